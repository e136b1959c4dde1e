"""Draws step curves as an SVG picture, without a plotting library."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 400, 60, 230, 20, 50  # pixels; the legend is right of the plot
COLOURS = ("#0b6e4f", "#d1495b", "#3066be", "#8d6a9f", "#edae49")
Curve = Sequence[tuple[float, float]]  # (x, y) at each step, in the order of x


def steps(curves: Mapping[str, Sequence[Curve]], x_label: str, y_label: str, x_max: float) -> str:
    """Return an SVG with all curves, each in the colour of its name, from its first step to `x_max`."""
    values = [y for several in curves.values() for curve in several for _, y in curve]
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 1.0
    low, high = low - margin, high + margin

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + x / x_max * (WIDTH - LEFT - RIGHT)
        return across, TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
    ]
    for k in range(6):
        (x, bottom), (left, y) = place(x_max * k / 5, low), place(0, low + (high - low) * k / 5)
        parts.append(f'<text x="{x:.0f}" y="{bottom + 18:.0f}" text-anchor="middle">{x_max * k / 5:.0f}</text>')
        parts.append(
            f'<text x="{left - 6:.0f}" y="{y + 4:.0f}" text-anchor="end">{low + (high - low) * k / 5:.2f}</text>'
        )
        parts.append(f'<path d="M{left:.0f} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
    for number, (name, several) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        for curve in several:
            if curve:
                parts.append(
                    f'<path d="{_path([place(x, y) for x, y in curve], place(x_max, low)[0])}" '
                    f'fill="none" stroke="{colour}" stroke-width="2" opacity="0.8"/>'
                )
        y = TOP + 14 + 20 * number
        parts.append(f'<path d="M{WIDTH - RIGHT + 12} {y - 4}h22" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 40}" y="{y}">{html.escape(name)}</text>')
    middle = (LEFT + WIDTH - RIGHT) // 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{html.escape(x_label)}</text>')
    parts.append(
        f'<text transform="translate(14 {HEIGHT // 2}) rotate(-90)" text-anchor="middle">{html.escape(y_label)}</text>'
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _path(points: Sequence[tuple[float, float]], end: float) -> str:
    (x, y), *others = points
    return f"M{x:.1f} {y:.1f}" + "".join(f"H{x:.1f}V{y:.1f}" for x, y in others) + f"H{end:.1f}"
