"""Summaries: percentiles, rates, and that the file holds what the table says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pando.bench.report import Distribution, Result, percentile, row, save, table


@pytest.mark.parametrize(("percent", "expected"), [(50, 5), (95, 10), (90, 9), (1, 1), (100, 10)])
def test_percentile_is_the_nearest_rank(percent: float, expected: int) -> None:
    assert percentile(list(range(1, 11)), percent) == expected


def test_distribution_of_nothing_is_zero() -> None:
    assert Distribution.of([]) == Distribution(0, 0, 0, 0, 0)
    assert Distribution.of([3.0, 1.0, 2.0]) == Distribution(2.0, 2.0, 3.0, 3.0, 3.0)


@pytest.fixture
def result() -> Result:
    return Result(
        name="concurrency 4",
        seconds=2.0,
        requests=10,
        errors={"503: full": 2},
        prompt_tokens=1000,
        cached_tokens=250,
        output_tokens=500,
        ttft=Distribution.of([0.1, 0.3]),
        itl=Distribution.of([0.01]),
        tpot=Distribution.of([0.01]),
        e2e=Distribution.of([1.0]),
    )


def test_rates(result: Result) -> None:
    assert (result.output_rate, result.total_rate, result.request_rate, result.hit_rate) == (250, 750, 5, 0.25)


def test_table_and_row_show_figures(result: Result) -> None:
    text = table(result)
    assert "250.0 tok/s" in text and "250 of 1000" in text and "error x2: 503: full" in text
    lines = row(result, header=True).splitlines()
    assert len(lines) == 2 and len(lines[0]) == len(lines[1])
    assert row(result, header=False) == lines[1] and "25.0%" in lines[1]


def test_file_is_complete(result: Result, tmp_path: Path) -> None:
    save([result], str(tmp_path / "r.json"))
    (saved,) = json.loads((tmp_path / "r.json").read_text())
    assert saved["ttft"]["p50"] == 0.1 and saved["cache_hit_rate"] == 0.25 and saved["errors"] == {"503: full": 2}
