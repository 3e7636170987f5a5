"""The steps of `benchmarks/gpu.py` on a CPU with toy shapes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_engine, gpu_server, gpu_steps
from benchmarks.gpu_report import Figures
from benchmarks.gpu_shapes import SHAPES, Scale, config_of
from pando.core.batch import Batch
from pando.runtime.runner import Runner, Step

TINY = Scale("cpu", tiny=True)
LIMITS = {"copy GB/s": 50.0, "bf16 TFLOP/s": 1.0}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def figures_of(step: str, scale: Scale = TINY) -> Figures:
    """All that a step finds."""
    found: Figures = {}
    for more in gpu_steps.run_step(step, scale, LIMITS):
        assert not set(found) & set(more), "a figure comes once"
        found |= more
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_a_model_runs_through_everything(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    found = figures_of(name)
    wanted = {f"decode {rows} {what}" for rows in TINY.batches for what in ("ms", "roofline", "idle")}
    others = {
        "start s",
        "prefill ms",
        "prefill roofline",
        "offline tok/s",
        "shared prefix ms",
        "shared prefix roofline",
    }
    assert set(found) == wanted | others
    assert all(float(value) > 0 for key, value in found.items() if "idle" not in key)
    assert all(0 < float(value) < 1 for key, value in found.items() if "idle" in key)
    assert "of the roofline" in capfd.readouterr().out


def test_a_part_that_raises_is_told_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Out of memory in the middle of decoding, with a step of the same requests behind it."""
    launch, failed = Runner.launch, []

    def failing(runner: Runner, batch: Batch) -> Step:
        if batch.num_tokens == [1, 1, 1, 1] and not failed:
            failed.append(batch.step)
            raise torch.OutOfMemoryError("tried to allocate 80 GiB")
        return launch(runner, batch)

    monkeypatch.setattr(Runner, "launch", failing)
    found = figures_of("llama-8b")
    assert found["failed"] == 1.0 and "decode 1 ms" in found and "decode 4 ms" not in found
    assert float(found["offline tok/s"]) > 0 and float(found["shared prefix ms"]) > 0
    assert "decode 4 FAILED: OutOfMemoryError: tried to allocate 80 GiB" in capfd.readouterr().out


def test_a_batch_that_there_is_no_room_for_is_a_failed_part(capfd: pytest.CaptureFixture[str]) -> None:
    bench = gpu_engine.Bench.of("qwen3-0.6b", TINY, LIMITS, max_running_requests=2)
    (found,) = gpu_engine.in_parts(bench, [("decode 4", gpu_engine.decode_part(bench, 4))])
    assert found == {"failed": 1.0}
    assert "decode 4 FAILED: RuntimeError: the memory plan has room for 2 sequences" in capfd.readouterr().out


def test_warming_runs_everything_and_says_how_long_it_took(capfd: pytest.CaptureFixture[str]) -> None:
    assert set(figures_of("warm-qwen3-0.6b")) == {"seconds"}
    (line,) = capfd.readouterr().out.splitlines()
    assert line.startswith("compiled and run once in") and line.endswith("0 parts failed")
    assert config_of("qwen3-next-half", tiny=False, shallow=True)["num_hidden_layers"] == 4


def test_a_prefix_that_each_request_reads_needs_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="when they are imported"):
        figures_of(gpu_engine.UNSHARED)
    assert {step.name: step.environment for step in gpu.STEPS}[gpu_engine.UNSHARED] == gpu.NO_SHARING
    for name, value in gpu.NO_SHARING:
        monkeypatch.setenv(name, value)
    assert float(figures_of(gpu_engine.UNSHARED)["shared prefix ms"]) > 0


