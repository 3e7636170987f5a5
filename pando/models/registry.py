"""Which adapter reads which checkpoint. The table is the list of supported architectures."""

from __future__ import annotations

from collections.abc import Callable

from pando.errors import UnsupportedModel
from pando.models.families import (
    gemma,
    glm,
    gpt_oss,
    granite,
    latent,
    layer_norm,
    lfm2,
    llama,
    mamba,
    mamba_hybrid,
    moe,
    olmo,
    phi,
    qwen_hybrid,
)
from pando.models.hf_config import HFConfig
from pando.models.spec import Spec

Adapter = Callable[[HFConfig], Spec]

ADAPTERS: dict[str, Adapter] = {
    "arcee": llama.arcee,
    "bamba": mamba_hybrid.bamba,
    "cohere": layer_norm.cohere,
    "cohere2": layer_norm.cohere2,
    "cwm": llama.cwm,
    "deepseek_v2": latent.deepseek_v2,
    "deepseek_v3": latent.deepseek_v3,
    "dots1": moe.dots1,
    "ernie4_5": llama.interleaved,
    "ernie4_5_moe": moe.ernie4_5_moe,
    "exaone4": olmo.exaone4,
    "falcon_h1": mamba_hybrid.falcon_h1,
    "flex_olmo": olmo.flex_olmo,
    "gemma": gemma.gemma,
    "gemma2": gemma.gemma2,
    "gemma3_text": gemma.gemma3,
    "glm": glm.glm,
    "glm4": glm.glm4,
    "glm4_moe": moe.glm4_moe,
    "glm4_moe_lite": latent.glm4_moe_lite,
    "gpt_neox": layer_norm.gpt_neox,
    "gpt_oss": gpt_oss.gpt_oss,
    "granite": granite.granite,
    "granitemoe": granite.granitemoe,
    "granitemoehybrid": granite.granitemoehybrid,
    "helium": llama.interleaved,
    "hunyuan_v1_dense": llama.hunyuan_dense,
    "jamba": mamba_hybrid.jamba,
    "lfm2": lfm2.lfm2,
    "lfm2_moe": lfm2.lfm2_moe,
    "llama": llama.llama,
    "mamba": mamba.mamba,
    "mamba2": mamba.mamba2,
    "minimax_m2": moe.minimax_m2,
    "ministral": llama.mistral,
    "mistral": llama.mistral,
    "mixtral": moe.mixtral,
    "nemotron": layer_norm.nemotron,
    "nemotron_h": mamba_hybrid.nemotron_h,
    "olmo": olmo.olmo,
    "olmo2": olmo.olmo2,
    "olmo3": olmo.olmo3,
    "olmoe": olmo.olmoe,
    "phi": layer_norm.phi,
    "phi3": phi.phi3,
    "qwen2": llama.qwen2,
    "qwen2_moe": moe.qwen2_moe,
    "qwen3": llama.qwen3,
    "qwen3_5_moe_text": qwen_hybrid.qwen3_5_moe,
    "qwen3_5_text": qwen_hybrid.qwen3_5,
    "qwen3_moe": moe.qwen3_moe,
    "qwen3_next": qwen_hybrid.qwen3_next,
    "seed_oss": llama.seed_oss,
    "smollm3": llama.smollm3,
    "stablelm": layer_norm.stablelm,
    "starcoder2": layer_norm.starcoder2,
    "vaultgemma": gemma.vaultgemma,
}
"""`model_type` of a config -> adapter."""


ALIASES = {"kimi_k2": "deepseek_v3"}
"""Model types that are another one under a name of their own."""


def known_models() -> tuple[str, ...]:
    """All supported `model_type`s, sorted."""
    return tuple(sorted(ADAPTERS))


def spec_of(config: HFConfig) -> Spec:
    """The Spec of a config.

    Multi-modal checkpoints are served through their language model (`text_config`). Raises UnsupportedModel when the
    architecture is not known, ConfigError when the config can not be read.
    """
    model_type = config.text("model_type", default="unknown")
    adapter = ADAPTERS.get(ALIASES.get(model_type, model_type))
    text = config.section("text_config")
    if adapter is None and text is not None:
        outer = {name: config.values[name] for name in ("tie_word_embeddings",) if config.has(name)}
        return spec_of(text.with_defaults(outer))
    if adapter is None:
        architectures = config.items("architectures") or []
        raise UnsupportedModel(
            f"{config.source}: model type {model_type!r} ({', '.join(map(str, architectures)) or 'no architecture'}) "
            f"is not supported; supported: {', '.join(known_models())}",
            param="model_path",
        )
    return adapter(config)
