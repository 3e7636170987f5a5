"""Writes GGUF files: the head, plain tensors, and blocks of random weights in each quantised format.

The blocks are put together field by field from the formats' definition, and the weights they stand for are computed
beside them, so that nothing is shared with the reader.
"""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

F32, F16, BF16 = 0, 1, 30
Block = tuple[bytes, list[float]]


def half(value: float) -> float:
    """The nearest float16."""
    (rounded,) = struct.unpack("<e", struct.pack("<e", value))
    return float(rounded)


def q4_0(rng: random.Random, size: float) -> Block:
    d, q = half(size * rng.uniform(-0.3, 0.3)), [rng.randrange(16) for _ in range(32)]
    return struct.pack("<e", d) + bytes(q[i] | q[i + 16] << 4 for i in range(16)), [d * (v - 8) for v in q]


def q4_1(rng: random.Random, size: float) -> Block:
    d, m, q = half(size * 0.3), half(-2.2 * size), [rng.randrange(16) for _ in range(32)]
    return struct.pack("<ee", d, m) + bytes(q[i] | q[i + 16] << 4 for i in range(16)), [d * v + m for v in q]


def _fifths(q: Sequence[int]) -> bytes:
    return struct.pack("<I", sum((v >> 4) << i for i, v in enumerate(q)))


def q5_0(rng: random.Random, size: float) -> Block:
    d, q = half(size * 0.1), [rng.randrange(32) for _ in range(32)]
    packed = bytes((q[i] & 15) | (q[i + 16] & 15) << 4 for i in range(16))
    return struct.pack("<e", d) + _fifths(q) + packed, [d * (v - 16) for v in q]


def q5_1(rng: random.Random, size: float) -> Block:
    d, m, q = half(size * 0.1), half(-1.6 * size), [rng.randrange(32) for _ in range(32)]
    packed = bytes((q[i] & 15) | (q[i + 16] & 15) << 4 for i in range(16))
    return struct.pack("<ee", d, m) + _fifths(q) + packed, [d * v + m for v in q]


def q8_0(rng: random.Random, size: float) -> Block:
    d, q = half(size * 0.015), [rng.randrange(-127, 128) for _ in range(32)]
    return struct.pack("<e32b", d, *q), [d * v for v in q]


def _k_lines(rng: random.Random) -> tuple[list[int], list[int], bytes]:
    a, b = [rng.randrange(20, 64) for _ in range(8)], [rng.randrange(20, 64) for _ in range(8)]
    packed = [a[j] | (a[j + 4] >> 4) << 6 for j in range(4)]
    packed += [b[j] | (b[j + 4] >> 4) << 6 for j in range(4)]
    packed += [(a[j + 4] & 15) | (b[j + 4] & 15) << 4 for j in range(4)]
    return a, b, bytes(packed)


