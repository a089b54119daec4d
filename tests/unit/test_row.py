"""What an engine makes of a request, and when its output ends."""

from pathlib import Path

import pytest

from sagec.runtime.request import FinishReason, Request
from sagec.runtime.row import Intake, Refused, RequestRow
from sagec.runtime.text import TokenizerFile


def request(prompt: tuple[int, ...] = (3, 4, 5), **fields: object) -> Request:
    return Request(id="a", prompt=prompt, **fields)


def intake(max_tokens: int | None = None) -> Intake:
    nowhere = TokenizerFile(Path("no-such-folder"))
    return Intake(
        vocab=200, eos_tokens=(1,), room_tokens=48, tokenizer=nowhere, max_tokens=max_tokens
    )


def row(asked: Request, max_tokens: int | None = None) -> RequestRow:
    return RequestRow(**intake(max_tokens).fields(asked, ()))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (request(()), "the prompt is empty"),
        (request((3, 200)), r"prompt token 200 is not in \[0, 200\)"),
        (request((3,) * 48), "leaves no room for an answer in 48 tokens"),
        (request(adapter="x"), "adapter 'x'"),
        (request(stop_strings=("",)), "an empty stop string"),
        (request(stop_strings=("end",)), "no-such-folder/tokenizer.json, which is not there"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_with_the_reason(
    asked: Request, said: str
) -> None:
    if asked.stop_strings == ("end",):
        pytest.importorskip("tokenizers")
    with pytest.raises(Refused, match=said):
        intake().fields(asked, ())


@pytest.mark.parametrize(
    ("asked", "model", "staying", "leaving"),
    [
        (request(max_output_tokens=9), None, 12, 12),
        (request(max_output_tokens=90), None, 48, 93),
        (request(max_output_tokens=90), 64, 48, 64),
        (request(), None, 48, 48),
        (request(), 64, 48, 64),
    ],
)
def test_a_row_is_bounded_by_its_client_the_model_and_while_it_stays_by_the_room(
    asked: Request, model: int | None, staying: int, leaving: int
) -> None:
    taken = row(asked, model)
    assert (taken.longest(leaves=False), taken.longest(leaves=True)) == (staying, leaving)


def test_an_output_ends_at_a_stop_token_which_is_no_part_of_it() -> None:
    taken = row(request(stop_tokens=(7,), max_output_tokens=9))
    assert taken.append(8) is None
    assert taken.append(7) is FinishReason.STOP
    assert (taken.output, taken.num_output, taken.num_tokens) == ((8,), 1, 4)
    assert row(request()).append(1) is FinishReason.STOP


def test_an_output_ends_with_its_last_token() -> None:
    taken = row(request(max_output_tokens=2))
    assert [taken.append(8), taken.append(9), taken.append(10)] == [
        None, FinishReason.LENGTH, FinishReason.LENGTH
    ]  # fmt: skip
    assert taken.output == (8, 9)
