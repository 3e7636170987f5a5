"""One command that says what a GPU does with Pando, in ten minutes: is it right, and how near to what is possible?

    python -m benchmarks.gpu [--steps limits correct llama-8b ...] [--seconds 570] [--json FILE] [--logs FOLDER]
    python -m benchmarks.gpu --cpu --tiny            the same code with toy shapes, to try the command itself

Every step runs in processes of its own with a time limit, the most valuable first, and prints as it goes: what was
measured stays, whatever happens later. Models have the shapes of Llama-3.1-8B, Qwen3-0.6B, Qwen3-30B-A3B and half of
Qwen3-Next, with random weights made on the device. Figures stand beside the roofline of the same run: bytes of
weights, KV and states over the measured copy bandwidth, or operations over the measured rate of products, whichever
takes longer. The summary comes last: where little of the output is kept, it is the end.

This module keeps time and imports no torch: the device belongs to the steps.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from types import FrameType

from benchmarks.gpu_report import Figures, Outcome, summary

ROOT = Path(__file__).resolve().parent.parent

NO_SHARING = (("PANDO_SHARED_PREFIX", "0"),)
"""Environment of the step that shows what sharing the reads of a prefix is worth."""

OFFLINE = (("HF_HUB_OFFLINE", "1"),)
"""Of steps whose libraries would else ask the network for what they need not have."""

H200_LIMITS = {"copy GB/s": 4300.0, "bf16 TFLOP/s": 790.0}
"""Taken where the step that measures them did not come to its end; the summary says so."""

UNFIT = 3
"""Exit code of a step that found out that none can run here."""

LEAST_SECONDS = 5.0
"""A step is not begun with less than this."""

LINES, WIDTH, TAIL = 24, 150, 500
"""What is shown of a step: lines, characters of a line, characters of its errors. All of it is in the logs."""


@dataclass(frozen=True, slots=True)
class Step:
    """A part of the benchmark. seconds: the longest it may take. beside: it runs beside the one before it in the list.

    command: what is run; empty = this module with `--step NAME`. It writes figures to the file whose path is appended.
    """

    name: str
    seconds: float
    beside: bool = False
    environment: tuple[tuple[str, str], ...] = ()
    command: tuple[str, ...] = ()


STEPS = (
    Step("limits", 60),
    # Nothing is timed in these: they compile kernels, each process on a core of its own, and leave them in Triton's
    # cache, which all processes of a user share.
    Step("correct", 130),
    Step("warm-llama-8b", 130, beside=True),
    Step("warm-qwen3-0.6b", 130, beside=True),
    Step("warm-qwen3-30b-a3b", 130, beside=True),
    Step("warm-qwen3-next-half", 130, beside=True),
    Step("llama-8b", 90),
    Step("llama-8b-http", 70),
    Step("llama-8b-transformers", 80, environment=OFFLINE),
    Step("llama-8b-unshared", 60, environment=NO_SHARING),
    Step("qwen3-0.6b-http", 60),
    Step("qwen3-30b-a3b", 80),
    Step("qwen3-next-half", 80),
    Step("qwen3-0.6b", 60),
    Step("qwen3-0.6b-transformers", 60, environment=OFFLINE),
)
"""All steps, in order: what the project promises of a GPU comes first."""


class Stopped(BaseException):
    """The command was told to end: by ctrl-C, or by whatever limits its time."""


def stop(number: int, frame: FrameType | None) -> None:
    """Handle a signal: end what runs and print what there is."""
    raise Stopped(signal.Signals(number).name)


@dataclass(slots=True)
class Shown:
    """A file that grows; its lines are printed as they come, up to `LINES` of them."""

    path: Path
    prefix: str = ""
    at: int = 0
    lines: int = 0

    def more(self, *, ended: bool = False) -> None:
        """Print the lines that came; those without an end too if no more will come."""
        with self.path.open("rb") as file:
            file.seek(self.at)
            new = file.read()
        if not ended:
            new = new[: new.rfind(b"\n") + 1]
        self.at += len(new)
        for line in new.decode(errors="replace").splitlines():
            self.lines += 1
            if self.lines <= LINES:
                print(f"{self.prefix}{line[:WIDTH]}", flush=True)


@dataclass(slots=True)
class Running:
    """A step's process."""

    step: Step
    process: subprocess.Popen[bytes]
    folder: Path
    deadline: float
    shown: Shown
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def start(cls, step: Step, command: Sequence[str], folder: Path, seconds: float, *, alone: bool) -> Running:
        """Begin a step; it leads a process group, so that nothing it started outlives it."""
        figures = folder / f"{step.name}.json"
        with (folder / f"{step.name}.log").open("wb") as out, (folder / f"{step.name}.err").open("wb") as err:
            process = subprocess.Popen(
                [*command, str(figures)],
                cwd=ROOT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(step.environment),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                preexec_fn=os.setpgrp,
            )
        shown = Shown(folder / f"{step.name}.log", "" if alone else f"[{step.name}] ")
        return cls(step, process, folder, time.monotonic() + seconds, shown)

    def ended(self) -> bool:
        """Whether it ended, or was ended because its time is over; shows what it printed."""
        over = time.monotonic() > self.deadline
        done = self.process.poll() is not None
        if over and not done:
            self.kill()
        self.shown.more(ended=done or over)
        return done or over

    def kill(self) -> None:
        """End it and everything it started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()

    def outcome(self) -> Outcome:
        """What it found until it ended, and how it did."""
        killed = time.monotonic() > self.deadline and self.process.returncode == -signal.SIGKILL
        self.kill()  # what it left behind
        seconds, code = time.monotonic() - self.began, self.process.returncode
        state = "done" if code == 0 else f"stopped after {seconds:.0f} s" if killed else f"failed ({code})"
        if code:
            print(f"{self.step.name}: {state}; what it had measured stays{self._errors()}", flush=True)
        return Outcome(state, seconds, read_figures(self.folder / f"{self.step.name}.json"), unfit=code == UNFIT)

    def _errors(self) -> str:
        text = (self.folder / f"{self.step.name}.err").read_text(errors="replace").strip()
        return "".join(f"\n    | {line[:WIDTH]}" for line in text[-TAIL:].splitlines())


def read_figures(file: Path) -> Figures:
    """What a step wrote; nothing if it did not come to that."""
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError):
        return {}


def write_figures(file: Path, figures: object) -> None:
    """Write all of it or nothing: a step may be ended at any moment."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps(figures, indent=1))
    new.replace(file)


