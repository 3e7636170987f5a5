"""What `benchmarks/gpu.py` says at the end: a line for each figure, how the steps ended, and what was promised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

Figures = dict[str, float | str]
"""Name -> value. Names end in their unit: ms, s, tok/s, GB/s; `roofline` and `idle` are shares."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a step ended, the seconds it took, and what it found. unfit: it found that no step can run here."""

    state: str
    seconds: float = 0.0
    figures: Figures = field(default_factory=dict)
    unfit: bool = False

    def as_json(self) -> dict[str, object]:
        """For a file."""
        return {"state": self.state, "seconds": round(self.seconds, 1), **self.figures}


Results = Mapping[str, Outcome]

MODELS = ("llama-8b", "qwen3-0.6b", "qwen3-30b-a3b", "qwen3-next-half")


def number(results: Results, step: str, name: str) -> float | None:
    """A figure, if the step came to it."""
    value = results[step].figures.get(name) if step in results else None
    return float(value) if isinstance(value, int | float) else None


def ratio(above: float | None, below: float | None) -> float | None:
    """Of two figures, if both are there."""
    return above / below if above is not None and below else None


@dataclass(frozen=True, slots=True)
class Promise:
    """What is promised of a GPU, and what was found: None = the step did not come to it. most: the bound is above."""

    what: str
    found: float | None
    bound: float
    unit: str = "%"
    most: bool = False

    def line(self) -> str:
        """`yes`, `NO` or `?`, with the figure and its bound."""
        sign = "<" if self.most else ">="
        if self.found is None:
            return f"  ?   {self.what}: not measured ({sign} {self._text(self.bound)})"
        kept = self.found < self.bound if self.most else self.found >= self.bound
        return f"  {'yes' if kept else 'NO '} {self.what}: {self._text(self.found)} ({sign} {self._text(self.bound)})"

    def _text(self, value: float) -> str:
        return f"{value:.1%}" if self.unit == "%" else f"{value:.2f}{self.unit}"


def promises(results: Results) -> list[Promise]:
    """What the project promises, in its order."""
    suites = [number(results, "correct", f"{suite} right") for suite in ("kernels", "engine", "waiting")]
    right = 0.0 if 0.0 in suites else None if None in suites else 1.0
    shares = {rows: number(results, "llama-8b", f"decode {rows} roofline") for rows in (1, 64, 256)}
    found = [
        Promise("kernels, engine and waiting as tested", right, 1.0),
        *(Promise(f"decode batch {rows}, 8B, of the roofline", share, 0.85) for rows, share in shares.items()),
        Promise("prefill 8K, 8B, of the products' rate", number(results, "llama-8b", "prefill roofline"), 0.70),
    ]
    for model in ("llama-8b", "qwen3-0.6b"):
        for rows in (16, 64):
            idle = number(results, f"{model}-http", f"http {rows} idle")
            found.append(Promise(f"idle, {model}, {rows} streams through the server", idle, 0.02, most=True))
    found.append(Promise("shared prefix of 8K, 64 requests, gain", shared_gain(results), 2.0, "x"))
    for model in ("llama-8b", "qwen3-0.6b"):
        found.append(Promise(f"offline beside transformers, {model}", offline_gain(results, model), 5.0, "x"))
    return found


def shared_gain(results: Results) -> float | None:
    """How much faster a step is that reads a shared prefix once."""
    apart = number(results, "llama-8b-unshared", "shared prefix ms")
    return ratio(apart, number(results, "llama-8b", "shared prefix ms"))


def offline_gain(results: Results, model: str) -> float | None:
    """Throughput over that of transformers, at its better way to run."""
    step = f"{model}-transformers"
    rates = [number(results, step, f"{way} tok/s") for way in ("static", "continuous")]
    return ratio(number(results, model, "offline tok/s"), max((rate for rate in rates if rate is not None), default=0))


def summary(results: Results, seconds: float, logs: Path) -> list[str]:
    """The end of the output, the most important last. Below 60 lines."""
    limits = results["limits"].figures if "limits" in results else {}
    rates = [f"{name} {value:,.3g}" for name, value in limits.items() if isinstance(value, float)]
    measured = "; ".join(rates) or "limits not measured: those of an H200, from elsewhere"
    lines = ["", f"== summary: {limits.get('device', 'device unknown')}, {seconds:.0f} s; logs in {logs}", measured]
    ended = [f"{name} {outcome.state} {outcome.seconds:.0f} s" for name, outcome in results.items()]
    lines += ["steps: " + "; ".join(ended)]
    for model in MODELS:
        lines += _model_lines(results, model)
    return [*lines, "promised (yes, NO, ? = not measured):", *(promise.line() for promise in promises(results))]


def _model_lines(results: Results, model: str) -> Iterator[str]:
    """A model's figures, all ways to run it side by side."""
    own = results[model].figures if model in results else {}
    for name in own:
        if name.startswith("decode ") and name.endswith(" ms"):
            yield _decode_line(results, model, name.split()[1])
    prefill, share = number(results, model, "prefill ms"), number(results, model, "prefill roofline")
    if prefill is not None and share is not None:
        yield f"{model} prefill {prefill:.1f} ms, {share:.1%} of the products' rate"
    together, share = number(results, model, "shared prefix ms"), number(results, model, "shared prefix roofline")
    if together is not None and share is not None:
        apart = number(results, f"{model}-unshared", "shared prefix ms")
        beside = f"; read by each {apart:.3f} ms" if apart is not None else ""
        yield f"{model} shared prefix {together:.3f} ms a step, {share:.1%} of the roofline{beside}"
    offline = number(results, model, "offline tok/s")
    if offline is not None:
        yield f"{model} offline {offline:,.0f} tok/s{_others(results, model)}"


def _decode_line(results: Results, model: str, rows: str) -> str:
    milliseconds = number(results, model, f"decode {rows} ms") or 0.0
    share, idle = (number(results, model, f"decode {rows} {what}") or 0.0 for what in ("roofline", "idle"))
    line = f"{model} decode {rows:>3}: {milliseconds:.3f} ms, {share:.1%} of the roofline, idle {idle:.1%}"
    served = number(results, f"{model}-http", f"http {rows} tok/s")
    if served is None:
        return line
    idle = number(results, f"{model}-http", f"http {rows} idle") or 0.0
    return f"{line}; served {int(rows) / served * 1e3:.3f} ms, {served:,.0f} tok/s, idle {idle:.1%}"


def _others(results: Results, model: str) -> str:
    """Transformers' throughputs, both ways."""
    figures = results[f"{model}-transformers"].figures if f"{model}-transformers" in results else {}
    parts = []
    for way in ("static", "continuous"):
        rate, why = figures.get(f"{way} tok/s"), figures.get(f"{way} failed")
        if isinstance(rate, float):
            parts.append(f"{way} {rate:,.0f}")
        elif why is not None:
            parts.append(f"{way} did not work")
    return f"; transformers {', '.join(parts)} tok/s" if parts else ""
