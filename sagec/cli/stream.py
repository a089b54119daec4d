"""How `sagec run` shows the text of its requests: a panel each on a terminal, or plain lines."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from rich.console import Group

from sagec.cli import writing

LINE_LETTERS = 100
"""A plain line is broken at the first space after so many letters."""

REFRESH_PER_S = 12

KEPT_PANELS = 24
"""Of more requests than these, the later ones' panels go when the run ends."""


class Stream(Protocol):
    """Shows text as it comes; `end` says that a request is at its end, and why."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *error: object) -> None: ...
    def text(self, request_id: str, fresh: str) -> None: ...
    def end(self, request_id: str, reason: str) -> None: ...


class Silent:
    """Shows nothing: for --json."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def text(self, request_id: str, fresh: str) -> None:
        pass

    def end(self, request_id: str, reason: str) -> None:
        pass


class Lines:
    """Lines that begin with the request's id, each written when it is whole.

    prompts: text by request id; it is written before a request's first text, after `>`.
    """

    def __init__(self, prompts: Mapping[str, str]) -> None:
        self._width = min(24, max(map(len, prompts), default=0))
        self._prompts = dict(prompts)
        self._open = dict.fromkeys(prompts, "")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for request_id, line in self._open.items():
            if line:
                self._write(request_id, "|", line)

    def text(self, request_id: str, fresh: str) -> None:
        if prompt := self._prompts.pop(request_id, ""):
            self._write(request_id, ">", prompt)
        line = self._open[request_id] + fresh
        while (cut := _break(line)) is not None:
            self._write(request_id, "|", line[:cut])
            line = line[cut + 1 :]
        self._open[request_id] = line

    def end(self, request_id: str, reason: str) -> None:
        line = self._open.pop(request_id, "")
        self._write(request_id, "|", f"{line}  [{reason}]".lstrip())

    def _write(self, request_id: str, mark: str, line: str) -> None:
        sys.stdout.write(f"{request_id:<{self._width}} {mark} {line.strip()}\n")
        sys.stdout.flush()


def _break(line: str) -> int | None:
    """Where a line ends: at its newline, or at the first space when it is long.

    >>> _break("one\\ntwo"), _break("short")
    (3, None)
    """
    at = line.find("\n")
    if at < 0 and len(line) > LINE_LETTERS:
        at = line.find(" ", LINE_LETTERS)
    return at if at >= 0 else None


class Panels:
    """A panel a request, on a terminal; as many as it has room for, those at work first."""

    def __init__(self, prompts: Mapping[str, str]) -> None:
        from rich.live import Live

        self._prompts = prompts
        self._texts = dict.fromkeys(prompts, "")
        self._ends: dict[str, str] = {}
        self._console = writing.console()
        self._live = Live(
            console=self._console,
            get_renderable=self._drawn,
            refresh_per_second=REFRESH_PER_S,
            transient=True,
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()
        if not any(error):
            self._console.print(self._group(list(self._texts)[:KEPT_PANELS], letters=None))

    def text(self, request_id: str, fresh: str) -> None:
        self._texts[request_id] += fresh

    def end(self, request_id: str, reason: str) -> None:
        self._ends[request_id] = reason or "done"

    def _drawn(self) -> Group:
        """The panels that fit: requests with text before those without, ended ones last."""
        room = max(1, (self._console.height - 2) // 4)
        order = sorted(self._texts, key=lambda name: (name in self._ends, not self._texts[name]))
        shown = set(order[:room])
        group = self._group(
            [name for name in self._texts if name in shown],
            letters=2 * (self._console.width - 6),
        )
        group.renderables.append(f"{len(self._ends)} of {len(self._texts)} requests have ended")
        return group

    def _group(self, names: Sequence[str], letters: int | None) -> Group:
        from rich.console import Group
        from rich.panel import Panel
        from rich.text import Text

        panels = []
        for name in names:
            text = self._texts[name]
            style = "green" if name in self._ends else "cyan" if text else "dim"
            panels.append(
                Panel(
                    Text.assemble((self._prompts[name], "dim"), text)
                    if letters is None
                    else Text(" ".join((self._prompts[name] + text)[-letters:].split())),
                    title=Text(name),
                    title_align="left",
                    subtitle=Text(self._ends.get(name, "")),
                    subtitle_align="right",
                    border_style=style,
                )
            )
        return Group(*panels)


def stream_for(prompts: Mapping[str, str], *, silent: bool) -> Stream:
    """Panels on a terminal, lines in a pipe, nothing for programs; prompts: text by request id."""
    if silent:
        return Silent()
    return Panels(prompts) if writing.is_terminal() else Lines(prompts)
