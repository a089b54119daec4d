"""Answers of the last few questions, for analyses that several passes ask for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

AnswerT = TypeVar("AnswerT")


class Recent(Generic[AnswerT]):
    """Keeps an answer as long as what it depends on is the same, for a few subjects.

    Not weakly by subject: an answer may hold the ops that hold the subject, which then lives for
    ever.
    """

    def __init__(self, subjects: int = 8) -> None:
        self._kept: OrderedDict[int, tuple[tuple[object, ...], AnswerT]] = OrderedDict()
        self._subjects = subjects

    def answer(
        self, subject: object, key: tuple[object, ...], make: Callable[[], AnswerT]
    ) -> AnswerT:
        """The answer about `subject` while `key` is what it was; else what `make` says."""
        known = self._kept.get(id(subject))
        if known is None or known[0] != key:
            self._kept[id(subject)] = known = (key, make())
            if len(self._kept) > self._subjects:
                self._kept.popitem(last=False)
        return known[1]
