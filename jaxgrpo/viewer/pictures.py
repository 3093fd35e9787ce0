"""Curves as pictures that stand alone: SVG with its own colors, title and legend, and PNG."""

import importlib.util
from collections.abc import Sequence

from markupsafe import escape

from jaxgrpo.viewer.charts import COLORS, HEIGHT, LEFT, WIDTH, Chart, Curve, lines

TITLE, ROW, EDGE = 30, 18, 14
"""Heights of the title and of a row of the legend, and the space around a chart."""
COLUMNS = 3
"""Charts beside each other on a sheet, and names beside each other in a legend."""
_STYLE = (
    "svg{background:#fff;font:11px DejaVu Sans,Arial,sans-serif}"
    ".title{font-size:14px;font-weight:bold}"
    ".grid{stroke:#ddd}.tick{fill:#444}.line{fill:none;stroke-width:2}"
    ".band{stroke:none;opacity:.18}"
    + "".join(
        f".c{n}.line{{stroke:{c}}}.c{n}.band,.c{n}.dot{{fill:{c}}}" for n, c in enumerate(COLORS)
    )
)


def picture(chart: Chart) -> str:
    """One chart as a file of its own."""
    return sheet([chart])


def sheet(charts: Sequence[Chart]) -> str:
    """Charts beside and below each other as one SVG file."""
    across = min(COLUMNS, len(charts))
    rows = [charts[start : start + across] for start in range(0, len(charts), across)]
    parts, y = list[str](), EDGE
    for row in rows:
        parts += [_titled(chart, EDGE + n * (WIDTH + EDGE), y) for n, chart in enumerate(row)]
        y += max(map(_height, row)) + EDGE
    width = EDGE + across * (WIDTH + EDGE)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" '
        f'width="{width * 2}" height="{y * 2}"><style>{_STYLE}</style>'
        f'<rect width="{width}" height="{y}" fill="#fff"/>{"".join(parts)}</svg>'
    )


def can_png() -> bool:
    """Whether resvg_py is installed, which draws an SVG as a picture."""
    return importlib.util.find_spec("resvg_py") is not None


def png(drawing: str) -> bytes | None:
    """A drawing as PNG; None if resvg_py is not installed."""
    if not can_png():
        return None
    import resvg_py

    return bytes(resvg_py.svg_to_bytes(svg_string=drawing))


def _height(chart: Chart) -> int:
    return TITLE + HEIGHT + ROW * -(-len(_named(chart)) // COLUMNS)


def _named(chart: Chart) -> Sequence[Curve]:
    """The curves that a legend names; one alone needs none."""
    return chart.curves if len(chart.curves) > 1 else ()


def _titled(chart: Chart, x: int, y: int) -> str:
    parts = [f'<text class="title" x="{LEFT}" y="18">{escape(chart.title)}</text>']
    parts.append(f'<g transform="translate(0 {TITLE})">{lines(chart)}</g>')
    for n, curve in enumerate(_named(chart)):
        left = LEFT + n % COLUMNS * (WIDTH - LEFT) // COLUMNS
        base = TITLE + HEIGHT + n // COLUMNS * ROW + 10
        dashed = f' stroke-dasharray="{curve.dash}"' if curve.dash else ""
        shown = curve.name if len(curve.name) <= 20 else f"{curve.name[:19]}…"
        parts.append(
            f'<path class="{curve.color} line"{dashed} d="M{left} {base - 4}h18"/>'
            f'<text class="tick" x="{left + 23}" y="{base}">{escape(shown)}</text>'
        )
    return f'<g transform="translate({x} {y})">{"".join(parts)}</g>'
