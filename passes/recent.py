"""Answers kept with the op that they are about, for analyses that several passes ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from xdsl.ir import Operation

AnswerT = TypeVar("AnswerT")


def recent(
    subject: Operation, name: str, key: tuple[object, ...], make: Callable[[], AnswerT]
) -> AnswerT:
    """The last answer called `name` about `subject`, while `key` is what it was; else a new one.

    key: all that the answer depends on. It lies with the op, so that it goes when the op goes.
    """
    known: tuple[tuple[object, ...], AnswerT] | None = subject.__dict__.get(name)
    if known is None or known[0] != key:
        subject.__dict__[name] = known = (key, make())
    return known[1]
