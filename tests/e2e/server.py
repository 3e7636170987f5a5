"""A real server in a process group of its own, with a tiny model."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from tests.tiny_models import tiny_checkpoint

FAMILY = "qwen3"
ROOT = Path(__file__).parents[2]
LAUNCH = ("-m", "pando.launch_server", "--model-path")
SERVE = ("-m", "pando", "serve")
SMALL = ("--device", "cpu", "--num-threads", "1", "--chunked-prefill-size", "256", "--log-level", "warning")


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def group_members(group: int) -> list[int]:
    """Ids of the processes of a process group, zombies left out."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            state, _, pgrp = Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()[:3]
        except OSError:
            continue
        if int(pgrp) == group and state != "Z":
            found.append(int(entry))
    return found


class Server:
    """`python -m pando...` on a free port of this machine. Everything it says is kept in `output`."""

    def __init__(self, *options: str, how: Sequence[str] = LAUNCH, port: int | None = None, model: str = "") -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        path = model or str(tiny_checkpoint(FAMILY))
        command = [sys.executable, *how, path, "--port", str(self.port), *SMALL, *options]
        # A key of whoever runs the tests would be asked of them.
        environment = {name: value for name, value in os.environ.items() if name != "PANDO_API_KEY"}
        # Its own group, as a shell would give it: ctrl-C goes to all of them, and what is left behind can be counted.
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        # A connection per request: idle ones kept by a client that many threads share are closed under their users.
        limits = httpx.Limits(max_keepalive_connections=0)
        self.http = httpx.Client(base_url=self.url, timeout=30.0, trust_env=False, limits=limits)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.append(line)

    @property
    def output(self) -> str:
        """What it has written so far."""
        return "".join(self._lines)

    def wait_ready(self, seconds: float = 60.0) -> None:
        """Wait until /health says 200; on the way it says 503 with a phase."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"the server ended:\n{self.output}"
            try:
                reply = self.http.get("/health")
            except httpx.TransportError:
                time.sleep(0.02)
                continue
            if reply.status_code == 200:
                return
            assert reply.status_code == 503 and reply.json()["status"] == "loading", reply.text
            time.sleep(0.02)
        raise AssertionError(f"the server is not ready:\n{self.output}")

    def generate(self, **body: Any) -> Any:
        """POST /generate; the reply's JSON."""
        reply = self.http.post("/generate", json=body)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def stats(self) -> dict[str, float]:
        """The engine's counters."""
        return dict(self.http.get("/server_info").json()["stats"])

    def engine_pid(self) -> int:
        """The other process of the group."""
        (pid,) = [pid for pid in group_members(self.process.pid) if pid != self.process.pid]
        return pid

    def signal(self, number: signal.Signals, *, whole_group: bool = False) -> None:
        """Send a signal to the server, or as a terminal does to its whole group."""
        if whole_group:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)

    def wait_end(self, seconds: float = 20.0) -> int:
        """Exit code; fails if the process goes on, or if another one of its group is left behind."""
        code = self.process.wait(seconds)
        deadline = time.monotonic() + 5.0
        while left := group_members(self.process.pid):
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(0.02)
        self._reader.join(5)
        return code

    def close(self) -> None:
        """End everything, however it stands."""
        self.http.close()
        for pid in group_members(self.process.pid):
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join(5)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