@pytest.mark.filterwarnings("ignore")
def test_transformers_both_ways(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    from benchmarks import gpu_transformers

    found = figures_of("llama-8b-transformers")
    assert set(found) == {"static tok/s", "continuous tok/s"} and min(map(float, found.values())) > 0

    @contextmanager
    def broken(*_: object) -> Iterator[gpu_transformers.Run]:
        raise ValueError("no paged attention here")
        yield

    @contextmanager
    def short(*_: object) -> Iterator[gpu_transformers.Run]:
        yield lambda prompts: 3

    monkeypatch.setattr(gpu_transformers, "continuous", broken)
    monkeypatch.setattr(gpu_transformers, "static", short)
    found = figures_of("llama-8b-transformers")
    assert set(found) == {"static failed", "continuous failed", "failed"} and found["failed"] == 2.0
    out = capfd.readouterr().out
    assert "continuous: does not work here: ValueError: no paged attention here" in out
    assert "static: does not work here: RuntimeError: 3 tokens came, not 16" in out


def test_streams_through_a_server(capfd: pytest.CaptureFixture[str]) -> None:
    """`pando serve` as a process of its own."""
    found = figures_of("llama-8b-http")
    assert set(found) == {"http 4 tok/s", "http 4 roofline", "http 4 idle"}
    assert float(found["http 4 tok/s"]) > 0 and 0 < float(found["http 4 idle"]) < 1
    assert "4 streams" in capfd.readouterr().out


def test_a_server_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_server.sys, "executable", "false")
    with pytest.raises(RuntimeError, match="ended with code 1 before it was ready"):
        figures_of("llama-8b-http")


def test_idle_is_what_the_device_did_not_work_between_two_looks() -> None:
    text = 'pando_{}{{model_name="a b"}} {}\n'
    names = ("steps_total", "generation_tokens_total", "num_running", "device_seconds_total", "uptime_seconds")
    page = "# TYPE pando_steps_total counter\n" + "".join(map(text.format, names, (10, 160, 16, 2.5, 7.0)))
    first = gpu_server.Counters.parse(page)
    assert first == gpu_server.Counters(10, 160, 16, 2.5, 7.0)
    window = gpu_server.Window(first, gpu_server.Counters(110, 1760, 16, 4.46, 9.0))
    assert window.tokens_per_second == 800 and window.idle == pytest.approx(0.02)
    with pytest.raises(KeyError):
        gpu_server.Counters.parse("pando_up 0\n")


def test_tests_that_fail_or_do_not_run_are_wrong(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "test_some.py"
    good = "def test_one():\n    pass\n\ndef test_two():\n    assert VALUE\n\nVALUE = True\n"
    where = ("-c", "/dev/null", "--rootdir", str(tmp_path))

    def suite(name: str, text: str, seconds: float = 60.0) -> gpu_steps.Suite:
        (tmp_path / name).mkdir()
        (tmp_path / name / file.name).write_text(text)
        return gpu_steps.Suite(name, (str(tmp_path / name / file.name), *where), seconds)

    suites = [
        suite("slow", good, 0.01),
        suite("good", good),
        suite("bad", good.replace("True", "False")),
    ]
    found: Figures = {}
    for more in gpu_steps.check(suites, "cpu"):
        found |= more
    assert found == {"good right": 1.0, "bad right": 0.0, "slow right": 0.0, "failed": 2.0}
    out = capfd.readouterr().out
    assert "good: right: 2 passed, 0 failed, all of them" in out
    assert "bad: WRONG: 1 passed, 1 failed, all of them" in out and "FAILED" in out
    assert "slow: WRONG: 0 passed, 0 failed, stopped after 0 s" in out


def test_the_command_runs_a_step_apart_and_keeps_its_figures(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    assert gpu.main(["--cpu", "--tiny", "--steps", "limits", "--json", str(file), "--logs", str(tmp_path)]) == 0
    found = json.loads(file.read_text())["limits"]
    assert found["copy GB/s"] > 0 and found["bf16 TFLOP/s"] > 0 and found["state"] == "done"


def test_without_a_gpu_or_a_module_nothing_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(gpu_steps.Unfit, match="CUDA|triton"):
            gpu_steps.machine(Scale("cuda", tiny=False))
        assert gpu.main(["--step", "limits"]) == gpu.UNFIT
    monkeypatch.setattr(gpu_steps, "NEEDED", ("torch", "no_such_module"))
    with pytest.raises(gpu_steps.Unfit, match="has no no_such_module"):
        gpu_steps.machine(TINY)
