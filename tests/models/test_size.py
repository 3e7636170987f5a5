"""Sizes from a config alone: exact parameter counts, bytes and operations."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from pando.kernels import op_table
from pando.models.load import load_model
from pando.models.size import ModelSize
from tests.tiny_models import EXTRA_FAMILIES, FAMILIES, HYBRID_FAMILIES, tiny_checkpoint

QWEN3_06B = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}


DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "n_group": 8,
    "topk_group": 4,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
}
QWEN3_NEXT = {
    "model_type": "qwen3_next",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "full_attention_interval": 4,
    "max_position_embeddings": 262144,
}


@pytest.mark.parametrize("family", FAMILIES + HYBRID_FAMILIES + EXTRA_FAMILIES)
def test_parameters_are_the_tensors_of_the_checkpoint(family: str) -> None:
    folder = tiny_checkpoint(family)
    tensors = load_file(folder / "model.safetensors")
    language = [t for name, t in tensors.items() if not name.startswith(("vision_tower.", "multi_modal"))]
    config = json.loads((folder / "config.json").read_text())
    expected = sum(t.numel() for t in language)
    assert ModelSize.of_config(config).num_parameters == expected
    assert load_model(folder, dtype="float32", ops=op_table("cpu", "reference")).num_parameters == expected


def test_a_published_model() -> None:
    size = ModelSize.of_config(QWEN3_06B)
    assert size.num_parameters == 596_049_920
    assert size.weight_bytes("bfloat16") == 2 * 596_049_920
    assert size.kv_bytes_per_token("bfloat16") == 28 * 2 * 8 * 128 * 2


def test_cache_bytes_are_those_of_the_loaded_plan() -> None:
    folder = tiny_checkpoint("gemma3")
    size = ModelSize.of_config(json.loads((folder / "config.json").read_text()))
    model = load_model(folder, dtype="bfloat16", ops=op_table("cpu", "reference"))
    assert size.kv_bytes_per_token("bfloat16") == model.cache_plan.bytes_per_token
    assert model.dtype == torch.bfloat16


def test_decode_costs_twice_the_weights_and_the_visible_keys() -> None:
    size = ModelSize.of_config(QWEN3_06B)
    matrices = size.num_parameters - 28 * (2 * 1024 + 2 * 128) - 1024
    keys = 28 * 2 * 16 * (128 + 128)
    assert size.decode_flops(1) == 2 * matrices + keys
    assert size.decode_flops(1001) - size.decode_flops(1) == 1000 * keys


def test_prefill_in_pieces_costs_the_same_but_for_the_head() -> None:
    size = ModelSize.of_config({**QWEN3_06B, "model_type": "mistral", "sliding_window": 64})
    whole = size.prefill_flops(300)
    pieces = sum(size.prefill_flops(100, start) for start in (0, 100, 200))
    assert pieces - whole == 2 * 2 * size.head_parameters


def test_only_chosen_experts_are_active() -> None:
    config = json.loads((tiny_checkpoint("qwen3_moe") / "config.json").read_text())
    two, three = (ModelSize.of_config({**config, "num_experts_per_tok": k}) for k in (2, 3))
    assert two.num_parameters == three.num_parameters
    sparse_layers = 2
    assert three.active_parameters - two.active_parameters == sparse_layers * 3 * 64 * 48


def test_a_latent_cache() -> None:
    size = ModelSize.of_config(DEEPSEEK_V3)
    assert size.num_parameters == 671_026_419_200
    assert size.kv_bytes_per_token("bfloat16") == 61 * (512 + 64) * 2 and size.state_bytes("bfloat16") == 0
    keys = 61 * 2 * 128 * (576 + 512)
    assert size.decode_flops(1001) - size.decode_flops(1) == 1000 * keys
    whole, pieces = size.prefill_flops(300), [size.prefill_flops(100, start) for start in (0, 100, 200)]
    assert sum(pieces) - whole == 2 * 2 * size.head_parameters


def test_a_hybrid_keeps_states_beside_its_keys() -> None:
    size = ModelSize.of_config(QWEN3_NEXT)
    assert size.kv_bytes_per_token("bfloat16") == 12 * 2 * 2 * 256 * 2
    assert size.state_bytes("bfloat16") == 36 * (8192 * 3 * 2 + 32 * 128 * 128 * 4)
    assert size.decode_flops(1001) - size.decode_flops(1) == 1000 * 12 * 2 * 16 * 512
    recurrent = 36 * (2 * 8192 * 4 + 7 * 32 * 128 * 128)
    attended = 12 * 2 * 16 * 512
    assert size.decode_flops(1) == 2 * (size.active_parameters + size.head_parameters) + recurrent + attended


def test_the_state_of_a_hybrid_costs_the_same_at_every_position() -> None:
    values = json.loads((tiny_checkpoint("jamba") / "config.json").read_text())
    pure = ModelSize.of_config({**values, "attn_layer_period": 100, "attn_layer_offset": 99})
    assert pure.kv_bytes_per_token("float32") == 0
    assert pure.decode_flops(100_000) == pure.decode_flops(1)


def test_reading_sizes_needs_no_torch() -> None:
    code = "import sys, pando.models.size; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
