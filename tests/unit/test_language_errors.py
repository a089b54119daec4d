"""What a person reads when a .sage file is wrong: each message with its place, caret and hint.

The cases and their texts lie in language_errors.txt: `=== name`, the source, `--- says`, the text.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from sagec import language
from sagec.diagnostics import Diagnostic
from sagec.language.known import engines, strategies

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples/models/tiny"

HERE = "cluster c {\n  device d\n  instance i on d engine sim kv_blocks 64\n}\n"
SHAPE = "model m { layers 1 hidden 8 heads 2 ffn 8 vocab 8 }\n"


def cases() -> list[tuple[str, str, str]]:
    """Name, source and rendered error of each case."""
    text = Path(__file__).with_name("language_errors.txt").read_text("utf-8")
    found = []
    for block in re.split(r"^=== ", text, flags=re.MULTILINE)[1:]:
        name, _, rest = block.partition("\n")
        source, _, says = rest.partition("\n--- says\n")
        found.append((name, source + "\n", says.rstrip("\n")))
    return found


def said(source: str, name: str = "serve.sage") -> str:
    """The errors of a source, as a person sees them."""
    with pytest.raises(Diagnostic) as caught:
        program = language.parse(source, name)
        language.lower(program)
    return "\n".join(line.rstrip() for line in str(caught.value).split("\n"))


@pytest.mark.parametrize(("source", "says"), [pytest.param(s, t, id=n) for n, s, t in cases()])
def test_an_error_says_where_what_and_what_would_be_right(source: str, says: str) -> None:
    known = {"{strategies}": ", ".join(strategies()), "{engines}": ", ".join(engines())}
    for key, names in known.items():
        says = says.replace(key, names)
    assert said(source) == says


def test_a_control_character_is_named_by_its_code() -> None:
    assert "unexpected 'U+0007'" in said("model \x07")


def test_half_a_surrogate_pair_is_no_character() -> None:
    assert said("model \ud800").startswith("serve.sage:1:7: error: U+D800 is no character\n")


@pytest.mark.parametrize("source", ['model m from "\\q"', 'cluster c {} serve tenant "\\q" {}'])
def test_an_unknown_escape_is_pointed_at_in_every_text(source: str) -> None:
    at = source.index("\\q") + 1
    assert f"serve.sage:1:{at}: error: \\q is no character" in said(source)


def test_requests_that_name_no_model_are_not_all_listed() -> None:
    models = SHAPE + SHAPE.replace("model m", "model n")
    cluster = "cluster c { device d instance i on d engine sim model m kv_blocks 8\n"
    cluster += "instance j on d engine sim model n kv_blocks 8 }\n"
    requests = "".join(f'request "{index}" tokens 4\n' for index in range(50))
    assert said(models + cluster + f"serve {{ {requests} }}").count("error:") == 20


def test_a_prompt_without_a_token_is_refused(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_bytes((TINY / "config.json").read_bytes())
    source = f'model m from "{tmp_path}"\n' + HERE + 'serve { request "a" prompt "" }\n'
    assert "6:28: error: the prompt has no token" in said(source)


def test_a_sample_may_not_be_called_as_another_request() -> None:
    requests = 'request "a" tokens 4 samples 2 request "a#1" tokens 4'
    assert "error: a second request 'a#1'" in said(SHAPE + HERE + f"serve {{ {requests} }}")


def test_at_most_twenty_errors_are_said_at_once() -> None:
    source = SHAPE + HERE + "serve {\n" + 'request "a" tokens 0\n' * 50 + "}\n"
    assert said(source).count("error:") == 20


def test_a_checkpoint_of_a_model_that_nobody_runs_is_named(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text('{"model_type": "mamba"}')
    text = said('model m from "m"\n' + HERE, str(tmp_path / "a.sage"))
    assert f"{tmp_path}/a.sage:1:14: error: {tmp_path}/m/config.json: model_type is 'mamba'" in text
    assert "^~~ this engine runs llama, qwen2, qwen3" in text


def test_a_checkpoint_without_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    text = said('model m from "m"\n' + HERE, str(tmp_path / "a.sage"))
    assert f"error: {tmp_path}/m/config.json: No such file or directory" in text


def test_a_prompt_longer_than_the_context_is_counted_in_tokens() -> None:
    pytest.importorskip("tokenizers")
    model = f'model m from "{TINY}" {{ max_context 16 }}\n'
    text = said(model + HERE + 'serve { request "a" prompt "Once upon a time" generate 12 }\n')
    message = (
        "request 'a': a prompt of 5 tokens and 12 to generate are more than the 16 of model 'm'"
    )
    assert message in text


def test_a_prompt_needs_the_tokenizers_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    text = said(f'model m from "{TINY}"\n' + HERE + 'serve { request "a" prompt "Once" }\n')
    assert "6:28: error: a prompt as text needs the package 'tokenizers'" in text
    assert "pip install 'sagec[torch]', or give the length instead, as in: tokens 128" in text


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "error: no tokenizer "), ("{}", "tokenizer.json is no tokenizer: ")],
    ids=["missing", "malformed"],
)
def test_a_checkpoint_needs_its_tokenizer(tmp_path: Path, content: str | None, says: str) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "config.json").write_bytes((TINY / "config.json").read_bytes())
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    source = f'model m from "{tmp_path}"\n' + HERE + 'serve { request "a" prompt "Once" }\n'
    assert says in said(source)


@pytest.mark.parametrize(
    ("trace", "says"),
    [
        ("", "t.csv:1:1: error: the trace is empty"),
        ("when,what\n", "t.csv:1:1: error: no trace that sagec knows: 'when' is no column of one"),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\n",
            "t.csv:1:1: error: the trace has no requests",
        ),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,3\n",
            "t.csv:2:1: error: 2 columns where there are 3",
        ),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,3,4\n",
            "t.csv:2:1: error: 'yesterday' is no TIMESTAMP",
        ),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-13-16 18:15:46,3,4\n",
            "t.csv:2:1: error: '2023-13-16 18:15:46' is no TIMESTAMP",
        ),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,3,0\n",
            "t.csv:2:26: error: GeneratedTokens is '0'",
        ),
        ('{"timestamp": 0\n', "t.csv:1:1: error: the line is no JSON object"),
        (
            '{"timestamp": 0, "input_length": 5}\n',
            "t.csv:1:1: error: the line has no output_length",
        ),
        (
            '{"timestamp": 0, "input_length": 5, "output_length": 2}\n[]\n',
            "t.csv:2:1: error: the line is no JSON object",
        ),
        (
            '{"timestamp": -1, "input_length": 5, "output_length": 2}\n',
            "t.csv:1:15: error: timestamp is -1",
        ),
        (
            '{"timestamp": 0, "input_length": 5.5, "output_length": 2}\n',
            "t.csv:1:34: error: input_length is 5.5",
        ),
        (
            '{"timestamp": 0, "input_length": 5, "output_length": 2, "hash_ids": ["x"]}\n',
            "t.csv:1:57: error: hash_ids is no list of integers",
        ),
    ],
)
def test_a_wrong_trace_is_named_by_its_line(tmp_path: Path, trace: str, says: str) -> None:
    (tmp_path / "t.csv").write_text(trace)
    text = said(SHAPE + HERE + 'serve { replay "t.csv" }\n', str(tmp_path / "a.sage"))
    assert text.startswith(f"{tmp_path}/{says}"), text


@pytest.mark.parametrize(("broken", "count"), [("x\n", "1 line"), ("x\n1,2\n", "2 lines")])
def test_a_trace_of_which_nothing_is_left_says_what_was_skipped(
    tmp_path: Path, broken: str, count: str
) -> None:
    (tmp_path / "t.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + broken)
    text = said(SHAPE + HERE + 'serve { replay "t.csv" broken_lines skip }\n', f"{tmp_path}/a.sage")
    first = f"{tmp_path}/t.csv:2:1: 1 columns where there are 3"
    what = f"the trace has no requests: {count} skipped; the first: {first}"
    assert text.startswith(f"{tmp_path}/t.csv:1:1: error: {what}"), text


def test_a_trace_longer_than_the_context_says_how_to_clip_it(tmp_path: Path) -> None:
    rows = "2023-11-16 18:15:46.68,300,50\n" * 3
    (tmp_path / "t.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    model = SHAPE.replace("vocab 8", "vocab 8 max_context 128")
    text = said(model + HERE + 'serve { replay "t.csv" }\n', str(tmp_path / "a.sage"))
    assert "'t-0': a prompt of 300 tokens and 50 to generate are more than the 128" in text
    assert "so are 2 more" in text
    assert "cut prompts, as in: clip 78" in text


def test_a_trace_and_a_request_may_not_share_an_id(tmp_path: Path) -> None:
    row = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,3,5\n"
    (tmp_path / "t.csv").write_text(row)
    source = SHAPE + HERE + 'serve { request "t-0" tokens 4 replay "t.csv" }\n'
    text = said(source, str(tmp_path / "a.sage"))
    assert "a second request 't-0', which the trace is replayed as" in text


def test_a_request_for_an_instance_of_another_model_is_told_which_would_do() -> None:
    models = SHAPE + SHAPE.replace("model m", "model n")
    cluster = HERE.replace("sim", "sim model m").replace(
        "}\n", "  instance j on d engine sim model n kv_blocks 8\n}\n"
    )
    text = said(models + cluster + 'serve { request "a" tokens 4 model n on i }\n')
    assert "error: instance 'i' runs model 'm', not 'n'" in text
    assert "^ what does: j" in text
