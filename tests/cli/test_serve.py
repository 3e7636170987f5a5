"""`pando serve`: the engine process begins before the server is imported, and never outlives a failed start."""

from __future__ import annotations

import pytest

from pando import engine_process
from pando.cli import main, serve
from pando.core.config import Config
from pando.errors import ConfigError
from pando.server import launch


class Spawned:
    """Stands for a SpawnedEngine."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.stops = 0

    def stop(self) -> None:
        self.stops += 1


@pytest.fixture
def spawned(monkeypatch: pytest.MonkeyPatch) -> list[Spawned]:
    made: list[Spawned] = []

    def spawn(config: Config) -> Spawned:
        made.append(Spawned(config))
        return made[-1]

    monkeypatch.setattr(engine_process, "spawn_engine", spawn)
    monkeypatch.setattr(serve.signal, "signal", lambda *_: None)  # this process keeps its own
    return made


def test_the_server_gets_the_engine_that_has_begun(spawned: list[Spawned], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def run_server(config: Config, *, spawned: Spawned) -> int:
        seen.extend((config, spawned))
        return 0

    monkeypatch.setattr(launch, "run_server", run_server)
    assert main(["serve", "--port", "31999"]) == 0
    assert seen == [spawned[0].config, spawned[0]] and spawned[0].config.port == 31999
    assert spawned[0].stops == 0


@pytest.mark.parametrize(("error", "code"), [(ConfigError("port in use"), 2), (KeyboardInterrupt(), 130)])
def test_a_failed_start_ends_the_engine(
    error: BaseException, code: int, spawned: list[Spawned], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_server(config: Config, *, spawned: Spawned) -> int:
        raise error

    monkeypatch.setattr(launch, "run_server", run_server)
    assert main(["serve"]) == code
    assert spawned[0].stops == 1
