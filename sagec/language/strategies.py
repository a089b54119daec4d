"""Strategies of a file: statements into rules, or into one of sagec's with other options."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from sagec.diagnostics import there_are
from sagec.language import checking, known, syntax
from sagec.language import settings as tables
from sagec.language.checking import ExpressionError
from sagec.language.errors import Errors
from sagec.language.expressions import quantity_text, read, words_of
from sagec.language.settings import Kind, Setting, Table
from sagec.language.syntax import Piece, Settings, Word
from sagec.runtime import strategies
from sagec.runtime.expressions import Key, RuledStrategy, Rules
from sagec.runtime.expressions.rules import LATEST, OLDEST
from sagec.runtime.expressions.tree import Expression
from sagec.runtime.expressions.values import (
    AdmissionValues,
    PlacingValues,
    RunningValues,
    VictimValues,
    WaitingValues,
)
from sagec.runtime.strategies import Strategy, StrategyError, choosers


def strategy_of(statement: syntax.Strategy) -> Strategy:
    """The strategy that a statement without errors stands for."""
    if statement.rules is not None:
        return RuledStrategy(statement.rules)
    return strategies.create(statement.base, statement.options)


class StrategyReader:
    """Makes strategies of lark's nodes and collects what is wrong with them."""

    def __init__(
        self, errors: Errors, read_settings: Callable[[list[Any], Table, str], Settings]
    ) -> None:
        """read_settings: the parser's."""
        self.errors = errors
        self._read_settings = read_settings
        self._seen: set[str] = set()

    def ruled(self, node: Any) -> syntax.Strategy:
        """`strategy NAME { rules }`."""
        keyword, name, _, *rest, _ = node.parts
        rules = [part for part in rest if hasattr(part, "rule")]
        if not rules:
            hint = "as in: order by priority, arrival"
            self.errors.at(_word(name), f"strategy '{name}' has no rules", hint)
        bounds = [tuple(rule.parts) for rule in rules if rule.rule == "bound"]
        said = self._read_settings(bounds, tables.STRATEGY, "a strategy")
        fields = self._fields([rule for rule in rules if rule.rule != "bound"])
        fields |= {_BOUNDS[setting]: value.value for setting, value in said.items()}
        return syntax.Strategy(
            keyword.start_pos,
            self._named(name),
            rules=Rules(name=str(name), **fields),
            pieces=tuple(piece for rule in rules for piece in _pieces(rule)),
        )

    def configured(self, node: Any) -> syntax.Strategy:
        """`strategy NAME from NAME { options }`."""
        keyword, name, base, *block = node.parts
        pairs = block[0].parts[1:-1] if block else []
        statement = syntax.Strategy(keyword.start_pos, self._named(name), base=str(base))
        if base not in known.strategies():
            hint = there_are(str(base), known.strategies())
            self.errors.at(_word(base), f"no strategy '{base}'", hint)
            return statement
        options = option_table(str(base))
        said = self._read_settings(pairs, options, f"strategy '{base}'")
        given = {option: _given(options[option], value.value) for option, value in said.items()}
        try:
            strategies.create(str(base), given)
        except StrategyError as error:
            message, _, hint = str(error).partition("; ")
            self.errors.at(_word(base), message, hint)
        return dataclasses.replace(statement, options=given, settings=said)

    def _named(self, name: Any) -> Word:
        word = _word(name)
        if word.text in known.strategies():
            message = f"there is a strategy '{word.text}' already: one of sagec's"
            self.errors.at(word, message, "give this one a name of its own")
        if word.text in self._seen:
            self.errors.at(word, f"a second strategy '{word.text}'", "rename one")
        self._seen.add(word.text)
        return word

    # Rules

    def _fields(self, rules: list[Any]) -> dict[str, Any]:
        """What the rules say, by field of `Rules`."""
        fields: dict[str, Any] = {}
        said: dict[str, Any] = {}
        for rule in rules:
            spoken = _spoken(rule)
            if spoken in said:
                self.errors.at(_word(rule.parts[0]), f"'{spoken}' is given twice", "leave one out")
            said[spoken] = rule
            try:
                fields |= getattr(self, f"_{rule.rule}")(rule.parts)
            except ExpressionError as error:
                self.errors.add(*error.at, error.message, error.hint)
        for phase in ("prefill on", "decode on"):
            if phase in said and "place by" in said:
                word = _word(said[phase].parts[0])
                message = f"'{phase}' and 'place by' both say where requests go"
                self.errors.at(word, message, "leave one of them out")
        return fields

    def _order(self, parts: list[Any]) -> dict[str, Any]:
        keys = [
            Key(_ordered(key.parts[0], WaitingValues), key.parts[-1] == "desc")
            for key in parts[2::2]
        ]
        return {"order": tuple(keys)}

    def _admit(self, parts: list[Any]) -> dict[str, Any]:
        return {"admit": _condition(parts[2], AdmissionValues)}

    def _reject(self, parts: list[Any]) -> dict[str, Any]:
        return {"reject": _condition(parts[2], WaitingValues)}

    def _place(self, parts: list[Any]) -> dict[str, Any]:
        name = parts[2]
        if name not in choosers.known():
            hint = there_are(str(name), choosers.known())
            self.errors.at(_word(name), f"no chooser '{name}'", hint)
        return {"place_by": str(name)}

    def _choose(self, parts: list[Any]) -> dict[str, Any]:
        keys = [_directed(best.parts, PlacingValues) for best in parts[2::2]]
        return {f"{parts[0]}_on": tuple(keys)}

    def _preempt(self, parts: list[Any]) -> dict[str, Any]:
        victims = [part for part in parts[1:] if getattr(part, "rule", "") == "victim"]
        fields: dict[str, Any] = {"preempt": tuple(_victim(part.parts) for part in victims)}
        if len(parts) > 2 * len(victims):
            fields["preempt_when"] = _condition(parts[-1], VictimValues)
        return fields