def q4_k(rng: random.Random, size: float) -> Block:
    d, m = half(size * 0.005), half(size * 0.04)
    a, b, lines = _k_lines(rng)
    q = [rng.randrange(16) for _ in range(256)]
    runs = bytes(q[64 * r + i] | q[64 * r + 32 + i] << 4 for r in range(4) for i in range(32))
    return struct.pack("<ee", d, m) + lines + runs, [d * a[i // 32] * v - m * b[i // 32] for i, v in enumerate(q)]


def q5_k(rng: random.Random, size: float) -> Block:
    d, m = half(size * 0.0025), half(size * 0.04)
    a, b, lines = _k_lines(rng)
    q = [rng.randrange(32) for _ in range(256)]
    fifth = bytes(sum((q[32 * g + i] >> 4) << g for g in range(8)) for i in range(32))
    runs = bytes((q[64 * r + i] & 15) | (q[64 * r + 32 + i] & 15) << 4 for r in range(4) for i in range(32))
    values = [d * a[i // 32] * v - m * b[i // 32] for i, v in enumerate(q)]
    return struct.pack("<ee", d, m) + lines + fifth + runs, values


def q6_k(rng: random.Random, size: float) -> Block:
    d, a = half(size * 0.0006), [rng.randrange(-128, 128) for _ in range(16)]
    q = [rng.randrange(64) for _ in range(256)]
    low, high = bytearray(128), bytearray(64)
    for h in range(2):
        for i in range(32):
            w = [q[128 * h + 32 * part + i] for part in range(4)]
            low[64 * h + i] = (w[0] & 15) | (w[2] & 15) << 4
            low[64 * h + 32 + i] = (w[1] & 15) | (w[3] & 15) << 4
            high[32 * h + i] = sum((w[part] >> 4) << 2 * part for part in range(4))
    values = [d * a[i // 16] * (v - 32) for i, v in enumerate(q)]
    return bytes(low) + bytes(high) + struct.pack("<16be", *a, d), values


FORMATS: dict[str, tuple[int, int, Callable[[random.Random, float], Block]]] = {
    "Q4_0": (2, 32, q4_0),
    "Q4_1": (3, 32, q4_1),
    "Q5_0": (6, 32, q5_0),
    "Q5_1": (7, 32, q5_1),
    "Q8_0": (8, 32, q8_0),
    "Q4_K": (12, 256, q4_k),
    "Q5_K": (13, 256, q5_k),
    "Q6_K": (14, 256, q6_k),
}
"""Name -> (type number, weights of a block, a random block of weights of about a size)."""

Stored = tuple[int, tuple[int, ...], bytes]
"""Type number, shape with the fastest dim last, data."""


def blocks(name: str, rows: int, columns: int, seed: int) -> tuple[Stored, Tensor]:
    """A random matrix in a format, and the weights it stands for [rows, columns] float32."""
    number, weights, make = FORMATS[name]
    rng = random.Random(f"{name} {seed}")
    made = [make(rng, columns**-0.5) for _ in range(rows * columns // weights)]
    values = torch.tensor([value for _, part in made for value in part], dtype=torch.float64)
    return (number, (rows, columns), b"".join(raw for raw, _ in made)), values.float().view(rows, columns)


def plain(tensor: Tensor) -> Stored:
    """A tensor in its own dtype."""
    number = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}[tensor.dtype]
    return number, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """A value with its type: bool, int, float, string, or a list of one of them."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<IQ", 10, value) if value >= 1 << 32 else struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    items = [_value(item) for item in value]
    kind = items[0][:4] if items else struct.pack("<I", 8)
    return struct.pack("<I", 9) + kind + struct.pack("<Q", len(items)) + b"".join(item[4:] for item in items)


def write_gguf(path: Path, metadata: dict[str, Any], tensors: dict[str, Stored], alignment: int = 32) -> Path:
    """A GGUF file of version 3."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(_text(key) + _value(value) for key, value in metadata.items())
    offset, data = 0, b""
    for name, (number, shape, raw) in tensors.items():
        head += _text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head += struct.pack("<IQ", number, offset)
        padded = raw + bytes(-len(raw) % alignment)
        data, offset = data + padded, offset + len(padded)
    path.write_bytes(head + bytes(-len(head) % alignment) + data)
    return path


LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}
GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name: str, architecture: str) -> str:
    """The file's name of a checkpoint's tensor."""
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, _, kind = name.rpartition(".")
    if stem in top:
        return f"{top[stem]}.{kind}"
    _, _, layer, role = stem.split(".", 3)
    names = {**LAYER_NAMES, **(GEMMA_NAMES if architecture.startswith("gemma") else {})}
    return f"blk.{layer}.{names[role]}.{kind}"


def neighbouring_pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection as Llama files have them: rotary pairs (2i, 2i + 1)."""
    dim = weight.shape[0] // heads
    rows = [h * dim + half_ * dim // 2 + i for h in range(heads) for i in range(dim // 2) for half_ in (0, 1)]
    return weight[rows]


def stacked_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts of a layer in one tensor, as files have them."""
    found: dict[str, Tensor] = {}
    experts: dict[str, list[Tensor]] = {}
    for name in sorted(tensors, key=lambda name: [int(p) if p.isdigit() else -1 for p in name.split(".")]):
        before, marker, after = name.partition(".mlp.experts.")
        if marker:
            experts.setdefault(f"{before}.mlp.experts.{after.partition('.')[2]}", []).append(tensors[name])
        else:
            found[name] = tensors[name]
    return found | {name: torch.stack(parts) for name, parts in experts.items()}


def convert(folder: Path, path: Path, architecture: str, **metadata: Any) -> Path:
    """A checkpoint of plain tensors as a GGUF file, with metadata from its config."""
    config = json.loads((folder / "config.json").read_text())
    tensors: dict[str, Stored] = {}
    for name, tensor in stacked_experts(load_file(folder / "model.safetensors")).items():
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        if architecture == "llama" and ".q_proj." in name:
            tensor = neighbouring_pairs(tensor, config["num_attention_heads"])
        if architecture == "llama" and ".k_proj." in name:
            tensor = neighbouring_pairs(tensor, config["num_key_value_heads"])
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + 1
        tensors[gguf_name(name, architecture)] = plain(tensor)
    if "rope_freqs" in metadata:
        tensors["rope_freqs.weight"] = plain(metadata.pop("rope_freqs"))
    return write_gguf(path, {**model_metadata(config, architecture), **metadata}, tensors)


def model_metadata(config: dict[str, Any], architecture: str) -> dict[str, Any]:
    """Metadata of a config."""
    rope = config.get("rope_parameters") or {}
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    values: dict[str, Any] = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        "rope.freq_base": float(theta),
    }
    optional = {
        "attention.sliding_window": "sliding_window",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
        "expert_count": "num_local_experts" if "num_local_experts" in config else "num_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
    }
    values |= {key: config[name] for key, name in optional.items() if config.get(name) is not None}
    return {"general.architecture": architecture, **{f"{architecture}.{k}": v for k, v in values.items()}}


def tokenizer_metadata(folder: Path, pre: str) -> dict[str, Any]:
    """The byte-level tokenizer of a model folder as metadata."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = {**tokenizer["model"]["vocab"], **{token["content"]: token["id"] for token in tokenizer["added_tokens"]}}
    controls = {token["content"] for token in tokenizer["added_tokens"] if token["special"]}
    users = {token["content"] for token in tokenizer["added_tokens"]} - controls
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokens = [f"[PAD{index}]" for index in range(size)]
    for token, index in vocab.items():
        tokens[index] = token
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    kinds = [3 if t in controls else 4 if t in users else 1 if t in vocab else 5 for t in tokens]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
    }


def llama3_factors(dim: int, theta: float, factor: float, low: float, high: float, original: int) -> Tensor:
    """Divisors of the frequencies by Llama 3's bands."""
    found = []
    for i in range(0, dim, 2):
        wavelength = 2 * math.pi * theta ** (i / dim)
        if wavelength < original / high:
            found.append(1.0)
        elif wavelength > original / low:
            found.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(found)
