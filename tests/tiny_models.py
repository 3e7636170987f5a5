"""Tiny random checkpoints of every supported family, and what transformers says they generate.

A tiny model with transformers' own initialisation repeats one token and forgives almost any bug. So every parameter is
drawn anew (noise on norms, biases, sinks and router corrections; matrices with std about 1.2 / sqrt(fan in)), and the
embedding's std and the matrices' gain are scanned until greedy decoding is varied and depends on its context. What was
reached is kept beside the checkpoint in `oracle/report.json` (see `Report`).

Checkpoints and oracle answers are kept in a temporary folder whose name depends on this file and on the version of
transformers; a second run does not import transformers at all.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCAB = 384
PROBE_TOKENS = 16
FINAL_NORMS = ("model.norm.weight", "language_model.norm.weight")
TIE = 1e-4
"""A token other than the oracle's is accepted if its logit is within this of the best one."""


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


@dataclass(frozen=True)
class Report:
    """How discriminating a checkpoint is, on one probe prompt of 24 tokens and 16 greedy ones.

    distinct: different tokens among them. min_gap: smallest distance between best and second logit. context_effect:
    change of the last logits, in units of their spread, when the fourth-last prompt token changes.
    """

    embedding_std: float
    gain: float
    distinct: int
    min_gap: float
    context_effect: float

    @property
    def good(self) -> bool:
        """Whether most bugs would show."""
        return self.distinct >= 10 and self.min_gap > 2e-3 and self.context_effect > 0.25


def cache_root() -> Path:
    """Folder of checkpoints and answers; `PANDO_TINY_MODELS` overrides it."""
    if given := os.environ.get("PANDO_TINY_MODELS"):
        return Path(given)
    source = Path(__file__).read_bytes() + importlib.metadata.version("transformers").encode()
    return Path(tempfile.gettempdir()) / f"pando-tiny-{os.getuid()}-{hashlib.sha256(source).hexdigest()[:12]}"


def tiny_checkpoint(family: str, tmp_root: Path | None = None) -> Path:
    """Folder of the family's checkpoint (config, safetensors, a byte-level tokenizer), built on first use."""
    folder = (tmp_root or cache_root()) / family
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Built beside its place and moved there in one step: test processes may build at the same time.
        with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as scratch:
            _build(family, Path(scratch))
            # Another process may have been first; its checkpoint is the same.
            with contextlib.suppress(OSError):
                os.rename(scratch, folder)
    return folder


def report(family: str) -> Report:
    """What the scan reached for the family's checkpoint."""
    return Report(**json.loads((tiny_checkpoint(family) / "oracle" / "report.json").read_text()))


def prompt_ids(length: int, seed: int = 0) -> list[int]:
    """A random prompt; the same for the same arguments."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(0, VOCAB, (length,), generator=generator).tolist()


def hf_greedy(path: Path, prompt: Sequence[int], n: int) -> tuple[list[int], list[float]]:
    """`n` greedy tokens of transformers' cached float32 decode, and their log-probabilities."""
    file = _answer(path, "greedy", prompt, ".json")
    if file.is_file():
        stored = json.loads(file.read_text())
        if len(stored["tokens"]) >= n:
            return stored["tokens"][:n], stored["logprobs"][:n]
    tokens, logprobs = _generate(hf_model(path), prompt, n)[:2]
    _write(file, json.dumps({"tokens": tokens, "logprobs": logprobs}))
    return tokens, logprobs


def hf_logits(path: Path, ids: Sequence[int]) -> Tensor:
    """Float32 logits [T, V] of transformers at every position of `ids`."""
    file = _answer(path, "logits", ids, ".safetensors")
    if not file.is_file():
        with torch.inference_mode():
            logits = hf_model(path)(torch.tensor([list(ids)])).logits[0].float().contiguous()
        scratch = file.with_suffix(f".{os.getpid()}")
        file.parent.mkdir(exist_ok=True)
        save_file({"logits": logits}, scratch)
        os.replace(scratch, file)
    return load_file(file)["logits"]


def assert_greedy(
    path: Path, prompt: Sequence[int], tokens: Sequence[int], logprobs: Sequence[float] | None = None
) -> None:
    """Fail unless `tokens` are what transformers generates, up to ties, with log-probabilities within 1e-3."""
    expected, expected_logprobs = hf_greedy(path, prompt, len(tokens))
    same = next((i for i, (a, b) in enumerate(zip(tokens, expected, strict=True)) if a != b), len(tokens))
    if same < len(tokens):
        logits = hf_logits(path, [*prompt, *tokens])[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(list(tokens))[:, None])[:, 0]
        gap = float((logits.max(dim=1).values - chosen).max())
        assert gap < TIE, f"{path.name}: {list(tokens)} != {expected} from token {same} on (gap {gap:.2g})"
    if logprobs is not None:
        error = max((abs(a - b) for a, b in zip(logprobs[:same], expected_logprobs[:same], strict=True)), default=0.0)
        assert error < 1e-3, f"{path.name}: log-probabilities are off by {error:.2g}"


@functools.lru_cache(maxsize=4)
def hf_model(path: Path) -> PreTrainedModel:
    """transformers' model of a checkpoint, float32, with the attention that knows soft-caps and sinks."""
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    auto_class = _auto_class(AutoConfig.from_pretrained(path))
    return auto_class.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def _auto_class(config: Any) -> Any:
    import transformers

    multimodal = hasattr(config, "text_config")
    return transformers.AutoModelForImageTextToText if multimodal else transformers.AutoModelForCausalLM


