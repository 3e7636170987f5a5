"""`benchmarks/gpu.py` on a CPU with toy shapes: every step, its time limit, and the arithmetic of the rooflines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_shapes import SHAPES, Roofline, cache_bytes, config_of, weight_bytes
from pando.models.size import ModelSize

TINY = gpu.Scale("cpu", tiny=True)
LIMITS = {"copy GB/s": 50.0, "bf16 TFLOP/s": 1.0}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", SHAPES)
def test_a_model_runs_through_everything(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    found = gpu.run_step(name, TINY, LIMITS)
    wanted = {f"decode {rows} {what}" for rows in TINY.batches for what in ("ms", "roofline", "idle")}
    assert set(found) == wanted | {"prefill ms", "prefill roofline", "shared prefix ms", "offline tok/s"}
    assert all(value > 0 for key, value in found.items() if "idle" not in key)
    assert all(0 <= value < 1 for key, value in found.items() if "idle" in key)
    assert "of the roofline" in capfd.readouterr().out


def test_tests_that_fail_or_do_not_run_are_wrong(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "test_some.py"
    file.write_text("def test_one():\n    pass\n\ndef test_two():\n    assert VALUE\n\nVALUE = True\n")
    where = [str(file), "-c", "/dev/null", "--rootdir", str(tmp_path)]
    assert gpu.run_tests("some", where, 60.0, "cpu")
    file.write_text(file.read_text().replace("True", "False"))
    assert not gpu.run_tests("some", where, 60.0, "cpu")
    assert not gpu.run_tests("some", [*where, "-k", "nothing"], 60.0, "cpu")
    assert not gpu.run_tests("some", where, 0.01, "cpu")
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("some:")]
    assert lines[:2] == [
        "some: right: 2 passed, 0 failed, all of them",
        "some: WRONG: 1 passed, 1 failed, all of them",
    ]
    assert lines[3] == "some: WRONG: 0 passed, 0 failed, stopped after 0 s"


def test_limits_are_positive() -> None:
    found = gpu.measure_limits(TINY)
    assert found["copy GB/s"] > 0 and found["bf16 TFLOP/s"] > 0


def test_the_command_runs_a_step_apart_and_keeps_its_figures(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    assert gpu.main(["--cpu", "--tiny", "--steps", "limits", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["limits"]["copy GB/s"] > 0


def test_a_step_that_takes_too_long_is_stopped(capfd: pytest.CaptureFixture[str]) -> None:
    assert gpu.run_apart("llama-8b", TINY, LIMITS, 0.05) is None
    assert "stopped after" in capfd.readouterr().out


def test_without_time_nothing_is_run_and_the_exit_code_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--cpu", "--tiny", "--seconds", "1"]) == 1
    out = capfd.readouterr().out
    assert out.count("no time left") == len(gpu.SECONDS) and "not in this run" in out


def test_steps_are_compared(capfd: pytest.CaptureFixture[str]) -> None:
    own = {"offline tok/s": 60.0, "shared prefix ms": 2.0}
    theirs = {"llama-8b tok/s": 10.0, "qwen3-0.6b tok/s": 1.0}
    gpu.compare({"llama-8b": own, "llama-8b-unshared": {"shared prefix ms": 5.0}, "transformers": theirs})
    assert capfd.readouterr().out.splitlines() == [
        "shared prefix: 2.000 ms a step, 5.000 ms read by each: 2.50x",
        "llama-8b: 60 tok/s, transformers 10 tok/s: 6.0x",
    ]


def test_reading_a_prefix_for_each_request_is_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="when they are imported"):
        gpu.run_step(gpu.UNSHARED, TINY, LIMITS)
    monkeypatch.setenv("PANDO_SHARED_PREFIX", "0")
    assert gpu.run_step(gpu.UNSHARED, TINY, LIMITS)["shared prefix ms"] > 0


def test_everything_fits_ten_minutes() -> None:
    assert sum(gpu.SECONDS.values()) <= 700, "limits, of which few are reached"
    assert set(SHAPES) < set(gpu.SECONDS)


def test_sizes_of_the_shapes() -> None:
    sizes = {name: ModelSize.of_config(config_of(name, tiny=False)).num_parameters / 1e9 for name in SHAPES}
    assert sizes["llama-8b"] == pytest.approx(8.03, abs=0.01)
    assert sizes["qwen3-0.6b"] == pytest.approx(0.596, abs=0.001)
    assert sizes["qwen3-30b-a3b"] == pytest.approx(30.5, abs=0.1)
    assert 38 < sizes["qwen3-next-half"] < 42


def test_rooflines() -> None:
    llama = ModelSize.of_config(config_of("llama-8b", tiny=False))
    roof = Roofline(4.3e12, 790e12)
    assert roof.decode_seconds(llama, "bfloat16", 1, 1) == pytest.approx(7.5e9 * 2 / 4.3e12, rel=0.02)
    assert roof.decode_seconds(llama, "bfloat16", 1024, 1) > 1024 * 2 * 7.5e9 / 790e12 * 0.98
    assert cache_bytes(llama, "bfloat16", 1000) == 131072 * 1000
    moe = ModelSize.of_config(config_of("qwen3-30b-a3b", tiny=False))
    one, many = (weight_bytes(moe, "bfloat16", rows) for rows in (1, 100_000))
    assert one == 2 * (moe.active_parameters + moe.head_parameters)
    embedding = moe.head_parameters
    assert many == pytest.approx(2 * (moe.num_parameters - embedding), rel=0.001)
