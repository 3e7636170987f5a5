"""The cache's page and its benchmark stay true: the samples run, and every call in the table exists."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.cache import decode_steps, evictions, request_calls
from pando.cache.manager import CacheManager

PAGE = (Path(__file__).parents[2] / "docs" / "prefix-cache.md").read_text(encoding="utf-8")


def test_samples_run() -> None:
    samples = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert samples
    for sample in samples:
        exec(compile(sample, "docs/prefix-cache.md", "exec"), {})


def test_the_table_names_every_public_call() -> None:
    table = PAGE[PAGE.index("## Calls") : PAGE.index("```python")]
    public = {name for name in vars(CacheManager) if not name.startswith("_")}
    named = set(re.findall(r"`(\w+)[(.`]", table))
    assert public - named == set()


def test_the_benchmark_runs() -> None:
    rows = [*evictions(100), *request_calls(16, 1), *decode_steps(16, 1)]
    assert len(rows) == 8
    assert all(microseconds > 0 for _, microseconds in rows)
