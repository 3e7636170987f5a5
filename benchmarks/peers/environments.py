"""Makes the peers' virtual environments, once; says why one could not be made."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from ctypes.util import find_library
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.machine import cores
from benchmarks.peers.registry import OWN_ENVIRONMENT, Environment

STAMP = "installed.json"
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
"""Dragged in beside a CPU build of torch in builds for a GPU, which then fail at import. No engine needs them here."""


class BuildFailed(Exception):
    """An environment could not be made; the message is what its last command said at the end."""


@dataclass(frozen=True, slots=True)
class Installer:
    """Installs environments below `folder`; a log of each beside it."""

    folder: Path
    pip_args: str = ""

    def python(self, name: str) -> str:
        """The interpreter of an environment."""
        return sys.executable if name == OWN_ENVIRONMENT else str(self.folder / name / "bin" / "python")

    def is_installed(self, environment: Environment) -> bool:
        """Is the environment complete, with the packages that are wanted now?"""
        stamp = self.folder / environment.name / STAMP
        return stamp.exists() and stamp.read_text() == json.dumps(environment.packages)

    def install(self, environment: Environment) -> None:
        """Make the environment unless it is there with the same packages. Raises BuildFailed."""
        if self.is_installed(environment):
            return
        place = self.folder / environment.name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        self.run(environment, [sys.executable, "-m", "venv", "--clear", str(place)])
        special = SPECIAL.get(environment.name)
        if special is None:
            self.pip(environment, "install", *environment.packages)
        else:
            special(self, environment, place)
        self.pip(environment, "uninstall", "--yes", *UNWANTED)
        self.run(environment, [self.python(environment.name), "-c", f"import {environment.module}"], variables(place))
        (place / STAMP).write_text(json.dumps(environment.packages))

    def pip(self, environment: Environment, command: str, *words: str) -> None:
        """Run pip in the environment; the installing commands get the user's own options."""
        options = [] if command == "uninstall" else shlex.split(self.pip_args)
        pip = [self.python(environment.name), "-m", "pip", "--disable-pip-version-check", command]
        self.run(environment, [*pip, *options, *words])

    def run(self, environment: Environment, command: list[str], more: dict[str, str] | None = None) -> None:
        """Run a command with these variables on top; its output goes to the log. Raises BuildFailed."""
        with open(self.folder / f"{environment.name}.log", "a", encoding="utf-8") as log:
            print("$", shlex.join(command), file=log, flush=True)
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **(more or {})})
        if done.returncode:
            lines = Path(log.name).read_text(encoding="utf-8").strip().splitlines()
            raise BuildFailed(f"{environment.name}: {lines[-1]} (log: {log.name})")


def _llama_cpp(installer: Installer, environment: Environment, place: Path) -> None:
    """Build llama.cpp once, from the sources in its Python package's archive: the library both use, and llama-bench."""
    bindings, *others = environment.packages
    installer.pip(environment, "install", "cmake", "ninja", *others)
    source = place / "source"
    installer.pip(environment, "download", "--no-deps", "--no-binary", ":all:", "--dest", str(source), bindings)
    with tarfile.open(next(source.glob("*.tar.gz"))) as archive:
        archive.extractall(source, filter="data")
    tree = next(path for path in source.iterdir() if path.is_dir())
    os.environ["CMAKE_ARGS"] = "-DLLAMA_BUILD=OFF"
    try:
        installer.pip(environment, "install", str(tree))
    finally:
        del os.environ["CMAKE_ARGS"]
    cmake, build = str(place / "bin" / "cmake"), str(place / "native")
    off = [f"-DLLAMA_{part}=OFF" for part in ("BUILD_SERVER", "BUILD_TESTS", "BUILD_EXAMPLES", "CURL", "OPENSSL")]
    configure = [cmake, "-G", "Ninja", "-S", str(tree / "vendor" / "llama.cpp"), "-B", build, *off]
    path = {"PATH": f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    installer.run(environment, [*configure, "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON"], path)
    installer.run(environment, [cmake, "--build", build, "--target", "llama-bench", "--parallel", str(cores())], path)


SPECIAL: dict[str, Callable[[Installer, Environment, Path], None]] = {"llama.cpp": _llama_cpp}


def variables(place: Path) -> dict[str, str]:
    """Environment variables for the peer in `place`: its best documented settings on a CPU, with all cores."""
    cpus = sorted(os.sched_getaffinity(0))
    every = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(cores())}
    if place.name == "llama.cpp":
        binaries = place / "native" / "bin"
        return {**every, "LLAMA_CPP_LIB_PATH": str(binaries), "LLAMA_BENCH": str(binaries / "llama-bench")}
    if place.name.startswith("vllm"):
        # Preloading an OpenMP runtime and tcmalloc, binding every core, and a fixed KV cache: its CPU page's advice.
        libraries = [str(place / "lib" / "libiomp5.so"), find_library("tcmalloc_minimal"), find_library("tcmalloc")]
        found = [name for name in libraries if name is not None and (not os.path.isabs(name) or Path(name).exists())]
        return {
            **every,
            "LD_PRELOAD": ":".join(found),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus)),
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_CPU_KVCACHE_SPACE": "4",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            # This version's ahead-of-time cache fails to load and all is compiled again; the older cache does load.
            "VLLM_USE_AOT_COMPILE": "0",
            "VLLM_CACHE_ROOT": str(place / "cache"),
            "VLLM_NO_USAGE_STATS": "1",
        }
    return every
