"""Layers run as one program against the same layers run op by op."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pando.kernels import cpu, op_table
from pando.kernels.ops import HeadsShape, StepTensors
from pando.layers.embedding import Embedding
from pando.models.decoder import DecoderModel
from pando.models.load import load_model
from tests.models.paged_loop import full_logits, greedy
from tests.tiny_models import ALL_RECIPES, prompt_ids, tiny_checkpoint

pytestmark = pytest.mark.skipif(cpu.LOAD_ERROR is not None, reason=f"no compiled kernels: {cpu.LOAD_ERROR}")

OPS = op_table("cpu", "auto")
FUSED = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "glm4", "granite", "exaone4", "hunyuan_v1_dense")
"""Plain, biases, query-key norms before and after rotary, four norms, windows, softcaps, multipliers, post norms."""
OTHER_PARTS = ("olmo2", "phi", "stablelm", "starcoder2", "cohere", "cohere2", "gpt_neox", "olmo", "nemotron", "arcee")
"""Layer norms with and without weights, norms over all heads, parallel branches, MLPs without a gate."""
MIXTURES = (
    *("mixtral", "qwen3_moe", "gpt_oss", "qwen2_moe", "olmoe", "flex_olmo", "dots1", "glm4_moe", "ernie4_5_moe"),
    *("granitemoe", "minimax_m2"),
)
"""Each way to choose and weigh experts, in groups or not, with shared experts, gated or not."""
RECURRENT = ("qwen3_next", "qwen3_5", "qwen3_5_moe", "granitemoehybrid", "bamba", "falcon_h1_gate")
"""Gated delta and state spaces, with gated attention, mixtures, or attention beside them."""
NOT_FUSED = ("falcon_h1", "jamba", "lfm2", "nemotron_h", "deepseek_v3")


def load(family: str, dtype: str) -> DecoderModel:
    return load_model(tiny_checkpoint(family), dtype=dtype, ops=OPS)


@pytest.mark.parametrize("family", FUSED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_program_computes_what_the_layers_do(family: str, dtype: str) -> None:
    model, ids = load(family, dtype), prompt_ids(70, seed=3)
    assert model.fused is not None
    fused = full_logits(model, OPS, ids)
    model.fused = None
    by_op = full_logits(model, OPS, ids)
    # A branch is added to the residual stream before it is rounded, op by op after: a unit in the last place per layer.
    tolerance = {"float32": 1e-4, "bfloat16": 0.15, "float16": 0.02}[dtype]
    assert (fused - by_op).abs().max() <= tolerance * by_op.abs().max()
    assert (fused - by_op).abs().mean() <= tolerance / 8 * by_op.abs().mean()


@pytest.mark.parametrize("family", (*OTHER_PARTS, *MIXTURES, *RECURRENT))
def test_other_parts_compute_what_the_layers_do(family: str) -> None:
    model, ids = load(family, "float32"), prompt_ids(70, seed=3)
    assert model.fused is not None
    fused = full_logits(model, OPS, ids)
    model.fused = None
    by_op = full_logits(model, OPS, ids)
    assert (fused - by_op).abs().max() <= 1e-4 * by_op.abs().max()


@pytest.mark.parametrize("family", ("cohere", "phi", "olmo2", "mixtral", "gpt_oss", "qwen3_next", "bamba"))
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_a_narrow_dtype_they_err_no_more_than_the_layers(family: str, dtype: str) -> None:
    """Against float32, for rounding may choose another expert."""
    ids = prompt_ids(70, seed=3)
    exact, model = full_logits(load(family, "float32"), OPS, ids), load(family, dtype)
    fused = full_logits(model, OPS, ids)
    model.fused = None
    by_op = full_logits(model, OPS, ids)
    assert 0 < (fused - exact).abs().mean() <= 1.3 * (by_op - exact).abs().mean()


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "cohere2", "dots1", "qwen3_next", "granitemoehybrid"])
@pytest.mark.parametrize("page_size", [1, 16])
def test_mixed_steps_give_the_tokens_of_the_layers(family: str, page_size: int) -> None:
    model = load(family, "float32")
    prompts = [prompt_ids(length, seed=length) for length in (1, 40, 9)]
    fused = greedy(model, OPS, prompts, 8, chunk=7, page_size=page_size)
    model.fused = None
    by_op = greedy(model, OPS, prompts, 8, chunk=7, page_size=page_size)
    assert [row.tokens for row in fused] == [row.tokens for row in by_op]


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keys_and_values_in_int8(family: str, dtype: str) -> None:
    model, ids = load(family, dtype), prompt_ids(70, seed=3)
    exact = full_logits(model, OPS, ids)
    model.cache_plan = model.cache_plan.in_int8()
    fused = full_logits(model, OPS, ids)
    model.fused = None
    by_op = full_logits(model, OPS, ids)
    tolerance = {"float32": 1e-4, "bfloat16": 0.15}[dtype]
    assert (fused - by_op).abs().max() <= tolerance * by_op.abs().max()
    assert 0 < (fused - exact).abs().mean() <= 0.05 * exact.abs().mean()


@pytest.mark.parametrize("family", NOT_FUSED)
def test_what_no_instruction_exists_for_runs_op_by_op(family: str) -> None:
    assert family in ALL_RECIPES and load(family, "float32").fused is None


def test_the_reference_has_no_programs() -> None:
    assert load_model(tiny_checkpoint("llama"), dtype="float32", ops=op_table("cpu", "reference")).fused is None


def test_instructions_that_do_not_fit_are_refused() -> None:
    assert OPS.program is not None
    program = OPS.program(torch.float32, 8)
    wide = program.buffer(12)
    weight = OPS.pack_linear(torch.randn(12, 8))
    assert program.linear(0, wide, weight, False)
    for source, target in ((0, 1), (wide, wide), (wide, 1)):
        with pytest.raises(ValueError, match="does not fit"):
            program.linear(source, target, weight, False)
    assert not program.linear(0, wide, op_table("cpu", "reference").pack_linear(torch.randn(12, 8)), False)
    with pytest.raises(ValueError, match="keeps the width"):
        program.norm(0, wide, torch.ones(8), 1e-6)
    with pytest.raises(IndexError):
        program.scale(7, 1.0)


def test_a_step_out_of_range_raises_and_the_next_one_runs() -> None:
    assert OPS.program is not None
    program, shape = OPS.program(torch.float32, 8), HeadsShape(1, 1, 8, 8, 8, False, False)
    qkv = program.buffer(24)
    assert program.linear(0, qkv, OPS.pack_linear(torch.randn(24, 8)), False)
    program.heads(qkv, 0, 0, shape, None, 0.0)
    program.attend(qkv, 1, 0, shape, 1.0, 0, 0.0, None)
    caches, zero, one = (torch.zeros(4, 1, 8),), torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int32)
    starts, table = torch.tensor([0, 1], dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    good = StepTensors(zero, (zero,), starts, one, (table,), 1, caches, (torch.zeros(4, 1, 8),), (0,))
    x, rotaries = torch.randn(1, 8), [torch.zeros(2, 8)]
    expected = program.run(x.clone(), good, rotaries)
    wrong = {"out_loc": (zero + 4,), "positions": zero + 2, "page_table": (table + 9,), "kv_lens": one + 1}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            program.run(x.clone(), replace(good, **{name: value}), rotaries)
    assert torch.equal(program.run(x.clone(), good, rotaries), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_program_that_embeds(dtype: torch.dtype) -> None:
    assert OPS.program is not None
    embed = Embedding(torch.randn(40, 24).to(dtype), 4.9)
    program, weight = OPS.program(dtype, 24), torch.rand(24) + 0.5
    assert not program.embed(embed.weight.double()) and not program.embed(embed.weight[:, :20])
    assert program.embed(embed.weight)
    program.scale(0, embed.multiplier)
    program.norm(0, 1, weight, 1e-6)
    cache, rows = (torch.zeros(4, 1, 8, dtype=dtype),), torch.zeros(1, 1, dtype=torch.int32)
    ids, positions = torch.tensor([39, 0, 7]), torch.arange(3)
    ragged = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    step = StepTensors(positions, (positions,), *ragged, (rows,), 4, cache, cache, (0,))
    for values in ([39, 0, 7], [1, 1, 2]):  # in place: the memory of a step serves the next one
        ids[:] = torch.tensor(values)
        assert torch.equal(program.run(ids, step, []), OPS.rms_norm(embed(ids), weight, 1e-6))
    for wrong in (40, -1):
        with pytest.raises(ValueError, match="input_ids"):
            program.run(torch.tensor([0, wrong, 0]), step, [])
    with pytest.raises(ValueError, match="embeds first"):
        program.embed(embed.weight)
