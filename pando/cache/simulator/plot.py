"""The hit-rate curve as a page of its own: HTML with an SVG inside, no scripts, nothing to load."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

Curve = Sequence[tuple[float, float]]
"""(budget in bytes, share) points."""

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 760, 420, 70, 30, 190, 60
COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#b83280", "#6b46c1", "#975a16", "#2c7a7b", "#9b2c2c")


def hit_rate_page(title: str, curves: Mapping[str, Curve]) -> str:
    """A page that shows the share of tokens from the cache over the budget, one line per name."""
    points = [point for curve in curves.values() for point in curve if math.isfinite(point[0])]
    finite = sorted({budget for budget, _ in points}) or [1.0]
    chart = _Chart(finite[0], finite[-1], max((share for _, share in points), default=1.0))
    parts = [chart.axes(finite)]
    for index, (name, curve) in enumerate(curves.items()):
        parts.append(chart.line(name, sorted(p for p in curve if math.isfinite(p[0])), index))
    safe = html.escape(title)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{safe}</title></head>\n'
        f'<body style="font-family:sans-serif;margin:2em"><h1 style="font-size:1.2em">{safe}</h1>\n'
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'font-size="12" role="img">\n{"".join(parts)}</svg>\n</body></html>\n'
    )


class _Chart:
    """Budgets run logarithmically from left to right, shares linearly from the bottom, which is 0."""

    def __init__(self, least: float, most: float, top: float) -> None:
        self._low, self._high = math.log10(least), math.log10(most)
        self._top = max(0.05, math.ceil(top * 20) / 20)

    def x(self, budget: float) -> float:
        span = self._high - self._low
        share = (math.log10(budget) - self._low) / span if span else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, share: float) -> float:
        return HEIGHT - BOTTOM - share / self._top * (HEIGHT - TOP - BOTTOM)

    def axes(self, budgets: Sequence[float]) -> str:
        rows = []
        for step in range(6):
            share = self._top * step / 5
            y = f"{self.y(share):.1f}"
            rows.append(
                f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="#ddd"/>'
                f'<text x="{LEFT - 8}" y="{y}" dy="4" text-anchor="end">{share:.0%}</text>\n'
            )
        for budget in budgets:
            rows.append(
                f'<text x="{self.x(budget):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">'
                f"{budget / 1e9:g}</text>\n"
            )
        middle = (LEFT + WIDTH - RIGHT) / 2
        rows.append(f'<text x="{middle}" y="{HEIGHT - 16}" text-anchor="middle">budget in GB</text>\n')
        rows.append(f'<text x="{LEFT - 50}" y="{TOP - 12}">prompt tokens from the cache</text>\n')
        return "".join(rows)

    def line(self, name: str, curve: Curve, index: int) -> str:
        colour = COLOURS[index % len(COLOURS)]
        places = [(self.x(budget), self.y(share)) for budget, share in curve]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        marks = "".join(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"><title>{html.escape(name)}: {share:.4f}</title>'
            "</circle>"
            for (x, y), (_, share) in zip(places, curve, strict=True)
        )
        legend = TOP + 18 * index
        return (
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>{marks}\n'
            f'<text x="{WIDTH - RIGHT + 16}" y="{legend + 4}" fill="{colour}">{html.escape(name)}</text>\n'
        )
