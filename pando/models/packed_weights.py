"""Loading a model from the packed weights of an earlier load.

A build is the same sequence of calls every time: the loader gives weights, the op table packs them. The first time, a
`Recording` keeps what was packed, in order. The next time a `Replay` gives weights without content (on torch's meta
device: shapes alone), lets the build fuse and reorder those at no cost, and answers each call that packs one with the
next weight of the file. Everything that is not packed (embedding, norms, biases) is read from the checkpoint as ever.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pando
from pando.kernels import cpu, packed_file
from pando.kernels.ops import OpTable, PackedExperts, PackedLinear
from pando.kernels.weights import QuantizedWeight, UnroundedWeight, Weight
from pando.models.weights import Loader
from pando.quant.order import InputWeight, OrderedWeight

_log = logging.getLogger(__name__)

SAMPLES, SAMPLE_BYTES = 32, 4096
"""A checkpoint's files are told apart by size, time and so many pieces of their content."""
SMALL_FILES = ("config.json", "model.safetensors.index.json", "quantize_config.json")
CODE = ("kernels", "layers", "models", "quant")
"""Packages that decide what is packed."""


UNQUANTIZED = (16, 0, 16, None)
"""Scheme of a plain weight: bits, group size, bits of activations, number of its order."""


class StaleWeights(Exception):
    """The file's weights are not those the model asks for."""


# -- keys


def checkpoint_files(path: Path) -> list[Path]:
    """The files that hold a checkpoint's weights: of a folder, or a GGUF file itself."""
    return [path] if path.is_file() else sorted(path.glob("*.safetensors"))


def cache_key(path: Path, dtype: torch.dtype, quantization: str) -> dict[str, Any]:
    """What packed weights depend on: the checkpoint's files, how they are read, and the code that packs them."""
    folder = path.parent if path.is_file() else path
    small = {name: _digest([(folder / name).read_bytes()]) for name in SMALL_FILES if (folder / name).is_file()}
    return {
        "files": [_file_key(file) for file in checkpoint_files(path)],
        "settings": small,
        "dtype": str(dtype),
        "quantization": quantization,
        "version": pando.__version__,
        "layout": packed_file.LAYOUT,
        "code": _code_key(),
    }


def _file_key(path: Path) -> list[Any]:
    real = path.resolve()
    status = real.stat()
    return [str(real), status.st_size, status.st_mtime_ns, _digest(_samples(real, status.st_size))]


def _samples(path: Path, size: int) -> Iterator[bytes]:
    """The beginning, which of safetensors is the header, and pieces from all over the file."""
    with path.open("rb") as file:
        yield file.read(1 << 16)
        for i in range(SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * i // (SAMPLES - 1))
            yield file.read(SAMPLE_BYTES)


def _code_key() -> str:
    """Changes when the installed code does, whatever its version says: names, sizes and times of its files."""
    package = Path(pando.__file__).parent
    files = sorted(file for name in CODE for file in (package / name).glob("*.py"))
    native = Path(cpu.native_file())
    rows = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in (*files, native)]
    return _digest([repr(rows).encode()])


def _digest(pieces: Iterator[bytes] | Sequence[bytes]) -> str:
    total = hashlib.sha256()
    for piece in pieces:
        total.update(piece)
    return total.hexdigest()


# -- the first time


@dataclass(slots=True)
class Recording:
    """Keeps what a build packs. schemes: of weights that the checkpoint itself has quantised, by name."""

    entries: list[PackedLinear | PackedExperts] = field(default_factory=list)
    schemes: dict[str, list[Any]] = field(default_factory=dict)
    orders: list[Tensor] = field(default_factory=list)

    def table(self, ops: OpTable) -> OpTable:
        """The op table, listened to."""

        def pack_linear(
            weight: Weight,
            bias: Tensor | None = None,
            *,
            activation: str | None = None,
            out_dtype: torch.dtype | None = None,
        ) -> PackedLinear:
            self.entries.append(ops.pack_linear(weight, bias, activation=activation, out_dtype=out_dtype))
            return self.entries[-1]  # type: ignore[return-value]

        def pack_experts(
            gate_up: Sequence[Weight],
            down: Sequence[Weight],
            activation: str,
            gate_up_bias: Tensor | None = None,
            down_bias: Tensor | None = None,
        ) -> PackedExperts:
            self.entries.append(ops.pack_experts(gate_up, down, activation, gate_up_bias, down_bias))
            return self.entries[-1]  # type: ignore[return-value]

        return replace(ops, pack_linear=pack_linear, pack_experts=pack_experts)

    def saw(self, name: str, weight: InputWeight) -> None:
        """Remember how a weight is quantised."""
        inner = weight.weight if isinstance(weight, OrderedWeight) else weight
        if not isinstance(inner, QuantizedWeight):
            return
        order = None
        if isinstance(weight, OrderedWeight):
            order = len(self.orders)
            self.orders.append(weight.order)
        self.schemes[name] = [inner.bits, inner.group_size, inner.activation_bits, order]


