"""Curves as SVG, drawn on the server: the same on the live page, in the export and in a file.
Pure."""

import dataclasses
import json
import math
from collections.abc import Sequence

from markupsafe import Markup, escape

WIDTH, HEIGHT = 480, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 28
MOST_POINTS = 600
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666")
"""Of Okabe and Ito (2008): told apart by the color-blind; on pages the style sheet has them,
brighter in the dark."""
DASHES = ("", "6 3", "2 2", "8 3 2 3")

Points = Sequence[tuple[int, float | None]]


@dataclasses.dataclass(frozen=True)
class Curve:
    """One line: a name and its points (step, value); None interrupts it. `band` holds (step,
    low, high). `pen` numbers its color; `style` 0 is a solid line, others are dashed."""

    name: str
    points: Points
    pen: int
    band: Sequence[tuple[int, float, float]] = ()
    style: int = 0

    @property
    def color(self) -> str:
        """Its class in the style sheet."""
        return f"c{self.pen % len(COLORS)}"

    @property
    def dash(self) -> str:
        """Its dashes; a second round through the colors has others."""
        return DASHES[(self.style + self.pen // len(COLORS)) % len(DASHES)]


@dataclasses.dataclass(frozen=True)
class Chart:
    """Curves over one another. `unit` is "%" for shares. A click on a step opens `target` with
    the step put in for `STEP`. `few` points are not smoothed: each is a measurement of its own."""

    title: str
    curves: Sequence[Curve]
    unit: str = ""
    target: str = ""
    few: bool = False


def smoothed(points: Points, weight: float) -> list[tuple[int, float | None]]:
    """An exponential moving average that starts without bias: each value is a weighted mean of
    those before it."""
    shown, total, mass = list[tuple[int, float | None]](), 0.0, 0.0
    for step, value in points:
        if value is None:
            shown.append((step, None))
            continue
        total, mass = weight * total + (1 - weight) * value, weight * mass + (1 - weight)
        shown.append((step, total / mass))
    return shown


def svg(chart: Chart, smoothing: float = 0.0) -> Markup:
    """The drawing for a page: the style sheet has its colors, the script shows its values."""
    drawn, frame, inside = _drawn(chart, smoothing)
    data = {
        "unit": chart.unit,
        "x": [frame.low_x, frame.high_x],
        "box": [LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM],
        "curves": [{"name": curve.name, "points": curve.points} for curve in drawn],
    }
    return Markup(
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'role="img" tabindex="0" aria-label="{escape(summary(chart))}" '
        f'data-chart="{escape(json.dumps(data))}" data-target="{escape(chart.target)}">{inside}'
        f'<line class="cursor" visibility="hidden" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>'
    )


def lines(chart: Chart) -> str:
    """Axes and curves as SVG elements, in a box of `WIDTH` by `HEIGHT`."""
    return _drawn(chart, 0.0)[2]


def _drawn(chart: Chart, smoothing: float) -> tuple[list[Curve], "Frame", str]:
    """The curves as they are drawn, the plane that is shown, and both as SVG elements."""
    smoothing = 0.0 if chart.few else smoothing
    curves = [dataclasses.replace(curve, points=thinned(curve.points)) for curve in chart.curves]
    drawn = [
        dataclasses.replace(curve, points=smoothed(curve.points, smoothing)) for curve in curves
    ]
    frame = Frame.around(
        [p for curve in (*curves, *drawn) for p in curve.points],
        [b for curve in curves for b in curve.band],
    )
    parts = [frame.axes(chart.unit)]
    for raw, curve in zip(curves, drawn, strict=True):
        if curve.band:
            parts.append(frame.band(curve))
        if smoothing:
            parts.append(frame.line(raw, "raw"))
        parts.append(frame.line(curve, "line"))
    return drawn, frame, "".join(parts)


def summary(chart: Chart) -> str:
    """A chart in words: where each curve begins and ends."""
    said = []
    for curve in chart.curves:
        known = [(step, value) for step, value in curve.points if value is not None]
        if known:
            (first, a), (last, b) = known[0], known[-1]
            said.append(
                f"{curve.name}: {shown(a, chart.unit)} at step {first}, "
                f"{shown(b, chart.unit)} at step {last}"
            )
    return f"{chart.title}. " + "; ".join(said)


def shown(value: float | None, unit: str = "") -> str:
    """A value as it is written on axes and in tables."""
    if value is None:
        return "not finite"
    if unit == "%":
        return f"{value * 100:.1f} %"
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def thinned(points: Points) -> Points:
    """At most `MOST_POINTS` points: of each stretch the lowest and the highest, so that spikes
    stay."""
    if len(points) <= MOST_POINTS:
        return points
    kept = list[tuple[int, float | None]]()
    stretch = math.ceil(len(points) / (MOST_POINTS // 2))
    for start in range(0, len(points), stretch):
        some = points[start : start + stretch]
        known = [(value, step) for step, value in some if value is not None]
        ends = {(s, v) for v, s in (min(known), max(known))} if known else {some[0]}
        kept += sorted(ends)
    return kept


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers between `low` and `high`.

    >>> ticks(0, 1)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    raw = (high - low) / count
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw * 0.8)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclasses.dataclass(frozen=True)
class Frame:
    """What part of the plane is shown, and where in the drawing a point of it lies."""

    low_x: float
    high_x: float
    low_y: float
    high_y: float

    @classmethod
    def around(cls, points: Points, bands: Sequence[tuple[int, float, float]]) -> "Frame":
        xs = [step for step, _ in points] or [0]
        ys = [value for _, value in points if value is not None] + [
            y for _, low, high in bands for y in (low, high)
        ] or [0.0]
        low, high = min(ys), max(ys)
        if 0 <= low < 0.5 * high:
            low = 0.0
        room = (high - low) * 0.06 or abs(high) * 0.1 or 0.5
        floor = low if low == 0 else low - room
        return cls(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, floor, high + room)

    def x(self, step: float) -> str:
        along = (step - self.low_x) / (self.high_x - self.low_x)
        return f"{LEFT + along * (WIDTH - LEFT - RIGHT):.1f}"

    def y(self, value: float) -> str:
        above = (value - self.low_y) / (self.high_y - self.low_y)
        return f"{HEIGHT - BOTTOM - above * (HEIGHT - TOP - BOTTOM):.1f}"

    def axes(self, unit: str) -> str:
        parts = []
        for value in ticks(self.low_y, self.high_y):
            y = self.y(value)
            label = escape(f"{value * 100:.3g}%" if unit == "%" else shown(value))
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
            parts.append(
                f'<text class="tick" text-anchor="end" x="{LEFT - 6}" y="{float(y) + 3.5:.1f}">'
                f"{label}</text>"
            )
        for step in ticks(self.low_x, self.high_x, 5):
            if step == int(step):
                parts.append(
                    f'<text class="tick" text-anchor="middle" x="{self.x(step)}" y="{HEIGHT - 8}">'
                    f"{int(step)}</text>"
                )
        return "".join(parts)

    def line(self, curve: Curve, kind: str) -> str:
        points, path, pen, alone = curve.points, [], "M", []
        for n, (step, value) in enumerate(points):
            if value is None:
                pen = "M"
                continue
            path.append(f"{pen}{self.x(step)} {self.y(value)}")
            ends = n + 1 == len(points) or points[n + 1][1] is None
            if pen == "M" and ends:
                alone.append(
                    f'<circle class="{curve.color} dot" '
                    f'cx="{self.x(step)}" cy="{self.y(value)}" r="3"/>'
                )
            pen = "L"
        dashed = f' stroke-dasharray="{curve.dash}"' if curve.dash else ""
        return f'<path class="{curve.color} {kind}"{dashed} d="{"".join(path)}"/>' + "".join(alone)

    def band(self, curve: Curve) -> str:
        band = curve.band
        if len(band) == 1:
            step, low, high = band[0]
            path = f"M{self.x(step)} {self.y(low)}V{self.y(high)}"
            return f'<path class="{curve.color} line" d="{path}"/>'
        there = [f"{self.x(step)} {self.y(high)}" for step, _, high in band]
        back = [f"{self.x(step)} {self.y(low)}" for step, low, _ in reversed(band)]
        return f'<path class="{curve.color} band" d="M{"L".join(there + back)}Z"/>'
