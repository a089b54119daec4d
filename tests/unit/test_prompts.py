"""Requests of a graph that was written as MLIR."""

from __future__ import annotations

from pathlib import Path

import pytest

from sagec.compiler import Compiler
from sagec.diagnostics import Diagnostic
from sagec.runtime.request import Request

TINY = Path(__file__).parents[2] / "examples/models/tiny"
MODEL = """cluster.model @{name} {{layers = 3, hidden = 256, heads = 4, kv_heads = 2, head_dim = 64,
  ffn = 384, vocab = 1024, path = "{path}"}}
"""


def asked(rows: str, path: str = str(TINY), models: str = "m") -> list[Request]:
    text = "".join(MODEL.format(name=name, path=path) for name in models)
    text += f"pd.graph @g {{ %new = pd.requests [{rows}] }}"
    return Compiler().parse(text, "g.mlir").requests()


def test_a_row_becomes_a_request_with_all_it_says() -> None:
    (one,) = asked('"a": prompt 5 generate 7 arrived 9 priority 2 ttft 10 tpot 3 tenant "blue"')
    assert (one.id, len(one.prompt), one.max_output_tokens) == ("a", 5, 7)
    assert (one.arrival_us, one.priority, one.ttft_us, one.tpot_us) == (9, 2, 10, 3)
    assert (one.tenant, one.model) == ("blue", "")
    assert all(0 <= token < 1024 for token in one.prompt)


def test_drawn_tokens_follow_from_the_id() -> None:
    rows = '"a": prompt 9, "b": prompt 9'
    (a, b), (again, _) = asked(rows), asked(rows)
    assert a.prompt == again.prompt != b.prompt
    assert a.max_output_tokens is None


def test_several_outputs_of_a_prompt_are_as_many_requests() -> None:
    several = asked('"a": prompt 5 samples 3')
    assert [one.id for one in several] == ["a#0", "a#1", "a#2"]
    assert len({one.prompt for one in several}) == 1


def test_a_text_gives_the_tokens_of_the_models_tokenizer() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    text = "Once upon a time"
    ids = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json")).encode(text).ids
    (one,) = asked(f'"a": prompt {len(ids)} text "{text}"')
    assert list(one.prompt) == ids


@pytest.mark.parametrize(
    ("rows", "path", "models", "says"),
    [
        ('"a": prompt 2 text "Once upon a time"', str(TINY), "m", "say prompt "),
        ('"a": prompt 2 text "Once"', "nowhere", "m", "say the model's path"),
        ('"a": prompt 2 model @z', str(TINY), "m", "there are: @m"),
        ('"a": prompt 2', str(TINY), "mn", "there are: @m, @n"),
    ],
)
def test_what_cannot_be_asked_is_said(rows: str, path: str, models: str, says: str) -> None:
    pytest.importorskip("tokenizers")
    with pytest.raises(Diagnostic) as error:
        asked(rows, path, models)
    assert says in str(error.value)