class RecordingLoader(Loader):
    """A loader whose weights a Recording sees."""

    def __init__(self, inner: Loader, recording: Recording) -> None:
        super().__init__(inner.source, inner.dtype, inner.device, inner.progress)
        self._recording = recording

    def weight(self, name: str, rows: int, columns: int) -> InputWeight:
        """As `Loader.weight`."""
        weight = super().weight(name, rows, columns)
        self._recording.saw(name, weight)
        return weight


# -- the next times


@dataclass(slots=True)
class Replay:
    """Answers calls that pack with the entries of a file, in order.

    entry: (index, out_dtype) -> a packed weight. shapes: of the entries, as `packed_file.shape_of` has them.
    """

    entry: Callable[[int, torch.dtype | None], PackedLinear | PackedExperts]
    shapes: Sequence[list[Any]]
    schemes: Mapping[str, list[Any]]
    order: Callable[[int], Tensor]
    done: int = 0

    def table(self, ops: OpTable) -> OpTable:
        """An op table that packs nothing."""
        return replace(ops, pack_linear=self._linear, pack_experts=self._experts)

    def finish(self) -> None:
        """Raise StaleWeights unless every entry was asked for."""
        if self.done != len(self.shapes):
            raise StaleWeights(f"{len(self.shapes)} packed weights where the model has {self.done}")

    def phantom(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> InputWeight:
        """A weight's shape and scheme."""
        bits, group, activation_bits, order = self.schemes.get(name, UNQUANTIZED)
        # Not a plain tensor: to concatenate those, torch would load its compiler, which takes a second.
        nothing = torch.empty(rows, columns, dtype=dtype, device="meta")
        weight = UnroundedWeight((nothing,), bits, group, activation_bits)
        return weight if order is None else OrderedWeight(weight, self.order(order))

    def _linear(
        self,
        weight: Weight,
        bias: Tensor | None = None,
        *,
        activation: str | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> PackedLinear:
        return self._next([*_wanted(weight, activation), bias is not None], out_dtype)  # type: ignore[return-value]

    def _experts(
        self,
        gate_up: Sequence[Weight],
        down: Sequence[Weight],
        activation: str,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> PackedExperts:
        first = [len(gate_up), *_wanted(gate_up[0], activation), gate_up_bias is not None]
        second = [len(down), *_wanted(down[0], None), down_bias is not None]
        return self._next([first, second], None)  # type: ignore[return-value]

    def _next(self, wanted: list[Any], out_dtype: torch.dtype | None) -> PackedLinear | PackedExperts:
        index = self.done
        if index >= len(self.shapes) or self.shapes[index] != wanted:
            raise StaleWeights(f"packed weight {index} is not {wanted}")
        self.done += 1
        return self.entry(index, out_dtype)


def _wanted(weight: Weight, activation: str | None) -> list[Any]:
    return [*weight.shape, cpu.activation_code(activation)]


class ReplayLoader(Loader):
    """A loader whose weights have no content; what is not packed comes from the checkpoint."""

    def __init__(self, inner: Loader, replay: Replay) -> None:
        super().__init__(inner.source, inner.dtype, inner.device, inner.progress)
        self._replay = replay

    def weight(self, name: str, rows: int, columns: int) -> InputWeight:
        """A phantom of the weight: good for packing only."""
        self.used(name)
        return self._replay.phantom(name, rows, columns, self.dtype)


def phantoms_in(root: object) -> int:
    """Tensors without content that an object of ours holds, itself or through others: there should be none."""
    found, seen, left = 0, set[int](), [root]
    while left:
        each = left.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, Tensor):
            found += each.is_meta
        elif isinstance(each, list | tuple | set | frozenset):
            left += each
        elif isinstance(each, dict):
            left += each.values()
        elif type(each).__module__.partition(".")[0] == "pando":
            left += vars(each).values() if hasattr(each, "__dict__") else ()
            slots = (name for kind in type(each).__mro__ for name in getattr(kind, "__slots__", ()))
            left += [getattr(each, name) for name in slots if hasattr(each, name)]
    return found
