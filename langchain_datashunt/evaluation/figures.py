"""Charts as inline SVG without scripts, coloured by CSS variables of the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT = 560, 340
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 14, 46
MOST_POINTS = 300


@dataclass(frozen=True)
class Line:
    """Line of a chart.

    Attributes:
        name: Name in the legend.
        x: Horizontal coordinates, shape `[m]`.
        y: Vertical coordinates, shape `[m]`.
        colour: Name of a CSS variable.
        dashed: Whether the line is dashed, as for a baseline.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str = "--a"
    dashed: bool = False


@dataclass(frozen=True)
class Point:
    """Marked point of a chart, with its name."""

    name: str
    x: float
    y: float
    colour: str = "--c"


@dataclass(frozen=True)
class Chart:
    """Chart with both axes in percent.

    Attributes:
        title: Title for screen readers.
        x_title: Label of the horizontal axis.
        y_title: Label of the vertical axis.
        lines: Lines of the chart.
        points: Marked points.
        bars: Bars behind the lines as (left, right, height), with heights in [0, 1].
        square: Whether both axes span 0 to 1.
    """

    title: str
    x_title: str
    y_title: str
    lines: Sequence[Line] = ()
    points: Sequence[Point] = ()
    bars: Sequence[tuple[float, float, float]] = ()
    square: bool = False

    def svg(self) -> str:
        """Return the chart as an SVG element."""
        (x0, x1), (y0, y1) = self._range("x"), self._range("y")

        def at_x(value: float) -> float:
            return LEFT + (value - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

        def at_y(value: float) -> float:
            return HEIGHT - BOTTOM - (value - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

        parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(self.title)}">']
        for tick in _ticks(y0, y1):
            parts.append(
                f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at_y(tick):.1f}" y2="{at_y(tick):.1f}"/>'
            )
            parts.append(f'<text x="{LEFT - 8}" y="{at_y(tick) + 4:.1f}" text-anchor="end">{_percent(tick)}</text>')
        for tick in _ticks(x0, x1):
            parts.append(
                f'<text x="{at_x(tick):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{_percent(tick)}</text>'
            )
        for left, right, height in self.bars:
            wide = max(1.0, at_x(right) - at_x(left) - 1)
            top = at_y(height)
            parts.append(
                f'<rect class="bar" x="{at_x(left):.1f}" y="{top:.1f}" width="{wide:.1f}" '
                f'height="{max(0.0, at_y(y0) - top):.1f}"/>'
            )
        for line in self.lines:
            xs, ys = _thin(line.x, line.y)
            path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in zip(xs, ys, strict=True))
            dash = ' stroke-dasharray="5 4"' if line.dashed else ""
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="var({line.colour})" stroke-width="2.2"{dash}/>'
            )
        for point in self.points:
            end = point.x > x0 + 0.7 * (x1 - x0)
            side, anchor = (-10, "end") if end else (10, "start")
            parts.append(
                f'<circle cx="{at_x(point.x):.1f}" cy="{at_y(point.y):.1f}" r="5.5" fill="var({point.colour})"/>'
                f'<text class="name" x="{at_x(point.x) + side:.1f}" y="{at_y(point.y) - 9:.1f}" '
                f'text-anchor="{anchor}">{escape(point.name)}</text>'
            )
        below = f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
        middle = (TOP + HEIGHT - BOTTOM) / 2
        beside = f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">'
        parts += [f"{below}{escape(self.x_title)}</text>", f"{beside}{escape(self.y_title)}</text>"]
        return "".join([*parts, "</svg>"])

    def legend(self) -> str:
        """Return the names and colours of the lines as HTML."""
        return "".join(
            f'<span><i style="background:var({line.colour})"></i>{escape(line.name)}</span>' for line in self.lines
        )

    def _range(self, axis: str) -> tuple[float, float]:
        if self.square:
            return 0.0, 1.0
        values = [v for line in self.lines for v in getattr(line, axis)] + [getattr(p, axis) for p in self.points]
        finite = [v for v in values if np.isfinite(v)] or [0.0, 1.0]
        low, high = (0.0, 1.0) if axis == "x" else (min(finite), max(finite))
        room = max(0.01, 0.08 * (high - low))
        return (low, high) if axis == "x" else (max(0.0, low - room), high + room)


def _ticks(low: float, high: float) -> list[float]:
    step = next((s for s in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2) if (high - low) / s <= 7), 0.5)
    first = np.ceil(low / step - 1e-9) * step
    return [float(round(v, 6)) + 0.0 for v in np.arange(first, high + 1e-9, step)]


def _percent(value: float) -> str:
    text = f"{100 * value:.1f}"
    return f"{text.removesuffix('.0')}%"


def _thin(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    n = len(x)
    at = range(n) if n <= MOST_POINTS else np.unique(np.linspace(0, n - 1, MOST_POINTS).astype(int)).tolist()
    return [float(x[i]) for i in at], [float(y[i]) for i in at]
