"""Short English stories, composed from the hand-written sentences of text/stories.toml.

A story is an opening, a plot and an ending. A plot is a list of beats, a beat is a list of
sentences that may stand in each other's place, and a sentence has slots in braces which one scene
fills, so a name or a thing stays the same through the whole story.
"""

from __future__ import annotations

import random
import tomllib
from dataclasses import dataclass
from pathlib import Path

TEXT = tomllib.loads((Path(__file__).parent / "text/stories.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Trade:
    """What somebody does for a living.

    `place` completes "she works", `habit` "every day she" and `does` "what she does is that she".
    """

    title: str
    place: str
    habit: str
    does: str


TRADES = tuple(Trade(**trade) for trade in TEXT["trades"])


def with_article(words: str) -> str:
    """Put "a" or "an" before a noun phrase.

    >>> with_article("old map")
    'an old map'
    """
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def pronouns(name: str) -> dict[str, str]:
    """The slots {he}, {him}, {his}, {He} and {His}, which agree with `name`.

    >>> pronouns("Mara")["his"]
    'her'
    """
    he, him, his = ("he", "him", "his") if name in TEXT["men"] else ("she", "her", "her")
    return {"he": he, "him": him, "his": his, "He": he.capitalize(), "His": his.capitalize()}


def scene(rng: random.Random, trade: Trade) -> dict[str, str]:
    """Draw the people and things of one story about somebody with `trade`, by slot."""
    name, friend = rng.sample(TEXT["women"] + TEXT["men"], 2)
    drawn = {slot: rng.choice(choices) for slot, choices in TEXT["words"].items()}
    people = {"name": name, "friend": friend, "him_friend": pronouns(friend)["him"]}
    work = {"trade": trade.title, "work": trade.place, "habit": trade.habit}
    forms = {
        "a_character": with_article(drawn["character"]),
        "a_thing": with_article(drawn["thing"]),
        "Hideout": drawn["hideout"].capitalize(),
    }
    return pronouns(name) | people | work | drawn | forms


def story(rng: random.Random, trade: Trade | None = None) -> str:
    """Compose one story of about 80 to 130 words, about somebody with `trade` if one is given.

    Half of the stories say what the hero does every day, and a third have a closing sentence.
    """
    habits = [TEXT["habits"]] if rng.random() < 1 / 2 else []
    endings = [TEXT["endings"]] if rng.random() < 1 / 3 else []
    beats = [TEXT["openings"], *habits, *rng.choice(TEXT["plots"])["beats"], *endings]
    slots = scene(rng, trade or rng.choice(TRADES))
    return " ".join(rng.choice(beat).format_map(slots) for beat in beats)
