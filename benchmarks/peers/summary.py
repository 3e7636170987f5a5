"""Medians, spreads, ratios: from rows to the cells of the table. Standard library only."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.peers.limits import bound
from benchmarks.peers.registry import ENGINES, Engine
from benchmarks.peers.runner import MEMORY, START, Row
from benchmarks.peers.workload import Scenario

NOISY_CORES = 0.15
"""A sample is noisy if others kept more than this many cores busy meanwhile."""
LOWER_IS_BETTER = (START, MEMORY)
START_MODEL = "0.6b"


@dataclass(frozen=True, slots=True)
class Cell:
    """Samples of one engine in one scenario.

    low, high: smallest and largest sample; noisy: no sample was quiet, so all are in, otherwise only quiet ones;
    of_bound: median ratio to the bound that follows from the limits measured beside each sample, if there is one.
    """

    median: float
    low: float
    high: float
    count: int
    noisy: bool
    of_bound: float | None = None

    @property
    def spread(self) -> float:
        """Half the range, as a share of the median."""
        return (self.high - self.low) / 2 / self.median if self.median else 0.0


def cell(rows: Sequence[Row], scenario: Scenario | None, bits: int) -> Cell:
    """The samples of one engine; scenario None: nothing bounds them (start, memory)."""
    quiet = [row for row in rows if row.foreign_cores <= NOISY_CORES]
    used = quiet or rows
    values = [row.value for row in used]
    bounds = [None if scenario is None else bound(scenario, bits, row.limits) for row in used]
    ratios = [row.value / most for row, most in zip(used, bounds, strict=True) if most]
    of_bound = statistics.median(ratios) if ratios else None
    return Cell(statistics.median(values), min(values), max(values), len(used), not quiet, of_bound)


def cells(rows: Iterable[Row], scenarios: Iterable[Scenario]) -> dict[tuple[str, str], Cell]:
    """(engine, scenario) to its cell; `start` and `memory` are those of the 0.6 B model."""
    known = {scenario.name: scenario for scenario in scenarios}
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.scenario in known or row.model == START_MODEL:
            groups.setdefault((row.engine, row.scenario), []).append(row)
    return {
        (engine, name): cell(group, known.get(name), ENGINES[engine].bits) for (engine, name), group in groups.items()
    }


@dataclass(frozen=True, slots=True)
class Comparison:
    """Pando against the best of some peers. ratio > 1: Pando is better, also where less is better."""

    scenario: str
    engine: str
    peers: str
    peer: str
    ratio: float


CLASSES: tuple[tuple[int, str, tuple[int, ...]], ...] = (
    (16, "16 bits", (16,)),
    (8, "8 bits", (8,)),
    (8, "8 bits or fewer", (8, 4)),
    (4, "4 bits", (4,)),
)
"""Bits of Pando's weights, and of the peers' that they are compared with."""


def compare(found: dict[tuple[str, str], Cell], names: Iterable[str]) -> list[Comparison]:
    """For each scenario and class: Pando's best engine of that width and the best peer, where both were measured."""
    comparisons = []
    for name in names:
        for bits, label, widths in CLASSES:
            own = _best(
                found, name, [engine for engine in ENGINES.values() if not engine.is_peer and engine.bits == bits]
            )
            peer = _best(
                found, name, [engine for engine in ENGINES.values() if engine.is_peer and engine.bits in widths]
            )
            if own is None or peer is None:
                continue
            ratio = found[own, name].median / found[peer, name].median
            ratio = 1 / ratio if name in LOWER_IS_BETTER else ratio
            comparisons.append(Comparison(name, own, label, peer, ratio))
    return comparisons


def _best(found: dict[tuple[str, str], Cell], name: str, engines: Iterable[Engine]) -> str | None:
    sign = -1 if name in LOWER_IS_BETTER else 1
    able = [engine.name for engine in engines if (engine.name, name) in found]
    return max(able, key=lambda engine: sign * found[engine, name].median, default=None)


def agreement(rows: Iterable[Row]) -> dict[str, float]:
    """Share of prompts whose first token is the one that most engines with 16-bit weights choose.

    All of them run the same weights, so a low share means that an engine computes something else. Near-ties between
    logits of random weights fall either way in 16-bit arithmetic; quantised engines differ more.
    """
    votes: dict[tuple[str, int, int, int], Counter[int]] = {}
    chosen: dict[str, list[tuple[tuple[str, int, int, int], int]]] = {}
    samples: Counter[tuple[str, str, int]] = Counter()
    for row in rows:
        samples[row.engine, row.scenario, row.round] += 1
        for index, token in enumerate(row.first_tokens):
            prompt = (row.scenario, row.round, samples[row.engine, row.scenario, row.round], index)
            chosen.setdefault(row.engine, []).append((prompt, token))
            if ENGINES[row.engine].bits == 16:
                votes.setdefault(prompt, Counter())[token] += 1
    shares = {}
    for engine, picks in chosen.items():
        judged = [(votes[prompt], token) for prompt, token in picks if prompt in votes]
        if judged:
            shares[engine] = sum(vote.most_common(1)[0][0] == token for vote, token in judged) / len(judged)
    return shares
