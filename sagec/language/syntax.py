"""What a .sage file says, as frozen data that knows where in the text each thing stands.

Places are offsets into the text; `Source.position` makes lines and columns of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from sagec.diagnostics import Diagnostic, Source

if TYPE_CHECKING:
    from sagec.runtime.expressions import Rules

Plain = int | float | str | tuple[str, ...]


class Word(NamedTuple):
    """A name, and where it stands: [begin, end)."""

    text: str
    begin: int
    end: int


class Value(NamedTuple):
    """What a setting is given, in sagec's units (bytes, us, per second), and where it stands."""

    value: Plain
    begin: int
    end: int


Settings = dict[str, Value]


@dataclass(frozen=True)
class Model:
    """`model NAME from "path" { settings }`; one of path and settings may be missing."""

    begin: int
    name: Word
    path: Value | None
    settings: Settings


@dataclass(frozen=True)
class Device:
    """`device NAMES settings`: as many devices as there are names."""

    begin: int
    names: tuple[Word, ...]
    settings: Settings


@dataclass(frozen=True)
class Switch:
    """`switch NAMES`."""

    begin: int
    names: tuple[Word, ...]


@dataclass(frozen=True)
class Link:
    """`link NAMES to NAMES settings`: each of the former with each of the latter."""

    begin: int
    sources: tuple[Word, ...]
    targets: tuple[Word, ...]
    settings: Settings


@dataclass(frozen=True)
class Instance:
    """`instance NAMES on DEVICES settings`: the devices are dealt out evenly, in order."""

    begin: int
    names: tuple[Word, ...]
    devices: tuple[Word, ...]
    settings: Settings


@dataclass(frozen=True)
class Cluster:
    """`cluster NAME { ... }`."""

    begin: int
    name: Word
    devices: tuple[Device, ...]
    switches: tuple[Switch, ...]
    links: tuple[Link, ...]
    instances: tuple[Instance, ...]


class Piece(NamedTuple):
    """A word of a rule: the text [begin, end), and how it is printed.

    starts: it begins a rule. glued: it follows without a space. breaks: a line may end before it.
    """

    begin: int
    end: int
    text: str
    starts: bool
    glued: bool
    breaks: bool


@dataclass(frozen=True)
class Strategy:
    """`strategy NAME { rules }`, or `strategy NAME from BASE { settings }` of one of sagec's.

    rules: None in the second case. options: what the settings give the strategy. pieces: all words
    of the rules.
    """

    begin: int
    name: Word
    rules: Rules | None = None
    pieces: tuple[Piece, ...] = ()
    base: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    settings: Settings = field(default_factory=dict)


class Request(NamedTuple):
    """`request "id" settings`: the text [begin, end).

    Values of settings are plain, because there may be ten thousand requests; `settings_in` finds
    the place of one again.
    """

    begin: int
    end: int
    id: str
    settings: dict[str, Plain]


@dataclass(frozen=True)
class Replay:
    """`replay "path" settings`."""

    begin: int
    path: Value
    settings: Settings


@dataclass(frozen=True)
class Serve:
    """`serve settings { requests }`; [begin, head_end) is the keyword."""

    begin: int
    end: int
    settings: Settings
    entries: tuple[Request | Replay, ...]


@dataclass(frozen=True, eq=False)
class Program:
    """A .sage file that parses; whether its names mean something, `lower` finds out.

    notes: what whoever reads it should be told of the files that it names, by file.
    """

    source: Source
    models: tuple[Model, ...]
    clusters: tuple[Cluster, ...]
    serve: Serve | None
    strategies: tuple[Strategy, ...] = ()
    notes: dict[str, str] = field(default_factory=dict)

    def without_profiles(self) -> Program:
        """The same, where no device names a profile."""
        clusters = []
        for cluster in self.clusters:
            devices = []
            for device in cluster.devices:
                kept = {name: v for name, v in device.settings.items() if name != "profile"}
                devices.append(replace(device, settings=kept))
            clusters.append(replace(cluster, devices=tuple(devices)))
        return replace(self, clusters=tuple(clusters))

    def error(self, at: Word | Value, message: str, hint: str = "") -> Diagnostic:
        """The error that points at a name or value of this program."""
        return self.source.error(at.begin, at.end, message, hint)
