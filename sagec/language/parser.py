"""Text to `Program`: lark reads the statements, `Reader` checks what they say."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any, NamedTuple

from sagec.diagnostics import Source, did_you_mean, there_are
from sagec.language import settings as tables
from sagec.language import syntax
from sagec.language.complaints import syntax_error
from sagec.language.errors import Errors
from sagec.language.settings import Kind, SettingError, Table
from sagec.language.syntax import Plain, Program, Request, Settings, Value, Word
from sagec.language.text import PAIR, TextError, unquoted

LARGEST_RANGE = 4096
"""Names that one range may stand for."""

_STATEMENTS = (
    "device",
    "switch",
    "link",
    "instance",
    "request",
    "replay",
    "serve",
    "cluster",
    "strategy",
)
"""What a misspelled setting may have been meant as."""


def parse(text: str, name: str) -> Program:
    """The program that a .sage text holds; `name` is its file's, for messages and paths.

    Raises Diagnostic, with all errors that can be found at once.
    """
    from lark.exceptions import UnexpectedInput

    source = Source(name, text)
    _check_characters(source)
    try:
        statements = _lark().parse(text)
    except UnexpectedInput as error:
        raise syntax_error(source, error) from None
    return Reader(source).program(statements)


def _check_characters(source: Source) -> None:
    try:
        source.text.encode()
    except UnicodeEncodeError as error:
        message = f"U+{ord(source.text[error.start]):04X} is no character"
        raise source.error(error.start, error.end, message, "save the file as UTF-8") from None
    if not source.text.strip():
        hint = "a file has models, clusters and requests to serve; see docs/language.md"
        raise source.error(0, 0, "the file is empty", hint)


class Node(NamedTuple):
    """A statement as lark found it: its rule and its parts."""

    rule: str
    parts: list[Any]


_RULES = (
    "model",
    "path",
    "block",
    "cluster",
    "device",
    "switch",
    "link",
    "instance",
    "on",
    "strategy",
    "configured",
    "order",
    "key",
    "admit",
    "reject",
    "place",
    "choose",
    "best",
    "preempt",
    "victim",
    "bound",
    "either",
    "both",
    "compared",
    "sum",
    "product",
    "prefixed",
    "call",
    "group",
    "serve",
    "replay",
    "names",
    "range",
)


@functools.cache
def _lark() -> Any:
    from lark import Lark, Transformer

    def node(rule: str) -> Callable[[Any, list[Any]], Node]:
        return lambda _, parts: Node(rule, parts)

    methods: dict[str, Any] = {rule: node(rule) for rule in _RULES}
    methods |= {"start": lambda _, parts: parts, "setting": lambda _, parts: tuple(parts)}
    grammar = resources.files(__package__).joinpath("sage.lark").read_text("utf-8")
    to_nodes = type("ToNodes", (Transformer,), methods)()
    return Lark(grammar, parser="lalr", lexer="contextual", transformer=to_nodes)


class Reader:
    """Makes a program of lark's nodes and collects what is wrong with it."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.errors = Errors(source)

    def program(self, statements: list[Node]) -> Program:
        """The program of these statements. Raises Diagnostic where one is wrong."""
        by_rule: dict[str, list[Node]] = {}
        for statement in statements:
            by_rule.setdefault(statement.rule, []).append(statement)
        serves = by_rule.get("serve", [])
        for extra in serves[1:]:
            word = extra.parts[0]
            hint = "a file has one; put the other into a file of its own"
            self.errors.add(word.start_pos, word.end_pos, "a second 'serve'", hint)
        program = Program(
            self.source,
            tuple(self._model(node) for node in by_rule.get("model", ())),
            tuple(self._cluster(node) for node in by_rule.get("cluster", ())),
            self._serve(serves[0]) if serves else None,
            self._strategies(statements),
        )
        self.errors.stop_if_any()
        return program

    def _strategies(self, statements: list[Node]) -> tuple[syntax.Strategy, ...]:
        """Imported here, for what strategies know takes a while to load and most files lack it."""
        stated = [node for node in statements if node.rule in ("strategy", "configured")]
        if not stated:
            return ()
        from sagec.language.strategies import StrategyReader

        reader = StrategyReader(self.errors, self._settings)
        read = {"strategy": reader.ruled, "configured": reader.configured}
        return tuple(read[node.rule](node) for node in stated)

    def _model(self, node: Node) -> syntax.Model:
        keyword, name, *rest = node.parts
        path, settings = None, {}
        for part in rest:
            if part.rule == "path":
                path = self._string(part.parts[0])
            else:
                settings = self._settings(part.parts[1:-1], tables.MODEL, "a model")
        if not rest:
            hint = f'model {name} from "folder", or model {name} {{ layers 4 hidden 256 ... }}'
            self.errors.add(
                name.start_pos, name.end_pos, f"model '{name}' has no checkpoint and no shape", hint
            )
        return syntax.Model(keyword.start_pos, _word(name), path, settings)

    def _cluster(self, node: Node) -> syntax.Cluster:
        keyword, name, _, *parts, _ = node.parts
        found: dict[str, list[Any]] = {"device": [], "switch": [], "link": [], "instance": []}
        for part in parts:
            found[part.rule].append(getattr(self, f"_{part.rule}")(part))
        return syntax.Cluster(
            keyword.start_pos,
            _word(name),
            tuple(found["device"]),
            tuple(found["switch"]),
            tuple(found["link"]),
            tuple(found["instance"]),
        )

    def _device(self, node: Node) -> syntax.Device:
        keyword, names, *rest = node.parts
        settings = self._settings(rest, tables.DEVICE, "a device")
        return syntax.Device(keyword.start_pos, self._names(names), settings)

    def _switch(self, node: Node) -> syntax.Switch:
        keyword, names = node.parts
        return syntax.Switch(keyword.start_pos, self._names(names))

    def _link(self, node: Node) -> syntax.Link:
        keyword, sources, targets, *rest = node.parts
        settings = self._settings(rest, tables.LINK, "a link")
        return syntax.Link(keyword.start_pos, self._names(sources), self._names(targets), settings)

    def _instance(self, node: Node) -> syntax.Instance:
        keyword, names, *rest = node.parts
        devices: tuple[Word, ...] = ()
        places = [part for part in rest if isinstance(part, Node)]
        for index, place in enumerate(places):
            if index:
                self._given_twice(place.parts[0])
            devices = self._names(place.parts[1])
        given = [part for part in rest if not isinstance(part, Node)]
        settings = self._settings(given, tables.INSTANCE, "an instance")
        return syntax.Instance(keyword.start_pos, self._names(names), devices, settings)

    def _serve(self, node: Node) -> syntax.Serve:
        keyword, *rest = node.parts
        head = [part for part in rest if isinstance(part, tuple) and not isinstance(part, Node)]
        settings = self._settings(head, tables.SERVE, "'serve'")
        entries: list[Request | syntax.Replay] = []
        for part in rest[len(head) + 1 : -1]:
            entries.append(self._replay(part) if isinstance(part, Node) else self._request(part))
        return syntax.Serve(keyword.start_pos, keyword.end_pos, settings, tuple(entries))

    def _replay(self, node: Node) -> syntax.Replay:
        keyword, path, *rest = node.parts
        settings = self._settings(rest, tables.REPLAY, "a replay")
        return syntax.Replay(keyword.start_pos, self._string(path), settings)

    # Names

    def _names(self, node: Node) -> tuple[Word, ...]:
        """All names of a list; a range stands for each of its names."""
        return tuple(word for part in node.parts for word in self._range(part.parts))

    def _range(self, ends: list[Any]) -> list[Word]:
        first, last = ends[0], ends[-1]
        if first is last:
            return [_word(first)]
        begin, end = _numbered(first), _numbered(last)
        if begin is None or end is None or begin[0] != end[0] or end[1] < begin[1]:
            self.errors.add(
                first.start_pos,
                last.end_pos,
                f"{first}..{last} is no range",
                "its names differ in the number at their end only, as g0..g7",
            )
            return [_word(first)]
        if end[1] - begin[1] >= LARGEST_RANGE:
            message = f"{first}..{last} are {end[1] - begin[1] + 1} names"
            self.errors.add(first.start_pos, last.end_pos, message, f"at most {LARGEST_RANGE}")
            return [_word(first)]
        width = len(first) - len(begin[0])
        numbers = range(begin[1], end[1] + 1)
        names = [f"{begin[0]}{number:0{width}}" for number in numbers]
        return [Word(name, first.start_pos, last.end_pos) for name in names]

    def _string(self, token: Any) -> Value:
        """The text of a string in quotes."""
        try:
            return Value(unquoted(token), token.start_pos, token.end_pos)
        except TextError as error:
            at = token.start_pos + error.offset
            self.errors.add(at, at + error.length, error.message, error.hint)
            return Value("", token.start_pos, token.end_pos)

    # Settings

    def _settings(self, pairs: list[Any], table: Table, whose: str) -> Settings:
        """The settings of a statement by name."""
        found: Settings = {}
        for name, token in pairs:
            setting = table.get(name)
            if setting is None:
                self._unknown(name, name.start_pos, table, whose)
            elif name in found and not setting.repeats:
                self._given_twice(name)
            elif (value := self._value(setting, token, token.start_pos)) is not None:
                if setting.repeats:
                    before = found[name].value if name in found else ()
                    assert isinstance(before, tuple)
                    value = (*before, str(value))
                found[str(name)] = Value(value, token.start_pos, token.end_pos)
        return found

    def _given_twice(self, name: Any) -> None:
        self.errors.add(name.start_pos, name.end_pos, f"'{name}' is given twice", "leave one out")

    def _unknown(self, name: str, begin: int, table: Table, whose: str) -> None:
        hint = there_are(name, table)
        if name in tables.UNITS:
            hint = "a unit follows its number without a space, as in: 10ms"
        elif (close := did_you_mean(name, [*table, *_STATEMENTS])) in _STATEMENTS:
            hint = f"did you mean the statement '{close}'? ({hint})"
        self.errors.add(begin, begin + len(name), f"{whose} has no '{name}'", hint)

    def _value(self, setting: tables.Setting, text: str, begin: int) -> Plain | None:
        """The value that a token gives a setting; None where it is wrong."""
        try:
            if text[0] == '"':
                return tables.read_text(setting, unquoted(text))
            if text[0].isalpha() or text[0] == "_":
                return tables.read_word(setting, str(text))
            return tables.read_number(setting, text)
        except SettingError as error:
            self.errors.add(begin, begin + len(text), error.message, error.hint)
        except TextError as error:
            at = begin + error.offset
            self.errors.add(at, at + error.length, error.message, error.hint)
        return None

    # Requests

    def _request(self, token: Any) -> Request:
        """A request, taken apart from its one token."""
        text, begin, known = str(token), token.start_pos, len(self.errors.found)
        pairs = pairs_of(text)
        first = next(pairs)
        request_id = ""
        if first.value is None or first.value[0] != '"':
            at = begin + (first.value_at if first.value is not None else 0)
            length = len(first.value or "request")
            self.errors.add(at, at + length, "a request has no id", 'as in: request "hello" ...')
        else:
            read = self._value(_ID, first.value, begin + first.value_at)
            request_id = str(read) if read is not None else ""
        found: dict[str, Plain] = {}
        for pair in pairs:
            if pair.key is not None or len(self.errors.found) == known:
                self._add(found, pair, begin)
        if len(self.errors.found) == known:
            self._check_prompt(request_id, found, begin)
        return Request(begin, begin + len(text), request_id, found)

    def _add(self, found: dict[str, Plain], pair: Pair, begin: int) -> None:
        """Add one setting of a request to those found so far."""
        at, key, text = begin + pair.at, pair.key, pair.value
        if key is None:
            assert text is not None
            hint = "settings are written: name value, as in: generate 32"
            self.errors.add(at, at + len(text), f"{text} belongs to no setting", hint)
            return
        setting = tables.REQUEST.get(key)
        if setting is None:
            self._unknown(key, at, tables.REQUEST, "a request")
        elif key in found and not setting.repeats:
            self.errors.add(at, at + len(key), f"'{key}' is given twice", "leave one out")
        elif text is None:
            self.errors.add(
                at, at + len(key), f"'{key}' has no value", f"it is {setting.kind.called}"
            )
        elif (value := self._value(setting, text, begin + pair.value_at)) is not None:
            if setting.repeats:
                before = found.get(key, ())
                assert isinstance(before, tuple)
                value = (*before, str(value))
            found[key] = value

    def _check_prompt(self, request_id: str, found: dict[str, Plain], begin: int) -> None:
        end = begin + len("request")
        if "prompt" in found and "tokens" in found:
            message = f"request '{request_id}' has a prompt and tokens"
            self.errors.add(begin, end, message, "give it one of them")
        if "prompt" not in found and "tokens" not in found:
            message = f"request '{request_id}' has no prompt"
            self.errors.add(begin, end, message, 'give it one: prompt "..." or tokens 128')


