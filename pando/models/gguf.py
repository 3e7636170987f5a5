"""GGUF files as checkpoints: a config made of their metadata, and their tensors under the names of our families."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pando.errors import ConfigError, UnsupportedModel
from pando.gguf import SUFFIX, GGUFFile, TensorInfo
from pando.kernels.weights import QuantizedWeight, Weight
from pando.models.hf_config import HFConfig
from pando.models.mapped import MappedFile
from pando.models.weights import Change
from pando.quant.gguf_blocks import BLOCK_TYPES, PLAIN_TYPES, read_blocks
from pando.quant.source import WeightProblem

ARCHITECTURES: Mapping[str, tuple[str, str]] = {
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen3moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
}
"""`general.architecture` -> (model type, architecture) of the config."""

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
_GEMMA_LAYER = {
    **_LAYER,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
"""One tensor [experts, rows, columns] in the file."""

_GEMMA_LARGEST = {"gemma2": 46, "gemma3": 62}
"""Layers of the one size whose attention is scaled by hidden size / heads; no metadata says so."""

END_OF_TURN = frozenset({"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>"})
"""Tokens that end an answer, whether or not the metadata says so."""


def is_gguf(path: Path) -> bool:
    """Whether a model path is a GGUF file."""
    return path.suffix.lower() == SUFFIX


def gguf_config(file: GGUFFile) -> HFConfig:
    """What config.json would say. Raises UnsupportedModel or ConfigError naming the metadata."""
    name = file.text("general.architecture")
    if name not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{file.path}: GGUF architecture {name!r} is not supported ({', '.join(sorted(ARCHITECTURES))} are); use "
            "the model's safetensors checkpoint with --quantization",
            param="model_path",
        )
    model_type, architecture = ARCHITECTURES[name]
    heads, hidden = file.integer(f"{name}.attention.head_count"), file.integer(f"{name}.embedding_length")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ConfigError(f"{file.path} has no tensor token_embd.weight: it holds no language model")
    values: dict[str, object] = {
        "model_type": model_type,
        "architectures": [architecture],
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": file.integer(f"{name}.feed_forward_length"),
        "num_hidden_layers": file.integer(f"{name}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.integer(f"{name}.attention.head_count_kv", heads),
        "head_dim": file.integer(f"{name}.attention.key_length", hidden // heads),
        "max_position_embeddings": file.integer(f"{name}.context_length"),
        "rms_norm_eps": file.number(f"{name}.attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "dtype": _dtype(file),
        "eos_token_id": end_tokens(file),
        "quantization_config": _stored_bits(file),
        **_rope(file, name),
    }
    if name.startswith("gemma"):
        values |= _gemma(file, name, hidden // heads)
    if (experts := file.integer(f"{name}.expert_count", 0)) > 0:
        values |= _experts(file, name, experts)
    return HFConfig(values, str(file.path))


def _rope(file: GGUFFile, name: str) -> dict[str, object]:
    """Rotary embedding. Llama 3's bands are stored as a divisor per frequency, which longrope can say."""
    theta = file.number(f"{name}.rope.freq_base", 10000.0)
    kind = file.text(f"{name}.rope.scaling.type", "none")
    scaling: dict[str, object] = {"rope_type": "default"}
    if "rope_freqs.weight" in file.tensors:
        factors = _read_plain(file, file.tensors["rope_freqs.weight"])
        length = file.integer(f"{name}.context_length")
        bands = {"short_factor": factors, "long_factor": factors, "original_max_position_embeddings": length}
        scaling = {"rope_type": "longrope", "attention_factor": 1.0, "factor": 1.0, **bands}
    elif kind in ("linear", "yarn"):
        scaling = {"rope_type": kind, "factor": file.number(f"{name}.rope.scaling.factor")}
        if kind == "yarn":
            original = file.integer(f"{name}.rope.scaling.original_context_length")
            scaling["original_max_position_embeddings"] = original
    elif kind != "none":
        raise ConfigError(f"{file.path}: rope scaling {kind!r} is not supported", param="model_path")
    return {"rope_theta": theta, "rope_scaling": {**scaling, "rope_theta": theta}}


