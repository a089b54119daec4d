"""Strategies as text, and back: what a recording, a file and a command line call them by.

    fifo                                        one of sagec's
    slo-aware{margin=0.2 reject=true}           with these of its options changed
    strategy mine { order by priority, ... }    one of the .sage language

Such a text says everything: the same text, the same decisions.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

from sagec.runtime import strategies
from sagec.runtime.expressions import RuledStrategy
from sagec.runtime.strategies import Strategy, StrategyError

_SPEC = re.compile(r"\s*([A-Za-z][\w-]*)\s*(?:\{(.*)\})?\s*", re.DOTALL)
_OPTION = re.compile(r"""\s*([A-Za-z][\w-]*)\s*=\s*("(?:[^"\\]|\\[nrtbf"\\])*"|[^\s,{}="]+)\s*,?""")
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")


def strategy_of(text: str) -> Strategy:
    """The strategy that a text stands for; `text_of` gives such texts.

    Raises StrategyError, or Diagnostic where a statement of the .sage language is wrong.

    >>> strategy_of("fifo").name
    'fifo'
    >>> strategy_of("strategy short { order by prompt_tokens }").name
    'short'
    """
    if re.match(r"\s*strategy\b(?!\s*\{)", text):
        return _stated(text)
    if (spec := _SPEC.fullmatch(text)) is None:
        hint = "a name, and options in braces, as in: fifo, or slo-aware{margin=0.2}"
        raise StrategyError(f"{_shown(text)} is no strategy; {hint}")
    return strategies.create(spec[1], _options(spec[1], spec[2] or ""))


def text_of(strategy: Strategy) -> str:
    """The text that `strategy_of` makes an equal strategy of.

    >>> text_of(strategy_of("fifo{ }"))
    'fifo'
    """
    if isinstance(strategy, RuledStrategy):
        from sagec import language

        return language.format(str(strategy.rules)).strip()
    given = [
        f"{field.name.replace('_', '-')}={option_text(getattr(strategy, field.name))}"
        for field in dataclasses.fields(strategy)  # type: ignore[arg-type]
        if field.init and getattr(strategy, field.name) != field.default
    ]
    return f"{strategy.name}{{{' '.join(given)}}}" if given else strategy.name


def _stated(text: str) -> Strategy:
    """The strategy of a text that has one `strategy` statement and nothing else."""
    from sagec import language
    from sagec.language.strategies import strategy_of as strategy_of_statement

    program = language.parse(text, "<strategy>")
    if len(program.strategies) != 1 or program.models or program.clusters or program.serve:
        raise StrategyError(f"{_shown(text)} is no strategy; one statement 'strategy', alone")
    return strategy_of_statement(program.strategies[0])


def _options(name: str, text: str) -> dict[str, Any]:
    """Options as they are given: `margin=0.2 reject=true`, with spaces or commas between them."""
    found: dict[str, Any] = {}
    begin = 0
    while text[begin:].strip():
        if (match := _OPTION.match(text, begin)) is None:
            rest = _shown(text[begin:].strip())
            raise StrategyError(f"strategy {name}: {rest} is no option; as in: {name}{{option=1}}")
        if match[1] in found:
            raise StrategyError(f"strategy {name}: option {match[1]} is given twice")
        found[match[1]] = _value(match[2])
        begin = match.end()
    return found


def _value(word: str) -> Any:
    if word in ("true", "false"):
        return word == "true"
    if (number := _NUMBER.fullmatch(word)) and math.isfinite(float(word)):
        return float(word) if number[1] or number[2] else int(word)
    return json.loads(word, strict=False) if word.startswith('"') else word


def option_text(value: Any) -> str:
    """An option's value as it is written.

    >>> option_text(True), option_text(0.5), option_text("round-robin")
    ('true', '0.5', '"round-robin"')
    """
    return json.dumps(value, ensure_ascii=False)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