_BOUNDS = {"mode": "mode", "chunk": "chunk_tokens", "horizon": "horizon_steps"}

_TWO_WORDS = {"order": "by", "admit": "while", "reject": "when", "place": "by", "choose": "on"}


def _spoken(rule: Any) -> str:
    second = _TWO_WORDS.get(rule.rule)
    return f"{rule.parts[0]} {second}" if second else str(rule.parts[0])


def _word(token: Any) -> Word:
    return Word(str(token), token.start_pos, token.end_pos)


def _condition(node: Any, place: type) -> Expression:
    return checking.condition(read(node, place))


def _ordered(node: Any, place: type) -> Expression:
    return checking.ordered(read(node, place))


def _directed(parts: list[Any], place: type) -> Key:
    return Key(_ordered(parts[1], place), parts[0] == "max")


def _victim(parts: list[Any]) -> Key:
    if len(parts) == 1:
        return LATEST if parts[0] == "latest" else OLDEST
    return _directed(parts, RunningValues)


# Options


def option_table(name: str) -> Table:
    """The options of one of sagec's strategies, as settings: fields in us, ms or s are times."""
    fields = dataclasses.fields(strategies.class_of(name))
    return {field.name: _setting(field) for field in fields if field.init}


def _setting(field: dataclasses.Field[Any]) -> Setting:
    doc = f"{field.default!r}, if not said"
    if isinstance(field.default, bool):
        return Setting(field.name, Kind.CHOICE, doc, choices=("no", "yes"))
    if isinstance(field.default, str):
        return Setting(field.name, Kind.LABEL, doc)
    if field.name.rpartition("_")[2] in Kind.TIME.units:
        return Setting(field.name, Kind.TIME, doc)
    kind = Kind.SHARE if isinstance(field.default, float) else Kind.COUNT
    return Setting(field.name, kind, doc, -tables.MOST, tables.MOST)


def _given(option: Setting, value: Any) -> Any:
    """What the strategy is given for what the setting says; times in the unit of its name."""
    if option.kind is Kind.CHOICE:
        return value == "yes"
    unit = option.name.rpartition("_")[2]
    return value / Kind.TIME.units[unit] if unit in ("ms", "s") else value


# What the printer needs


def _pieces(rule: Any) -> Iterator[Piece]:
    """The words of a rule, as they are to be printed."""
    words = [word for word in words_of(rule) if word.type != "_SEP"]
    kinds = ["", "", *(word.type for word in words)]
    for word, kind, last, last_but_one in zip(words, kinds[2:], kinds[1:], kinds, strict=False):
        yield Piece(
            word.start_pos,
            word.end_pos,
            quantity_text(word) if kind == "QUANTITY" else str(word),
            starts=not last,
            glued=kind in ("_RIGHT", "_COMMA")
            or last == "_LEFT"
            or (kind == "_LEFT" and last in ("VALUE", "MIN", "MAX"))
            or (last == "MINUS" and last_but_one not in _ENDS),
            breaks=kind in ("WHEN", "AND", "OR") or last in ("", "_COMMA"),
        )


_ENDS = ("VALUE", "QUANTITY", "STRING", "_RIGHT")
"""What a value ends with: a `-` after it is no sign."""