def _gemma(file: GGUFFile, name: str, width: int) -> dict[str, object]:
    values: dict[str, object] = {"hidden_activation": "gelu_pytorch_tanh"}
    largest = file.integer(f"{name}.block_count") == _GEMMA_LARGEST[name]
    head_dim = file.integer(f"{name}.attention.key_length", width)
    values["query_pre_attn_scalar"] = width if largest else head_dim
    if (window := file.integer(f"{name}.attention.sliding_window", 0)) > 0:
        values["sliding_window"] = window
    for key, ours in (("attn_logit_softcapping",) * 2, ("final_logit_softcapping",) * 2):
        if f"{name}.{key}" in file.metadata:
            values[ours] = file.number(f"{name}.{key}")
    return values


def _experts(file: GGUFFile, name: str, count: int) -> dict[str, object]:
    if name != "qwen3moe":
        raise UnsupportedModel(
            f"{file.path}: GGUF architecture {name!r} with experts is not supported (qwen3moe is); use the model's "
            "safetensors checkpoint with --quantization",
            param="model_path",
        )
    return {
        "num_experts": count,
        "num_experts_per_tok": file.integer(f"{name}.expert_used_count"),
        "moe_intermediate_size": file.integer(f"{name}.expert_feed_forward_length"),
        "norm_topk_prob": True,
    }


