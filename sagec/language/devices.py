"""Devices, switches and links of a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sagec.diagnostics import there_are
from sagec.dialects.cluster import DEVICE_FIGURES, DEVICE_KINDS
from sagec.language import syntax
from sagec.language.errors import Errors
from sagec.language.models import Scalars, relative_to_source, scalars_of
from sagec.language.syntax import Value, Word
from sagec.runtime import profile

MOST_LINKS = 65536
"""That one statement may stand for."""


@dataclass(frozen=True)
class Device:
    """A device; like: the first of its statement, whose scalars it shares."""

    at: Word
    begin: int
    scalars: Scalars
    like: str | None

    @property
    def memory_bytes(self) -> int:
        return int(self.scalars["memory_bytes"])


@dataclass(frozen=True)
class Link:
    """A link between two devices or switches."""

    source: str
    target: str
    begin: int
    scalars: Scalars


def resolve_devices(device: syntax.Device, errors: Errors) -> list[Device]:
    """The devices of a statement, each with the figures of its kind and its own."""
    said = scalars_of(device.settings)
    kind = str(said.get("kind", "cpu"))
    scalars: Scalars = {}
    if (known := DEVICE_KINDS.get(kind)) is not None:
        scalars |= known
    elif not all(name in said for name in DEVICE_FIGURES):
        hint = f"{there_are(kind, DEVICE_KINDS)}; or say memory, flops and bandwidth"
        errors.at(device.settings["kind"], f"no device kind '{kind}'", hint)
    scalars |= said
    if "profile" in scalars:
        scalars["profile"] = _profile(device.settings["profile"], errors)
    first = device.names[0].text
    return [
        Device(name, device.begin, scalars, first if name.text != first else None)
        for name in device.names
    ]


def _profile(path: Value, errors: Errors) -> str:
    """Where the profile is, seen from where we are; the errors say if it is none."""
    place = str(relative_to_source(errors.source.name, str(path.value)))
    try:
        profile.read(place)
    except profile.ProfileError as error:
        message, _, hint = str(error).partition("; ")
        errors.at(path, message, hint or "sagec profile writes one; the path counts from this file")
    return place


def resolve_links(link: syntax.Link, cluster: syntax.Cluster, errors: Errors) -> Iterator[Link]:
    """The links of a statement: each of its sources with each of its targets."""
    places = [word.text for device in cluster.devices for word in device.names]
    places += [word.text for switch in cluster.switches for word in switch.names]
    known, sources = set(places), {word.text for word in link.sources}
    for end in (*link.sources, *link.targets):
        if end.text not in known:
            errors.at(end, f"no device or switch '{end.text}'", there_are(end.text, places))
    for end in link.targets:
        if end.text in sources:
            errors.at(end, f"'{end.text}' is on both ends of the link", "name two places")
    if (count := len(link.sources) * len(link.targets)) > MOST_LINKS:
        errors.at(link.sources[0], f"{count} links", f"at most {MOST_LINKS}: use a switch")
        return
    scalars = scalars_of(link.settings)
    for source in link.sources:
        for target in link.targets:
            yield Link(source.text, target.text, link.begin, scalars)
