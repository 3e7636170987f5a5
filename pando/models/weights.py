"""Checkpoint tensors: where they come from (safetensors or random), and the loader a model pulls them through.

A model asks for each tensor by name and shape; the loader allocates it once in the target dtype and copies from the
memory-mapped file, so a weight never exists twice in memory. What nobody asked for is an error at the end.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pando.errors import ConfigError

Progress = Callable[[float, str], None]
"""Called with (fraction in 0..1, what is going on)."""

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


Change = Callable[[Tensor], Tensor]
"""Rearranges a stored tensor: a transpose, a permutation of rows."""


class WeightSource(Protocol):
    """Named tensors of one checkpoint."""

    def names(self) -> frozenset[str]:
        """All tensor names; empty for a source that makes up whatever is asked for."""

    def fill(self, out: Tensor, name: str, change: Change | None) -> str | None:
        """Write a tensor into `out`, in its dtype and on its device; else say what is wrong with it."""


class SafetensorsSource:
    """A folder with one `.safetensors` file or several and an index. Files are memory-mapped when first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of = _tensor_files(folder)
        self._names = frozenset(self._file_of)
        self._open: dict[str, safe_open] = {}

    def names(self) -> frozenset[str]:
        """All tensor names of the checkpoint."""
        return self._names

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or some of its first-dim rows, on the CPU in its stored dtype; not to be written to."""
        handle = self._handle(name)
        tensor: Tensor = handle.get_tensor(name) if rows is None else handle.get_slice(name)[rows]
        return tensor

    def fill(self, out: Tensor, name: str, change: Change | None) -> str | None:
        """Copy a tensor from the mapped file into `out`; else say what is wrong with it."""
        if name not in self._file_of:
            return f"{name} is missing"
        stored = self.read(name)
        if change is not None and stored.numel() == out.numel():
            stored = change(stored)
        if stored.shape != out.shape:
            return f"{name} has shape {list(stored.shape)}, {list(out.shape)} expected"
        out.copy_(stored)
        return None

    def _handle(self, name: str) -> safe_open:
        file = self._file_of[name]
        if file not in self._open:
            try:
                self._open[file] = safe_open(self.folder / file, framework="pt", device="cpu")
            except (OSError, SafetensorError) as error:
                raise ConfigError(f"can not open weights {self.folder / file}: {error}") from error
        return self._open[file]


def _tensor_files(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index or the headers."""
    index = folder / INDEX_FILE
    if index.is_file():
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        lost = sorted({file for file in weight_map.values() if not (folder / file).is_file()})
        if lost:
            raise ConfigError(f"{index} names files that are not there: {', '.join(lost)}; download them again")
        return weight_map
    files = [SINGLE_FILE] if (folder / SINGLE_FILE).is_file() else sorted(p.name for p in folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{folder} has no .safetensors weights; convert the checkpoint to safetensors")
    return {name: file for file in files for name in _header_names(folder / file)}


def _header_names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            return list(handle.keys())
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"can not open weights {path}: {error}") from error


class DummySource:
    """Random weights of any shape, the same for the same seed and name; fast, because one block of noise is reused."""

    BLOCK = 1 << 20

    def __init__(self, seed: int = 0, std: float = 0.02) -> None:
        self._noise = torch.randn(self.BLOCK, generator=torch.Generator().manual_seed(seed)) * std
        self._converted: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def names(self) -> frozenset[str]:
        """Nothing is listed: every name exists."""
        return frozenset()

    def fill(self, out: Tensor, name: str, change: Change | None) -> str | None:
        """Noise that starts at an offset that depends on the name; norm weights are 1 + noise."""
        noise = self._noise_as(out.dtype, out.device)
        flat, filled, start = out.view(-1), 0, zlib.crc32(name.encode()) % self.BLOCK
        while filled < flat.numel():
            count = min(self.BLOCK - start, flat.numel() - filled)
            flat[filled : filled + count] = noise[start : start + count]
            filled, start = filled + count, 0
        if "norm" in name.rsplit(".", 2)[-2]:
            out.add_(1.0)
        return None

    def _noise_as(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        if (dtype, device) not in self._converted:
            self._converted[dtype, device] = self._noise.to(device, dtype)
        return self._converted[dtype, device]


_IGNORED = re.compile(r"rotary_emb\.inv_freq$|\.masked_bias$|attention\.bias$|rotary_emb\.(cos|sin)_cached$")
"""Buffers older checkpoints carry, which follow from the config."""


class Loader:
    """Pulls tensors into a device and dtype. Collects every problem, so that one error names all of them."""

    def __init__(
        self,
        source: WeightSource,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress | None = None,
    ) -> None:
        self.source = source
        self.dtype = dtype
        self.device = device
        self.names = source.names()
        self._progress = progress
        self._unused = set(self.names)
        self._problems: list[str] = []

    def empty(self, *shape: int) -> Tensor:
        """Room for a tensor in the target dtype, on the target device."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def into(self, out: Tensor, name: str, change: Change | None = None) -> None:
        """Fill `out`; `change` first rearranges what is stored. A problem is reported by `finish`, not here."""
        problem = self.source.fill(out, name, change)
        self._unused.discard(name)
        if problem is not None:
            self._problems.append(problem)
        if self._progress is not None:
            self._progress(1.0 - len(self._unused) / max(len(self.names), 1), name)

    def tensor(self, name: str, *shape: int) -> Tensor:
        """One tensor in the target dtype."""
        out = self.empty(*shape)
        self.into(out, name)
        return out

    def float32(self, name: str, *shape: int) -> Tensor:
        """One tensor kept in float32: norm weights, sinks."""
        out = torch.empty(shape, dtype=torch.float32, device=self.device)
        self.into(out, name)
        return out

    def stack(self, parts: Sequence[tuple[str, int]], *row: int) -> Tensor:
        """Several tensors [n_i, *row] one after another along the first dim."""
        out = self.empty(sum(rows for _, rows in parts), *row)
        start = 0
        for name, rows in parts:
            self.into(out[start : start + rows], name)
            start += rows
        return out

    def skip(self, pattern: str) -> None:
        """Declare tensors whose name matches as known and not needed."""
        expression = re.compile(pattern)
        self._unused = {name for name in self._unused if not expression.search(name)}

    def finish(self) -> None:
        """Raise ConfigError if a tensor was missing, misshapen, or left over."""
        left = sorted(name for name in self._unused if not _IGNORED.search(name))
        problems = self._problems + [f"{name} is not part of this architecture" for name in left]
        if problems:
            shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
            raise ConfigError(f"the weights do not fit the config: {shown}", param="model_path")
