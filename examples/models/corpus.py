"""The text the tiny model learns from: an endless, seeded stream of stories and dialogues."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from itertools import islice

from questions import Turn, dialogue
from stories import story

BEGIN = "<|begin_of_text|>"
END = "<|end_of_text|>"
DIALOGUE_SHARE = 0.6


def render(turns: Iterable[Turn]) -> str:
    """Write a dialogue as the model sees it; each answer but the last is closed by `END`.

    >>> render([("Why?", "So that."), ("Thanks!", "You are welcome.")])
    'Question: Why?\\nAnswer: So that.<|end_of_text|>Question: Thanks!\\nAnswer: You are welcome.'
    """
    return END.join(f"Question: {question}\nAnswer: {answer}" for question, answer in turns)


def documents(seed: int) -> Iterator[str]:
    """Compose documents without end: the same seed, the same documents."""
    rng = random.Random(seed)
    while True:
        yield render(dialogue(rng)) if rng.random() < DIALOGUE_SHARE else story(rng)


def words(text: str) -> list[str]:
    """Split a text into its words, without punctuation and special tokens.

    >>> words("What is a KV cache?<|end_of_text|>It's memory.")
    ['What', 'is', 'a', 'KV', 'cache', "It's", 'memory']
    """
    return re.findall(r"[A-Za-z']+", text.replace(END, " "))


def vocabulary(num_documents: int = 4000, seed: int = 0) -> set[str]:
    """The words that occur in the first `num_documents` documents."""
    return {word for text in islice(documents(seed), num_documents) for word in words(text)}
