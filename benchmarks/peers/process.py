"""One engine process: gives it its jobs, reads its events, watches its memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.machine import LoadMeter, tree_peak_rss, tree_rss

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 1800.0
POLL_SECONDS = 0.25


@dataclass(slots=True)
class Outcome:
    """What a process told. ready_seconds: from its start to its first token; ready_bytes: most resident memory of its
    tree until then; samples: events of `session`; failures: scenario, or "" for the engine itself, to a message."""

    ready_seconds: float | None = None
    ready_bytes: int = 0
    ready_foreign_cores: float = 0.0
    version: str = ""
    samples: list[dict[str, Any]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)


class MemoryWatch:
    """Peak memory of a process tree until it is stopped.

    The kernel keeps the peak of a process, so that polling, which takes a core milliseconds, may be rare: it is for
    processes that have ended by then.
    """

    def __init__(self, pid: int) -> None:
        self._peak = 0
        self._pid = pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """The peak in bytes; counts no further."""
        self._stop.set()
        self._thread.join()
        return max(self._peak, tree_peak_rss(self._pid))

    def _poll(self) -> None:
        while True:
            self._peak = max(self._peak, tree_rss(self._pid))
            if self._stop.wait(POLL_SECONDS):
                return


def run(command: Sequence[str], variables: dict[str, str], order: dict[str, object], log: Path) -> Outcome:
    """Run an adapter with its order on stdin; what the engine prints goes to `log`. Never raises for its failures."""
    outcome = Outcome()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **variables}
    with open(log, "w", encoding="utf-8") as errors:
        load = LoadMeter.start(os.getpid())
        begun = time.time()
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        watch = MemoryWatch(process.pid)
        timer = threading.Timer(TIMEOUT_SECONDS, _kill, [process])
        timer.start()
        try:
            _talk(process, order, outcome, begun, load, watch)
        finally:
            timer.cancel()
            watch.stop()
            _kill(process)
            if process.stdout is not None:
                process.stdout.close()
    if process.returncode and "" not in outcome.failures:
        outcome.failures[""] = f"ended with status {process.returncode}: {_last_line(log)}"
    return outcome


def _talk(
    process: subprocess.Popen[str],
    order: dict[str, object],
    outcome: Outcome,
    begun: float,
    load: LoadMeter,
    watch: MemoryWatch,
) -> None:
    assert process.stdin is not None and process.stdout is not None
    try:
        with process.stdin as stdin:
            json.dump(order, stdin)
    except BrokenPipeError:
        pass  # it ended before it read its order; its status says so below
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "ready":
            outcome.ready_seconds = event["at"] - begun
            outcome.ready_foreign_cores = load.foreign_cores()
            outcome.ready_bytes = watch.stop()
            outcome.version = event["version"]
        elif event["event"] == "sample":
            outcome.samples.append(event)
        elif event["event"] == "failure":
            outcome.failures[event["scenario"]] = event["message"]
    process.wait()


def _kill(process: subprocess.Popen[str]) -> None:
    """End what is left of the process and its children."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "no message"
