"""The line in the log."""

from __future__ import annotations

import logging

import pytest

from pando.scheduler import reporter as module
from tests.scheduler.harness import bench


def test_a_line_while_there_is_work_and_none_after(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EVERY_SECONDS", 0.0)
    caplog.set_level(logging.INFO, logger="pando.scheduler.reporter")
    b = bench()
    for rid in ("a", "b"):
        b.add(rid, [11] * 20, 5, ignore_eos=True)
    b.step()
    tick = b.scheduler.reporter.tick
    tick(b.scheduler.stats, b.scheduler.admission)
    assert "running 2, waiting 0" in caplog.messages[-1] and "cached 48% of prompts" in caplog.messages[-1]
    b.run()
    tick(b.scheduler.stats, b.scheduler.admission)
    count = len(caplog.messages)
    tick(b.scheduler.stats, b.scheduler.admission)
    assert len(caplog.messages) == count == 2
