"""Line and bar charts as SVG, which read on a light and on a dark page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape

Point = tuple[float, float]

WIDTH, HEIGHT = 760, 420
_LEFT, _TOP, _BOTTOM, _LEGEND = 76, 56, 58, 150
_LETTER_PX = 6.2
_LEAST = 1e-300

COLOURS = ("#0072b2", "#d9822b", "#009e73", "#c2569b", "#808791", "#b5a300", "#5aa9e6", "#b0413e")
"""Of the series in their order; told apart by people who see few colours, and on both pages."""

_DASHES = ("", "6 3", "2 3")
"""Of lines, when the colours have been used up once and twice."""

_STYLE = """
text { font: 12px ui-sans-serif, system-ui, "DejaVu Sans", sans-serif; fill: #767c86; }
.title { font-size: 15px; font-weight: 600; }
.grid { stroke: #808791; stroke-opacity: 0.22; stroke-width: 1; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
""".strip()


def line_chart(
    series: Mapping[str, Sequence[Point]],
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
) -> str:
    """A picture of named lines through (x, y) points; y begins at 0 or below.

    log_x: the x axis in powers of ten; every x must be more than 0. Raises ValueError where there
    is no point, or a number that cannot be drawn.
    """
    points = [point for line in series.values() for point in line]
    _check(points, log_x)
    across = _Axis([x for x, _ in points], _LEFT, WIDTH - _LEGEND, log=log_x)
    up = _Axis([0.0, *(y for _, y in points)], HEIGHT - _BOTTOM, _TOP)
    body = [*_grid(across, up)]
    for index, (name, line) in enumerate(series.items()):
        colour, dash = COLOURS[index % len(COLOURS)], _dash(index)
        at = [(_px(across.px(x)), _px(up.px(y))) for x, y in sorted(line)]
        path = " ".join(f"{x},{y}" for x, y in at)
        body.append(f'<polyline class="line" stroke="{colour}"{dash} points="{path}"/>')
        for (x, y), told in zip(at, sorted(line), strict=True):
            note = escape(f"{name}: {_number(told[0])}, {_number(told[1])}")
            body.append(
                f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"><title>{note}</title></circle>'
            )
    return _picture(body, list(series), title, x_label, y_label)


def bar_chart(
    series: Mapping[str, Mapping[str, float]], title: str, x_label: str, y_label: str
) -> str:
    """A picture of groups of bars: of each named series, a value for each group.

    A group that a series lacks is left empty. Raises ValueError where there is no value, or a
    number that cannot be drawn.
    """
    groups = list(dict.fromkeys(group for bars in series.values() for group in bars))
    _check([(0.0, value) for bars in series.values() for value in bars.values()], log_x=False)
    up = _Axis(
        [0.0, *(v for bars in series.values() for v in bars.values())], HEIGHT - _BOTTOM, _TOP
    )
    group_px = (WIDTH - _LEGEND - _LEFT) / len(groups)
    bar_px = 0.8 * group_px / len(series)
    body = [*_grid(None, up)]
    for place, group in enumerate(groups):
        left = _LEFT + (place + 0.1) * group_px
        middle = _px(left + 0.4 * group_px)
        label = escape(_shortened(group, int(group_px / _LETTER_PX)))
        body.append(f'<text x="{middle}" y="{HEIGHT - 38}" text-anchor="middle">{label}</text>')
        for index, (name, bars) in enumerate(series.items()):
            if group in bars:
                ends = sorted((up.px(bars[group]), up.px(0.0)))
                note = escape(f"{name}, {group}: {_number(bars[group])}")
                body.append(
                    f'<rect x="{_px(left + index * bar_px)}" y="{_px(ends[0])}" '
                    f'width="{_px(0.94 * bar_px)}" height="{_px(ends[1] - ends[0])}" '
                    f'fill="{COLOURS[index % len(COLOURS)]}"><title>{note}</title></rect>'
                )
    return _picture(body, list(series), title, x_label, y_label)


class _Axis:
    """Where values lie between two pixels, and which of them are marked."""

    def __init__(
        self, values: Sequence[float], begin_px: float, end_px: float, log: bool = False
    ) -> None:
        self._log = log
        self._begin_px, self._end_px = begin_px, end_px
        low, high = min(map(self._scaled, values)), max(map(self._scaled, values))
        step = _step(low, high)
        # A linear axis ends at a mark; one in powers of ten where its values end.
        self._low = low if log else math.floor(low / step) * step
        self._high = high if log else math.ceil(high / step) * step
        if self._low == self._high:
            self._high = self._low + step
        self._step = step

    def px(self, value: float) -> float:
        """Where a value lies."""
        share = (self._scaled(value) - self._low) / (self._high - self._low)
        return self._begin_px + share * (self._end_px - self._begin_px)

    def marks(self) -> Iterator[float]:
        """Round values along the axis."""
        if self._log:
            for power in range(math.floor(self._low), math.ceil(self._high) + 1):
                for digit in (1, 3) if self._high - self._low < 4 else (1,):
                    if self._low - 1e-9 <= math.log10(digit * 10.0**power) <= self._high + 1e-9:
                        yield digit * 10.0**power
            return
        for index in range(round((self._high - self._low) / self._step) + 1):
            yield self._low + index * self._step

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self._log else value


def _step(low: float, high: float, about: int = 5) -> float:
    """A round distance between some five marks.

    >>> _step(0, 0.64), _step(0, 100), _step(3, 3), _step(0, 0)
    (0.2, 20.0, 1.0, 1.0)
    """
    size = max(abs(low), abs(high))
    # What differs by less than can be told apart is marked as one value.
    span = high - low if high - low > 1e-9 * size else size
    if span < _LEAST:
        return 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= 0.999 * span / about)


def _check(points: Sequence[Point], log_x: bool) -> None:
    if not points:
        raise ValueError("a chart of nothing; give at least one point")
    for x, y in points:
        if not (math.isfinite(x) and math.isfinite(y)) or (log_x and x <= 0):
            more = ", x more than 0" if log_x else ""
            raise ValueError(f"point ({x}, {y}) cannot be drawn; finite numbers{more}")


def _grid(across: _Axis | None, up: _Axis) -> Iterator[str]:
    """Lines and numbers of both axes; groups of bars mark their own."""
    for value in up.marks():
        y = _px(up.px(value))
        yield f'<line class="grid" x1="{_LEFT}" y1="{y}" x2="{WIDTH - _LEGEND}" y2="{y}"/>'
        yield f'<text x="{_LEFT - 8}" y="{y}" dy="4" text-anchor="end">{_number(value)}</text>'
    for value in across.marks() if across else ():
        x = _px(across.px(value)) if across else ""
        yield f'<line class="grid" x1="{x}" y1="{_TOP}" x2="{x}" y2="{HEIGHT - _BOTTOM}"/>'
        yield f'<text x="{x}" y="{HEIGHT - 38}" text-anchor="middle">{_number(value)}</text>'


def _picture(
    body: Sequence[str], names: Sequence[str], title: str, x_label: str, y_label: str
) -> str:
    """The SVG around what is drawn: title, labels and legend. It has no background."""
    middle_x, middle_y = (_LEFT + WIDTH - _LEGEND) / 2, (_TOP + HEIGHT - _BOTTOM) / 2
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{_STYLE}</style>",
        f'<text class="title" x="{_LEFT}" y="28">{escape(title)}</text>',
        *body,
        f'<text x="{middle_x}" y="{HEIGHT - 14}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text transform="translate(20 {middle_y}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>",
    ]
    for index, name in enumerate(names):
        x, y = WIDTH - _LEGEND + 16, _TOP + 6 + 20 * index
        lines.append(
            f'<line class="line" stroke="{COLOURS[index % len(COLOURS)]}"{_dash(index)} '
            f'x1="{x}" y1="{y}" x2="{x + 20}" y2="{y}"/>'
        )
        told = escape(_shortened(name, int((_LEGEND - 46) / _LETTER_PX)))
        lines.append(f'<text x="{x + 26}" y="{y + 4}">{told}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def _dash(index: int) -> str:
    dash = _DASHES[index // len(COLOURS) % len(_DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: max(length - 1, 1)] + "…"


def _number(value: float) -> str:
    """A number as short as it goes.

    >>> _number(0.2), _number(30_000.0), _number(2_500_000), _number(0.30000000000000004)
    ('0.2', '30k', '2.5M', '0.3')
    """
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def _px(value: float) -> str:
    """A coordinate to a tenth of a pixel, as short as it goes."""
    return f"{value:.1f}".removesuffix(".0")
