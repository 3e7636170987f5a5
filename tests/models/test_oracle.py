"""Every family against transformers: logits of a whole prompt, and greedy decoding through a paged cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pando.kernels import op_table
from pando.kernels.ops import OpTable
from pando.layers.linear import Linear
from pando.layers.shapes import LayerShape
from pando.models.build import build_model
from pando.models.decoder import DecoderModel, ModelInfo
from pando.models.load import load_model, load_spec
from pando.models.spec import Spec
from pando.models.weights import Loader, SafetensorsSource
from tests.models.paged_loop import full_logits, greedy
from tests.tiny_models import (
    EXTRA_FAMILIES,
    FAMILIES,
    assert_greedy,
    hf_logits,
    prompt_ids,
    report,
    tiny_checkpoint,
)

NEW_TOKENS = 16
PROMPTS = (prompt_ids(41), prompt_ids(37, seed=1))
"""Longer than every window, so that windows matter from the first new token on."""

REFERENCE = op_table("cpu", "reference")
TABLES = {table.name: table for table in (REFERENCE, op_table("cpu", "auto"))}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


def load(path: Path, ops: OpTable = REFERENCE, dtype: str = "float32") -> DecoderModel:
    return load_model(path, dtype=dtype, ops=ops)


def assert_same_generation(model: DecoderModel, ops: OpTable, path: Path, *, chunk: int, page_size: int) -> None:
    rows = greedy(model, ops, PROMPTS, NEW_TOKENS, chunk=chunk, page_size=page_size)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        assert_greedy(path, prompt, row.tokens[row.prompt_len :], row.logprobs)


@pytest.mark.parametrize("ops", TABLES.values(), ids=TABLES.keys())
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_prompt(family: str, ops: OpTable) -> None:
    path = tiny_checkpoint(family)
    expected = hf_logits(path, PROMPTS[0])
    error = (full_logits(load(path, ops), ops, PROMPTS[0]) - expected).abs().max() / expected.abs().max()
    assert error < 1e-4


@pytest.mark.parametrize("ops", TABLES.values(), ids=TABLES.keys())
@pytest.mark.parametrize(("chunk", "page_size"), [(64, 1), (7, 16), (19, 1), (1, 16)])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding(family: str, chunk: int, page_size: int, ops: OpTable) -> None:
    path = tiny_checkpoint(family)
    assert_same_generation(load(path, ops), ops, path, chunk=chunk, page_size=page_size)


@pytest.mark.parametrize("family", EXTRA_FAMILIES)
def test_one_pass_of_further_families(family: str) -> None:
    path = tiny_checkpoint(family)
    found = report(family)
    assert found.distinct >= 8 and found.context_effect > 0.1, found
    expected = hf_logits(path, PROMPTS[0])
    error = (full_logits(load(path), REFERENCE, PROMPTS[0]) - expected).abs().max() / expected.abs().max()
    assert error < 1e-4
    ops = op_table("cpu", "auto")
    assert_same_generation(load(path, ops), ops, path, chunk=7, page_size=16)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.2), ("float16", 0.03)])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_close(family: str, dtype: str, tolerance: float) -> None:
    path = tiny_checkpoint(family)
    model = load(path, dtype=dtype)
    assert str(model.dtype) == f"torch.{dtype}"
    expected = hf_logits(path, PROMPTS[0])
    logits = full_logits(model, REFERENCE, PROMPTS[0])
    assert logits.dtype == torch.float32
    assert (logits - expected).square().mean().sqrt() < tolerance * expected.std()


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_show_mistakes(family: str) -> None:
    """Varied output that depends on the context; a model that repeats itself would accept most bugs."""
    found = report(family)
    assert found.distinct >= 8, found
    assert found.context_effect > 0.1, found


def load_changed(path: Path, change: Callable[[Spec], Spec]) -> DecoderModel:
    """The family's checkpoint read with a wrong spec."""
    spec, config = load_spec(path)
    loader = Loader(SafetensorsSource(path), torch.float32, torch.device("cpu"))
    info = ModelInfo((), config.values)
    with torch.inference_mode():
        return build_model(change(spec), loader, REFERENCE, spec.max_position, info)


def each_layer(**changes: Callable[[LayerShape], object]) -> Callable[[Spec], Spec]:
    """A change of fields of every layer's shape."""

    def change(spec: Spec) -> Spec:
        layers = (replace(x, **{name: new(x) for name, new in changes.items()}) for x in spec.layers)  # type: ignore[arg-type]
        return replace(spec, layers=tuple(layers))

    return change


def rope_with(**changes: object) -> Callable[[Spec], Spec]:
    """A change of fields of every layer's rotary embedding."""
    return each_layer(rope=lambda layer: layer.rope and replace(layer.rope, **changes))  # type: ignore[arg-type]


def moe_with(**changes: object) -> Callable[[Spec], Spec]:
    """A change of fields of every layer's routing."""
    return each_layer(moe=lambda layer: layer.moe and replace(layer.moe, **changes))  # type: ignore[arg-type]


