"""Shapes of the models that `benchmarks/gpu.py` runs, and what a step of them costs at least."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pando.cache.spec import DTYPE_BYTES
from pando.models.load import resolve_model_path
from pando.models.size import ModelSize

COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16", "attention_bias": False}

LLAMA_8B = {
    **COMMON,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 500000.0,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}

QWEN3_06B = {
    **COMMON,
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}

QWEN3_30B_A3B = {
    **QWEN3_06B,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "tie_word_embeddings": False,
}

QWEN3_NEXT_HALF = {
    **QWEN3_06B,
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "rope_theta": 10000000.0,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "tie_word_embeddings": False,
}
"""Half of its 48 layers: 80 B parameters in 16 bits do not fit into 141 GB."""

SHAPES: dict[str, dict[str, object]] = {
    "llama-8b": LLAMA_8B,
    "qwen3-0.6b": QWEN3_06B,
    "qwen3-30b-a3b": QWEN3_30B_A3B,
    "qwen3-next-half": QWEN3_NEXT_HALF,
}

_TINY: dict[str, object] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "torch_dtype": "float32",
}
_TINY_MOE: dict[str, object] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_TINY_DELTA: dict[str, object] = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "shared_expert_intermediate_size": 32,
}


def config_of(name: str, *, tiny: bool, shallow: bool = False) -> dict[str, object]:
    """The `config.json` of a shape; shallow: with as few layers as it has kinds of them, tiny: and toy sizes too."""
    config = dict(SHAPES[name])
    if shallow or tiny:
        config["num_hidden_layers"] = 4 if "full_attention_interval" in config else 2
    if tiny:
        config |= _TINY
        config |= _TINY_MOE if "num_experts" in config else {}
        config |= _TINY_DELTA if "linear_key_head_dim" in config else {}
    return config


@dataclass(frozen=True, slots=True)
class Scale:
    """How large everything is, and where it runs. warming: only so much that everything has run once."""

    device: str
    tiny: bool
    warming: bool = False

    @property
    def batches(self) -> tuple[int, ...]:
        """Decoding batches."""
        return (1, 4) if self.tiny else (1, 16, 64, 256)

    @property
    def streams(self) -> tuple[int, ...]:
        """Decoding batches through the server: some of `batches`."""
        return (4,) if self.tiny else (16, 64)

    @property
    def prompt(self) -> int:
        """Tokens of a prompt before decoding is timed."""
        return 16 if self.tiny else 512

    @property
    def long_prompt(self) -> int:
        """Tokens of the prompt whose prefill is timed, and of the prefix that is shared."""
        return 96 if self.tiny else 8192

    @property
    def context(self) -> int:
        """Longest sequence, tokens."""
        return 2048 if self.tiny else self.long_prompt + 1024

    @property
    def suffix(self) -> int:
        """Tokens of a prompt behind the shared prefix."""
        return 16

    @property
    def sharing(self) -> int:
        """Requests below the shared prefix."""
        return 4 if self.tiny else 64

    @property
    def timed_steps(self) -> int:
        """Decode steps in one measurement."""
        return 2 if self.warming else 4 if self.tiny else 128

    @property
    def lead(self) -> int:
        """Steps that streams run before they are looked at: more than the last prompts need."""
        return 4 if self.tiny else 48

    @property
    def offline(self) -> tuple[int, int, int]:
        """Requests, tokens in, tokens out of the throughput that transformers is compared in."""
        return (4, 16, 4) if self.tiny else (64, 128, 64)


def write_folder(config: dict[str, object]) -> Path:
    """A model folder without weights: this config and the built-in tokenizer."""
    folder = Path(tempfile.mkdtemp(prefix="pando-gpu-"))
    builtin = resolve_model_path("aspen")
    ends = json.loads((builtin / "config.json").read_text())["eos_token_id"]
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": ends}))
    for file in builtin.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@dataclass(frozen=True, slots=True)
class Roofline:
    """What a device can do at most, measured: bytes/s of a copy (read and written), operations/s of products."""

    bytes_per_s: float
    flops_per_s: float

    @classmethod
    def of(cls, limits: Mapping[str, float]) -> Roofline:
        """Of the figures of the step that measures them."""
        return cls(limits["copy GB/s"] * 1e9, limits["bf16 TFLOP/s"] * 1e12)

    def decode_seconds(self, size: ModelSize, dtype: str, rows: int, context: int, shared: int = 0) -> float:
        """Least time of a step of `rows` sequences that see `context` tokens each, the first `shared` in common."""
        num_bytes = weight_bytes(size, dtype, rows) + rows * cache_bytes(size, dtype, context - shared)
        num_bytes += size.kv_bytes_per_token(dtype) * shared
        return max(num_bytes / self.bytes_per_s, rows * size.decode_flops(context) / self.flops_per_s)

    def prefill_seconds(self, size: ModelSize, dtype: str, num_tokens: int) -> float:
        """Least time of a prompt."""
        num_bytes = weight_bytes(size, dtype, num_tokens)
        return max(num_bytes / self.bytes_per_s, size.prefill_flops(num_tokens) / self.flops_per_s)


def weight_bytes(size: ModelSize, dtype: str, rows: int) -> int:
    """Bytes of weights that a step of `rows` tokens reads: of a mixture, the experts that are expected to be chosen.

    A token chooses k of E experts; if tokens choose apart from one another, all n of them miss one with (1 - k/E)^n.
    """
    spec, elements = size.spec, size.active_parameters + size.head_parameters
    for layer in spec.layers:
        if (moe := layer.moe) is not None:
            one = (3 if spec.gated else 2) * (moe.latent or spec.hidden_size) * moe.intermediate
            chosen = moe.num_experts * (1 - (1 - moe.top_k / moe.num_experts) ** rows)
            elements += int((chosen - moe.top_k) * one)
    return elements * DTYPE_BYTES[dtype]


def cache_bytes(size: ModelSize, dtype: str, context: int) -> int:
    """Bytes of KV and recurrent states that one decoding row reads and writes."""
    return size.kv_bytes_per_token(dtype) * context + 2 * size.state_bytes(dtype)
