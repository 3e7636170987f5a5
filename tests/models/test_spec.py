"""Reading configs: typed access, defaults of published formats, and errors that name the key."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from pando.errors import ConfigError, UnsupportedModel
from pando.layers.shapes import LatentShape, RopeShape
from pando.models.families.hybrid import read_dt_limit
from pando.models.hf_config import HFConfig
from pando.models.registry import known_models, spec_of
from pando.models.spec import Spec, read_rope
from tests.tiny_models import EXTRA_FAMILIES, FAMILIES, HYBRID_FAMILIES, hf_config, hf_config_values

BASE: dict[str, object] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "max_position_embeddings": 2048,
}


def spec(**changes: object) -> Spec:
    return spec_of(HFConfig({**BASE, **changes}))


def windows(found: Spec) -> list[int]:
    return [layer.window for layer in found.layers]


def test_llama_defaults() -> None:
    found = spec()
    layer = found.layers[0]
    assert (layer.heads, layer.kv_heads, layer.head_dim, layer.window) == (8, 8, 8, 0)
    assert layer.rope == RopeShape(theta=10000.0, dim=8)
    assert found.scale == pytest.approx(8**-0.5)
    assert not found.tied and not found.qkv_bias and found.qk_norm is None


def test_null_counts_as_not_given() -> None:
    assert spec(num_key_value_heads=None, head_dim=None, rope_scaling=None) == spec()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "64"}, "hidden_size is '64'; expected an integer"),
        ({"rms_norm_eps": True}, "rms_norm_eps is True; expected a number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; expected true or false"),
        ({"hidden_act": "mish"}, "activation 'mish' is not known"),
        ({"rope_scaling": []}, r"rope_scaling is \[\]; expected an object"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supported"),
        ({"num_attention_heads": None}, "lacks 'num_attention_heads'"),
        ({"model_type": "mistral", "layer_types": ["linear_attention"] * 6}, "linear_attention"),
        ({"model_type": "qwen3_5_text", "layer_types": ["full_attention"] * 5}, "layer_types"),
        ({"model_type": "qwen3_5_text", "layer_types": ["chunked_attention"] * 6}, "chunked_attention"),
        ({"model_type": "nemotron_h"}, "layers_block_type"),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "M?"}, r"\?"),
        ({"model_type": "falcon_h1", "mlp_bias": True}, "mlp_bias is not supported"),
        ({"model_type": "falcon_h1", "ssm_multipliers": [1.0]}, "1 numbers; 5 expected"),
        ({"model_type": "phi3", "rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "long_factor"),
    ],
)
def test_a_wrong_value_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec(**changes)


def test_windows_by_family() -> None:
    window: dict[str, object] = {"sliding_window": 32}
    assert windows(spec(**window)) == [0] * 6
    assert windows(spec(model_type="mistral", **window)) == [32] * 6
    assert windows(spec(model_type="mistral")) == [0] * 6
    assert windows(spec(model_type="qwen2", **window)) == [0] * 6
    assert (
        windows(spec(model_type="qwen2", use_sliding_window=True, max_window_layers=4, **window)) == [0] * 4 + [32] * 2
    )
    assert windows(spec(model_type="gemma2", **window)) == [32, 0] * 3
    assert windows(spec(model_type="gemma3_text", sliding_window_pattern=3, **window)) == [32, 32, 0] * 2


def test_layer_types_win_over_the_rule() -> None:
    kinds = ["full_attention"] * 5 + ["sliding_attention"]
    assert windows(spec(model_type="mistral", sliding_window=32, layer_types=kinds)) == [0] * 5 + [32]


def test_both_rope_spellings_agree() -> None:
    values = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}
    old = read_rope(HFConfig({**BASE, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **values}}))
    new = read_rope(HFConfig({**BASE, "rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **values}}))
    assert old == new == RopeShape(theta=5e5, dim=8, kind="llama3", factor=8.0, original_max=512)


def test_partial_rotary() -> None:
    assert read_rope(HFConfig({**BASE, "partial_rotary_factor": 0.5})).dim == 4
    assert read_rope(HFConfig({**BASE, "rope_parameters": {"partial_rotary_factor": 0.25}})).dim == 2


def test_published_gemma3_configs_leave_defaults_out() -> None:
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    }
    found = spec_of(HFConfig({"model_type": "gemma3", "text_config": text, "vision_config": {}}))
    assert found.tied and found.vocab_size == 262208 and found.max_position == 131072
    assert [layer.window for layer in found.layers[:6]] == [1024] * 5 + [0]
    local, full = found.layers[0].rope, found.layers[5].rope
    assert local == RopeShape(theta=10000.0, dim=256)
    assert full is not None and (full.kind, full.factor, full.theta) == ("linear", 8.0, 1e6)


def test_published_deepseek_configs_scale_their_scores() -> None:
    yarn = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
    latent: dict[str, object] = {"n_routed_experts": 8, "moe_intermediate_size": 16, "q_lora_rank": 24}
    found = spec(model_type="deepseek_v3", rope_scaling={**yarn, "mscale": 1.0, "mscale_all_dim": 1.0}, **latent)
    assert found.scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    mixer = found.layers[0].mixer
    assert isinstance(mixer, LatentShape) and (mixer.q_rank, mixer.rank, mixer.rope.kind) == (24, 512, "yarn")
    assert [layer.moe is not None for layer in found.layers] == [False] * 3 + [True] * 3
    lite = spec(model_type="deepseek_v2", num_experts_per_tok=2, **{**latent, "q_lora_rank": None})
    assert lite.layers[0].mixer == replace(mixer, q_rank=0, rope=RopeShape(theta=10000.0, dim=64, interleaved=True))


def test_layer_kinds_in_the_spellings_of_published_configs() -> None:
    kinds = ["mamba"] * 5 + ["attention"]
    granite = spec(model_type="granitemoehybrid", layer_types=kinds, shared_intermediate_size=32, mamba_n_heads=4)
    assert [layer.heads > 0 for layer in granite.layers] == [False] * 5 + [True]
    assert granite.layers[5].rope is None and granite.layers[0].intermediate == 32
    nemotron = spec(model_type="nemotron_h", hybrid_override_pattern="M-M*E")
    assert [(x.heads > 0, x.mixer is not None, x.intermediate > 0, x.moe is not None) for x in nemotron.layers] == [
        (False, True, False, False),
        (False, False, True, False),
        (False, True, False, False),
        (True, False, False, False),
        (False, False, False, True),
    ]
    following = spec(model_type="qwen3_5_text", full_attention_interval=3)
    assert [layer.mixer is None for layer in following.layers] == [False, False, True] * 2


def test_step_size_bounds_in_both_spellings() -> None:
    infinite: list[list[object]] = [[0.0, math.inf], [0.0, {"__float__": "Infinity"}]]
    for given in infinite:
        assert read_dt_limit(HFConfig({"time_step_limit": given})) == (0.0, math.inf)
    assert read_dt_limit(HFConfig({})) == (0.0, math.inf)
    assert read_dt_limit(HFConfig({"time_step_limit": [0.1, 2]})) == (0.1, 2.0)


def test_unknown_models_list_the_known_ones() -> None:
    with pytest.raises(UnsupportedModel, match=", ".join(known_models())):
        spec(model_type="mystery")


def test_config_files_that_can_not_be_read(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with pytest.raises(ConfigError, match="can not read"):
        HFConfig.from_file(file)
    file.write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        HFConfig.from_file(file)
    file.write_text(json.dumps([1]))
    with pytest.raises(ConfigError, match="holds list"):
        HFConfig.from_file(file)


@pytest.mark.parametrize("family", [*FAMILIES, *HYBRID_FAMILIES, *EXTRA_FAMILIES])
def test_rules_for_older_configs_match_transformers(family: str) -> None:
    """What a config may leave out (windows per layer, rotary defaults) follows as transformers fills it in."""
    values = {**hf_config_values(family), "num_hidden_layers": 9}
    filled = hf_config(family, values)
    text = dict(filled.get("text_config", filled))
    left_out = {"layer_types", "no_rope_layers", "rope_parameters"} - set(values)
    older = {name: value for name, value in text.items() if name not in left_out}
    assert spec_of(HFConfig(older)) == spec_of(HFConfig(text))
