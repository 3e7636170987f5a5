"""Checkpoint tensors: where they come from (safetensors or random), and the loader a model pulls them through.

A model asks for each tensor by name and shape; the loader allocates it once in the target dtype and copies from the
memory-mapped file, so a weight never exists twice in memory. What nobody asked for is an error at the end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
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


class WeightSource(Protocol):
    """Named tensors of one checkpoint."""

    def names(self) -> Sequence[str]:
        """All tensor names; empty for a source that makes up whatever is asked for."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor, None when it does not exist."""

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or some of its first-dim rows, on the CPU in its stored dtype; not to be written to."""


class SafetensorsSource:
    """A folder with one `.safetensors` file or several and an index. Files are memory-mapped when first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of = _tensor_files(folder)
        self._open: dict[str, safe_open] = {}

    def names(self) -> Sequence[str]:
        """All tensor names of the checkpoint."""
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor, None when it does not exist."""
        if name not in self._file_of:
            return None
        return tuple(self._handle(name).get_slice(name).get_shape())

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or some of its first-dim rows, on the CPU in its stored dtype; not to be written to."""
        handle = self._handle(name)
        tensor: Tensor = handle.get_tensor(name) if rows is None else handle.get_slice(name)[rows]
        return tensor

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
        generator = torch.Generator().manual_seed(seed)
        self._noise = torch.randn(self.BLOCK, generator=generator) * std
        self._sizes: dict[str, tuple[int, ...]] = {}

    def names(self) -> Sequence[str]:
        """Nothing is listed: every name exists."""
        return []

    def expect(self, name: str, shape: tuple[int, ...]) -> None:
        """Fix the shape of a tensor before it is read."""
        self._sizes[name] = shape

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape that was fixed, else None."""
        return self._sizes.get(name)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Noise that starts at an offset that depends on the name; norm weights are 1 + noise."""
        shape = self._sizes[name]
        count = 1
        for size in shape:
            count *= size
        start = sum(name.encode()) * 7919 % self.BLOCK
        repeats = (start + count) // self.BLOCK + 1
        noise = self._noise.repeat(repeats)[start : start + count].view(shape)
        noise = noise + 1.0 if "norm" in name.rsplit(".", 2)[-2] else noise
        return noise if rows is None else noise[rows]


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
        self._progress = progress
        self._unused = set(source.names())
        self._total = max(len(self._unused), 1)
        self._problems: list[str] = []

    def has(self, name: str) -> bool:
        """Whether the checkpoint lists the tensor; always true for a source that lists nothing."""
        return not self.source.names() or self.source.shape(name) is not None

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """One tensor. A missing or misshapen one is reported by `finish`, not here."""
        out = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        self.into(out, name)
        return out

    def vector(self, name: str, size: int) -> Tensor:
        """A float32 vector: norm weights, sinks, router corrections."""
        return self.tensor(name, (size,), torch.float32)

    def stack(self, parts: Iterable[tuple[str, int]], row: tuple[int, ...] = ()) -> Tensor:
        """Several tensors [n_i, *row] one after another along the first dim."""
        parts = list(parts)
        out = torch.empty((sum(n for _, n in parts), *row), dtype=self.dtype, device=self.device)
        start = 0
        for name, rows in parts:
            self.into(out[start : start + rows], name)
            start += rows
        return out

    def into(self, out: Tensor, name: str, change: Callable[[Tensor], Tensor] | None = None) -> None:
        """Copy a tensor into `out`, converting dtype and device; `change` first rearranges what is stored."""
        if isinstance(self.source, DummySource):
            self.source.expect(name, tuple(out.shape))
            change = None
        stored = self.source.shape(name)
        if stored is None:
            self._problems.append(f"{name} is missing")
            return
        tensor = self.source.read(name)
        tensor = change(tensor) if change is not None else tensor
        if tensor.shape != out.shape:
            expected = f"{list(out.shape)} expected" + (f" (stored as {list(stored)})" if change else "")
            self._problems.append(f"{name} has shape {list(tensor.shape)}, {expected}")
            return
        out.copy_(tensor)
        self._used(name)

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

    def _used(self, name: str) -> None:
        self._unused.discard(name)
        if self._progress is not None:
            self._progress(min(1.0, 1.0 - len(self._unused) / self._total), name)
