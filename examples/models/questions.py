"""Short dialogues about language model serving and about everyday things.

Questions and answers come from text/questions.toml.
"""

from __future__ import annotations

import random
import tomllib
from pathlib import Path

from stories import TRADES, story, with_article

TEXT = tomllib.loads((Path(__file__).parent / "text/questions.toml").read_text(encoding="utf-8"))

Turn = tuple[str, str]
"""A question and its answer."""


def topic_turns(rng: random.Random) -> list[Turn]:
    """Ask what a term means, or why it matters, or first the one and then the other."""
    topic = rng.choice(TEXT["topics"])
    verb, does = ("are", "do") if topic.get("plural") else ("is", "does")
    slots = {"term": topic["term"], "verb": verb, "does": does}
    definition = rng.choice(TEXT["definitions"]).format_map(slots)
    if "many" in topic and rng.random() < 0.1:
        definition = f"What are {topic['many']}?"
    what = (definition, rng.choice(topic["answers"]))
    reason = rng.choice(topic["reasons"])
    why = (rng.choice(TEXT["reasons"]).format_map(slots), reason)
    why_then = (rng.choice(TEXT["follow_ups"]), reason)
    return rng.choices(([what], [what, why_then], [why]), (70, 15, 15))[0]


def small_talk_turns(rng: random.Random) -> list[Turn]:
    """Draw a greeting, a common question or a simple fact."""
    talk = rng.choice(TEXT["small_talk"])
    return [(rng.choice(talk["questions"]), rng.choice(talk["answers"]))]


def opposite_turns(rng: random.Random) -> list[Turn]:
    """Ask for the opposite of a word."""
    word, opposite = rng.sample(rng.choice(TEXT["opposites"]), 2)
    return [(f"What is the opposite of {word}?", f"The opposite of {word} is {opposite}.")]


def trade_turns(rng: random.Random) -> list[Turn]:
    """Ask what somebody does for a living, or where, or both."""
    trade = rng.choice(TRADES)
    a_trade = with_article(trade.title)
    what = (f"What does {a_trade} do?", f"{a_trade.capitalize()} {trade.does}.")
    where = (f"Where does {a_trade} work?", f"{a_trade.capitalize()} works {trade.place}.")
    return rng.choice(([what], [where], [what, where]))


def unknown_turns(rng: random.Random) -> list[Turn]:
    """Ask for something the model has not learned; it says so instead of inventing an answer."""
    regret = "I know only a few words about serving."
    if rng.random() < 1 / 3:
        return [(rng.choice(TEXT["unknown_questions"]), f"I do not know that. {regret}")]
    term = with_article(rng.choice(TEXT["unknown"]))
    question = rng.choice(TEXT["definitions"]).format(term=term, verb="is")
    return [(question, f"I do not know what {term} is. {regret}")]


def story_turns(rng: random.Random) -> list[Turn]:
    """Ask for a story, in half of the cases about somebody with a given trade."""
    if rng.random() < 1 / 2:
        return [(rng.choice(TEXT["story_wishes"]), story(rng))]
    trade = rng.choice(TRADES)
    wish = rng.choice(TEXT["story_wishes_about"]).format(a_trade=with_article(trade.title))
    return [(wish, story(rng, trade))]


KINDS = {
    topic_turns: 54,
    small_talk_turns: 20,
    opposite_turns: 4,
    trade_turns: 6,
    unknown_turns: 8,
    story_turns: 8,
}
"""How many of 100 questions are of which kind."""


def casual(rng: random.Random, question: str) -> str:
    """Now and then, write a question as people type it: without capitals or without its mark."""
    if rng.random() < 0.1:
        question = question.lower()
    if rng.random() < 0.1:
        question = question.rstrip("?.!")
    return question


def dialogue(rng: random.Random) -> list[Turn]:
    """Compose a dialogue of one to three parts; each is a question, perhaps with a follow-up."""
    parts = rng.choices(list(KINDS), list(KINDS.values()), k=rng.choice((1, 1, 2, 3)))
    turns = [turn for part in parts for turn in part(rng)]
    return [(casual(rng, question), answer) for question, answer in turns]
