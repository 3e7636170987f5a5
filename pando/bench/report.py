"""Results of a measurement: what is in them, as a table, as a row, as a file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Distribution:
    """Summary of a quantity; zero if nothing was measured. Seconds, unless the name says otherwise."""

    mean: float
    p50: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Distribution:
        """Summary of these values."""
        if not values:
            return cls(0.0, 0.0, 0.0, 0.0, 0.0)
        ordered = sorted(values)
        return cls(
            sum(ordered) / len(ordered),
            percentile(ordered, 50),
            percentile(ordered, 95),
            percentile(ordered, 99),
            ordered[-1],
        )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of the sorted values do not exceed (nearest rank)."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One measurement. Counts are tokens; times are seconds.

    ttft: request sent to first token. itl: gap between two pieces of a stream. tpot: mean time of a token after the
    first, per request. e2e: request sent to last token.
    """

    name: str
    seconds: float
    requests: int
    errors: dict[str, int]
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    ttft: Distribution
    itl: Distribution
    tpot: Distribution
    e2e: Distribution
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def output_rate(self) -> float:
        """Generated tokens per second."""
        return self.output_tokens / self.seconds if self.seconds else 0.0

    @property
    def total_rate(self) -> float:
        """Prompt and generated tokens per second."""
        return (self.prompt_tokens + self.output_tokens) / self.seconds if self.seconds else 0.0

    @property
    def request_rate(self) -> float:
        """Finished requests per second."""
        return self.requests / self.seconds if self.seconds else 0.0

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that came from the cache."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def to_json(self) -> dict[str, Any]:
        """Everything, with the rates, ready for `json.dump`."""
        rates = {
            "output_tokens_per_second": self.output_rate,
            "total_tokens_per_second": self.total_rate,
            "requests_per_second": self.request_rate,
            "cache_hit_rate": self.hit_rate,
        }
        return {**asdict(self), **rates}


def table(result: Result) -> str:
    """The result for people."""
    lines = [
        f"{result.name}",
        f"  requests     {result.requests} in {result.seconds:.2f} s ({result.request_rate:.2f}/s)",
        f"  output       {result.output_tokens} tokens, {result.output_rate:.1f} tok/s",
        f"  total        {result.prompt_tokens + result.output_tokens} tokens, {result.total_rate:.1f} tok/s",
        f"  cache hits   {result.cached_tokens} of {result.prompt_tokens} prompt tokens ({result.hit_rate:.1%})",
    ]
    if result.ttft.max or result.e2e.max:
        lines.append(f"  {'milliseconds':14}{'mean':>10}{'p50':>10}{'p95':>10}{'p99':>10}{'max':>10}")
    for label, values in (
        ("first token", result.ttft),
        ("between", result.itl),
        ("per token", result.tpot),
        ("whole request", result.e2e),
    ):
        if values.max:
            shown = (values.mean, values.p50, values.p95, values.p99, values.max)
            lines.append(f"  {label:14}" + "".join(f"{value * 1000:10.1f}" for value in shown))
    lines += [f"  error x{count}: {text}" for text, count in result.errors.items()]
    return "\n".join(lines)


def row(result: Result, *, header: bool) -> str:
    """One line of a sweep, under a header if asked for."""
    names = ("", "out tok/s", "req/s", "hits", "TTFT p50", "p99", "ITL p50", "p99", "errors")
    head = "".join(f"{name:>{width}}" for name, width in zip(names, (16, 11, 8, 7, 10, 9, 9, 9, 8), strict=True))
    line = (
        f"{result.name:>16}{result.output_rate:11.1f}{result.request_rate:8.2f}{result.hit_rate:7.1%}"
        f"{result.ttft.p50 * 1000:10.1f}{result.ttft.p99 * 1000:9.1f}"
        f"{result.itl.p50 * 1000:9.1f}{result.itl.p99 * 1000:9.1f}{sum(result.errors.values()):8d}"
    )
    return f"{head}\n{line}" if header else line


def save(results: Sequence[Result], file: str | None) -> None:
    """Write the results as a JSON list to `file`, if one is named."""
    if file is not None:
        text = json.dumps([result.to_json() for result in results], indent=1)
        Path(file).write_text(text + "\n", encoding="utf-8")