def end_tokens(file: GGUFFile) -> list[int]:
    """Tokens that end an answer: those the metadata names, and the usual ends of a turn in the vocabulary."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    found = [file.integer(f"tokenizer.ggml.{k}") for k in keys if f"tokenizer.ggml.{k}" in file.metadata]
    tokens = file.strings("tokenizer.ggml.tokens")
    found += [index for index, token in enumerate(tokens) if token in END_OF_TURN]
    return list(dict.fromkeys(found))


def _matrices(file: GGUFFile) -> Iterator[TensorInfo]:
    """Projections of the layers."""
    return (info for name, info in file.tensors.items() if name.startswith("blk.") and len(info.shape) > 1)


def _dtype(file: GGUFFile) -> str:
    """Of activations: that of plain matrices, bfloat16 for quantised ones."""
    plain = {info.type for info in _matrices(file)} & set(PLAIN_TYPES)
    quantised = {info.type for info in _matrices(file)} - plain
    if quantised or plain == {"BF16"}:
        return "bfloat16"
    return "float16" if "F16" in plain else "float32"


def _stored_bits(file: GGUFFile) -> dict[str, object]:
    """What the memory plan counts with: bits of an element of the projections, and of the head, when packed."""

    def bits(info: TensorInfo) -> float:
        kind = BLOCK_TYPES.get(info.type)
        return 16 if kind is None else kind.bits + 32 / kind.group

    weights = list(_matrices(file))
    total = sum(torch.Size(info.shape).numel() for info in weights)
    mean = sum(torch.Size(info.shape).numel() * bits(info) for info in weights) / max(total, 1)
    head = file.tensors.get("output.weight", file.tensors["token_embd.weight"])
    return {"quant_method": "gguf", "bits": mean, "head_bits": bits(head)}


def _read_plain(file: GGUFFile, info: TensorInfo) -> list[float]:
    if info.type not in PLAIN_TYPES:
        raise ConfigError(f"{file.path}: rope_freqs.weight has type {info.type}; F32 expected")
    values: list[float] = MappedFile(file.path).tensor(info.start, PLAIN_TYPES[info.type], info.shape).tolist()
    return values


class GGUFSource:
    """The tensors of a GGUF file under the names a safetensors checkpoint of its family has."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self._map = MappedFile(file.path)
        self._architecture = file.text("general.architecture")
        self._stored: dict[str, tuple[TensorInfo, int | None]] = {}
        for name, info in file.tensors.items():
            for ours, expert in self._our_names(name, info):
                self._stored[ours] = info, expert

    def names(self) -> frozenset[str]:
        """All tensor names, an expert's each on its own."""
        return frozenset(self._stored)

    def is_quantized(self, name: str) -> bool:
        """Whether a tensor is stored in blocks."""
        return name in self._stored and self._stored[name][0].type in BLOCK_TYPES

    def tensor(self, name: str, shape: Sequence[int], change: Change | None = None) -> Tensor:
        """A float tensor. Raises WeightProblem."""
        stored = self._plain(name, shape)
        if self._architecture.startswith("gemma") and name.endswith("norm.weight"):
            return stored.float() - 1  # the file has 1 + w, the families keep w
        index = self._row_order(name, shape[0])
        return stored if index is None else stored[index]

    def weight(self, name: str, rows: int, columns: int) -> Weight:
        """A matrix, quantised where the file has it so. Raises WeightProblem."""
        info, expert = self._find(name)
        kind = BLOCK_TYPES.get(info.type)
        if kind is None:
            return self.tensor(name, (rows, columns))
        if info.shape[-2:] != (rows, columns) or columns % kind.weights:
            raise WeightProblem(
                f"{name} ({info.type} blocks of {kind.weights}) has shape {list(info.shape[-2:])}, {[rows, columns]} "
                "expected"
            )
        num_blocks = rows * columns // kind.weights
        start = info.start + (expert or 0) * num_blocks * kind.bytes
        self._check(name, start + num_blocks * kind.bytes)
        weight: QuantizedWeight = read_blocks(
            self._map.tensor(start, torch.uint8, (num_blocks, kind.bytes)), kind, rows, columns
        )
        return weight if (index := self._row_order(name, rows)) is None else weight.rows(index)

    def release(self) -> None:
        """Give back the pages of the file."""
        self._map.release()

    def _find(self, name: str) -> tuple[TensorInfo, int | None]:
        if name not in self._stored:
            raise WeightProblem(f"{name} is missing")
        info, expert = self._stored[name]
        if info.type not in BLOCK_TYPES and info.type not in PLAIN_TYPES:
            known = ", ".join([*PLAIN_TYPES, *BLOCK_TYPES])
            raise WeightProblem(f"{name} has GGUF type {info.type}, which can not be read ({known} can)")
        return info, expert

    def _plain(self, name: str, shape: Sequence[int]) -> Tensor:
        info, expert = self._find(name)
        if info.type not in PLAIN_TYPES:
            raise WeightProblem(f"{name} has GGUF type {info.type} where a plain tensor is expected")
        stored = info.shape if expert is None else info.shape[1:]
        if stored != tuple(shape):
            raise WeightProblem(f"{name} has shape {list(stored)}, {list(shape)} expected")
        dtype = PLAIN_TYPES[info.type]
        size = torch.Size(stored).numel() * dtype.itemsize
        start = info.start + (expert or 0) * size
        self._check(name, start + size)
        return self._map.tensor(start, dtype, stored)

    def _check(self, name: str, end: int) -> None:
        if end > self._map.size:
            raise WeightProblem(f"{name} lies outside {self.file.path}; download the file again")

    def _row_order(self, name: str, rows: int) -> Tensor | None:
        """Where the rows of our query and key projections are: Llama files keep rotary pairs as neighbours."""
        match = re.search(r"\.([qk])_proj\.", name)
        if self._architecture != "llama" or match is None:
            return None
        heads = self.file.integer("llama.attention.head_count")
        if match[1] == "k":
            heads = self.file.integer("llama.attention.head_count_kv", heads)
        return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).flatten()

    def _our_names(self, name: str, info: TensorInfo) -> Iterator[tuple[str, int | None]]:
        """Our name of a stored tensor, or one for each of its experts; an unknown one keeps its own."""
        gemma = self._architecture.startswith("gemma")
        stem, _, kind = name.rpartition(".")
        if stem == "rope_freqs":
            return
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        if match is None:
            yield f"{_TOP.get(stem, stem)}.{kind}", None
        elif match[2] in _EXPERTS:
            for expert in range(info.shape[0]):
                yield f"model.layers.{match[1]}.mlp.experts.{expert}.{_EXPERTS[match[2]]}.{kind}", expert
        else:
            role = (_GEMMA_LAYER if gemma else _LAYER).get(match[2], match[2])
            yield f"model.layers.{match[1]}.{role}.{kind}", None
