"""Charts as inline SVG. Colours are CSS variables of the page, so that one picture serves light and dark."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Final

from tidegate.bench.report.axes import Scale, linear, logarithmic, short

WIDTH: Final = 560
HEIGHT: Final = 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 26


@dataclass(frozen=True)
class Series:
    """One line or one layer. `ys` may have NaN where there is nothing."""

    name: str
    ys: Sequence[float]
    colour: str
    """The name of a CSS variable, without its dashes."""
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """Series over the same `xs`."""

    xs: Sequence[float]
    lines: Sequence[Series] = ()
    layers: Sequence[Series] = ()
    """Areas on top of each other."""
    levels: Sequence[tuple[str, float]] = ()
    """Values to mark across the picture, with a word each."""
    x_is_logarithmic: bool = False
    y_is_logarithmic: bool = False
    steps: bool = False
    """Whether a value holds until the next, as counts in buckets do."""
    x_text: Callable[[float], str] = short
    y_text: Callable[[float], str] = short
    x_name: str = "s"
    y_values: Sequence[float] = field(default_factory=list)
    """More values that the scale must reach, so that charts side by side have the same."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not any(math.isfinite(y) for series in (*self.lines, *self.layers) for y in series.ys)

    def heights(self) -> list[float]:
        """All values of the vertical axis."""
        stacked = [sum(column) for column in zip(*(layer.ys for layer in self.layers), strict=True)]
        lines = [y for line in self.lines for y in line.ys]
        return [*stacked, *lines, *(value for _, value in self.levels), *self.y_values]


def svg(chart: Chart, label: str) -> str:
    """The chart as an SVG element; `label` is read to those who do not see it."""
    if chart.is_empty:
        return '<p class="nothing">nothing to show</p>'
    across = _across(chart)
    up = (logarithmic if chart.y_is_logarithmic else linear)(chart.heights(), HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label, quote=True)}">',
        _grid(chart, across, up),
        *_layers(chart, across, up),
        *(_line(chart, series, across, up) for series in chart.lines),
        *(_level(name, value, up) for name, value in chart.levels),
        "</svg>",
    ]
    return "".join(parts) + legend([*chart.layers, *chart.lines])


def legend(series: Sequence[Series]) -> str:
    """What the colours mean."""
    items = "".join(
        f'<li><i style="background:var(--{each.colour})"></i>{escape(each.name)}</li>'
        for each in series
        if any(each.ys)
    )
    return f'<ul class="legend">{items}</ul>'


def _across(chart: Chart) -> Scale:
    if chart.x_is_logarithmic:
        return logarithmic(chart.xs, _LEFT, WIDTH - _RIGHT)
    return Scale(0.0, max(*chart.xs, 1e-9), _LEFT, WIDTH - _RIGHT)


def _grid(chart: Chart, across: Scale, up: Scale) -> str:
    parts = []
    for value in up.ticks():
        y = up.place(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{chart.y_text(value)}</text>')
    ticks = across.ticks()
    for value in ticks:
        x = across.place(value)
        unit = f" {chart.x_name}" if chart.x_name and value == ticks[-1] else ""
        anchor = "end" if unit else "middle"
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{chart.x_text(value)}{escape(unit)}</text>'
        )
    return "".join(parts)


def _layers(chart: Chart, across: Scale, up: Scale) -> list[str]:
    floor = [0.0] * len(chart.xs)
    parts = []
    for series in chart.layers:
        top = [below + (y if math.isfinite(y) else 0.0) for below, y in zip(floor, series.ys, strict=True)]
        if top != floor:
            outline = _points(chart, top, across, up) + _points(chart, floor, across, up)[::-1]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in outline)
            parts.append(
                f'<polygon points="{path}" fill="var(--{series.colour})"><title>{escape(series.name)}</title></polygon>'
            )
        floor = top
    return parts


def _line(chart: Chart, series: Series, across: Scale, up: Scale) -> str:
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(chart.xs, series.ys, strict=True):
        if math.isfinite(y) and (y > 0 or not chart.y_is_logarithmic):
            pieces[-1].append((x, y))
        elif pieces[-1]:
            pieces.append([])
    parts = []
    for piece in pieces:
        if len(piece) == 1:
            x, y = piece[0]
            parts.append(f'<circle cx="{across.place(x):.1f}" cy="{up.place(y):.1f}" r="1.8" class="dot" '
                         f'style="fill:var(--{series.colour})"/>')  # fmt: skip
        elif piece:
            piece_chart = Chart(xs=[x for x, _ in piece], steps=chart.steps)
            places = _points(piece_chart, [y for _, y in piece], across, up)
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            dashes = ' stroke-dasharray="5 4"' if series.dashed else ""
            parts.append(
                f'<polyline points="{path}" stroke="var(--{series.colour})"{dashes}>'
                f"<title>{escape(series.name)}</title></polyline>"
            )
    return "".join(parts)


def _points(chart: Chart, ys: Sequence[float], across: Scale, up: Scale) -> list[tuple[float, float]]:
    places = [(across.place(x), up.place(y)) for x, y in zip(chart.xs, ys, strict=True)]
    if not chart.steps:
        return places
    held = [(x, before[1]) for before, (x, _) in itertools.pairwise(places)]
    return [places[0], *(place for pair in zip(held, places[1:], strict=True) for place in pair)]


def _level(name: str, value: float, up: Scale) -> str:
    y = up.place(value)
    return (
        f'<line class="level" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="level-name" x="{WIDTH - _RIGHT - 4}" y="{y - 4:.1f}" text-anchor="end">{escape(name)}</text>'
    )
