"""Writes a tiny checkpoint in a quantised format, and beside it the plain one of the same weights.

The packers put one field after another into its word, straight from the formats' definitions, and share nothing with
the readers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny_models import tiny_checkpoint

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Codes:
    """w[n, k] = scale[n, group[k]] * (code[n, k] - zero[n, group[k]]); codes from 0 to 2^bits - 1."""

    code: Tensor
    scale: Tensor
    zero: Tensor
    group: Tensor
    bits: int

    @property
    def weight(self) -> Tensor:
        """[N, K] float32."""
        return self.scale[:, self.group] * (self.code - self.zero[:, self.group])


def quantise(weight: Tensor, bits: int, group_size: int, *, symmetric: bool, shuffled: bool = False) -> Codes:
    """Codes of a matrix; shuffled: groups are formed over inputs in a random order, the same for all matrices."""
    rows, columns = weight.shape
    size = columns if group_size < 0 else group_size
    group = torch.arange(columns) // size
    if shuffled:
        group = group[torch.randperm(columns, generator=torch.Generator().manual_seed(columns))]
    num, top = int(group.max()) + 1, 2**bits - 1
    scale, zero = torch.empty(rows, num), torch.empty(rows, num)
    for g in range(num):
        part = weight[:, group == g].float()
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if symmetric:
            scale[:, g], zero[:, g] = torch.maximum(high, -low) * 2 / top, 2 ** (bits - 1)
        else:
            scale[:, g] = (high - low) / top
            zero[:, g] = (-low / scale[:, g]).round().clamp(1, top)
    scale = scale.half().float()
    code = (weight.float() / scale[:, group] + zero[:, group]).round().clamp(0, top)
    return Codes(code, scale, zero, group, bits)


def pack(fields: Tensor, bits: int, places: tuple[int, ...] | None = None) -> Tensor:
    """fields [R, C] -> int32 words [R, ceil(C / per word)]; the i-th lowest field of a word is its column places[i]."""
    per_word = 32 // bits
    places = places or tuple(range(per_word))
    rows, columns = fields.shape
    words = [[0] * -(-columns // per_word) for _ in range(rows)]
    for r, row in enumerate(fields.long().tolist()):
        for w in range(len(words[r])):
            for i, place in enumerate(places):
                if w * per_word + place < columns:
                    words[r][w] |= row[w * per_word + place] << (i * bits)
    return torch.tensor(words, dtype=torch.int64).to(torch.uint32).view(torch.int32)


Writer = Callable[[str, Codes], dict[str, Tensor]]
"""Tensors of a module in a format."""


def awq(module: str, codes: Codes) -> dict[str, Tensor]:
    """Words of neighbouring outputs, transposed."""
    places = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        f"{module}.qweight": pack(codes.code.T, 4, places),
        f"{module}.qzeros": pack(codes.zero.T, 4, places),
        f"{module}.scales": codes.scale.T.half().contiguous(),
    }


def gptq(module: str, codes: Codes, shift: int = 1) -> dict[str, Tensor]:
    """Words of neighbouring inputs, transposed; zero points minus one in the first version of the format."""
    return {
        f"{module}.qweight": pack(codes.code, codes.bits).T.contiguous(),
        f"{module}.qzeros": pack(codes.zero.T - shift, codes.bits),
        f"{module}.scales": codes.scale.T.half().contiguous(),
        f"{module}.g_idx": codes.group.int(),
    }


def gptq_v2(module: str, codes: Codes) -> dict[str, Tensor]:
    """Zero points as they are."""
    return gptq(module, codes, shift=0)


def pack_quantized(module: str, codes: Codes) -> dict[str, Tensor]:
    """Words of neighbouring inputs; zero points and the order of groups only where they say something."""
    tensors = {
        f"{module}.weight_packed": pack(codes.code, codes.bits),
        f"{module}.weight_scale": codes.scale.half(),
        f"{module}.weight_shape": torch.tensor(codes.code.shape),
    }
    if not bool((codes.zero == 2 ** (codes.bits - 1)).all()):
        tensors[f"{module}.weight_zero_point"] = pack(codes.zero.T, codes.bits).T.contiguous()
    if not torch.equal(codes.group, codes.group.sort().values):
        tensors[f"{module}.weight_g_idx"] = codes.group.int()
    return tensors


def int_quantized(module: str, codes: Codes) -> dict[str, Tensor]:
    """Plain int8."""
    return {f"{module}.weight": (codes.code - 128).to(torch.int8), f"{module}.weight_scale": codes.scale.half()}


def float_quantized(module: str, codes: Codes, whole: bool = False) -> dict[str, Tensor]:
    """float8 e4m3; whole: one scale for all outputs."""
    scale = codes.scale[:1].flatten() if whole else codes.scale
    return {f"{module}.weight": codes.code.to(torch.float8_e4m3fn), f"{module}.weight_scale": scale.contiguous()}


def write(
    folder: Path,
    family: str,
    writer: Writer,
    settings: dict[str, object],
    make: Callable[[Tensor], Codes],
    keep: str = "lm_head",
) -> tuple[Path, Path]:
    """(quantised checkpoint, plain one of the same weights). Modules whose name contains `keep` stay as they are."""
    source = tiny_checkpoint(family)
    quantised: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.rsplit(".", 1)[-1] in (*PROJECTIONS, "lm_head") and keep not in module and tensor.ndim == 2:
            codes = make(tensor)
            plain[name] = codes.weight.contiguous()
            quantised.update(writer(module, codes))
        else:
            plain[name] = quantised[name] = tensor.clone()
    config = json.loads((source / "config.json").read_text())
    for path, tensors, extra in (
        (folder / "quantised", quantised, {"quantization_config": settings}),
        (folder / "plain", plain, {}),
    ):
        path.mkdir()
        save_file(tensors, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps({**config, **extra}))
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (path / file).write_bytes((source / file).read_bytes())
    return folder / "quantised", folder / "plain"
