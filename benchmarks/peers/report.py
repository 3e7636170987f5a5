"""The markdown page and the plot of a run; puts the page between markers of a document. Standard library only."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.registry import ENGINES
from benchmarks.peers.runner import MEMORY, START, Results, Row
from benchmarks.peers.summary import NOISY_CORES, Cell, agreement, cells, compare
from benchmarks.peers.workload import Scenario

BEGIN, END = "<!-- peers:begin -->", "<!-- peers:end -->"
Cells = Callable[[str, Cell], str]
"""The text of a cell, of the scenario's name and the figures."""
TITLES = {START: "start, seconds to the first token", MEMORY: "start, peak memory, GB"}


@dataclass(frozen=True, slots=True)
class Report:
    """What is written about a run. machine, commit, command: one line each."""

    results: Results
    scenarios: Sequence[Scenario]
    machine: str
    commit: str
    command: str

    def names(self) -> list[str]:
        """Scenarios with results, in their order, then start and memory."""
        measured = {row.scenario for row in self.results.rows}
        return [name for name in (*(each.name for each in self.scenarios), START, MEMORY) if name in measured]

    def engines(self) -> list[str]:
        """Engines that ran or failed, in the registry's order."""
        seen = {row.engine for row in self.results.rows} | {engine for engine, _ in self.results.failures}
        return [name for name in ENGINES if name in seen]

    def cells(self) -> dict[tuple[str, str], Cell]:
        """See `summary.cells`."""
        return cells(self.results.rows, self.scenarios)

    def markdown(self) -> str:
        """Machine and limits, the figures, their shares of the bound, the comparison, what failed."""
        found = self.cells()
        titles = {each.name: each.title for each in self.scenarios} | TITLES
        names = self.names()
        legend = [f"- **{name}**: {titles[name]}" for name in names]
        parts = [
            f"{self.machine}; commit {self.commit}; `{self.command}`.\n{limits_line(self.results.rows)}",
            "Median tokens/s, half the range, and n. `*`: no quiet sample (others used more than "
            f"{NOISY_CORES} cores); otherwise noisy samples are left out.",
            "\n".join(legend),
            self._table(found, names, _figure),
            "Share of the bound that follows from the limits measured beside each sample:",
            self._table(found, [name for name in names if name not in TITLES], _share),
            "Pando against the best peer (above 1: Pando is better):",
            self._comparison(found, names),
            "First tokens that are the majority's among engines with 16-bit weights: " + self._agreement(),
            "Versions: " + ", ".join(f"{name} {version}" for name, version in self.results.versions.items() if version),
            *self._failures(),
        ]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _table(self, found: dict[tuple[str, str], Cell], names: Sequence[str], text: Cells) -> str:
        lines = ["| engine | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for engine in self.engines():
            texts = [self._text(found, engine, name, text) for name in names]
            lines.append(f"| {engine} | " + " | ".join(texts) + " |")
        return "\n".join(lines)

    def _text(self, found: dict[tuple[str, str], Cell], engine: str, name: str, text: Cells) -> str:
        if (engine, name) in found:
            return text(name, found[engine, name])
        failed = (engine, name) in self.results.failures or (engine, "") in self.results.failures
        return "failed" if failed and ENGINES[engine].runs(name) else ""

    def _comparison(self, found: dict[tuple[str, str], Cell], names: Iterable[str]) -> str:
        lines = ["| scenario | Pando | | best peer of | | | ratio |", "|---|---|---|---|---|---|---|"]
        for each in compare(found, names):
            own, other = found[each.engine, each.scenario], found[each.peer, each.scenario]
            own_text, other_text = (_number(each.scenario, one.median) for one in (own, other))
            left = f"| {each.scenario} | {each.engine} | {own_text} | {each.peers} | {each.peer} | {other_text} "
            lines.append(f"{left}| {each.ratio:.2f} |")
        return "\n".join(lines) if len(lines) > 2 else ""

    def _agreement(self) -> str:
        shares = agreement(self.results.rows)
        return ", ".join(f"{name} {share:.0%}" for name, share in shares.items()) or "none compared"

    def _failures(self) -> list[str]:
        lines = [f"- {engine} {name}: {message}" for (engine, name), message in self.results.failures.items()]
        return ["Failed:\n\n" + "\n".join(lines)] if lines else []


def limits_line(rows: Sequence[Row]) -> str:
    """Medians of the limits measured beside the rows, with their range."""
    if not rows:
        return "Nothing was measured."
    parts = []
    for label, unit, values in (
        ("read", "GB/s", [row.limits.read for row in rows]),
        ("bf16", "Gop/s", [row.limits.bf16 for row in rows if row.limits.bf16]),
        ("int8", "Gop/s", [row.limits.int8 for row in rows if row.limits.int8]),
    ):
        if values:
            low, high = min(values) / 1e9, max(values) / 1e9
            parts.append(f"{label} {statistics.median(values) / 1e9:,.0f} {unit} ({low:,.0f} to {high:,.0f})")
    return "Limits of all cores, measured beside every engine: " + ", ".join(parts) + "."


def _number(name: str, value: float) -> str:
    value = value / 1e9 if name == MEMORY else value
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _figure(name: str, cell: Cell) -> str:
    star = "*" if cell.noisy else ""
    return f"{_number(name, cell.median)}{star} ±{cell.spread:.0%} ({cell.count})"


def _share(_: str, cell: Cell) -> str:
    return "" if cell.of_bound is None else f"{cell.of_bound:.0%}" + ("*" if cell.noisy else "")


def insert(document: Path, text: str) -> None:
    """Replace what is between the markers of the document. ValueError if it has none."""
    page = document.read_text(encoding="utf-8")
    if BEGIN not in page or END not in page:
        raise ValueError(f"{document} has no {BEGIN} and {END}")
    head, rest = page.split(BEGIN, 1)
    tail = rest.split(END, 1)[1]
    document.write_text(f"{head}{BEGIN}\n\n{text}\n{END}{tail}", encoding="utf-8")
