"""Every kernel in the configurations it is launched in, compiled for GPUs: no spills, no fp64, tiles that fit."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import triton

from pando.kernels.triton.launch import CompileCase
from pando.kernels.triton.table import MODULES

ROOT = Path(__file__).resolve().parents[3]
SHARED = {80: 163 << 10, 90: 227 << 10}
"""Bytes of shared memory a block can have by compute capability."""

STACK = 0 if triton.__version__.startswith("3.7.") else 256
"""Bytes of local memory that are let pass: tilings are cut for the 3.7 of torch 2.13. Others spill elsewhere, 3.9 in
latent attention (200, sm_90), in states 256 wide (96) and in int8 heads of 256 dims with norms (8)."""

CASES: list[tuple[str, CompileCase]] = [
    (module, case)
    for module in MODULES
    for case in importlib.import_module(f"pando.kernels.triton.{module}").COMPILE_CASES
]


COMPILE_TEST = "test_kernels_compile["


def compile_module(module: str) -> list[dict]:
    """Facts of a module's kernels, from a process in which Triton compiles and does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.triton.compile_all", module],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="session")
def compiled(request: pytest.FixtureRequest) -> dict[tuple[str, str], list[dict]]:
    """Facts of kernels by module and case, of the modules that this session tests; a process per core."""
    wanted = {item.callspec.params["module"] for item in request.session.items if item.name.startswith(COMPILE_TEST)}
    facts: dict[tuple[str, str], list[dict]] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for fact in itertools.chain.from_iterable(pool.map(compile_module, sorted(wanted))):
            facts.setdefault((fact["module"], fact["case"]), []).append(fact)
    return facts


def faults(case: CompileCase, facts: list[dict]) -> list[str]:
    """What is wrong with the kernels of a case."""
    found = [f"sm_{fact['target']}: {fact['error']}" for fact in facts if "error" in fact]
    for fact in facts:
        if "error" in fact:
            continue
        where = f"{fact['kernel']} for sm_{fact['target']}"
        if fact["stack"] > STACK:
            found.append(f"{where} keeps {fact['stack']} bytes in local memory")
        if fact["shared"] > SHARED[fact["target"]]:
            found.append(f"{where} takes {fact['shared']} bytes of shared memory")
        if fact["fp64"]:
            found.append(f"{where} computes in fp64")
        if case.tensor_cores and fact["dot"] and not fact["tensor_cores"]:
            found.append(f"{where} has a product without tensor cores")
    return found


@pytest.mark.slow
@pytest.mark.timeout(1300)
@pytest.mark.parametrize(("module", "case"), CASES, ids=[f"{module}-{case.name}" for module, case in CASES])
def test_kernels_compile(module: str, case: CompileCase, compiled: dict[tuple[str, str], list[dict]]) -> None:
    facts = compiled[module, case.name]
    assert {fact["target"] for fact in facts} == {target for target in SHARED if target >= case.oldest}
    assert not (wrong := faults(case, facts)), "\n".join(wrong)


def test_names_of_cases_are_unique() -> None:
    names = [(module, case.name) for module, case in CASES]
    assert len(names) == len(set(names))


def test_faults_are_seen() -> None:
    bad = {"target": 80, "kernel": "k", "stack": 512, "shared": 1 << 20, "fp64": True}
    bad |= {"dot": True, "tensor_cores": False}
    case = CompileCase("bad", lambda: None)
    assert len(faults(case, [bad])) == 4
    assert faults(case, [{"target": 90, "error": "no"}]) == ["sm_90: no"]
    assert not faults(case, [{**bad, "stack": 0, "shared": 0, "fp64": False, "tensor_cores": True}])
