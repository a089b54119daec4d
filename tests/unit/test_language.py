"""What .sage programs mean: the ops and requests that they lower to."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from xdsl.context import Context
from xdsl.dialects.builtin import Builtin, FileLineColLoc, ModuleOp
from xdsl.parser import Parser

from sagec import language
from sagec.dialects import cluster, pd
from sagec.dialects.cluster import Cluster
from sagec.dialects.pd import PD
from sagec.language import settings
from sagec.language.known import engines, strategies
from sagec.language.traces import read_trace
from sagec.runtime.kv.hashes import block_hashes
from sagec.runtime.request import Request

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples/models/tiny"
TRACES = ROOT.parent / "shared/traces"

SHAPE = "model m { layers 4 hidden 256 heads 8 kv_heads 2 ffn 688 vocab 1000 max_context 200000 }\n"
HERE = "cluster c {\n  device d\n  instance i on d engine sim kv_blocks 64\n}\n"


def lowered(source: str, name: str = "a.sage") -> ModuleOp:
    """The module of a source, verified."""
    module = language.lower(language.parse(source, name))
    module.verify()
    return module


def served(body: str, head: str = "") -> pd.RequestsOp:
    """The requests op of a program that serves `body` on the smallest cluster."""
    module = lowered(SHAPE + HERE + f"serve {head} {{ {body} }}\n")
    return next(op for op in module.walk() if isinstance(op, pd.RequestsOp))


def asked(body: str, head: str = "") -> list[Request]:
    return language.requests(
        language.parse(SHAPE + HERE + f"serve {head} {{ {body} }}\n", "a.sage")
    )


def ops(module: ModuleOp, kind: type) -> list:  # type: ignore[type-arg]
    return [op for op in module.walk() if isinstance(op, kind)]


# Clusters


def test_a_program_lowers_to_its_cluster_and_one_graph() -> None:
    module = lowered(SHAPE + HERE + 'serve mode strict chunk 64 horizon 8 { request "a" tokens 4 }')
    names = [op.name for op in module.ops]
    assert names == ["cluster.model", "cluster.device", "cluster.instance", "pd.graph"]
    graph = ops(module, pd.GraphOp)[0]
    assert [op.name for op in graph.body.block.ops] == [
        "pd.requests",
        "pd.prefill",
        "pd.decode",
        "pd.yield",
    ]
    assert (graph.symbol, graph.text("policy", ""), graph.text("mode", "")) == (
        "serve",
        "fifo",
        "strict",
    )
    assert graph.number("horizon") == 8
    assert ops(module, pd.PrefillOp)[0].chunk_tokens == 64


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.sage")), ids=lambda p: p.name)
def test_the_examples_lower_to_modules_that_parse_again(path: Path) -> None:
    pytest.importorskip("tokenizers")
    module = lowered(path.read_text("utf-8"), str(path))
    context = Context()
    for dialect in (Builtin, PD, Cluster):
        context.load_dialect(dialect)
    text = str(module)
    again = Parser(context, text).parse_module()
    again.verify()
    assert str(again) == text


def test_the_folder_of_a_model_counts_from_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    source = 'model tiny from "models/tiny"\n' + HERE + 'serve { request "a" tokens 4 }'
    model = ops(lowered(source, "examples/chat.sage"), cluster.ModelOp)[0]
    assert model.scalar("path") == "examples/models/tiny"


def test_a_checkpoint_gives_the_shape_and_a_block_overrides_it() -> None:
    config = json.loads((TINY / "config.json").read_text())
    source = f'model tiny from "{TINY}" {{ dtype f32 max_context 64 }}\n' + HERE
    model = ops(lowered(source), cluster.ModelOp)[0]
    assert model.scalar("layers") == config["num_hidden_layers"]
    assert model.scalar("kv_heads") == config["num_key_value_heads"]
    assert model.scalar("vocab") == config["vocab_size"]
    assert (model.scalar("dtype"), model.scalar("max_context")) == ("f32", 64)


def test_a_shape_fills_in_what_follows_from_it() -> None:
    model = ops(
        lowered("model m { layers 1 hidden 64 heads 4 ffn 8 vocab 9 tied yes }\n" + HERE),
        cluster.ModelOp,
    )[0]
    assert (model.scalar("kv_heads"), model.scalar("head_dim"), model.scalar("tied")) == (4, 16, 1)


def test_a_range_of_devices_is_one_device_and_others_like_it() -> None:
    source = SHAPE + "cluster c {\n devices g08..g10, x kind h100 memory 1GiB\n}\n"
    devices = ops(lowered(source), cluster.DeviceOp)
    assert [device.symbol for device in devices] == ["g08", "g09", "g10", "x"]
    assert devices[0].scalar("memory_bytes") == 2**30
    assert devices[0].scalar("flops_per_s") == 9.9e14
    assert [str(device.properties.get("like")) for device in devices[1:]] == ["@g08"] * 3


@pytest.mark.parametrize(
    ("written", "bytes_per_s"),
    [("450GB/s", 450e9), ("2GiB/s", 2.0 * 2**30), ("400Gbit/s", 50e9), ("1.5TB/s", 1.5e12)],
)
def test_a_bandwidth_becomes_bytes_per_second(written: str, bytes_per_s: float) -> None:
    body = f"device a, b\nlink a to b bandwidth {written} latency 1.5ms"
    link = ops(lowered(f"cluster c {{ {body} }}"), cluster.LinkOp)[0]
    assert link.scalar("bytes_per_s") == bytes_per_s
    assert link.scalar("latency_us") == 1500.0


def test_a_link_of_lists_joins_each_with_each() -> None:
    links = ops(lowered("cluster c { device a, b switch s, t link a, b to s, t }"), cluster.LinkOp)
    ends = [(str(link.source), str(link.target)) for link in links]
    assert ends == [("@a", "@s"), ("@a", "@t"), ("@b", "@s"), ("@b", "@t")]


def test_instances_share_their_devices_and_split_as_they_allow() -> None:
    body = "devices g0..g7 kind h100\ninstances p0, p1 on g0..g7 engine sim pp 2 kv_blocks 9"
    instances = ops(lowered(SHAPE + f"cluster c {{ {body} }}"), cluster.InstanceOp)
    assert [i.device_names for i in instances] == [
        ("g0", "g1", "g2", "g3"),
        ("g4", "g5", "g6", "g7"),
    ]
    assert [(i.scalar("tp"), i.scalar("pp"), i.role.data) for i in instances] == [
        (2, 2, "both")
    ] * 2


def test_settings_of_an_instance_reach_the_ir_under_its_names() -> None:
    said = "block 32 budget 99 max_batch 7 kv_dtype fp8 quantization awq max_partial_prefills 1"
    body = f'device d\ninstance i on d engine sim kv_blocks 9 {said} kv_layout "paged" dtype f32'
    op = ops(lowered(SHAPE + f"cluster c {{ {body} }}"), cluster.InstanceOp)[0]
    names = ("block_tokens", "max_step_tokens", "max_batch", "kv_dtype", "quantization")
    assert [op.scalar(name) for name in names] == [32, 99, 7, "fp8", "awq"]
    names = ("max_partial_prefills", "kv_layout", "dtype")
    assert [op.scalar(name) for name in names] == [1, "paged", "f32"]


@pytest.mark.parametrize(("said", "partial"), [("", 1), ("max_partial_prefills 0", 0)])
def test_what_an_engine_cannot_do_otherwise_need_not_be_said(said: str, partial: int) -> None:
    source = HERE.replace("engine sim", f"engine turbomind block 64 {said}")
    instance = ops(lowered(SHAPE + source), cluster.InstanceOp)[0]
    assert instance.scalar("max_partial_prefills") == partial


def test_the_kv_cache_may_be_said_as_a_size() -> None:
    block_bytes = 2 * 4 * 2 * 32 * 2 * 16  # K and V, layers, KV heads, head_dim, bf16, tokens
    body = "device d\ninstance i on d engine sim kv 1MiB"
    op = ops(lowered(SHAPE + f"cluster c {{ {body} }}"), cluster.InstanceOp)[0]
    assert op.scalar("kv_blocks") == 2**20 // block_bytes


def test_a_kv_cache_that_nobody_sizes_takes_what_memory_is_left_and_no_more_than_it_can_use() -> (
    None
):
    body = "device d memory 1GiB\ninstance i, j on d, e engine sim\ndevice e memory 1GiB"
    few = ops(lowered(SHAPE + f"cluster c {{ {body} }}"), cluster.InstanceOp)
    assert all(0 < int(op.scalar("kv_blocks")) * 16384 < 0.9 * 2**30 for op in few)
    body = "device d\ninstance i on d engine sim max_batch 2 block 16"
    most = ops(
        lowered(SHAPE.replace("200000", "160") + f"cluster c {{ {body} }}"), cluster.InstanceOp
    )
    assert most[0].scalar("kv_blocks") == 2 * 160 // 16


def test_of_several_clusters_the_one_served_on_is_lowered() -> None:
    other = HERE.replace("cluster c", "cluster b").replace("device d", "device d memory 8GiB")
    module = lowered(SHAPE + HERE + other + 'serve on b { request "a" tokens 4 }')
    assert [op.scalar("memory_bytes") for op in ops(module, cluster.DeviceOp)] == [8 * 2**30]


def test_every_op_knows_its_place_in_the_text() -> None:
    module = lowered(SHAPE + HERE + '\nserve { request "a" tokens 4 }', "dir/a.sage")
    places = []
    for op in module.walk():
        if op is not module:
            assert isinstance(op.location, FileLineColLoc)
            assert op.location.filename.data == "dir/a.sage"
            places.append((op.name, op.location.line.data, op.location.column.data))
    assert places[:3] == [
        ("cluster.model", 1, 1),
        ("cluster.device", 3, 3),
        ("cluster.instance", 4, 3),
    ]
    assert {place[1:] for place in places[3:]} == {(7, 1)}


def test_choices_are_those_of_the_dialects() -> None:
    assert settings.MODES == pd.MODES
    assert settings.ROLES == cluster.ROLES
    assert settings.DTYPES == cluster.DTYPES
    assert settings.KV_DTYPES == cluster.KV_DTYPES


def test_strategies_and_engines_are_found_by_their_files() -> None:
    assert "fifo" in strategies()
    assert {"torch", "turbomind", "vllm", "sim"} <= set(engines())


# Requests


def test_requests_are_one_op_with_a_column_for_each_field_that_is_said() -> None:
    op = served('request "a" tokens 4 generate 5 request "b" tokens 6 arrives 2ms tenant acme')
    assert op.names == ("a", "b")
    assert op.column("prompt").tolist() == [4, 6]
    assert op.column("generate").tolist() == [5, pd.UNBOUNDED]
    assert op.column("arrived").tolist() == [0, 2000]
    assert op.words("tenant") == ["", "acme"]
    assert set(op.properties) == {"ids", "prompt", "generate", "arrived", "tenant"}


def test_every_setting_of_a_request_reaches_the_ir() -> None:
    op = served(
        'request "a" tokens 4 generate 9 priority -2 ttft 1.5s tpot 20ms samples 3 chunk 2 '
        'session "s 1" adapter lora on i decode_on i model m'
    )
    numbers = {"priority": -2, "ttft": 1_500_000, "tpot": 20_000, "samples": 3, "chunk": 2}
    assert {name: op.column(name).tolist() for name in numbers} == {
        name: [value] for name, value in numbers.items()
    }
    words = {"session": "s 1", "adapter": "lora", "on": "i", "decode_on": "i", "model": "m"}
    assert {name: op.words(name) for name in words} == {n: [v] for n, v in words.items()}


def test_settings_of_serve_hold_for_requests_that_do_not_say_otherwise() -> None:
    first, second = asked(
        'request "a" tokens 4 request "b" tokens 4 generate 2 stop "z"',
        'generate 7 ttft 5ms temperature 0.5 seed 3 stop "x" stop "y"',
    )
    assert (first.max_output_tokens, second.max_output_tokens) == (7, 2)
    assert (first.stop_strings, second.stop_strings) == (("x", "y"), ("z",))
    assert first.ttft_us == 5000
    assert (first.sampling.temperature, first.sampling.seed) == (0.5, 3)


def test_requests_of_different_models_stay_in_one_wave() -> None:
    body = "device d instance i on d engine sim model m kv_blocks 8\n"
    body += "instance j on d engine sim model n kv_blocks 8"
    source = SHAPE + SHAPE.replace("model m", "model n") + f"cluster c {{ {body} }}\n"
    source += 'serve { request "a" tokens 4 model n request "b" tokens 4 model m }'
    op = ops(lowered(source), pd.RequestsOp)[0]
    assert op.words("model") == ["n", "m"]
    assert [r.model for r in language.requests(language.parse(source, "a"))] == ["n", "m"]


def test_a_text_is_counted_and_kept_and_given_as_the_models_tokens() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    text = 'Once upon a time,\n"she" said'
    source = f'model tiny from "{TINY}"\n' + HERE
    source += f'serve {{ request "a" prompt {json.dumps(text)} stop end-of-text }}'
    ids = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json")).encode(text).ids
    op = ops(lowered(source), pd.RequestsOp)[0]
    assert op.column("prompt").tolist() == [len(ids)]
    assert op.properties["text"].data == (text,)  # type: ignore[attr-defined]
    request = language.requests(language.parse(source, "a"))[0]
    assert request.prompt == tuple(ids)
    eos = json.loads((TINY / "config.json").read_text())["eos_token_id"]
    assert request.stop_tokens == (eos,)


def test_drawn_tokens_follow_from_the_id_alone() -> None:
    first, again, other = (
        asked('request "a" tokens 50')[0],
        asked('request "x" tokens 7 request "a" tokens 50')[1],
        asked('request "b" tokens 50')[0],
    )
    assert first.prompt == again.prompt != other.prompt
    assert len(first.prompt) == 50
    assert all(0 <= token < 1000 for token in first.prompt)


@pytest.mark.parametrize("block", [16, 48, 512, 600, 1024])
def test_hashes_of_counted_prompts_share_what_their_tokens_share(
    tmp_path: Path, block: int
) -> None:
    rows = [(1500, [1, 2, 3]), (1500, [1, 2, 4]), (2100, [1, 2, 3, 5, 6]), (1300, [1, 2, 3]),
            (1800, [1, 2]), (1800, [1, 2]), (300, [1]), (1700, [])]  # fmt: skip
    text = "".join(
        json.dumps({"timestamp": 0, "input_length": n, "output_length": 2, "hash_ids": ids}) + "\n"
        for n, ids in rows
    )
    (tmp_path / "t.jsonl").write_text(text, "utf-8")
    source = SHAPE + HERE.replace("kv_blocks 64", f"kv_blocks 640 block {block}")
    program = language.parse(source + 'serve { replay "t.jsonl" }\n', f"{tmp_path}/a.sage")
    counted = [one.block_hashes for one in language.requests(program, counted=True)]
    drawn = [block_hashes(one.prompt, block) for one in language.requests(program)]
    for ours, theirs in zip(counted, drawn, strict=True):
        assert len(ours) == len(theirs)
        shared = [len(set(ours) & set(other)) for other in counted]
        assert shared == [len(set(theirs) & set(other)) for other in drawn]


def test_several_samples_are_as_many_requests() -> None:
    requests = asked('request "a" tokens 4 samples 3 seed 5 temperature 1')
    assert [request.id for request in requests] == ["a#0", "a#1", "a#2"]
    assert [request.sampling.seed for request in requests] == [5, 6, 7]
    assert len({request.prompt for request in requests}) == 1


def test_a_program_that_serves_nothing_has_no_requests() -> None:
    assert language.requests(language.parse(SHAPE + HERE, "a.sage")) == []


def test_separators_and_line_ends_mean_nothing() -> None:
    one = 'request "a" tokens 4 generate 2 request "b" tokens 5'
    two = '; request\n"a" # id\ntokens // how long\n4\ngenerate 2;;\n\nrequest "b" tokens 5;'
    assert str(served(one)) == str(served(two))


def test_names_may_be_words_of_the_language() -> None:
    source = "model model { layers 1 hidden 8 heads 1 ffn 8 vocab 8 }\n"
    source += "cluster cluster { device device kind cpu switch link link device to link\n"
    source += "instance on on device role both engine sim model model kv_blocks 8 }\n"
    source += 'serve on cluster with fifo { request "request" tokens 4 model model on on }'
    module = lowered(source)
    assert ops(module, pd.RequestsOp)[0].words("on") == ["on"]


# Traces


def trace(tmp_path: Path, name: str, lines: list[str]) -> str:
    (tmp_path / name).write_text("\n".join(lines) + "\n")
    return str(tmp_path / name)


AZURE = [
    "TIMESTAMP,ContextTokens,GeneratedTokens",
    "2023-11-16 18:15:46.6805900,374,44",
    "2023-11-16 18:15:50.9951690,396,109",
    "2023-11-17 00:00:00.0000000,879,55",
]


def test_an_azure_trace_arrives_relative_to_its_first_request(tmp_path: Path) -> None:
    path = trace(tmp_path, "az.csv", AZURE)
    op = served(f'replay "{path}" rate 2 limit 2 clip 380 priority 3')
    assert op.names == ("az-0", "az-1")
    assert op.column("prompt").tolist() == [374, 380]
    assert op.column("generate").tolist() == [44, 109]
    assert op.column("arrived").tolist() == [0, round(4_314_579 / 2)]
    assert op.column("priority").tolist() == [3, 3]


def test_midnight_does_not_turn_a_trace_back(tmp_path: Path) -> None:
    path = trace(tmp_path, "az.csv", AZURE)
    arrivals = [row.arrival_us for row in read_trace(Path(path))]
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] == round((5 * 3600 + 44 * 60 + 13.31941) * 1e6)


def test_equal_blocks_of_a_mooncake_trace_are_equal_tokens(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 27, "input_length": 1030, "output_length": 6, "hash_ids": [1, 2, 3]},
        {"timestamp": 30, "input_length": 1000, "output_length": 4, "hash_ids": [1, 9]},
    ]
    path = trace(tmp_path, "moon.jsonl", [json.dumps(row) for row in rows])
    first, second = asked(f'replay "{path}"')
    assert (len(first.prompt), len(second.prompt)) == (1030, 1000)
    assert first.prompt[:512] == second.prompt[:512]
    assert first.prompt[512:1000] != second.prompt[512:1000]
    assert (first.arrival_us, second.arrival_us) == (0, 3000)
    assert (first.max_output_tokens, second.max_output_tokens) == (6, 4)


@pytest.mark.parametrize(
    ("name", "rows"),
    [("azure/AzureLLMInferenceTrace_conv.csv", 19366), ("mooncake/synthetic_trace.jsonl", 3993)],
)
def test_a_public_trace_is_read_whole(name: str, rows: int) -> None:
    if not (TRACES / name).exists():
        pytest.skip(f"{TRACES / name} is not there")
    recorded = read_trace(TRACES / name)
    assert len(recorded) == rows
    assert all(row.prompt_tokens > 0 and row.output_tokens > 0 for row in recorded)
    assert np.all(np.diff([row.arrival_us for row in recorded]) >= 0)


# Cost


def test_ten_thousand_requests_are_one_wide_op() -> None:
    body = "\n".join(
        f'request "r{i}" tokens {i % 50 + 1} generate 8 arrives {i}ms' for i in range(10_000)
    )
    op = served(body)
    assert len(op.names) == 10_000
    assert op.column("arrived")[-1] == 9_999_000


def test_importing_the_language_loads_neither_lark_nor_xdsl() -> None:
    code = "import sys, sagec.language as l; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not re.findall(r"\b(?:lark|xdsl|torch|tokenizers)\b", done.stdout)