def spec_with(**changes: object) -> Callable[[Spec], Spec]:
    """A change of the spec itself."""
    return lambda spec: replace(spec, **changes)  # type: ignore[arg-type]


def same_rope_everywhere(spec: Spec) -> Spec:
    """Every layer turned like the first."""
    return replace(spec, layers=tuple(replace(layer, rope=spec.layers[0].rope) for layer in spec.layers))


WIDER = each_layer(window=lambda layer: layer.window and layer.window + 1)
NARROWER = each_layer(window=lambda layer: layer.window and layer.window - 1)

WRONG_SPECS: dict[str, tuple[str, Callable[[Spec], Spec]]] = {
    "window off by one, wide": ("mistral", WIDER),
    "window off by one, narrow": ("mistral", NARROWER),
    "gemma2 window": ("gemma2", WIDER),
    "gemma3 window": ("gemma3", NARROWER),
    "qwen2 window": ("qwen2", WIDER),
    "gpt_oss window": ("gpt_oss", NARROWER),
    "rope theta": ("llama", rope_with(theta=20000.0)),
    "rope scaling ignored": ("llama3", rope_with(kind="default")),
    "one rope for both kinds of layers": ("gemma3", rope_with(theta=10000.0)),
    "yarn attention factor": ("gpt_oss", rope_with(attention_factor=1.0)),
    "yarn truncated": ("gpt_oss", rope_with(truncate=True)),
    "longrope short for long": ("phi3_long", rope_with(original_max=1024, attention_factor=1.4136)),
    "longrope attention factor": ("phi3_long", rope_with(attention_factor=1.0)),
    "rope halves for pairs": ("glm4", rope_with(interleaved=False)),
    "rope on the whole head": ("glm4", rope_with(dim=24)),
    "norms without the one": ("gemma2", spec_with(norm_offset=0.0)),
    "embedding multiplier": ("gemma3", spec_with(embed_multiplier=1.0)),
    "attention softcap": ("gemma2", spec_with(softcap=0.0)),
    "final softcap": ("gemma2", spec_with(final_softcap=0.0)),
    "attention scale": ("gemma2", spec_with(scale=24**-0.5)),
    "residual multiplier": ("granite", spec_with(residual_multiplier=1.0)),
    "logit multiplier": ("granite", spec_with(logit_multiplier=1.0)),
    "activation": ("gemma", spec_with(activation="silu")),
    "router weights not renormalised": ("qwen3_moe", moe_with(renormalise=False)),
    "one expert too few": ("qwen3_moe", moe_with(top_k=1)),
    "expert correction in the weights": ("dots1", moe_with(score="softmax")),
    "routed scale": ("glm4_moe", moe_with(scale=1.0)),
    "expert groups": ("dots1", moe_with(groups=1)),
    "rope on layers without one": ("smollm3", same_rope_everywhere),
    "branches one after the other": ("gpt_neox", spec_with(parallel=False)),
    "epsilon": ("qwen3", spec_with(eps=1e-2)),
    "softmax before top-k": ("gpt_oss", moe_with(score="softmax", renormalise=False)),
}


@pytest.mark.parametrize("mistake", WRONG_SPECS)
def test_oracle_sees_a_wrong_spec(mistake: str) -> None:
    family, change = WRONG_SPECS[mistake]
    path = tiny_checkpoint(family)
    with pytest.raises(AssertionError, match=r"!=|are off by"):
        assert_same_generation(load_changed(path, change), REFERENCE, path, chunk=64, page_size=16)


def without_qk_norm(model: DecoderModel) -> None:
    for layer in model.layers:
        layer.mixer.qk_norm = None


def without_sinks(model: DecoderModel) -> None:
    for layer in model.layers:
        layer.mixer.params = replace(layer.mixer.params, sinks=None)


def without_bias(linear: Linear, model: DecoderModel) -> None:
    packed = linear.packed
    bias = packed(torch.zeros(1, model.hidden_size))
    assert bias.any()
    linear.packed = lambda x: packed(x) - bias  # type: ignore[assignment]


def without_qkv_bias(model: DecoderModel) -> None:
    for layer in model.layers:
        without_bias(layer.mixer.qkv, model)


def without_router_bias(model: DecoderModel) -> None:
    for layer in model.layers:
        without_bias(layer.mlp.router, model)  # type: ignore[attr-defined]


WRONG_MODELS = {
    "query and key norms skipped": ("qwen3", without_qk_norm),
    "full-width norms skipped": ("olmo2", without_qk_norm),
    "sinks ignored": ("gpt_oss", without_sinks),
    "projection biases ignored": ("qwen2", without_qkv_bias),
    "router bias ignored": ("gpt_oss", without_router_bias),
}


@pytest.mark.parametrize("mistake", WRONG_MODELS)
def test_oracle_sees_a_skipped_part(mistake: str) -> None:
    family, break_model = WRONG_MODELS[mistake]
    path = tiny_checkpoint(family)
    model = load(path)
    break_model(model)
    with pytest.raises(AssertionError, match=r"!=|are off by"):
        assert_same_generation(model, REFERENCE, path, chunk=64, page_size=16)
