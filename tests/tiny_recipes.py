"""Configs of the tiny checkpoints: small shapes that use every part of a family. `tests.tiny_models` builds them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

VOCAB = 384


@dataclass(frozen=True)
class Recipe:
    """A family's config class and the values that differ from `COMMON`; windows are shorter than the tests' prompts.

    multimodal: the outer config's other values; `values` are then those of its text part.
    """

    config: str
    values: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    multimodal: dict[str, Any] | None = None


COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 128,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.0 + 1.5 * i for i in range(8)],
    "original_max_position_embeddings": 1024,
}
OLMO3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {**YARN_ROPE, "truncate": True},
}
SIGMOID_MOE = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.7,
}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
GEMMA = {"head_dim": 24, "query_pre_attn_scalar": 40, "tie_word_embeddings": True}
VISION = {
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    "mm_tokens_per_image": 4,
    "image_token_index": VOCAB - 1,
    "boi_token_index": VOCAB - 2,
    "eoi_token_index": VOCAB - 3,
}

RECIPES: dict[str, Recipe] = {
    "llama": Recipe("LlamaConfig"),
    "llama3": Recipe("LlamaConfig", {"rope_parameters": LLAMA3_ROPE, "head_dim": 32, "attention_bias": True}),
    "mistral": Recipe("MistralConfig", {"sliding_window": 9, "head_dim": 24}),
    "qwen2": Recipe("Qwen2Config", {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 2}),
    "qwen3": Recipe("Qwen3Config", {"head_dim": 24, "tie_word_embeddings": True}),
    "qwen3_moe": Recipe("Qwen3MoeConfig", {**MOE, "head_dim": 24, "mlp_only_layers": [1]}),
    "gemma": Recipe("GemmaConfig", {**GEMMA, "num_key_value_heads": 1}),
    "gemma2": Recipe(
        "Gemma2Config",
        {**GEMMA, "sliding_window": 9, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 12.0},
    ),
    "gemma3": Recipe(
        "Gemma3TextConfig",
        {**GEMMA, "sliding_window": 10, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "gemma3_vision": Recipe(
        "Gemma3Config", {**GEMMA, "sliding_window": 9, "sliding_window_pattern": 2}, multimodal=VISION
    ),
    "olmo2": Recipe("Olmo2Config"),
    "phi3": Recipe("Phi3Config", {"sliding_window": 13, "rope_parameters": {"rope_theta": 10000.0}}),
    "phi3_long": Recipe("Phi3Config", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}),
    "phi3_short": Recipe("Phi3Config", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 1024}),
    "glm": Recipe("GlmConfig", {"head_dim": 24, "attention_bias": True}),
    "glm4": Recipe("Glm4Config", {"head_dim": 24, "attention_bias": True}),
    "granite": Recipe(
        "GraniteConfig",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.6,
            "logits_scaling": 0.5,
            "tie_word_embeddings": True,
        },
    ),
    "gpt_oss": Recipe(
        "GptOssConfig",
        {
            "head_dim": 16,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "sliding_window": 7,
            "rope_parameters": YARN_ROPE,
        },
    ),
}

MLA = {"kv_lora_rank": 40, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 24, "num_key_value_heads": 4}
DELTA = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_state": 12, "mamba_n_groups": 2, "mamba_d_head": 16, "mamba_chunk_size": 8}

HYBRID_RECIPES: dict[str, Recipe] = {
    "qwen3_next": Recipe("Qwen3NextConfig", {**DELTA, **MOE, "shared_expert_intermediate_size": 40}),
    "qwen3_5": Recipe("Qwen3_5TextConfig", DELTA),
    "qwen3_5_moe": Recipe(
        "Qwen3_5MoeTextConfig",
        {
            **DELTA,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 40,
        },
    ),
    "granitemoehybrid": Recipe(
        "GraniteMoeHybridConfig",
        {
            **MAMBA2,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 40,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.6,
            "logits_scaling": 0.5,
        },
    ),
    "granitemoehybrid_dense": Recipe(
        "GraniteMoeHybridConfig",
        {
            **MAMBA2,
            "layer_types": ["full_attention", "linear_attention", "linear_attention"],
            "num_local_experts": 0,
            "shared_intermediate_size": 80,
            "position_embedding_type": "rope",
            "attention_multiplier": 0.2,
        },
    ),
    "bamba": Recipe("BambaConfig", {**MAMBA2, "attn_layer_indices": [1], "head_dim": 16}),
    "falcon_h1": Recipe(
        "FalconH1Config",
        {
            **MAMBA2,
            "mamba_d_ssm": 128,
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": False,
            "attention_in_multiplier": 1.2,
            "attention_out_multiplier": 0.9,
            "key_multiplier": 0.8,
            "embedding_multiplier": 1.3,
            "lm_head_multiplier": 0.7,
            "mlp_multipliers": [0.8, 1.2],
            "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.7],
            "ssm_in_multiplier": 1.1,
            "ssm_out_multiplier": 0.8,
        },
    ),
    "falcon_h1_gate": Recipe("FalconH1Config", {**MAMBA2, "mamba_d_ssm": 128}),
    "jamba": Recipe(
        "JambaConfig",
        {
            "mamba_d_state": 12,
            "mamba_dt_rank": 10,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "num_experts": 6,
            "num_hidden_layers": 4,
        },
    ),
    "lfm2": Recipe("Lfm2Config", {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 16}),
    "lfm2_moe": Recipe(
        "Lfm2MoeConfig",
        {
            "layer_types": ["conv", "full_attention", "conv"],
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "num_dense_layers": 1,
            "norm_topk_prob": False,
        },
    ),
    "mamba": Recipe("MambaConfig", {"state_size": 12, "time_step_rank": 10, "use_bias": True}),
    "mamba2": Recipe(
        "Mamba2Config",
        {"num_heads": 8, "head_dim": 16, "state_size": 12, "n_groups": 2, "chunk_size": 8},
    ),
    "nemotron_h": Recipe(
        "NemotronHConfig",
        {
            "layers_block_type": ["linear_attention", "mlp", "linear_attention", "full_attention", "moe"],
            "num_hidden_layers": 5,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "ssm_state_size": 12,
            "chunk_size": 8,
            "head_dim": 24,
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "moe_shared_expert_intermediate_size": 40,
            "moe_latent_size": 32,
            "routed_scaling_factor": 1.7,
            # No bound: transformers applies one to the step sizes of prompts, and not to those of new tokens.
            "time_step_min": 1e-30,
        },
    ),
    "deepseek_v2": Recipe(
        "DeepseekV2Config",
        {
            **MLA,
            "q_lora_rank": None,
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "n_shared_experts": 2,
            "routed_scaling_factor": 1.7,
            "first_k_dense_replace": 1,
            "topk_method": "group_limited_greedy",
            "n_group": 3,
            "topk_group": 2,
        },
    ),
    "deepseek_v3": Recipe(
        "DeepseekV3Config",
        {
            **MLA,
            **SIGMOID_MOE,
            "q_lora_rank": 32,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "num_nextn_predict_layers": 0,
            "rope_parameters": {**YARN_ROPE, "mscale": 0.7, "mscale_all_dim": 1.0},
        },
    ),
    "glm4_moe_lite": Recipe("Glm4MoeLiteConfig", {**MLA, **SIGMOID_MOE, "q_lora_rank": 32}),
}
"""Layers with recurrent states or a latent cache, alone or between attention."""

EXTRA_RECIPES: dict[str, Recipe] = {
    "arcee": Recipe("ArceeConfig"),
    "cohere": Recipe("CohereConfig", {"logit_scale": 0.25, "use_qk_norm": True}),
    "cohere2": Recipe("Cohere2Config", {"logit_scale": 0.25, "sliding_window": 9, "num_hidden_layers": 4}),
    "cwm": Recipe(
        "CwmConfig",
        {
            "head_dim": 16,
            "sliding_window": 9,
            "rope_parameters": LLAMA3_ROPE,
            # It insists on ids; these end nothing, because no model here can produce them.
            "bos_token_id": VOCAB,
            "eos_token_id": VOCAB,
        },
    ),
    "dots1": Recipe(
        "Dots1Config",
        {**SIGMOID_MOE, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "head_dim": 16},
    ),
    "ernie4_5": Recipe("Ernie4_5Config", {"head_dim": 24}),
    "ernie4_5_moe": Recipe(
        "Ernie4_5_MoeConfig",
        {"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 48, "moe_num_shared_experts": 2},
    ),
    "exaone4": Recipe("Exaone4Config", {"sliding_window": 9, "num_hidden_layers": 4, "head_dim": 16}),
    "flex_olmo": Recipe("FlexOlmoConfig", {"num_experts": 6, "num_experts_per_tok": 2}),
    "glm4_moe": Recipe(
        "Glm4MoeConfig", {**SIGMOID_MOE, "head_dim": 24, "use_qk_norm": True, "first_k_dense_replace": 1}
    ),
    "granitemoe": Recipe(
        "GraniteMoeConfig",
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.6,
            "logits_scaling": 0.5,
        },
    ),
    "gpt_neox": Recipe("GPTNeoXConfig", {"num_key_value_heads": 4}),
    "helium": Recipe("HeliumConfig", {"head_dim": 16}),
    "hunyuan_v1_dense": Recipe("HunYuanDenseV1Config", {"head_dim": 24}),
    "minimax_m2": Recipe(
        "MiniMaxM2Config",
        {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 16, "rotary_dim": 8},
    ),
    "ministral": Recipe("MinistralConfig", {"sliding_window": 9, "head_dim": 24}),
    "mixtral": Recipe("MixtralConfig", {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 9}),
    "nemotron": Recipe("NemotronConfig"),
    "olmo": Recipe("OlmoConfig"),
    "olmo3": Recipe("Olmo3Config", {"sliding_window": 9, "num_hidden_layers": 4, "rope_parameters": OLMO3_ROPE}),
    "olmoe": Recipe("OlmoeConfig", {"num_experts": 6, "num_experts_per_tok": 2}),
    "phi": Recipe("PhiConfig"),
    "qwen2_moe": Recipe("Qwen2MoeConfig", {**MOE, "norm_topk_prob": False, "shared_expert_intermediate_size": 40}),
    "seed_oss": Recipe("SeedOssConfig", {"head_dim": 24}),
    "smollm3": Recipe("SmolLM3Config", {"num_hidden_layers": 4}),
    "vaultgemma": Recipe("VaultGemmaConfig", {**GEMMA, "sliding_window": 9, "attn_logit_softcapping": 1.5}),
    "stablelm": Recipe("StableLmConfig", {"use_qkv_bias": True}),
    "starcoder2": Recipe("Starcoder2Config", {"sliding_window": 9}),
}
"""Families beyond the first ones: one oracle pass each, where those get the whole matrix."""

ALL_RECIPES = {**RECIPES, **HYBRID_RECIPES, **EXTRA_RECIPES}
FAMILIES: tuple[str, ...] = tuple(RECIPES)
HYBRID_FAMILIES: tuple[str, ...] = tuple(HYBRID_RECIPES)
EXTRA_FAMILIES: tuple[str, ...] = tuple(EXTRA_RECIPES)
