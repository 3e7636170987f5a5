"""`benchmarks/gpu.py` keeps time: steps that fail, hang, run out of memory or leave processes behind; its summary."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from textwrap import dedent

import pytest

from benchmarks import gpu
from benchmarks.gpu_report import Outcome, promises, summary


def step(name: str, script: str, seconds: float = 30.0, beside: bool = False) -> gpu.Step:
    """A step that is a few lines of Python: `write(name=value)` notes figures, as a step of the benchmark does."""
    begin = "import json, os, subprocess, sys, time\ndef write(**f): open(sys.argv[1], 'w').write(json.dumps(f))\n"
    return gpu.Step(name, seconds, beside, command=(sys.executable, "-c", begin + dedent(script)))


def alive(pid: int) -> bool:
    """Whether a process runs (zombies do not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid: int) -> bool:
    """Whether a process ends within some seconds."""
    deadline = time.monotonic() + 20
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


def run(steps: list[gpu.Step], tmp_path: Path, *flags: str) -> tuple[int, dict[str, dict[str, object]]]:
    file = tmp_path / "all.json"
    code = gpu.main(["--json", str(file), "--logs", str(tmp_path / "logs"), *flags], steps)
    return code, json.loads(file.read_text())


def test_what_fails_keeps_its_figures_and_stops_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    steps = [
        step("raises", "write(first=1.0); print('so far'); raise ValueError('no such kernel')"),
        step("memory", "write(first=2.0)\nraise MemoryError('tried to allocate 80 GiB')"),
        step("hangs", "write(first=3.0); time.sleep(600)", seconds=0.8),
        step("killed", "write(first=4.0); os.kill(os.getpid(), 9)"),
        step("broken", "open(sys.argv[1], 'w').write('{\"first\": ')"),
        step("good", "write(first=5.0)"),
    ]
    code, found = run(steps, tmp_path)
    assert code == 1
    assert {name: row.get("first") for name, row in found.items()} == {
        "raises": 1.0, "memory": 2.0, "hangs": 3.0, "killed": 4.0, "broken": None, "good": 5.0,
    }  # fmt: skip
    states = {name: str(row["state"]) for name, row in found.items()}
    assert states["raises"] == states["memory"] == "failed (1)" and states["killed"] == "failed (-9)"
    assert states["hangs"].startswith("stopped after") and states["good"] == states["broken"] == "done"
    out = capfd.readouterr().out
    assert "so far" in out and "ValueError: no such kernel" in out and "tried to allocate 80 GiB" in out
    assert (tmp_path / "logs" / "raises.err").read_text().endswith("no such kernel\n")
    assert out.index("== good") < out.index("== summary")


def test_nothing_outlives_its_step(tmp_path: Path) -> None:
    """A server or test run that a step left behind would keep the device's memory."""
    child = "write(pid=subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid); "
    steps = [step("hangs", child + "time.sleep(600)", seconds=2.5), step("leaves", child)]
    _, found = run(steps, tmp_path)
    for row in found.values():
        assert gone(int(str(row["pid"])))


def test_steps_beside_one_another_run_at_the_same_time(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each waits for the other's file."""
    script = """
        open({mine!r}, 'w').close()
        while not os.path.exists({other!r}): time.sleep(0.01)
        write(met=1.0); print('met')
    """
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    steps = [step("a", script.format(mine=one, other=two)), step("b", script.format(mine=two, other=one), beside=True)]
    code, found = run(steps, tmp_path)
    assert code == 0 and found["a"]["met"] == found["b"]["met"] == 1.0
    out = capfd.readouterr().out
    assert "== a, b (at most" in out and "[a] met" in out and "[b] met" in out
    assert [[each.name for each in group] for group in gpu.groups([*steps, steps[0]])] == [["a", "b"], ["a"]]


def test_steps_that_there_is_no_time_for_are_said_to_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.5)
    code, found = run([step("long", "time.sleep(600)"), step("late", "write(x=1.0)")], tmp_path, "--seconds", "1")
    assert code == 1
    assert str(found["long"]["state"]).startswith("stopped after") and found["late"]["state"] == "no time left"


def test_a_machine_that_can_run_nothing_is_found_at_once(tmp_path: Path) -> None:
    steps = [step("limits", f"print('nothing can run here'); sys.exit({gpu.UNFIT})"), step("other", "write(x=1.0)")]
    code, found = run(steps, tmp_path)
    assert code == 2 and found["other"]["state"] == "not run"


def test_limits_go_to_the_steps_behind(tmp_path: Path) -> None:
    steps = [step("limits", "write(**{'copy GB/s': 123.0, 'device': 'some GPU'})")]
    started = gpu.Run((), tmp_path, time.monotonic() + 60)
    started.all(steps)
    assert started.limits == {"copy GB/s": 123.0, "bf16 TFLOP/s": gpu.H200_LIMITS["bf16 TFLOP/s"]}


def test_much_output_is_cut_and_kept_in_the_logs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run([step("loud", "for i in range(500): print('line', i, '.' * 400)")], tmp_path)
    out = capfd.readouterr().out
    assert out.count("\nline ") == gpu.LINES and max(map(len, out.splitlines())) <= 200
    assert (tmp_path / "logs" / "loud.log").read_text().count("line ") == 500


COMMAND = """
import sys
from tests.test_gpu_command import gpu, step
child = "write(first=1.0, pid=os.getpid()); print('begun'); time.sleep(600)"
sys.exit(gpu.main(["--json", sys.argv[1], "--logs", sys.argv[2]], [step("long", child), step("other", "")]))
"""


