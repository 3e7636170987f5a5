"""Before anything is measured: environments and models. What can not be had leaves its engines out, with a reason."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.environments import BuildFailed, Installer, variables
from benchmarks.peers.models import make_model, make_w8a8
from benchmarks.peers.process import ROOT
from benchmarks.peers.registry import ENVIRONMENTS, Engine
from benchmarks.peers.runner import Results
from benchmarks.peers.workload import SHAPES

CONVERTERS = {"llama.cpp": ("convert_gguf", "gguf"), "openvino": ("convert_openvino", "openvino")}
"""Environment to the module that converts a model there, and the folder it makes."""


def install(installer: Installer, engines: Sequence[Engine], results: Results, *, allowed: bool) -> list[Engine]:
    """Make the environments; returns the engines that have theirs. allowed=False: those that are there must do."""
    missing: dict[str, str] = {}
    for name in dict.fromkeys(engine.environment for engine in engines if engine.is_peer):
        environment = ENVIRONMENTS[name]
        if not allowed and not installer.is_installed(environment):
            missing[name] = "not installed"
            continue
        try:
            print(f"environment {name}", flush=True)
            installer.install(environment)
        except BuildFailed as error:
            print(error, flush=True)
            missing[name] = str(error)
    return _without(engines, missing, results)


def convert(installer: Installer, engines: Sequence[Engine], models: Path, results: Results) -> list[Engine]:
    """Make the models; returns the engines that have theirs."""
    missing: dict[str, str] = {}
    for name, shape in SHAPES.items():
        source = make_model(shape, models / name / "hf")
        make_w8a8(source, models / name / "w8a8")
        for environment in {engine.environment for engine in engines} & CONVERTERS.keys():
            module, folder = CONVERTERS[environment]
            target = models / name / folder
            if not target.exists():
                print(f"model {name} for {environment}", flush=True)
                message = _convert(installer, environment, module, source, target)
                missing.update({environment: f"no model: {message}"} if message else {})
    return _without(engines, missing, results)


def _convert(installer: Installer, environment: str, module: str, source: Path, target: Path) -> str:
    """Run a converter in its environment; what it said last if it failed, else nothing."""
    part = target.with_name(target.name + ".part")  # so that a half-made model is never taken for one
    settings = {**os.environ, "PYTHONPATH": str(ROOT), **variables(installer.folder / environment)}
    command = [installer.python(environment), "-m", f"benchmarks.peers.{module}", str(source), str(part)]
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    if done.returncode == 0:
        part.rename(target)
        return ""
    return (done.stderr.strip().splitlines() or ["it said nothing"])[-1]


def _without(engines: Sequence[Engine], missing: dict[str, str], results: Results) -> list[Engine]:
    """The engines whose environment is not missing something; the others are failures of the run."""
    results.failures.update(
        {(each.name, ""): missing[each.environment] for each in engines if each.environment in missing}
    )
    return [each for each in engines if each.environment not in missing]
