"""Starts that fail, signals, and an engine that dies: exit codes, one clean line, and no process left behind."""

from __future__ import annotations

import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.server import SERVE, Server, free_port, group_members

LONG: dict[str, Any] = {
    "text": "once",
    "sampling_params": {"temperature": 0.0, "ignore_eos": True, "max_new_tokens": 1000},
}


def test_ctrl_c_lets_requests_finish_and_leaves_nothing_behind() -> None:
    with Server(how=SERVE) as server:
        server.wait_ready()
        assert len(group_members(server.process.pid)) == 2
        with ThreadPoolExecutor(1) as pool:
            work = pool.submit(
                server.generate, **{**LONG, "sampling_params": {**LONG["sampling_params"], "max_new_tokens": 200}}
            )
            while not server.stats()["num_running"]:
                time.sleep(0.005)
            server.signal(signal.SIGINT, whole_group=True)
            assert len(work.result()["output_ids"]) == 200
        assert server.wait_end() == 130
        assert "Traceback" not in server.output and "stopped" in server.output


def test_ctrl_c_twice_ends_at_once_with_an_answer() -> None:
    with Server(how=SERVE) as server:
        server.wait_ready()
        with ThreadPoolExecutor(1) as pool:
            work = pool.submit(server.http.post, "/generate", json=LONG)
            while not server.stats()["num_running"]:
                time.sleep(0.005)
            server.signal(signal.SIGINT, whole_group=True)
            time.sleep(0.05)
            server.signal(signal.SIGINT, whole_group=True)
            reply = work.result()
            assert reply.status_code in (200, 503), reply.text  # 200 if it was quicker than the second signal
            if reply.status_code == 503:
                assert reply.json()["error"]["code"] == "engine_unavailable"
        assert server.wait_end() == 130
        assert "Traceback" not in server.output


@pytest.mark.parametrize("wait", [0.0, 0.6])
def test_ctrl_c_while_the_engine_starts_is_quiet(wait: float) -> None:
    """The terminal sends it to the engine as well, which may not even have begun to read its configuration."""
    with Server(how=SERVE) as server:
        deadline = time.monotonic() + 30
        while len(group_members(server.process.pid)) < 2:
            assert time.monotonic() < deadline and server.process.poll() is None, server.output
            time.sleep(0.005)
        time.sleep(wait)
        server.signal(signal.SIGINT, whole_group=True)
        assert server.wait_end() == 130
        assert "Traceback" not in server.output and "KeyboardInterrupt" not in server.output, server.output


@pytest.mark.parametrize("when", ["loading", "ready"])
def test_sigterm_leaves_nothing_behind(when: str) -> None:
    with Server() as server:
        if when == "ready":
            server.wait_ready()
        else:
            deadline = time.monotonic() + 30
            while len(group_members(server.process.pid)) < 2:
                assert time.monotonic() < deadline and server.process.poll() is None, server.output
                time.sleep(0.01)
        server.signal(signal.SIGTERM)
        assert server.wait_end() == 0
        assert "Traceback" not in server.output


def test_a_server_that_is_killed_takes_its_engine_along() -> None:
    with Server() as server:
        server.wait_ready()
        server.signal(signal.SIGKILL)
        assert server.wait_end() == -signal.SIGKILL


def test_an_engine_that_is_killed_ends_requests_with_503_and_the_server() -> None:
    with Server() as server:
        server.wait_ready()
        assert server.http.get("/health").json() == {"status": "ok"}
        with ThreadPoolExecutor(1) as pool:
            work = pool.submit(server.http.post, "/generate", json=LONG)
            while not server.stats()["num_running"]:
                time.sleep(0.002)
            os.kill(server.engine_pid(), signal.SIGKILL)
            reply = work.result()
        assert reply.status_code == 503, reply.text
        assert reply.json()["error"]["code"] == "engine_unavailable" and "engine" in reply.json()["error"]["message"]
        try:
            health = server.http.get("/health")
            assert health.status_code == 503 and health.json()["status"] == "dead"
        except httpx.TransportError:
            pass  # it has stopped listening already
        assert server.wait_end() == 1
        assert "the engine ended" in server.output and "Traceback" not in server.output


def test_a_bad_model_path_is_one_line_and_exit_code_2() -> None:
    with Server(model="/nowhere/at/all") as server:
        assert server.wait_end() == 2
        assert "Traceback" not in server.output
        lines = [line for line in server.output.splitlines() if "/nowhere/at/all" in line]
        assert len(lines) == 1 and lines[0].startswith("pando: ")


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with Server(model=str(tmp_path)) as server:
        assert server.wait_end() == 2
        assert "Traceback" not in server.output and "pando: " in server.output


def test_a_port_in_use_is_named_with_a_free_one() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with Server(port=port) as server:
            assert server.wait_end() == 2
            assert f"port {port} is in use; use --port " in server.output
            assert "Traceback" not in server.output


def test_an_unknown_option_is_exit_code_2() -> None:
    with Server("--page-sise", "4", port=free_port()) as server:
        assert server.wait_end() == 2
        assert "page-sise" in server.output and "Traceback" not in server.output
