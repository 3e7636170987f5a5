"""Shapes of the models that `benchmarks/gpu.py` runs, and what a step of them costs at least."""

from __future__ import annotations

import json
import tempfile
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


def config_of(name: str, *, tiny: bool) -> dict[str, object]:
    """The `config.json` of a shape; tiny: of the same family, to be run on a CPU in a moment."""
    config = dict(SHAPES[name])
    if tiny:
        config |= _TINY
        config["num_hidden_layers"] = 4 if "full_attention_interval" in config else 2
        config |= _TINY_MOE if "num_experts" in config else {}
        config |= _TINY_DELTA if "linear_key_head_dim" in config else {}
    return config


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

    def decode_seconds(self, size: ModelSize, dtype: str, rows: int, context: int) -> float:
        """Least time of a step of `rows` sequences that see `context` tokens each."""
        num_bytes = weight_bytes(size, dtype, rows) + rows * cache_bytes(size, dtype, context)
        return max(num_bytes / self.bytes_per_s, rows * size.decode_flops(context) / self.flops_per_s)

    def prefill_seconds(self, size: ModelSize, num_tokens: int) -> float:
        """Least time of a prompt."""
        return size.prefill_flops(num_tokens) / self.flops_per_s


def weight_bytes(size: ModelSize, dtype: str, rows: int) -> int:
    """Bytes of weights that a step of `rows` tokens reads: of a mixture, the experts that are expected to be chosen."""
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
