"""Layers with recurrent states or a latent cache against transformers, through pages and state slots."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pando.kernels import op_table
from pando.kernels.ops import OpTable
from pando.layers.shapes import LayerShape
from pando.models.build import build_model
from pando.models.decoder import DecoderModel, ModelInfo
from pando.models.hf_config import HFConfig
from pando.models.load import load_model, load_spec
from pando.models.registry import spec_of
from pando.models.size import ModelSize
from pando.models.spec import Spec
from pando.models.weights import Loader, SafetensorsSource
from tests.models.paged_loop import PagedLoop, Row, full_logits, greedy
from tests.tiny_models import HYBRID_FAMILIES, assert_greedy, hf_logits, prompt_ids, report, tiny_checkpoint

NEW_TOKENS = 16
PROMPTS = (prompt_ids(41), prompt_ids(3, seed=1), prompt_ids(26, seed=2))
"""One shorter than the convolutions, one that several chunks are needed for."""

RECURRENT_FAMILIES = tuple(name for name in HYBRID_FAMILIES if not name.startswith(("deepseek", "glm")))

REFERENCE, BEST = op_table("cpu", "reference"), op_table("cpu", "auto")
TABLES = {table.name: table for table in (REFERENCE, BEST)}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


def load(family: str, ops: OpTable = REFERENCE, dtype: str = "float32") -> DecoderModel:
    return load_model(tiny_checkpoint(family), dtype=dtype, ops=ops)


@pytest.mark.parametrize("ops", TABLES.values(), ids=TABLES.keys())
@pytest.mark.parametrize("family", HYBRID_FAMILIES)
def test_logits_of_a_prompt(family: str, ops: OpTable) -> None:
    expected = hf_logits(tiny_checkpoint(family), PROMPTS[0])
    error = (full_logits(load(family, ops), ops, PROMPTS[0]) - expected).abs().max() / expected.abs().max()
    assert error < 1e-4


@pytest.mark.parametrize("ops", TABLES.values(), ids=TABLES.keys())
@pytest.mark.parametrize(("chunk", "page_size"), [(64, 1), (7, 16), (1, 4)])
@pytest.mark.parametrize("family", HYBRID_FAMILIES)
def test_greedy_decoding(family: str, chunk: int, page_size: int, ops: OpTable) -> None:
    """Rows of different lengths in every step; at 7 tokens a step some decode while others are still prefilled."""
    rows = greedy(load(family, ops), ops, PROMPTS, NEW_TOKENS, chunk=chunk, page_size=page_size)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        assert_greedy(tiny_checkpoint(family), prompt, row.tokens[row.prompt_len :], row.logprobs)


@pytest.mark.parametrize("family", HYBRID_FAMILIES)
def test_checkpoints_show_mistakes(family: str) -> None:
    found = report(family)
    assert found.distinct >= 8 and found.context_effect > 0.1, found


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.2), ("float16", 0.05)])
@pytest.mark.parametrize("family", HYBRID_FAMILIES)
def test_half_precision_is_close(family: str, dtype: str, tolerance: float) -> None:
    model = load(family, BEST, dtype)
    expected = hf_logits(tiny_checkpoint(family), PROMPTS[0])
    logits = full_logits(model, BEST, PROMPTS[0])
    assert logits.dtype == torch.float32
    assert (logits - expected).square().mean().sqrt() < tolerance * expected.std()


@pytest.mark.skipif(BEST.program is None, reason="these kernels have no programs")
@pytest.mark.parametrize("family", HYBRID_FAMILIES)
def test_a_program_is_chosen_where_all_parts_have_instructions(family: str) -> None:
    by_op = ("falcon_h1", "jamba", "lfm2", "lfm2_moe", "mamba", "nemotron_h")
    latent = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite")
    assert (load(family, BEST).fused is None) == (family in by_op + latent)


def run(loop: PagedLoop, row: Row, *counts: int) -> Tensor:
    """Logits of the tokens of several steps of one row."""
    hidden = torch.cat([loop.step([row], [count]) for count in counts])
    with torch.inference_mode():
        return loop.model.logits(hidden)


@pytest.mark.parametrize("ops", TABLES.values(), ids=TABLES.keys())
@pytest.mark.parametrize("family", HYBRID_FAMILIES)
def test_a_row_resumes_from_a_state_saved_inside_a_chunk(family: str, ops: OpTable) -> None:
    """Saved in the middle of one step while another row runs beside it; resumed by a row with other tokens after it."""
    model, ids, saved = load(family, ops), list(PROMPTS[0]), (1, 17, 23)
    loop = PagedLoop(model, ops, page_size=1)
    slots = {position: loop.free_states.pop() for position in saved}
    first, other = Row(ids, len(ids), save_at=dict(slots)), Row(prompt_ids(30, seed=3), 30)
    loop.step([other, first], [9, 5])
    loop.step([first, other], [25, 8])
    for position, slot in slots.items():
        branch = [*ids[:position], *prompt_ids(12, seed=4)]
        resumed = resume(loop, first, branch, position, slot)
        expected = hf_logits(tiny_checkpoint(family), branch)[position:]
        logits = run(loop, resumed, 5, len(branch) - position - 5)
        assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


def resume(loop: PagedLoop, source: Row, tokens: Sequence[int], position: int, slot: int) -> Row:
    """A row that shares the first `position` tokens' pages with another and starts from a saved state."""
    row = Row(list(tokens), len(tokens), position, list(source.pages[:position]), state=loop.free_states.pop())
    loop.pool.copy_states(torch.tensor([slot]), torch.tensor([row.state]))
    return row