def test_a_command_that_is_told_to_end_says_what_it_has(tmp_path: Path) -> None:
    file = tmp_path / "all.json"
    command = [sys.executable, "-c", COMMAND, str(file), str(tmp_path / "logs")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=gpu.ROOT)
    assert process.stdout is not None
    while "begun" not in process.stdout.readline():
        assert process.poll() is None
    os.kill(process.pid, signal.SIGTERM)
    rest = process.communicate(timeout=60)[0]
    found = json.loads(file.read_text())
    assert found["long"]["first"] == 1.0 and found["long"]["state"] == "interrupted"
    assert found["other"]["state"] == "not run" and process.returncode == 1
    assert gone(found["long"]["pid"])
    assert "stopped by SIGTERM" in rest and "promised" in rest


def outcomes() -> dict[str, Outcome]:
    """What an H200 might bring."""
    decode = {f"decode {n} {what}": 0.9 for n in (1, 16, 64, 256) for what in ("ms", "roofline")}
    model = {**decode, **{f"decode {n} idle": 0.01 for n in (1, 16, 64, 256)}, "prefill ms": 180.0}
    model |= {"prefill roofline": 0.69, "offline tok/s": 60.0, "shared prefix ms": 2.0, "shared prefix roofline": 0.7}
    served = {"http 16 tok/s": 4000.0, "http 16 idle": 0.019, "http 64 tok/s": 9000.0, "http 64 idle": 0.021}
    found = {each.name: Outcome("done", 100.0, dict(model)) for each in gpu.STEPS}
    limits = {"device": "NVIDIA H200", "copy GB/s": 4300.0, "bf16 TFLOP/s": 790.0}
    suites = {"kernels right": 1.0, "engine right": 1.0, "waiting right": 1.0}
    others = {"static tok/s": 10.0, "continuous tok/s": 12.5}
    return found | {
        "limits": Outcome("done", 20.0, limits),
        "correct": Outcome("done", 120.0, suites),
        "llama-8b-http": Outcome("done", 40.0, served),
        "llama-8b-transformers": Outcome("done", 40.0, others),
        "llama-8b-unshared": Outcome("done", 40.0, {"shared prefix ms": 5.0}),
        "qwen3-0.6b-http": Outcome("failed (1)", 9.0),
        "qwen3-0.6b-transformers": Outcome("done", 40.0, {"static tok/s": 10.0, "continuous failed": "no"}),
    }


def test_the_summary_says_what_is_kept() -> None:
    assert [promise.line() for promise in promises(outcomes())] == [
        "  yes kernels, engine and waiting as tested: 100.0% (>= 100.0%)",
        "  yes decode batch 1, 8B, of the roofline: 90.0% (>= 85.0%)",
        "  yes decode batch 64, 8B, of the roofline: 90.0% (>= 85.0%)",
        "  yes decode batch 256, 8B, of the roofline: 90.0% (>= 85.0%)",
        "  NO  prefill 8K, 8B, of the products' rate: 69.0% (>= 70.0%)",
        "  yes idle, llama-8b, 16 streams through the server: 1.9% (< 2.0%)",
        "  NO  idle, llama-8b, 64 streams through the server: 2.1% (< 2.0%)",
        "  ?   idle, qwen3-0.6b, 16 streams through the server: not measured (< 2.0%)",
        "  ?   idle, qwen3-0.6b, 64 streams through the server: not measured (< 2.0%)",
        "  yes shared prefix of 8K, 64 requests, gain: 2.50x (>= 2.00x)",
        "  NO  offline beside transformers, llama-8b: 4.80x (>= 5.00x)",
        "  yes offline beside transformers, qwen3-0.6b: 6.00x (>= 5.00x)",
    ]


def test_the_summary_fits_what_is_kept_of_an_output() -> None:
    lines = summary(outcomes(), 548.0, Path("/logs"))
    text = "\n".join(lines)
    assert len(lines) < 60 and len(text) < 6000
    assert "NVIDIA H200" in text and lines[-1].startswith("  yes offline beside transformers")
    assert "served 4.000 ms, 4,000 tok/s, idle 1.9%" in text
    assert "transformers static 10, continuous 12 tok/s" in text
    assert "transformers static 10, continuous did not work tok/s" in text


def test_without_any_figure_the_summary_says_so() -> None:
    lines = summary({each.name: Outcome("not run") for each in gpu.STEPS}, 1.0, Path("/logs"))
    assert "those of an H200, from elsewhere" in "\n".join(lines)
    assert sum(line.startswith("  ?   ") for line in lines) == len(promises({}))


def test_wrong_answers_are_told_even_if_other_suites_were_right() -> None:
    found = outcomes() | {"correct": Outcome("failed (1)", 1.0, {"kernels right": 0.0, "engine right": 1.0})}
    assert promises(found)[0].line().startswith("  NO ")
    found["correct"].figures["kernels right"] = 1.0
    assert promises(found)[0].line().startswith("  ?   "), "one of them was not run"


def test_the_steps() -> None:
    """What is promised comes within ten minutes even if every step takes as long as it may."""
    longest = {group[0].name: max(each.seconds for each in group) for group in gpu.groups(gpu.STEPS)}
    names = list(longest)
    first = names[: names.index("qwen3-0.6b-http") + 1]
    assert sum(longest[name] for name in first) <= 570
    assert {"llama-8b", "llama-8b-http", "llama-8b-unshared", "llama-8b-transformers"} < set(first)
    assert sum(longest.values()) <= 900, "limits, of which few are reached"
