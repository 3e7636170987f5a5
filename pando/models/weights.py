"""Checkpoint tensors: where they come from (safetensors or random), and the loader a model pulls them through.

A model asks for each tensor by name and shape. What comes is a view of the memory-mapped file if the dtype is right,
else a converted copy; packing it for the kernels makes the one copy that stays. What nobody asked for is an error at
the end.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pando.errors import ConfigError
from pando.models.mapped import Entry, MappedFile, safetensors_entries
from pando.quant.order import InputWeight, OrderedWeight, expand, on_device
from pando.quant.source import WeightProblem

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

    def tensor(self, name: str, shape: Sequence[int], change: Change | None = None) -> Tensor:
        """A float tensor in its stored dtype on the CPU, not to be written to. Raises WeightProblem."""

    def weight(self, name: str, rows: int, columns: int) -> InputWeight:
        """A matrix [rows, columns], quantised if the checkpoint has it so. Raises WeightProblem."""

    def is_quantized(self, name: str) -> bool:
        """Whether `weight` gives a quantised matrix."""

    def release(self) -> None:
        """What has been read so far is used; its pages can be given back."""


class SafetensorsSource:
    """A folder with one `.safetensors` file or several and an index. Files are memory-mapped when first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, tuple[MappedFile, dict[str, Entry]]] = {}
        self._file_of = self._tensor_files()
        self._names = frozenset(self._file_of)

    def names(self) -> frozenset[str]:
        """All tensor names of the checkpoint."""
        return self._names

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored: a view of the file. Raises WeightProblem if there is none of that name."""
        if name not in self._file_of:
            raise WeightProblem(f"{name} is missing")
        file, entries = self._file(self._file_of[name])
        if name not in entries:
            raise WeightProblem(f"{name} is not in {file.path}, where {INDEX_FILE} says it is")
        entry = entries[name]
        return file.tensor(entry.start, entry.dtype, entry.shape)

    def tensor(self, name: str, shape: Sequence[int], change: Change | None = None) -> Tensor:
        """A tensor of a known shape, rearranged by `change`. Raises WeightProblem."""
        stored = self.read(name)
        if change is not None and stored.numel() == torch.Size(shape).numel():
            stored = change(stored)
        if stored.shape != torch.Size(shape):
            raise WeightProblem(f"{name} has shape {list(stored.shape)}, {list(shape)} expected")
        if not stored.is_floating_point() or stored.element_size() == 1:
            raise WeightProblem(f"{name} holds {str(stored.dtype).removeprefix('torch.')}, which is no plain weight")
        return stored

    def weight(self, name: str, rows: int, columns: int) -> Tensor:
        """A matrix. Raises WeightProblem."""
        return self.tensor(name, (rows, columns))

    def is_quantized(self, name: str) -> bool:
        """Nothing is."""
        return False

    def release(self) -> None:
        """Give back the pages of all files."""
        for file, _ in self._open.values():
            file.release()

    def _file(self, name: str) -> tuple[MappedFile, dict[str, Entry]]:
        if name not in self._open:
            file = MappedFile(self.folder / name)
            self._open[name] = file, safetensors_entries(file)
        return self._open[name]

    def _tensor_files(self) -> dict[str, str]:
        """Tensor name -> file name, from the index or the headers."""
        folder, index = self.folder, self.folder / INDEX_FILE
        if index.is_file():
            weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            lost = sorted({file for file in weight_map.values() if not (folder / file).is_file()})
            if lost:
                raise ConfigError(f"{index} names files that are not there: {', '.join(lost)}; download them again")
            return weight_map
        single = (folder / SINGLE_FILE).is_file()
        files = [SINGLE_FILE] if single else sorted(path.name for path in folder.glob("*.safetensors"))
        if not files:
            raise ConfigError(f"{folder} has no .safetensors weights; convert the checkpoint to safetensors")
        return {name: file for file in files for name in self._file(file)[1]}


class DummySource:
    """Random weights of any shape, the same for the same seed and name; fast, because one block of noise is reused.

    They are made where they are wanted: a large model would take minutes on its way to a GPU.
    """

    BLOCK = 1 << 20

    def __init__(
        self, seed: int = 0, std: float = 0.02, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        self.dtype = dtype
        noise = torch.randn(self.BLOCK, generator=torch.Generator().manual_seed(seed)) * std
        self._noise = noise.to(dtype).to(device)

    def names(self) -> frozenset[str]:
        """Nothing is listed: every name exists."""
        return frozenset()

    def tensor(self, name: str, shape: Sequence[int], change: Change | None = None) -> Tensor:
        """Noise that starts at an offset that depends on the name; norm weights are 1 + noise."""
        out = torch.empty(tuple(shape), dtype=self.dtype, device=self._noise.device)
        start, filled = zlib.crc32(name.encode()) % self.BLOCK, 0
        flat = out.view(-1)
        while filled < flat.numel():
            count = min(self.BLOCK - start, flat.numel() - filled)
            flat[filled : filled + count] = self._noise[start : start + count]
            filled, start = filled + count, 0
        return out.add_(1.0) if "norm" in name.rsplit(".", 2)[-2] else out

    def weight(self, name: str, rows: int, columns: int) -> Tensor:
        """A matrix of noise."""
        return self.tensor(name, (rows, columns))

    def is_quantized(self, name: str) -> bool:
        """Nothing is."""
        return False

    def release(self) -> None:
        """Nothing is kept."""


_IGNORED = re.compile(r"rotary_emb\.inv_freq$|\.masked_bias$|attention\.bias$|rotary_emb\.(cos|sin)_cached$")
"""Buffers older checkpoints carry, which follow from the config."""


class Loader:
    """Pulls tensors into a device and dtype. Collects every problem, so that one error names all of them.

    Float tensors come in the target dtype; they may be views of the checkpoint and are not to be written to.
    """

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
        self.progress = progress
        self._unused = set(self.names)
        self._problems: list[str] = []

    def tensor(self, name: str, *shape: int, change: Change | None = None) -> Tensor:
        """One tensor; `change` first rearranges what is stored. A problem is reported by `finish`, not here."""
        if len(shape) == 2 and change is None and self.source.is_quantized(name):
            return expand(self._weight(name, *shape), self.dtype).to(self.device)
        stored = self._stored(name, shape, change)
        return stored.to(self.device, self.dtype).contiguous()

    def float32(self, name: str, *shape: int, change: Change | None = None) -> Tensor:
        """One tensor in float32 that belongs to the caller: norm weights, sinks."""
        stored = self._stored(name, shape, change)
        return stored.to(self.device, torch.float32, copy=True).contiguous()

    def _stored(self, name: str, shape: Sequence[int], change: Change | None) -> Tensor:
        try:
            stored = self.source.tensor(name, shape, change)
        except WeightProblem as problem:
            self._problems.append(problem.message)
            stored = torch.zeros(tuple(shape))
        self.used(name)
        return stored

    def weight(self, name: str, rows: int, columns: int) -> InputWeight:
        """A matrix [rows, columns] for the op table to pack: a float tensor in the target dtype, or quantised.

        What is not packed is read with `tensor`: a start from packed weights gives matrices without content here.
        """
        return self._weight(name, rows, columns)

    def _weight(self, name: str, rows: int, columns: int) -> InputWeight:
        weight: InputWeight
        try:
            weight = self.source.weight(name, rows, columns)
        except WeightProblem as problem:
            self._problems.append(problem.message)
            weight = torch.zeros(rows, columns)
        self.used(name)
        if isinstance(weight, Tensor):
            return weight.to(self.device, self.dtype).contiguous()
        if isinstance(weight, OrderedWeight):
            return OrderedWeight(on_device(weight.weight, self.device), weight.order.to(self.device))
        return on_device(weight, self.device)

    def vectors(self, parts: Sequence[tuple[str, int]]) -> Tensor:
        """Several vectors one after another: the biases of a fused projection."""
        return torch.cat([self.tensor(name, size) for name, size in parts])

    def release(self) -> None:
        """Give back what the checkpoint's pages take; to be called when what was read has been packed."""
        self.source.release()

    def used(self, name: str) -> None:
        """Strike a tensor off the list of those that nobody asked for."""
        self._unused.discard(name)
        if self.progress is not None:
            self.progress(1.0 - len(self._unused) / max(len(self.names), 1), name)

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