@pytest.mark.parametrize("ops", TABLES.values(), ids=TABLES.keys())
@pytest.mark.parametrize("family", RECURRENT_FAMILIES)
def test_states_do_not_depend_on_cuts_and_neighbours(family: str, ops: OpTable) -> None:
    model, ids = load(family, ops), list(PROMPTS[0][:20])
    one, many = PagedLoop(model, ops, page_size=1), PagedLoop(model, ops, page_size=1)
    alone, beside = Row(ids, len(ids)), Row(ids, len(ids))
    run(one, alone, *[1] * 20)
    other = Row(prompt_ids(40, seed=5), 40)
    many.step([other, beside], [3, 12])
    many.step([beside, other], [8, 11])
    for cut, whole in zip(one.pool.states, many.pool.states, strict=True):
        for left, right in zip(cut, whole, strict=True):
            difference = (left[alone.state] - right[beside.state]).abs().max()
            assert difference < 1e-5 * right[beside.state].abs().max()


Change = Callable[[Spec], Spec]


def mixer_with(**changes: object) -> Change:
    """A change of every mixer's shape."""

    def changed(layer: LayerShape) -> LayerShape:
        return layer if layer.mixer is None else replace(layer, mixer=replace(layer.mixer, **changes))  # type: ignore[arg-type]

    return lambda spec: replace(spec, layers=tuple(changed(layer) for layer in spec.layers))


def moe_with(**changes: object) -> Change:
    """A change of every layer's routing."""

    def changed(layer: LayerShape) -> LayerShape:
        return layer if layer.moe is None else replace(layer, moe=replace(layer.moe, **changes))  # type: ignore[arg-type]

    return lambda spec: replace(spec, layers=tuple(changed(layer) for layer in spec.layers))


def spec_with(**changes: object) -> Change:
    """A change of the spec itself."""
    return lambda spec: replace(spec, **changes)  # type: ignore[arg-type]


def rope_pairs(spec: Spec) -> Spec:
    """Rotary halves instead of pairs."""
    mixer = spec.layers[0].mixer
    return mixer_with(rope=replace(mixer.rope, interleaved=False))(spec)  # type: ignore[union-attr]


