"""What every instance did when: collected from events, drawn as SVG or written as a trace.

timeline = Timeline()
executor = ExecutorAPI(engines, watch=[timeline.hear])
...
Path("timeline.svg").write_text(timeline.to_svg())
Path("trace.json").write_text(timeline.to_trace())     # opens in Perfetto
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from sagec.runtime.engines import KVExported, KVImported, StepReport
from sagec.runtime.loop import Arrived, Finished
from sagec.runtime.report import RequestReport

PREFILL, DECODE, MIXED = "prefill", "decode", "mixed"

WIDTH = 1200
_LEFT, _RIGHT, _TOP = 96, 24, 78
_LANE, _GAP, _BAR, _STRIP = 64, 30, 38, 14
_MIN_PX = 0.75
"""No bar is drawn thinner, and bars of a kind closer than this are drawn as one."""

_ROW, _ROW_BAR, _MOST_ROWS = 15, 9, 24
"""A request has a row below the lanes, where there are no more of them than this."""

_LABEL_PX = 6.1
"""Width of a letter of a label."""

TIMES = "\u00d7"

_ARROW_LIMIT = 60
"""More hand-overs than these are drawn without arrow heads, and fainter."""

_STYLE = """
text { font: 11px ui-sans-serif, system-ui, "DejaVu Sans", sans-serif; fill: #767c86; }
.title { font-size: 14px; font-weight: 600; }
.name { font-size: 13px; font-weight: 600; }
.label { fill: #ffffff; font-size: 10px; }
.lane { fill: #808791; fill-opacity: 0.10; }
.grid { stroke: #808791; stroke-opacity: 0.22; stroke-width: 1; }
.prefill { fill: #0072b2; }
.decode { fill: #d9822b; }
.kv { fill: #009e73; fill-opacity: 0.30; }
.move { fill: #009e73; }
.wait { fill: #808791; fill-opacity: 0.45; }
.promise { stroke: #cc3311; stroke-width: 2; }
.arrow { fill: none; stroke: #009e73; stroke-width: 1.3; }
""".strip()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Move:
    """KV that went from one instance to another, from the export's begin to the import's end."""

    request_id: str
    source: str
    target: str
    num_bytes: int
    begin_us: int
    end_us: int

    @classmethod
    def of(cls, imported: KVImported) -> "Move":
        """The move that ended so."""
        return cls(
            request_id=imported.request_id,
            source=imported.source,
            target=imported.instance,
            num_bytes=imported.num_bytes,
            begin_us=imported.begin_us,
            end_us=imported.end_us,
        )


class Timeline:
    """Collects what happened; `hear` takes an engine's events in any order."""

    def __init__(self, instances: Sequence[str] = ()) -> None:
        """instances: lanes in this order; others follow as they are heard of."""
        self.instances = list(instances)
        self.steps: list[StepReport] = []
        self.moves: list[Move] = []
        self.reports: list[RequestReport] = []
        self.promised_us: dict[str, int | None] = {}

    def hear(self, event: object) -> None:
        """Note a step, a hand-over, or a request's promise and end; all else leaves no mark."""
        if isinstance(event, StepReport):
            self.steps.append(event)
            self._know(event.instance)
        elif isinstance(event, Arrived):
            self.promised_us[event.request.id] = event.request.ttft_us
        elif isinstance(event, Finished):
            self.reports.append(event.report)
        elif isinstance(event, KVExported):
            self._know(event.handle.source)
            self._know(event.handle.target)
        elif isinstance(event, KVImported):
            self._know(event.source)
            self._know(event.instance)
            self.moves.append(Move.of(event))

    @property
    def kv_moved_bytes(self) -> int:
        """KV that was handed over between instances."""
        return sum(move.num_bytes for move in self.moves)

    @property
    def span_us(self) -> tuple[int, int]:
        """From when to when there is something to see; (0, 1) where there is nothing."""
        events: list[StepReport | Move] = [*self.steps, *self.moves]
        if not events:
            return 0, 1
        begin_us = min(event.begin_us for event in events)
        return begin_us, max(begin_us + 1, *(event.end_us for event in events))

    def to_svg(self, title: str = "") -> str:
        """A picture: a lane an instance, hand-overs between lanes, milliseconds along the bottom.

        Below the lanes, where they are few, each request's waiting, prefill and decoding, and when
        its first token was promised.

        It has no background, and reads on a light and on a dark page.
        """
        return "\n".join(_Drawing(self, title).lines()) + "\n"

    def to_trace(self) -> str:
        """JSON for Perfetto or chrome://tracing: a process an instance, a thread a phase."""
        return json.dumps({"traceEvents": list(_trace(self)), "displayTimeUnit": "ms"})

    def _know(self, instance: str) -> None:
        if instance not in self.instances:
            self.instances.append(instance)


def kind(step: StepReport) -> str:
    """What a step was: PREFILL, DECODE, or MIXED of both."""
    if step.chunks and step.decodes:
        return MIXED
    return PREFILL if step.chunks else DECODE


@dataclasses.dataclass
class _Bar:
    """One step, or several of a kind that are too close together to be told apart."""

    kind: str
    begin_px: float
    end_px: float
    tiny: bool
    steps: list[StepReport]

    @property
    def width_px(self) -> float:
        return max(_MIN_PX, self.end_px - self.begin_px)


class _Drawing:
    """The lines of a timeline's SVG."""

    def __init__(self, timeline: Timeline, title: str) -> None:
        self._timeline = timeline
        self._title = title
        self._begin_us, self._end_us = timeline.span_us
        self._top = {name: _TOP + i * (_LANE + _GAP) for i, name in enumerate(timeline.instances)}
        reports = timeline.reports if len(timeline.reports) <= _MOST_ROWS else []
        came = {name: index for index, name in enumerate(timeline.promised_us)}
        self._rows = sorted(reports, key=lambda report: came.get(report.request_id, len(came)))
        self._rows_top = _TOP + max(1, len(self._top)) * (_LANE + _GAP) - _GAP + 16
        self._bottom = self._rows_top + (len(self._rows) * _ROW if self._rows else -16)
        self._most_blocks = max((step.kv_blocks_used for step in timeline.steps), default=0)

    def lines(self) -> Iterator[str]:
        height = self._bottom + 44
        yield (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            f'width="{WIDTH}" height="{height}" role="img">'
        )
        yield f"<style>{_STYLE}</style>"
        yield (
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" '
            'markerHeight="6" orient="auto"><path class="move" d="M0 0.8 8 4 0 7.2z"/>'
            "</marker></defs>"
        )
        yield from self._heading()
        yield from self._axis()
        for name in self._timeline.instances:
            yield from self._lane(name)
        yield from self._arrows()
        for index, report in enumerate(self._rows):
            yield from self._row(report, self._rows_top + index * _ROW)
        yield "</svg>"

    def _x(self, time_us: int) -> float:
        share = (time_us - self._begin_us) / (self._end_us - self._begin_us)
        return _LEFT + share * (WIDTH - _LEFT - _RIGHT)

    def _heading(self) -> Iterator[str]:
        timeline = self._timeline
        counts = f"{len(timeline.steps)} steps · {_ms(self._end_us - self._begin_us)} ms"
        if timeline.moves:
            moved = _bytes(timeline.kv_moved_bytes)
            counts += f" · {len(timeline.moves)} hand-overs, {moved} of KV"
        yield f'<text class="title" x="{_LEFT}" y="26">{escape(self._title or "Timeline")}</text>'
        yield f'<text x="{_LEFT}" y="46">{counts}</text>'
        promised = self._rows and any(timeline.promised_us.values())
        legend = [
            *((("promise", "TTFT promised", 112),) if promised else ()),
            *((("wait", "waits", 62),) if self._rows else ()),
            (PREFILL, "prefill", 70),
            (DECODE, "decode", 72),
            (MIXED, "both in a step", 110),
            *((("move", "KV hand-over", 104),) if timeline.moves else ()),
            ("kv", "KV held", 70),
        ]
        x = WIDTH - _RIGHT - sum(advance for _, _, advance in legend)
        for css, name, advance in legend:
            yield from _swatch(css, x, 36)
            yield f'<text x="{x + 17}" y="46">{name}</text>'
            x += advance

    def _axis(self) -> Iterator[str]:
        for time_us in _ticks(self._end_us - self._begin_us):
            x = _px(self._x(self._begin_us + time_us))
            yield f'<line class="grid" x1="{x}" y1="{_TOP - 8}" x2="{x}" y2="{self._bottom + 8}"/>'
            label = f"{_ms(time_us)} ms" if time_us else "0"
            yield f'<text x="{x}" y="{self._bottom + 24}" text-anchor="middle">{label}</text>'

    def _lane(self, name: str) -> Iterator[str]:
        top = self._top[name]
        steps = sorted(
            (step for step in self._timeline.steps if step.instance == name),
            key=lambda step: step.begin_us,
        )
        yield (
            f'<rect class="lane" x="{_LEFT}" y="{top}" width="{WIDTH - _LEFT - _RIGHT}" '
            f'height="{_LANE}" rx="4"/>'
        )
        yield (
            f'<text class="name" x="{_LEFT - 12}" y="{top + 27}" '
            f'text-anchor="end">{escape(_shortened(name, 10))}</text>'
        )
        yield f'<text x="{_LEFT - 12}" y="{top + _LANE - 8}" text-anchor="end">KV</text>'
        if steps:
            yield self._held(steps, top + _LANE - 3)
        for bar in self._bars(steps):
            yield from self._bar(bar, top + 4)
        for move in self._timeline.moves:
            if move.target == name:
                yield self._move_bar(move, top + _LANE - 7)

    def _held(self, steps: Sequence[StepReport], base: int) -> str:
        """The area of KV blocks in use, as high as the strip where it is most of all lanes."""
        scale = _STRIP / max(1, self._most_blocks)
        path = f"M{_px(self._x(steps[0].begin_us))} {base}"
        last = None
        for step in steps:
            y = _px(base - step.kv_blocks_used * scale)
            if y != last:
                path += f"H{_px(self._x(step.begin_us))}V{y}"
            last = y
        path += f"H{_px(self._x(steps[-1].end_us))}V{base}z"
        return f'<path class="kv" d="{path}"><title>KV blocks in use</title></path>'

    def _bars(self, steps: Sequence[StepReport]) -> list[_Bar]:
        """A bar a step; where steps are closer than can be seen, one for several of a kind."""
        bars: list[_Bar] = []
        for step in steps:
            begin_px, end_px = self._x(step.begin_us), self._x(step.end_us)
            last = bars[-1] if bars else None
            tiny = end_px - begin_px < 2 * _MIN_PX
            near = last and last.kind == kind(step) and begin_px - last.end_px < _MIN_PX
            if last and near and tiny and last.tiny:
                last.end_px = end_px
                last.steps.append(step)
            else:
                bars.append(_Bar(kind(step), begin_px, end_px, tiny, [step]))
        return bars

    def _bar(self, bar: _Bar, top: int) -> Iterator[str]:
        """A bar with its label; a mixed one is split as its tokens are, as far as can be seen."""
        gap_px = 0.6 if bar.width_px > 3 else 0.0
        width = _px(bar.width_px - gap_px)
        prefill = sum(end - begin for step in bar.steps for _, begin, end in step.chunks)
        decodes = sum(len(step.decodes) for step in bar.steps)
        share = prefill / max(1, prefill + decodes)
        if bar.kind == MIXED:
            share = min(0.62, max(0.38, share))
        split = round(_BAR * share)
        yield f"<g><title>{escape(_told(bar, self._begin_us))}</title>"
        for css, y, height in ((PREFILL, top, split), (DECODE, top + split, _BAR - split)):
            if height:
                yield (
                    f'<rect class="{css}" x="{_px(bar.begin_px)}" y="{y}" width="{width}" '
                    f'height="{height}"/>'
                )
                if len(bar.steps) == 1:
                    yield from _label(bar, css, y + height / 2)
        yield "</g>"

    def _move_bar(self, move: Move, y: int) -> str:
        begin_px, end_px = self._x(move.begin_us), self._x(move.end_us)
        told = (
            f"KV of {move.request_id}: {move.source} to {move.target}, {_bytes(move.num_bytes)}, "
            f"{_ms(move.begin_us - self._begin_us)} to {_ms(move.end_us - self._begin_us)} ms"
        )
        return (
            f'<rect class="move" x="{_px(begin_px)}" y="{y}" '
            f'width="{_px(max(_MIN_PX, end_px - begin_px))}" height="4" rx="1">'
            f"<title>{escape(told)}</title></rect>"
        )

    def _row(self, report: RequestReport, top: int) -> Iterator[str]:
        """A request from its arrival to its end, and when its first token was promised."""
        name = report.request_id
        yield (
            f'<text x="{_LEFT - 12}" y="{top + _ROW_BAR}" '
            f'text-anchor="end">{escape(_shortened(name, 13))}</text>'
        )
        admitted_us = report.end_us if report.admitted_us is None else report.admitted_us
        first_us = report.end_us if report.first_token_us is None else report.first_token_us
        for css, told, begin_us, end_us in (
            ("wait", "waits", report.arrival_us, admitted_us),
            (PREFILL, "prefill", admitted_us, first_us),
            (DECODE, "decode", first_us, report.end_us),
        ):
            begin_px, end_px = self._inside(begin_us), self._inside(end_us)
            if end_px > begin_px:
                yield (
                    f'<rect class="{css} row" x="{_px(begin_px)}" y="{top}" height="{_ROW_BAR}" '
                    f'width="{_px(end_px - begin_px)}"><title>{escape(name)}: {told} '
                    f"{_ms(end_us - begin_us)} ms</title></rect>"
                )
        if (promised_us := self._timeline.promised_us.get(name)) is not None:
            x = _px(self._inside(report.arrival_us + promised_us))
            told = f"{escape(name)}: first token promised"
            yield (
                f'<line class="promise" x1="{x}" y1="{top - 2}" x2="{x}" y2="{top + _ROW_BAR + 2}">'
                f"<title>{told}</title></line>"
            )

    def _inside(self, time_us: int) -> float:
        """Where a moment lies, or the edge that it lies beyond."""
        return min(max(self._x(time_us), _LEFT), WIDTH - _RIGHT)

    def _arrows(self) -> Iterator[str]:
        """Where KV left and where it arrived, as a curve between the lanes."""
        moves = self._timeline.moves
        many = len(moves) > _ARROW_LIMIT
        opacity = max(0.15, min(0.85, 24 / max(1, len(moves)))) if many else 0.85
        head = "" if many else ' marker-end="url(#head)"'
        yield f'<g class="arrow" stroke-opacity="{opacity:.2f}">'
        for move in moves:
            down = self._top[move.target] > self._top[move.source]
            y0 = self._top[move.source] + (_LANE if down else 0)
            y1 = self._top[move.target] + (0 if down else _LANE)
            x0, x1 = self._x(move.begin_us), self._x(move.end_us)
            bend = (y1 - y0) * 0.55
            yield (
                f'<path d="M{_px(x0)} {y0}C{_px(x0)} {_px(y0 + bend)} {_px(x1)} '
                f'{_px(y1 - bend)} {_px(x1)} {y1}"{head}/>'
            )
        yield "</g>"


def _swatch(css: str, x: int, y: int) -> Iterator[str]:
    """A sample of a colour for the legend; a mixed one has both."""
    if css == "promise":
        yield f'<line class="promise" x1="{x + 10}" y1="{y}" x2="{x + 10}" y2="{y + 12}"/>'
        return
    if css != MIXED:
        yield f'<rect class="{css}" x="{x}" y="{y}" width="12" height="12" rx="2"/>'
        return
    yield f'<rect class="{PREFILL}" x="{x}" y="{y}" width="12" height="6"/>'
    yield f'<rect class="{DECODE}" x="{x}" y="{y + 6}" width="12" height="6"/>'


def _label(bar: _Bar, phase: str, middle: float) -> Iterator[str]:
    """The names of the prompts, or the number of decodes, where they fit into the bar."""
    (step,) = bar.steps
    names = list(dict.fromkeys(request_id for request_id, _, _ in step.chunks))
    choices = [" ".join(names), *names[:1]]
    if phase == DECODE:
        choices = [
            " ".join(step.decodes),
            f"{len(step.decodes)} decodes",
            f"{TIMES}{len(step.decodes)}",
        ]
    for text in choices:
        if text and len(text) * _LABEL_PX + 4 <= bar.width_px:
            x = _px(bar.begin_px + bar.width_px / 2)
            yield (
                f'<text class="label" x="{x}" y="{_px(middle + 3.5)}" '
                f'text-anchor="middle">{escape(text)}</text>'
            )
            return


def _told(bar: _Bar, origin_us: int) -> str:
    """What a pointer that rests on the bar is told."""
    first, last = bar.steps[0], bar.steps[-1]
    when = f"{_ms(first.begin_us - origin_us)} to {_ms(last.end_us - origin_us)} ms"
    if len(bar.steps) > 1:
        return f"{len(bar.steps)} {bar.kind} steps, {when}"
    chunks = ", ".join(f"{name} [{begin}, {end})" for name, begin, end in first.chunks)
    decodes = f"decodes {', '.join(first.decodes)}" if first.decodes else ""
    what = "; ".join(part for part in (chunks, decodes) if part)
    return f"{first.plan_id} step {first.step}, {when}: {what}"


def _ticks(duration_us: int, about: int = 10) -> Iterator[int]:
    """Round moments from 0 to the duration, some ten of them.

    >>> list(_ticks(3500, about=4))
    [0, 1000, 2000, 3000]
    """
    rough = max(1, duration_us / about)
    power = 10 ** (len(str(int(rough))) - 1)
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    return iter(range(0, duration_us + 1, step))


def _ms(time_us: int) -> str:
    """Milliseconds, three digits of them.

    >>> _ms(1500), _ms(2_000_000), _ms(37), _ms(22633)
    ('1.5', '2000', '0.037', '22.6')
    """
    decimals = 3 if time_us < 1000 else 2 if time_us < 10_000 else 1
    return f"{time_us / 1000:.{decimals}f}".rstrip("0").rstrip(".")


def _bytes(num_bytes: int) -> str:
    """
    >>> _bytes(900), _bytes(1_250_000)
    ('900 B', '1.2 MB')
    """
    size = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _px(value: float) -> str:
    """A coordinate to a tenth of a pixel, as short as it goes."""
    return f"{value:.1f}".removesuffix(".0")


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


_THREADS = {PREFILL: 1, DECODE: 2, "kv": 3}


def _trace(timeline: Timeline) -> Iterator[dict[str, Any]]:
    """Trace events: times are microseconds from the first thing that happened."""
    origin_us = timeline.span_us[0]
    pids = {name: i + 1 for i, name in enumerate(timeline.instances)}
    for name, pid in pids.items():
        yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}
        for thread, tid in _THREADS.items():
            args = {"name": thread}
            yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": args}
    for step in timeline.steps:
        yield from _step_slices(step, pids[step.instance], origin_us)
    for flow, move in enumerate(timeline.moves):
        yield from _move_slices(move, flow, pids, origin_us)


def _step_slices(step: StepReport, pid: int, origin_us: int) -> Iterator[dict[str, Any]]:
    """A slice in each phase's thread that the step took part in, and the KV in use."""
    at = {"pid": pid, "ts": step.begin_us - origin_us}
    common = {"ph": "X", **at, "dur": step.end_us - step.begin_us, "cat": kind(step)}
    plan = {"plan": step.plan_id, "step": step.step}
    if step.chunks:
        chunks = [f"{name} [{begin}, {end})" for name, begin, end in step.chunks]
        name = ", ".join(dict.fromkeys(name for name, _, _ in step.chunks))
        yield {**common, "tid": _THREADS[PREFILL], "name": name, "args": {**plan, "chunks": chunks}}
    if step.decodes:
        name = f"{len(step.decodes)} decodes"
        args = {**plan, "decodes": list(step.decodes)}
        yield {**common, "tid": _THREADS[DECODE], "name": name, "args": args}
    yield {"ph": "C", **at, "name": "KV blocks", "args": {"used": step.kv_blocks_used}}


def _move_slices(
    move: Move, flow: int, pids: dict[str, int], origin_us: int
) -> Iterator[dict[str, Any]]:
    """A slice on either side, and the flow between them."""
    begin, tid = move.begin_us - origin_us, _THREADS["kv"]
    duration = max(1, move.end_us - move.begin_us)
    args = {"bytes": move.num_bytes, "from": move.source, "to": move.target}
    link = {"cat": "kv", "name": "hand-over", "id": flow, "tid": tid}
    for side, instance in (("export", move.source), ("import", move.target)):
        yield {
            "ph": "X", "cat": "kv", "name": f"{side} {move.request_id}", "pid": pids[instance],
            "tid": tid, "ts": begin, "dur": duration, "args": args,
        }  # fmt: skip
    yield {"ph": "s", **link, "pid": pids[move.source], "ts": begin}
    yield {"ph": "f", "bp": "e", **link, "pid": pids[move.target], "ts": begin + duration}