def groups(steps: Sequence[Step]) -> Iterator[list[Step]]:
    """Steps that run beside one another."""
    left = list(steps)
    while left:
        group = [left[0], *takewhile(lambda step: step.beside, left[1:])]
        del left[: len(group)]
        yield group


@dataclass(slots=True)
class Run:
    """All steps within a total time, and what they found."""

    flags: tuple[str, ...]
    folder: Path
    deadline: float
    limits: dict[str, float] = field(default_factory=lambda: dict(H200_LIMITS))
    results: dict[str, Outcome] = field(default_factory=dict)

    def all(self, steps: Sequence[Step]) -> None:
        """Run them; what fails or takes too long stops nothing else, unless it shows that none can run here."""
        for group in groups(steps):
            seconds = self.deadline - time.monotonic()
            if seconds < LEAST_SECONDS or any(outcome.unfit for outcome in self.results.values()):
                why = "not run" if seconds >= LEAST_SECONDS else "no time left"
                self.results |= {step.name: Outcome(why) for step in group}
                continue
            self._group(group, seconds)
            if (limits := self.results.get("limits")) is not None:
                found = {name: limits.figures.get(name) for name in self.limits}
                self.limits |= {name: value for name, value in found.items() if isinstance(value, float)}

    def _group(self, group: list[Step], seconds: float) -> None:
        names = ", ".join(step.name for step in group)
        print(f"== {names} (at most {min(seconds, max(step.seconds for step in group)):.0f} s)", flush=True)
        running: list[Running] = []
        try:
            for step in group:
                limit = min(step.seconds, seconds)
                command = step.command or self._command(step)
                running.append(Running.start(step, command, self.folder, limit, alone=len(group) == 1))
            while running:
                time.sleep(0.05)
                for one in [one for one in running if one.ended()]:
                    running.remove(one)
                    self.results[one.step.name] = one.outcome()
        finally:
            for one in running:
                one.kill()
                figures = read_figures(self.folder / f"{one.step.name}.json")
                self.results[one.step.name] = Outcome("interrupted", time.monotonic() - one.began, figures)

    def _command(self, step: Step) -> tuple[str, ...]:
        limits = json.dumps(self.limits)
        return (sys.executable, "-m", "benchmarks.gpu", *self.flags, "--limits", limits, "--step", step.name, "--json")


def run_here(name: str, flags: argparse.Namespace) -> int:
    """A step, in this process: the figures it has so far are on disk at any time."""
    from benchmarks.gpu_steps import Scale, Unfit, run_step

    figures: Figures = {}
    try:
        for found in run_step(name, Scale("cpu" if flags.cpu else "cuda", flags.tiny), json.loads(flags.limits)):
            figures |= found
            if flags.json:
                write_figures(Path(flags.json), figures)
    except Unfit as reason:
        print(f"nothing can run here: {reason}", flush=True)
        return UNFIT
    return 1 if figures.get("failed") else 0


def main(arguments: Sequence[str] | None = None, steps: Sequence[Step] = STEPS) -> int:
    """Run the command; 0 if every step came to its end, 2 if none can run here."""
    flags = parse(arguments, steps)
    if flags.step:
        return run_here(flags.step, flags)
    chosen = [step for step in steps if step.name in flags.steps]
    folder = Path(flags.logs or tempfile.mkdtemp(prefix="pando-gpu-"))
    folder.mkdir(parents=True, exist_ok=True)
    passed = tuple(flag for flag, given in (("--cpu", flags.cpu), ("--tiny", flags.tiny)) if given)
    began = time.monotonic()
    run = Run(passed, folder, began + flags.seconds)
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        run.all(chosen)
    except Stopped as signalled:
        print(f"stopped by {signalled}", flush=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        results = {step.name: run.results.get(step.name, Outcome("not run")) for step in chosen}
        if flags.json:
            write_figures(Path(flags.json), {name: outcome.as_json() for name, outcome in results.items()})
        if flags.tiny:
            print("toy shapes: what follows tries the command, no figure tells of a GPU", flush=True)
        print("\n".join(summary(results, time.monotonic() - began, folder)), flush=True)
    if any(outcome.unfit for outcome in results.values()):
        return 2
    return 0 if all(outcome.state == "done" for outcome in results.values()) else 1


def parse(arguments: Sequence[str] | None, steps: Sequence[Step]) -> argparse.Namespace:
    """The command's options."""
    names = [step.name for step in steps]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", choices=names, default=names, metavar="STEP", help=", ".join(names))
    parser.add_argument("--seconds", type=float, default=570.0, help="for everything together")
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--logs", help="folder for what the steps print")
    parser.add_argument("--cpu", action="store_true", help="on the CPU, to try the command")
    parser.add_argument("--tiny", action="store_true", help="toy shapes")
    parser.add_argument("--step", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--limits", default=json.dumps(H200_LIMITS), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