WRONG_SPECS: dict[str, tuple[str, Change]] = {
    "bounds of the step size": ("granitemoehybrid", mixer_with(dt_limit=(0.5, 1.0))),
    "norm before the gate": ("bamba", mixer_with(norm="before_gate")),
    "norm after the gate": ("falcon_h1", mixer_with(norm="before_gate")),
    "factors on the projection": ("falcon_h1", mixer_with(factors=(1.0,) * 5)),
    "factor on the state space": ("falcon_h1", mixer_with(out_factor=1.0)),
    "factor on attention": ("falcon_h1", spec_with(attention_factor=1.0)),
    "factor on keys": ("falcon_h1", spec_with(scale=16**-0.5)),
    "factor on the gate": ("falcon_h1", spec_with(gate_multiplier=1.0)),
    "factor on the MLP": ("falcon_h1", spec_with(mlp_multiplier=1.0)),
    "scores sharpened by yarn": ("deepseek_v3", spec_with(scale=24**-0.5)),
    "rotary pairs": ("deepseek_v3", rope_pairs),
    "epsilon of the compressed norms": ("glm4_moe_lite", mixer_with(norm_eps=1e-1)),
    "groups by their best two": ("deepseek_v2", moe_with(group_scores=2)),
    "weights renormalised": ("deepseek_v2", moe_with(renormalise=True)),
    "norms without the one": ("qwen3_next", spec_with(norm_offset=0.0)),
    "activation of plain experts": ("nemotron_h", spec_with(activation="silu")),
}


@pytest.mark.parametrize("mistake", WRONG_SPECS)
def test_oracle_sees_a_wrong_spec(mistake: str) -> None:
    family, change = WRONG_SPECS[mistake]
    path = tiny_checkpoint(family)
    spec, config = load_spec(path)
    loader = Loader(SafetensorsSource(path), torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        model = build_model(change(spec), loader, REFERENCE, spec.max_position, ModelInfo((), config.values))
    expected = hf_logits(path, PROMPTS[0])
    assert (full_logits(model, REFERENCE, PROMPTS[0]) - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize(("quantization", "tolerance"), [("int8", 0.1), ("w8a8", 0.15), ("int4", 0.7)])
@pytest.mark.parametrize("family", HYBRID_FAMILIES)
def test_rounded_on_load(family: str, quantization: str, tolerance: float) -> None:
    """Weights are rounded, so the logits change, and stay near (at most tokens: some are sent to another expert)."""
    path = tiny_checkpoint(family)
    plain = full_logits(load(family, BEST), BEST, PROMPTS[0])
    rounded = full_logits(load_model(path, dtype="float32", ops=BEST, quantization=quantization), BEST, PROMPTS[0])
    error = (rounded - plain).square().mean(-1).sqrt().median() / plain.std()
    assert 0 < error < tolerance


def test_multimodal_checkpoints_are_read_through_their_language_model(tmp_path: Path) -> None:
    """Qwen3.5 as it is published: nested names, a vision tower, a layer that drafts."""
    path = tiny_checkpoint("qwen3_5")
    tensors = {
        name if name == "lm_head.weight" else "model.language_model." + name.removeprefix("model."): tensor
        for name, tensor in load_file(path / "model.safetensors").items()
    }
    extra = {"model.visual.patch_embed.weight": torch.zeros(2, 2), "mtp.fc.weight": torch.zeros(2, 2)}
    save_file({**tensors, **extra}, tmp_path / "model.safetensors")
    text = json.loads((path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_5", "text_config": text}))
    model = load_model(tmp_path, dtype="float32", ops=REFERENCE)
    assert torch.equal(full_logits(model, REFERENCE, PROMPTS[1]), full_logits(load("qwen3_5"), REFERENCE, PROMPTS[1]))


def test_a_model_type_by_another_name() -> None:
    values = json.loads((tiny_checkpoint("deepseek_v3") / "config.json").read_text())
    renamed = spec_of(HFConfig({**values, "model_type": "kimi_k2"}))
    assert renamed.layers == spec_of(HFConfig(values)).layers


@pytest.mark.parametrize("family", HYBRID_FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cache_bytes_are_those_of_the_pool(family: str, dtype: str) -> None:
    path = tiny_checkpoint(family)
    model = load(family, REFERENCE, dtype)
    size = ModelSize.of_config(json.loads((path / "config.json").read_text()))
    loop = PagedLoop(model, REFERENCE, page_size=4, num_slots=32)
    bytes_of_states = sum(tensor.nbytes for layer in loop.pool.states for tensor in layer)
    assert size.state_bytes(dtype) * loop.pool.num_states == bytes_of_states
    assert size.kv_bytes_per_token(dtype) * loop.pool.num_slots == loop.pool.num_bytes - bytes_of_states
    assert (bytes_of_states > 0) == (family in RECURRENT_FAMILIES)
