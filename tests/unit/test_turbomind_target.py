"""What may be asked of TurboMind: said before anything runs, also of sampling and of hand-overs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from msgspec.structs import replace

from sagec.cli import main
from sagec.compiler import Compiler
from sagec.lowering import targets
from sagec.passes.errors import PassError
from sagec.planner import CompilingPlanner
from sagec.runtime.plan import SWAP
from sagec.runtime.state import Decision, Instances, Running, State, Waiting
from tests.echo_cluster import ONE, serve
from tests.turbomind_plans import VOCAB, Asked, Serving, faults, on_echo, servings, wrong

COMPILER = Compiler()

CLUSTER = """\
cluster.model @m {layers = 2, hidden = 512, heads = 8, kv_heads = 4, head_dim = 64, ffn = 1024,
  vocab = 256}
cluster.device @g0 {kind = "h200"}
cluster.device @g1 {kind = "h200"}
cluster.device @g2 {kind = "h200"}
cluster.link @g0 to @g1
cluster.link @g0 to @g2
"""
EACH = "kv_blocks = 40, block_tokens = 64, max_partial_prefills = 1"


def instance(name: str, on: str, role: str, more: str = "") -> str:
    scalars = EACH + (f", {more}" if more else "")
    engine = f'engine "turbomind" role {role}'
    return f"cluster.instance @{name} on [{on}] {engine} model @m {{{scalars}}}\n"


@pytest.mark.parametrize(
    ("decode", "fault"),
    [
        (("@g1, @g2", "tp = 2"), "tp 1 and 2 differ, and turbomind does not re-shard KV"),
        (("@g1", 'kv_dtype = "int8"'), "kv_dtype bf16 and int8 differ; make them the same"),
        (("@g1", 'kv_layout = "other"'), "kv_layout default and other differ; make them the same"),
    ],
)
def test_kv_goes_only_where_it_fits(decode: tuple[str, str], fault: str) -> None:
    on, more = decode
    text = CLUSTER + instance("p0", "@g0", "prefill") + instance("d0", on, "decode", more)
    text += """pd.graph @serve {mode = "strict"} {
      %new = pd.requests ["a": prompt 100 generate 9]
      %kv = pd.prefill %new
      %end = pd.decode %kv
      pd.yield %end
    }"""
    module = COMPILER.parse(text, "pair.mlir").module
    with pytest.raises(PassError, match=f"hand-over @p0 to @d0: {fault}"):
        COMPILER.optimize(module)


def state(**rows: object) -> State:
    instances = Instances.of(
        ["i0"],
        role=["both"],
        model=["m"],
        engine=["turbomind"],
        kv_blocks=[40],
        block_tokens=[64],
        max_context_tokens=[2560],
    )
    nobody = {"waiting": Waiting.of([]), "running": Running.of([])}
    return State(now_us=0, round=0, instances=instances, **{**nobody, **rows})


@pytest.fixture
def planner() -> CompilingPlanner:
    text = CLUSTER + instance("i0", "@g0", "both")
    return CompilingPlanner(COMPILER.parse(text, "one.mlir").module)


def test_who_is_preempted_may_keep_its_kv_in_host_memory_and_go_on_with_it(
    planner: CompilingPlanner,
) -> None:
    running = Running.of(
        ["a", "b"], model=["m", "m"], prompt_tokens=[100, 100], computed_tokens=[120, 110],
        remaining_tokens=[9, 9],
    )  # fmt: skip
    leaves = state(running=running)
    decision = Decision.defer(leaves.waiting).preempt(np.array([1]), "it gives way", SWAP)
    (plan,) = planner.plan(leaves, decision)
    ((row, how),) = zip(plan.preemptions.row.tolist(), plan.preemptions.how.tolist(), strict=True)
    assert (plan.request_ids[row], how) == ("b", SWAP)
    waiting = Waiting.of(["b"], model=["m"], prompt_tokens=[111], generate_tokens=[8])
    returns = state(waiting=waiting, cached_tokens=np.array([[110]]))
    (plan,) = planner.plan(returns, Decision.admit(np.array([0]), waiting))
    assert plan.reuses.tokens.tolist() == [110]
    assert plan.chunks.begin.tolist() == [110]


def test_a_step_whose_rows_decode_later_is_not_empty(planner: CompilingPlanner) -> None:
    """In time-share mode a resident decodes in the steps that have no chunks."""
    running = Running.of(
        ["a"], model=["m"], prompt_tokens=[100], computed_tokens=[120], remaining_tokens=[1]
    )
    waiting = Waiting.of(["b"], model=["m"], prompt_tokens=[64], generate_tokens=[1])
    seen = state(running=running, waiting=waiting)
    decision = Decision.admit(np.array([0]), waiting)
    (plan,) = planner.plan(seen, dataclasses.replace(decision, mode="time-share"))
    assert plan.num_steps == 2
    assert plan.chunks.step.tolist() == [0]


SAGE = """\
model m {{ layers 2 hidden 512 heads 8 kv_heads 4 head_dim 64 ffn 1024 vocab 256 }}
cluster c {{
  device g kind h200
  instance i0 on g engine turbomind kv_blocks 40 block 64
}}
serve on c {{
  request "hello" tokens 100 generate 8 temperature 0.7 top_k {top_k}
}}
"""


def test_a_program_that_samples_among_too_many_is_refused_where_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "serve.sage"
    file.write_text(SAGE.format(top_k=2000), encoding="utf-8")
    assert main(["compile", str(file)]) == 1
    said = capsys.readouterr().err
    assert '"hello" is sampled among its 2000 likeliest tokens' in said
    assert "turbomind takes top_k 1024 at most, or 0: all of them" in said
    file.write_text(SAGE.format(top_k=1024), encoding="utf-8")
    assert main(["compile", str(file)]) == 0


def test_the_target_says_what_the_patches_can_do() -> None:
    ability = targets.ability_of("turbomind")
    assert ability is not None
    assert ability.hands_over and ability.swaps and ability.caches_prefixes
    assert not (ability.reshards or ability.drafts or ability.adapters)
    assert (ability.partial_prefills, ability.samples, ability.max_pp) == (1, 1, 1)


# Plans that loop, compiler and target make of drawn decisions, on engines that check them.


@settings(max_examples=12, suppress_health_check=list(HealthCheck))
@given(serving=servings())
def test_plans_of_drawn_decisions_keep_the_rules_and_give_the_tokens_of_each_request_alone(
    serving: Serving,
) -> None:
    alone = serve(ONE, serving.requests(), kv_blocks=4000, vocab=str(VOCAB)).tokens
    right = {request.id: alone.get(request.id, []) for request in serving.requests()}
    outcome = on_echo(serving)
    assert wrong(serving, outcome, right) == []
    assert outcome.conformance["obeyed"] == outcome.steps


def test_faults_of_a_plan_are_found_without_the_compiler(planner: CompilingPlanner) -> None:
    """The check that the random plans are held against is no empty one."""
    serving = Serving(
        seed=0, cluster="one", kv_blocks=40, block_tokens=64, max_step_tokens=512, max_batch=4,
        mode="hybrid", tp=1, prefix_cache=False, asked=(Asked(100, 9),),
    )  # fmt: skip
    waiting = Waiting.of(
        ["a", "b"], model=["m"] * 2, prompt_tokens=[300, 300], generate_tokens=[4, 4]
    )
    (plan,) = planner.plan(state(waiting=waiting), Decision.admit(np.array([0, 1]), waiting))
    assert list(faults(serving, plan)) == []
    swapped = replace(plan, chunks=_reversed(plan.chunks))
    assert "step 0 goes on after an unfinished prompt" in " ".join(faults(serving, swapped))
    longer = replace(plan, num_steps=plan.num_steps + 1)
    assert f"step {plan.num_steps} computes nothing" in " ".join(faults(serving, longer))
    smaller = replace(serving, max_step_tokens=100)
    assert "a step computes 512" in " ".join(faults(smaller, plan))
    assert f"{plan.estimates.kv_blocks.max()} blocks of 3" in " ".join(
        faults(replace(serving, kv_blocks=3), plan)
    )


def _reversed(chunks):
    """The first step's chunks the other way round."""
    order = np.argsort(chunks.step * 1000 - np.arange(len(chunks)), kind="stable")
    return type(chunks)(**{name: getattr(chunks, name)[order] for name in chunks.__struct_fields__})
