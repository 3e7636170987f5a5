"""Runs engines one after the other, round by round, and gathers what they measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers import process
from benchmarks.peers.environments import Installer, variables
from benchmarks.peers.limits import Limits, best
from benchmarks.peers.machine import cores
from benchmarks.peers.registry import OWN_ENVIRONMENT, Engine
from benchmarks.peers.workload import SHAPES, Scenario, job

KV_BYTES = 4 << 30
"""Room for keys and values, alike for all engines that can be told."""
START = "start"
MEMORY = "memory"


@dataclass(frozen=True, slots=True)
class Row:
    """One sample. value: tokens/s; of `start` seconds from the command to the first token, of `memory` peak bytes.

    foreign_cores: mean number of cores that something else kept busy meanwhile. limits: measured just before and after
    the engine ran, the better of the two. first_tokens: of every prompt, where known.
    """

    engine: str
    model: str
    scenario: str
    round: int
    value: float
    foreign_cores: float
    limits: Limits
    first_tokens: tuple[int, ...] = ()


@dataclass(slots=True)
class Results:
    """Everything a run has found. failures: engine and scenario ("" is the engine itself) to a message."""

    rows: list[Row] = field(default_factory=list)
    failures: dict[tuple[str, str], str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Runner:
    """Runs engines whose environments are installed on models that are made."""

    installer: Installer
    models: Path
    logs: Path
    scenarios: Sequence[Scenario]
    limits: Callable[[], Limits]
    with_start: bool

    def run(self, engines: Sequence[Engine], rounds: int, results: Results) -> Iterator[int]:
        """All rounds; yields after each process. Every round begins with another engine: none is always the first."""
        for index in range(rounds):
            shift = index % max(1, len(engines))
            for model in SHAPES:
                for engine in [*engines[shift:], *engines[:shift]]:
                    self.run_engine(engine, model, index, results)
                    yield index

    def run_engine(self, engine: Engine, model: str, index: int, results: Results) -> None:
        """One process: its start, and all scenarios of the model that the engine runs. Prints a line."""
        chosen = [scenario for scenario in self.scenarios if scenario.model == model and engine.runs(scenario.name)]
        with_start = self.with_start and engine.runs(START)
        if not chosen and not with_start:
            return
        before = self.limits()
        outcome = process.run(
            [self.installer.python(engine.environment), "-m", f"benchmarks.peers.engines.{engine.adapter}"],
            self._variables(engine),
            {"settings": self._settings(engine, model, chosen), "jobs": [job(each, index) for each in chosen]},
            self.logs / f"{engine.name.replace(' ', '-')}-{model}.log",
        )
        limits = best(before, self.limits())
        rows = list(_rows(outcome, engine, model, index, limits, {each.name: each for each in chosen}, with_start))
        results.rows += rows
        results.versions[engine.name] = outcome.version or results.versions.get(engine.name, "")
        results.failures.update({(engine.name, name): message for name, message in outcome.failures.items()})
        print(f"round {index + 1}, {model}, {engine.name}:", *_words(rows), *outcome.failures.values(), flush=True)

    def _variables(self, engine: Engine) -> dict[str, str]:
        own = engine.environment == OWN_ENVIRONMENT
        return {**({} if own else variables(self.installer.folder / engine.environment)), **engine.settings}

    def _settings(self, engine: Engine, model: str, chosen: Sequence[Scenario]) -> dict[str, object]:
        """`session.Settings`."""
        longest = max((scenario.length for scenario in chosen), default=256)
        tokens = max((scenario.requests * scenario.length for scenario in chosen), default=4096)
        return {
            "model": str(self.models / model / engine.model),
            "variant": engine.variant,
            "context": -(-(longest + 16) // 256) * 256,
            "pool_tokens": min(2 * tokens, KV_BYTES // SHAPES[model].kv_bytes),
            "requests": max((scenario.requests for scenario in chosen), default=1),
            "threads": cores(),
        }


def value_of(scenario: Scenario, figures: dict[str, Any]) -> float:
    """Tokens/s of a sample, from the figures of `session.measure`."""
    if scenario.measure == "prefill":
        return scenario.prompt / float(figures["first_seconds"])
    if scenario.measure == "decode":
        return float(figures["decode_tokens"] / figures["decode_seconds"])
    return float(figures["output_tokens"] / figures["seconds"])


def _rows(
    outcome: process.Outcome,
    engine: Engine,
    model: str,
    index: int,
    limits: Limits,
    chosen: dict[str, Scenario],
    with_start: bool,
) -> Iterator[Row]:
    if with_start and outcome.ready_seconds is not None:
        foreign = outcome.ready_foreign_cores
        yield Row(engine.name, model, START, index, outcome.ready_seconds, foreign, limits)
        yield Row(engine.name, model, MEMORY, index, outcome.ready_bytes, 0.0, limits)
    for sample in outcome.samples:
        scenario = chosen[sample["scenario"]]
        value, foreign, first = value_of(scenario, sample), sample["foreign_cores"], tuple(sample["first_tokens"])
        yield Row(engine.name, model, scenario.name, index, value, foreign, limits, first)


def _words(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        unit = {START: " s", MEMORY: " GB"}.get(row.scenario, "")
        yield f"{row.scenario} {row.value / (1e9 if row.scenario == MEMORY else 1):,.4g}{unit};"