def _answer(path: Path, kind: str, ids: Sequence[int], suffix: str) -> Path:
    key = hashlib.sha256(json.dumps([int(i) for i in ids]).encode()).hexdigest()[:16]
    return path / "oracle" / f"{kind}-{key}{suffix}"


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(exist_ok=True)
    scratch = file.with_suffix(f".{os.getpid()}")
    scratch.write_text(text)
    os.replace(scratch, file)


@torch.inference_mode()
def _generate(model: PreTrainedModel, prompt: Sequence[int], n: int) -> tuple[list[int], list[float], float]:
    """Greedy tokens, their log-probabilities, and the smallest gap between best and second logit."""
    out = model.generate(
        torch.tensor([list(prompt)]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=n,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = out.sequences[0, len(prompt) :]
    logits = torch.cat(out.logits).float()
    best = logits.topk(2).values
    logprobs = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    return tokens.tolist(), logprobs.tolist(), float((best[:, 0] - best[:, 1]).min())


def _build(family: str, folder: Path) -> None:
    """Write config, weights, tokenizer and report of a family into `folder`."""

    recipe = ALL_RECIPES[family]
    config = _config(recipe, {**COMMON, **recipe.values})
    config._attn_implementation = "eager"
    model = _auto_class(config).from_config(config).eval()
    initial = {name: p.detach().clone() for name, p in _parameters(model).items()}
    best: Report | None = None
    for std, gain in itertools.product((1.0, 0.3, 0.1, 0.05, 0.02), (1.0, 1.5, 2.0)):
        _redraw(model, initial, recipe.seed, std, gain)
        found = _probe(model, std, gain)
        if best is None or (found.distinct, found.min_gap) > (best.distinct, best.min_gap):
            best = found
        if found.good:
            break
    assert best is not None
    _redraw(model, initial, recipe.seed, best.embedding_std, best.gain)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    _write(folder / "oracle" / "report.json", json.dumps(asdict(best)))
    _save_tokenizer(folder)


def hf_config_values(family: str) -> dict[str, Any]:
    """What a published config of the family would say; what older ones leave to defaults is left out."""
    values = {**COMMON, **ALL_RECIPES[family].values}
    return {name: value for name, value in values.items() if name != "layer_types"}


def hf_config(family: str, values: dict[str, Any]) -> dict[str, Any]:
    """The config transformers makes of `values`, with every default filled in."""
    return _config(ALL_RECIPES[family], values).to_dict()


def _config(recipe: Recipe, values: dict[str, Any]) -> Any:
    import transformers

    if recipe.multimodal is not None:
        values = {"text_config": values, **recipe.multimodal}
    return getattr(transformers, recipe.config)(**values)


def _parameters(model: PreTrainedModel) -> dict[str, Tensor]:
    buffers = {
        name: b for name, b in model.named_buffers() if name.endswith(("e_score_correction_bias", "expert_bias"))
    }
    return {**dict(model.named_parameters()), **buffers}


@torch.no_grad()
def _redraw(model: PreTrainedModel, initial: dict[str, Tensor], seed: int, std: float, gain: float) -> None:
    """Draw every parameter anew; vectors keep their initial value as mean (1 for a norm, 0 for Gemma's)."""
    generator = torch.Generator().manual_seed(seed)
    embedding = model.get_input_embeddings().weight
    for name, parameter in _parameters(model).items():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter is embedding:
            parameter.copy_(noise * std)
        elif name.endswith(FINAL_NORMS) and model.config.tie_word_embeddings:
            # A small tied embedding (so that a token does not simply predict itself) would make small logits.
            offset = 1.0 - initial[name]
            parameter.copy_((1.0 + noise * 0.3) / (std * parameter.numel() ** 0.5) - offset)
        elif name.endswith("A_log"):
            # A state that lasts about as long as the prompts: one that forgets at once would hide most mistakes.
            parameter.copy_(noise * 0.7 - 2.5)
        elif name.endswith(("dt_bias", "dt_proj.bias")):
            parameter.copy_(noise * 0.5)
        elif parameter.ndim == 1:
            parameter.copy_(initial[name] + noise * 0.3)
        elif name.endswith("bias"):
            parameter.copy_(noise * 0.3)
        else:
            # Fused experts are [E, in, out] in gpt-oss, [E, out, in] elsewhere.
            fan_in = parameter.shape[1 if "gpt_oss" in model.config.model_type and parameter.ndim == 3 else -1]
            parameter.copy_(noise * (1.2 * gain / fan_in**0.5))


@torch.inference_mode()
def _probe(model: PreTrainedModel, std: float, gain: float) -> Report:
    prompt = prompt_ids(24)
    tokens, _, min_gap = _generate(model, prompt, PROBE_TOKENS)
    other = [*prompt[:-4], (prompt[-4] + 1) % VOCAB, *prompt[-3:]]
    first, second = (model(torch.tensor([ids])).logits[0, -1] for ids in (prompt, other))
    effect = float((first - second).abs().max() / first.std())
    return Report(std, gain, len(set(tokens)), min_gap, effect)


def _save_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer: one token per byte, and unused two-byte tokens up to the vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [a + b for a in "abcdefghijkl" for b in "abcdefghijkl"]
    vocab = {token: index for index, token in enumerate([*letters, *pairs[: VOCAB - len(letters)]])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}[assistant]"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, "model_max_length": 1024}
    _write(folder / "tokenizer_config.json", json.dumps(settings))
