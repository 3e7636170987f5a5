"""The plot of a run as SVG: a panel per scenario, a bar per engine. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

from benchmarks.peers.registry import ENGINES
from benchmarks.peers.runner import MEMORY
from benchmarks.peers.summary import Cell

WIDTH, LABEL, BAR, GAP, HEAD = 760, 190, 14, 4, 34
OWN, PEER = "#2f7d5b", "#9aa5ad"


def svg(found: Mapping[tuple[str, str], Cell], names: Sequence[str], titles: Mapping[str, str]) -> str:
    """Bars are medians on a scale of the panel's own, whiskers the range; Pando's are green."""
    body: list[str] = []
    top = 0
    for name in names:
        engines = [engine for engine in ENGINES if (engine, name) in found]
        if engines:
            body += _panel(top, f"{name}: {titles[name]}", name, [(each, found[each, name]) for each in engines])
            top += HEAD + len(engines) * (BAR + GAP) + GAP
    style = "text{font:12px system-ui,sans-serif;fill:#3c4449}.t{font-weight:600}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" width="{WIDTH}" height="{top}">'
    return "\n".join(
        [head, f"<style>{style}</style>", f'<rect width="{WIDTH}" height="{top}" fill="#fff"/>', *body, "</svg>\n"]
    )


def _panel(top: int, title: str, name: str, bars: Sequence[tuple[str, Cell]]) -> list[str]:
    most = max(cell.high for _, cell in bars) or 1.0
    scale = (WIDTH - LABEL - 80) / most
    lines = [f'<text class="t" x="8" y="{top + 22}">{escape(title)}</text>']
    for index, (engine, cell) in enumerate(bars):
        y = top + HEAD + index * (BAR + GAP)
        end, middle, base = LABEL + cell.median * scale, y + BAR / 2, y + BAR - 3
        low, high = LABEL + cell.low * scale, LABEL + cell.high * scale
        colour = PEER if ENGINES[engine].is_peer else OWN
        value = cell.median / 1e9 if name == MEMORY else cell.median
        lines += [
            f'<text x="{LABEL - 8}" y="{base}" text-anchor="end">{escape(engine)}</text>',
            f'<rect x="{LABEL}" y="{y}" width="{end - LABEL:.1f}" height="{BAR}" fill="{colour}"/>',
            f'<path d="M{low:.1f} {middle}H{high:.1f}" stroke="#3c4449"/>',
            f'<text x="{high + 6:.1f}" y="{base}">{value:,.3g}</text>'
            if value < 100
            else f'<text x="{high + 6:.1f}" y="{base}">{value:,.0f}</text>',
        ]
    return lines
