"""What holds for every engine: the same file gives the same tokens, however it is served."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from sagec.cli import main
from sagec.compiler import Compiler
from sagec.runtime.engines import (
    Cancelled,
    Engine,
    Event,
    InstanceSpec,
    PlanDone,
    Preempted,
    create,
    known,
)
from sagec.runtime.plan import RECOMPUTE, SWAP
from sagec.runtime.request import Request
from tests.torch_engines import plan

MODEL = """\
cluster.model @m {{layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 112,
                  vocab = 97, dtype = "f32", max_context = 256, path = "{path}"}}
cluster.device @c0 {{kind = "cpu"}}
cluster.device @c1 {{kind = "cpu"}}
cluster.link @c0 to @c1
"""

ONE = 'cluster.instance @i0 on [@c0] engine "{engine}" role both model @m {{{room}}}\n'
PAIR = (
    'cluster.instance @p0 on [@c0] engine "{engine}" role prefill model @m {{{room}}}\n'
    'cluster.instance @d0 on [@c1] engine "{engine}" role decode model @m {{{room}}}\n'
)
MIXED = (
    'cluster.instance @i0 on [@c0] engine "{engine}" role both model @m {{{room}}}\n'
    'cluster.instance @d0 on [@c1] engine "{engine}" role decode model @m {{{room}}}\n'
)

GRAPH = """\
pd.graph @serve {{policy = "fifo", mode = "{mode}", horizon = {horizon}}} {{
  %new = pd.requests [
    "a": prompt 33 generate 9,
    "b": prompt 5 generate 14,
    "c": prompt 61 generate 1,
    "d": prompt 17 generate 12 priority 1,
    "e": prompt 48 generate 7,
    "f": prompt 2 generate 20
  ]
  %kv = pd.prefill %new {chunk} : !pd.kv<6>
  %end = pd.decode %kv : !pd.kv<6>
  pd.yield %end : !pd.kv<6>
}}
"""

WIDE = "kv_blocks = 64, block_tokens = 16, max_step_tokens = 64"
NARROW = "kv_blocks = 7, block_tokens = 16, max_step_tokens = 24, max_batch = 3"

LIMITS = {"turbomind": ", max_partial_prefills = 1"}
"""What instances of an engine must say, for it takes no more."""

ALONE = ["--one-process"]

SERVINGS = {
    "hybrid": (ONE, WIDE, "hybrid", "", []),
    "hybrid in small chunks": (ONE, WIDE, "hybrid", "chunk 7", ALONE),
    "time-share": (ONE, WIDE, "time-share", "chunk 16", ALONE),
    "hybrid with little KV": (ONE, NARROW, "hybrid", "chunk 9", ALONE),
    "a pair": (PAIR, WIDE, "strict", "", []),
    "a pair in one process": (PAIR, WIDE, "strict", "chunk 11", ALONE),
    "a pair with little KV": (PAIR, NARROW, "strict", "chunk 5", ALONE),
    "both and decode": (MIXED, WIDE, "hybrid", "chunk 20", ALONE),
    "hybrid over short horizons": (ONE, WIDE, "hybrid", "chunk 13", [*ALONE, "--horizon", "2"]),
}


def module_of(engine: str, path: str, serving: str) -> tuple[str, list[str]]:
    cluster, room, mode, chunk, flags = SERVINGS[serving]
    room += LIMITS.get(engine, "")
    text = MODEL.format(path=path) + cluster.format(engine=engine, room=room)
    return text + GRAPH.format(mode=mode, chunk=chunk, horizon=8), flags


def path_of(engine: str) -> str:
    """A checkpoint for the engines that load one."""
    if engine != "torch":
        return ""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.checkpoints import checkpoint

    return str(checkpoint("llama"))


def served(
    engine: str, serving: str, tmp_path: Path, captured: pytest.CaptureFixture[str], *more: str
) -> dict[str, list[int]]:
    """The tokens of each request; as many zeros of an engine that only counts them."""
    text, flags = module_of(engine, path_of(engine), serving)
    file = tmp_path / "serve.mlir"
    file.write_text(text, encoding="utf-8")
    captured.readouterr()
    code = main(["run", str(file), "--json", *flags, *more])
    out, err = captured.readouterr()
    assert (code, err) == (0, ""), out
    result: dict[str, Any] = json.loads(out)
    told = dict(result["total"]["conformance"])
    assert told.pop("obeyed") >= result["total"]["steps"]
    assert set(told.values()) == {0}, told
    counted = {row["request"]: [0] * row["output_tokens"] for row in result["requests"]}
    return counted | {row["request"]: row["tokens"] for row in result["requests"] if row["tokens"]}


@pytest.mark.parametrize("serving", SERVINGS)
@pytest.mark.parametrize("engine", [name for name in known() if name != "torch"])
def test_how_requests_are_served_changes_no_token(
    engine: str, serving: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = served(engine, "hybrid", tmp_path, capsys, *ALONE)
    assert {name: len(tokens) for name, tokens in alone.items()} == {
        "a": 9, "b": 14, "c": 1, "d": 12, "e": 7, "f": 20
    }  # fmt: skip
    assert served(engine, serving, tmp_path, capsys) == alone


@pytest.mark.parametrize("engine", known())
def test_a_prompt_that_fills_its_prefill_instance_is_answered_in_full_elsewhere(
    engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = LIMITS.get(engine, "")
    small, wide = f"kv_blocks = 3, block_tokens = 16{limits}", WIDE + limits
    prefill, decode = PAIR.splitlines(keepends=True)
    cluster = prefill.format(engine=engine, room=small) + decode.format(engine=engine, room=wide)
    file = tmp_path / "serve.mlir"
    file.write_text(
        MODEL.format(path=path_of(engine))
        + cluster
        + """pd.graph @serve {mode = "strict"} {
          %new = pd.requests ["a": prompt 47 generate 9]
          %kv = pd.prefill %new
          %end = pd.decode %kv
        }""",
        encoding="utf-8",
    )
    capsys.readouterr()
    assert main(["run", str(file), "--json", "--one-process"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["requests"]
    assert (row["output_tokens"], row["end"]) == (9, "length")


@pytest.mark.parametrize("mode", ["hybrid", "time-share"])
@pytest.mark.parametrize("engine", known())
def test_a_step_does_both_phases_in_hybrid_mode_alone(
    engine: str, mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.json"
    served(engine, mode, tmp_path, capsys, "--one-process", "--trace", str(trace))
    events = json.loads(trace.read_text("utf-8"))["traceEvents"]
    kinds = {event["cat"] for event in events if event.get("ph") == "X"}
    assert kinds >= {"prefill", "decode"}
    assert ("mixed" in kinds) == (mode == "hybrid")


@pytest.mark.parametrize("serving", SERVINGS)
def test_the_torch_engine_gives_the_tokens_of_transformers(
    serving: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = served("torch", serving, tmp_path, capsys)
    text, _ = module_of("torch", path_of("torch"), serving)
    for request in Compiler().parse(text, "serve.mlir").requests():
        limit = request.max_output_tokens
        assert tokens[request.id] == generated(request.prompt, limit), request.id


def generated(prompt: tuple[int, ...], limit: int | None) -> list[int]:
    """What transformers generates greedily."""
    import torch

    from tests.checkpoints import reference

    ids = torch.tensor([prompt])
    output = reference("llama").generate(
        ids, max_new_tokens=limit, do_sample=False, attention_mask=torch.ones_like(ids)
    )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


@pytest.mark.parametrize("how", [RECOMPUTE, SWAP], ids=["recompute", "swap"])
@pytest.mark.parametrize("engine", known())
def test_who_was_here_before_does_not_go_on_while_its_kv_is_awaited(engine: str, how: int) -> None:
    """A request loses its place and is placed elsewhere; its old self must not take the room."""
    options = {"maths": "toy"} if engine == "turbomind" else {}
    spec = InstanceSpec(
        id="d0",
        engine=engine,
        model=path_of(engine),
        kv_blocks=16,
        block_tokens=16,
        options=options,
    )
    one = create(spec)
    try:
        given = {"chunks": [(0, "a", 0, 20)], "decodes": {"a": 24}, "kv_blocks": {"a": 3}}
        here = plan("d0", {"a": 20}, plan_id="here", **given)
        one.submit(here, [Request(id="a", prompt=tuple(range(20)), max_output_tokens=30)])
        events = polled(one, "here")
        one.submit(plan("d0", {"a": 25}, preemptions={"a": how}, plan_id="out"))
        events += polled(one, "out")
        assert [event.request_id for event in events if isinstance(event, Preempted)] == ["a"]
        coming = {"imports": {"a": "p0"}, "decodes": {"a": 99}, "kv_blocks": {"a": 7}}
        one.submit(plan("d0", {"a": 25}, plan_id="awaits", **coming))
        assert [event for _ in range(20) for event in one.poll(0.005)] == []
        one.cancel("a")
        assert {type(event) for event in polled(one, "awaits")} == {Cancelled, PlanDone}
    finally:
        one.close()


def polled(one: Engine, plan_id: str) -> list[Event]:
    """What an engine tells until a plan is done."""
    events: list[Event] = []
    until_s = time.monotonic() + 60
    while not any(isinstance(event, PlanDone) and event.plan_id == plan_id for event in events):
        assert time.monotonic() < until_s, f"{plan_id} is not done after {events[-3:]}"
        events += one.poll(0.01)
    return events
