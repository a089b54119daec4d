"""`sagec fmt`: one canonical text for each program, with the same meaning and all comments."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagec import language
from sagec.diagnostics import Diagnostic
from sagec.language.text import TOKEN

ROOT = Path(__file__).parents[2]

UNTIDY = """

# head
model   tiny from "models/tiny";model b { layers 4 hidden 5 // c
  heads 3 // d

  // own
  ffn 4; vocab 5 } // after b
cluster a {   // why


  device g0 , g1 .. g4   // mid
      // own mid
     kind cpu


  // about link
  link g0 to g1 bandwidth 1GB/s
  // last
}
cluster empty { }
serve { // x
 replay "x" rate 2; request "a" tokens 5 // t
 } // end
// eof
"""

TIDY = """\
# head
model tiny from "models/tiny"
model b {
  layers 4
  hidden 5  // c
  heads 3  // d

  // own
  ffn 4
  vocab 5
}  // after b

cluster a {  // why
  device g0, g1..g4  // mid
      // own mid
      kind cpu

  // about link
  link g0 to g1 bandwidth 1GB/s
  // last
}

cluster empty {}

serve {  // x
  replay "x" rate 2
  request "a" tokens 5  // t
}  // end

// eof
"""


def words(text: str) -> list[str]:
    """What a text says: its tokens without space and `;`."""
    kinds = [(match.lastgroup, match[0]) for match in TOKEN.finditer(text)]
    return [
        word for kind, word in kinds if kind not in ("line", "space", "comment") and word != ";"
    ]


def comments(text: str) -> list[str]:
    return [m[0].rstrip() for m in TOKEN.finditer(text) if m.lastgroup == "comment"]


def test_a_program_prints_a_statement_a_line_and_keeps_its_comments() -> None:
    assert language.format(UNTIDY) == TIDY


def test_a_canonical_text_stays_as_it_is() -> None:
    assert language.format(TIDY) == TIDY


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.sage")), ids=lambda p: p.name)
def test_the_examples_are_canonical(path: Path) -> None:
    text = path.read_text("utf-8")
    assert language.format(text, str(path)) == text


def test_a_long_statement_is_broken_before_a_setting() -> None:
    request = 'request "a" ' + " ".join(f'stop "{"x" * 20}{i}"' for i in range(8)) + " tokens 5"
    lines = language.format(f"serve {{ {request} }}").split("\n")
    assert max(map(len, lines)) <= 100
    assert lines[2].startswith("      stop ")


def test_a_rule_is_broken_after_a_comma_and_before_a_word_that_joins() -> None:
    keys = ", ".join(f"prompt_tokens * {n}" for n in range(9))
    rules = f"order by {keys} reject when waited > 20s and priority > 1000000 and running > 7654321"
    lines = language.format(f"strategy s {{ {rules} }}").split("\n")
    assert max(map(len, lines)) <= 100
    assert lines[1].endswith(",") and lines[2].startswith("      prompt_tokens")


def test_units_signs_and_calls_are_written_in_one_way() -> None:
    text = "strategy s { order by - priority,blocks ( 5tokens )-3 blocks, -  2  ms - 1 % * 2s }"
    assert language.format(text).split("\n")[1] == (
        "  order by -priority, blocks(5 tokens) - 3 blocks, -2ms - 1% * 2s"
    )


def test_a_text_that_does_not_parse_is_not_printed() -> None:
    with pytest.raises(Diagnostic, match="unexpected"):
        language.format("modle x")


GAPS = st.sampled_from(
    [" ", "  ", "\n", "\n\n\n", "\t", " // note\n", "\n# alone\n", "\n\n// own\n\n"]
)
SEPARATORS = st.sampled_from(["", "; ", " ;\n"])
STATEMENTS = ("device", "link", "request", "instance", "cluster", "serve", "switch")


@st.composite
def spaced(draw: st.DrawFn, text: str) -> str:
    """`text` with other space and comments between its words, and some `;`."""
    parts = []
    for index, word in enumerate(words(text)):
        separator = draw(SEPARATORS) if index and word in STATEMENTS else ""
        parts += [separator, draw(GAPS), word]
    return "".join(parts) + draw(GAPS)


SAYING = """
model m { layers 4 hidden 256 heads 8 kv_heads 2 ffn 688 vocab 1024 }
cluster c {
  device g0, g1..g3 kind h100
  switch s
  link g0..g3 to s bandwidth 4GB/s latency 2us
  instance i tp 2 on g0, g1 engine sim kv_blocks 64
}
strategy s {
  order by (prompt_tokens - cached_tokens) * 2 desc, arrival
  admit while not kv_free < 5% and (running < 8 or tenant == "//")
  prefill on min(load), max(kv_free)
  preempt max priority, latest when kv_free < 2%
  chunk 16
}
strategy t from adaptive { dwell_ms 8s }
serve on c with s mode strict stop "//" {
  request "a # b" tokens 4 generate 3 stop "x" stop end-of-text arrives 10ms
  request "b" tokens 5 tenant "a  b"
}
"""


@settings(max_examples=120, deadline=None)
@given(spaced(SAYING))
def test_printing_changes_neither_meaning_nor_comments(text: str) -> None:
    printed = language.format(text)
    assert words(printed) == words(text)
    assert comments(printed) == comments(text)
    assert str(language.lower(language.parse(printed, "a"))) == str(
        language.lower(language.parse(SAYING, "a"))
    )


@settings(max_examples=120, deadline=None)
@given(spaced(SAYING))
def test_printing_twice_is_printing_once(text: str) -> None:
    printed = language.format(text)
    assert language.format(printed) == printed


@settings(max_examples=60, deadline=None)
@given(spaced(SAYING))
def test_lines_are_indented_by_their_block_and_end_without_space(text: str) -> None:
    depth = 0
    for line in language.format(text).split("\n"):
        assert line == line.rstrip()
        code = re.sub(r"\s*(//|#).*", "", re.sub(r'"[^"]*"', '""', line))
        depth -= code.startswith("}") or code.lstrip().startswith("}")
        if line:
            assert len(line) - len(line.lstrip(" ")) in (2 * depth, 2 * depth + 4)
        depth += code.endswith("{")
