"""Whatever the text: a module that verifies, or a Diagnostic. Never anything else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sagec import language
from sagec.diagnostics import Diagnostic
from sagec.language.text import TOKEN

ROOT = Path(__file__).parents[2]

WHOLE = """\
# every statement and setting that there is
model small { layers 4 hidden 256 heads 8 kv_heads 2 head_dim 32 ffn 688 vocab 1024 dtype f16
  max_context 4096 experts 8 experts_per_token 2 tied yes }
model other from "examples/models/tiny" { dtype f32 }
cluster laptop {
  device cpu kind cpu memory 16GiB flops 1e12 bandwidth 20GB/s; devices g0..g3, h kind h200
  switches s0, s1
  link g0..g3 to s0 bandwidth 450GB/s latency 2us
  link s0 to s1 bandwidth 400Gbit/s latency 1.5us // between
  instance p0 role prefill on g0, g1 engine sim model small tp 2 pp 1 kv_blocks 512 block 16
      budget 512 max_batch 64 kv_dtype fp8 kv_layout "paged" max_partial_prefills 1
  instances d0, d1 role decode on g2..g3 engine torch model small kv 2GiB quantization awq
  instance both role both on cpu engine torch model other dtype f32 draft_layers 1 draft_tokens 2
      pool "shared" switch_time 800ms
}
strategy short {
  order by prompt_tokens - cached_tokens, -waited desc; admit while kv_free > 5% and running < 8
  reject when slack < 0ms or tenant == "x" prefill on min(load), max(blocks(64 tokens) / kv_blocks)
  decode on max (kv_free); preempt max priority, latest when not (kv_free >= 2%) mode hybrid
  chunk 16 horizon 4
}
strategy calm from slo-aware { margin 20% reject yes patience_us 3s chooser weighted }
strategy placed { place by least-load }
serve on laptop with short mode time-share chunk 64 horizon 8 ttft 200ms {
  request "a" tokens 12 generate 4 model small temperature 0.5 top_k 4 top_p 0.9 seed 3 stop "x"
    stop end-of-text arrives 10ms priority -1 ttft 2s tpot 50ms tenant acme session "s" adapter "l"
    samples 2 chunk 8 on p0 decode_on d1
  request "b" prompt "Once \\"upon\\" a \\u0074ime\\n" model other
  replay "trace.csv" rate 2.5 limit 3 clip 100 model small
}
"""
SMALL = "cluster c { device d; instance i on d engine echo kv 1GiB } model m { layers 1 hidden 8\n"
SMALL += 'heads 2 ffn 8 vocab 8 } serve { request "a" tokens 3 generate 2; request "b" tokens 1 }'
SPLICES = (
    "{",
    "}",
    '"',
    ";",
    "..",
    ",",
    "//",
    "#",
    "\n",
    "\x00",
    "é",
    "\\",
    "-",
    "9" * 30,
    "1e999",
)
SPLICES += (
    "request",
    "serve",
    "on",
    "model",
    "0",
    "strategy x { }",
    "\u2028",
    "\ud800",
    "10ms",
    "4.5",
)


def outcome(text: str, name: str = "fuzz.sage") -> str:
    """What becomes of a text; raises what neither parse, lower nor requests may raise."""
    try:
        program = language.parse(text, name)
        module = language.lower(program)
        language.requests(program)
    except Diagnostic as error:
        assert_readable(error)
        return "diagnostic"
    module.verify()
    assert str(module)
    return "module"


def assert_readable(error: Diagnostic) -> None:
    """Every error has a place, says something, and its caret stands inside what it shows."""
    for one in (error, *error.others):
        assert re.match(r"[^\n]+: error: \S", one.line()), one.line()
        assert "\n" not in one.line()
        head, *rest = str(one).split("\n")[:3]
        assert head.startswith(f"{one.source}:{one.line_number}:{one.column}: error: ")
        assert len(rest) == 2 and rest[1].lstrip(" ").startswith("|")


@st.composite
def mutated(draw: st.DrawFn, text: str) -> str:
    """`text` with a few cuts, copies, swaps and foreign pieces."""
    tokens = [match[0] for match in TOKEN.finditer(text)]
    for _ in range(draw(st.integers(1, 4))):
        index = draw(st.integers(0, len(tokens) - 1))
        match draw(st.integers(0, 4)):
            case 0:
                tokens[index] = ""
            case 1:
                tokens[index] = draw(st.sampled_from(tokens))
            case 2:
                tokens.insert(index, draw(st.sampled_from(SPLICES)))
            case 3:
                word = tokens[index]
                cut = draw(st.integers(0, len(word)))
                tokens[index] = word[:cut] + draw(st.sampled_from(SPLICES)) + word[cut + 1 :]
            case _:
                del tokens[index : draw(st.integers(index + 1, len(tokens)))]
                tokens.append(draw(st.sampled_from(SPLICES)))
    return "".join(tokens) or " "


QUICK = settings(
    max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)


def test_the_texts_to_mutate_are_right_themselves() -> None:
    assert outcome(SMALL) == "module"
    assert (
        outcome(re.sub(r'  (replay|request "b").*\n', "", WHOLE), str(ROOT / "x.sage")) == "module"
    )


@QUICK
@given(mutated(SMALL))
def test_a_mutated_small_file_gives_a_module_or_a_diagnostic(text: str) -> None:
    assert outcome(text) in ("module", "diagnostic")


@QUICK
@given(mutated(WHOLE))
def test_a_mutated_file_of_everything_gives_a_module_or_a_diagnostic(text: str) -> None:
    assert outcome(text) in ("module", "diagnostic")


@QUICK
@given(st.text(max_size=60))
def test_any_text_at_all_gives_a_module_or_a_diagnostic(text: str) -> None:
    assert outcome(text) in ("module", "diagnostic")


@settings(QUICK, max_examples=500)
@given(mutated((ROOT / "examples/hybrid.sage").read_text("utf-8")))
def test_a_mutated_example_gives_a_module_or_a_diagnostic(text: str) -> None:
    if not (ROOT / "examples/models/tiny/config.json").exists():
        pytest.skip("the small model is not there")
    pytest.importorskip("tokenizers")
    assert outcome(text, str(ROOT / "examples/hybrid.sage")) in ("module", "diagnostic")


@QUICK
@given(
    st.lists(st.sampled_from(["a,b", "{", "2023-11-16 18:15:46.68,3,4", "\x00", "-1"]) | st.text())
)
def test_any_trace_gives_requests_or_a_diagnostic(tmp_path_factory, lines) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path_factory.mktemp("trace") / "trace.csv"
    head = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    path.write_bytes((head + "\n".join(lines)).encode("utf-8", "surrogatepass"))
    source = SMALL.replace('request "b" tokens 1', f'replay "{path}"')
    assert outcome(source) in ("module", "diagnostic")