_ID = tables.Setting("request", Kind.TEXT, "what the request is called")


class Pair(NamedTuple):
    """A setting in the text of a request, by offsets into it; key or value may be missing."""

    at: int
    key: str | None
    value_at: int
    value: str | None


def pairs_of(text: str) -> Iterator[Pair]:
    """The word `request` with the id, and then each setting with its value."""
    for match in PAIR.finditer(text):
        key, value, stray = match.group("key", "value", "stray")
        if stray is not None:
            yield Pair(match.start("stray"), None, match.start("stray"), stray)
        else:
            yield Pair(match.start("key"), key, match.start("value"), value)


def said_in(source: Source, request: Request) -> list[tuple[str, Value]]:
    """The settings of a request as they are written, and where; "request" is its id."""
    text, begin = source.text[request.begin : request.end], request.begin
    return [
        (
            pair.key,
            Value(pair.value, begin + pair.value_at, begin + pair.value_at + len(pair.value)),
        )
        for pair in pairs_of(text)
        if pair.key is not None and pair.value is not None
    ]


def _word(token: Any) -> Word:
    return Word(str(token), token.start_pos, token.end_pos)


def _numbered(name: str) -> tuple[str, int] | None:
    """A name that ends in a number, as the name before it and the number."""
    match = re.fullmatch(r"(.*?)(\d{1,9})", name)
    return (match[1], int(match[2])) if match else None
