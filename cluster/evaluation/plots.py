"""Plots as inline SVG, coloured by the page's style sheet: classes s0, s1, ... are series."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 64, 36, 14, 44
COLOURS = 6
"""Series of the style sheet; more are dashed and begin again."""


@dataclass(frozen=True, slots=True)
class Series:
    """Values at 0, 1, ... on the x axis; `tips` are shown when a point is pointed at."""

    name: str
    values: Sequence[float]
    tips: Sequence[str]


def lines(
    title: str, x_label: str, y_label: str, ticks: Sequence[str], series: Sequence[Series]
) -> str:
    """One line a series, from zero up; `ticks` name the places on the x axis."""
    top = _nice(max((v for one in series for v in one.values if math.isfinite(v)), default=0.0))
    parts = [_axes(x_label, y_label, ticks, top, centred=False)]
    for index, one in enumerate(series):
        points = [(_x(i, len(ticks)), _y(min(v, top), top)) for i, v in enumerate(one.values)]
        dashed = " dashed" if index >= COLOURS else ""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline class="line s{index % COLOURS}{dashed}" points="{path}"/>')
        parts += [
            f'<circle class="dot s{index % COLOURS}" cx="{x:.1f}" cy="{y:.1f}" r="3">'
            f"<title>{escape(tip)}</title></circle>"
            for (x, y), tip in zip(points, one.tips, strict=True)
        ]
    return _svg(title, parts)


def bars(
    title: str, x_label: str, y_label: str, ticks: Sequence[str], one: Series, colour: int
) -> str:
    """One bar a value."""
    top = _nice(max(one.values, default=0.0))
    parts = [_axes(x_label, y_label, ticks, top, centred=True)]
    step = (WIDTH - LEFT - RIGHT) / max(len(ticks), 1)
    for i, (value, tip) in enumerate(zip(one.values, one.tips, strict=True)):
        y = _y(value, top)
        parts.append(
            f'<rect class="bar s{colour % COLOURS}" x="{LEFT + i * step + 1:.1f}" y="{y:.1f}" '
            f'width="{max(step - 2, 1):.1f}" height="{HEIGHT - BOTTOM - y:.1f}"><title>{escape(tip)}</title></rect>'
        )
    return _svg(title, parts)


def _svg(title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )


def _axes(x_label: str, y_label: str, ticks: Sequence[str], top: float, *, centred: bool) -> str:
    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = _y(share * top, top)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(
            f'<text class="end" x="{LEFT - 6}" y="{y + 4:.1f}">{_number(share * top)}</text>'
        )
    every = max(1, -(-len(ticks) // 12))  # as many names as do not touch
    step = (WIDTH - LEFT - RIGHT) / max(len(ticks), 1)
    for i, tick in enumerate(ticks):
        if i % every == 0:
            x = LEFT + (i + 0.5) * step if centred else _x(i, len(ticks))
            parts.append(
                f'<text class="mid" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}">{escape(tick)}</text>'
            )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="mid label" x="{middle:.1f}" y="{HEIGHT - 6}">{escape(x_label)}</text>'
    )
    centre = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text class="mid label" transform="translate(14 {centre:.1f}) rotate(-90)">{escape(y_label)}</text>'
    )
    return "".join(parts)


def _x(index: int, count: int) -> float:
    return LEFT + 8 + (WIDTH - LEFT - RIGHT - 16) * (index / (count - 1) if count > 1 else 0.5)


def _y(value: float, top: float) -> float:
    share = value / top if top else 0.0
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - share)


def _nice(most: float) -> float:
    """The next of 1, 2, 4, 6, 8 times a power of ten."""
    if not most > 0:
        return 1.0
    power: float = 10.0 ** math.floor(math.log10(most))
    return next(n for n in (1, 2, 4, 6, 8, 10) if n * power >= most * 0.999999) * power


def _number(value: float) -> str:
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.1e}"
    return f"{value:,.6g}"
