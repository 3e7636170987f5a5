"""FlashInfer's attention, played by a stand-in, against the reference: what is planned, when, and what is left out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pando.kernels import flashinfer
from pando.kernels.ops import AttentionPlan, OpTable, StepRows
from pando.kernels.reference import REFERENCE
from tests.kernels import flashinfer_stand_in as stand_in
from tests.kernels.cases import ATTENTION_CASES, BASE, AttentionCase, AttentionInputs, attention_inputs, close

LIBRARY = SimpleNamespace(
    BatchDecodeWithPagedKVCacheWrapper=stand_in.BatchDecodeWithPagedKVCacheWrapper,
    BatchPrefillWithPagedKVCacheWrapper=stand_in.BatchPrefillWithPagedKVCacheWrapper,
)
DECODE, PREFILL = LIBRARY.BatchDecodeWithPagedKVCacheWrapper, LIBRARY.BatchPrefillWithPagedKVCacheWrapper


def refuse(*args: object, **options: object) -> Tensor:
    raise AssertionError("left to the table below")


ROWS_TOLD = (((2, 30), (1, 9)), ((1, 9), (2, 30)))

BELOW_REFUSES = replace(REFERENCE, paged_attention=refuse)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(flashinfer, "FLOAT_BYTES", 1 << 10)
    stand_in._Wrapper.made.clear()
    yield
    stand_in._Wrapper.made.clear()


def ops_over(below: OpTable) -> OpTable:
    return flashinfer.over(below, LIBRARY)


def aligned(inputs: AttentionInputs) -> AttentionInputs:
    """The same with caches whose rows begin at multiples of 16 bytes, gaps between them."""

    def spread(cache: Tensor) -> Tensor:
        wide = torch.full((*cache.shape[:2], cache.shape[2] + 8), float("nan"), dtype=cache.dtype)
        wide[..., : cache.shape[2]] = cache
        return wide[..., : cache.shape[2]]

    return replace(inputs, k_cache=spread(inputs.k_cache), v_cache=spread(inputs.v_cache))


def rows_of(case: AttentionCase, recorded: str | None = None) -> StepRows:
    return StepRows([queries for queries, _ in case.rows], [keys for _, keys in case.rows], recorded)


def begin(ops: OpTable, plan: AttentionPlan, rows: StepRows) -> None:
    """As the attention backend does."""
    plan.reset()
    assert ops.plan_rows is not None
    ops.plan_rows(plan, rows)


def run(ops: OpTable, plan: AttentionPlan, inputs: AttentionInputs) -> Tensor:
    return ops.paged_attention(
        inputs.q,
        inputs.k_cache,
        inputs.v_cache,
        *inputs.ragged,
        plan=plan,
        **inputs.options,  # type: ignore[arg-type]
    )


def own(case: AttentionCase) -> AttentionCase:
    """The case, of a head size that FlashInfer knows."""
    return replace(case, head_dim=64, v_dim=None, sinks=False)


@pytest.mark.parametrize("case", sorted({own(case) for case in ATTENTION_CASES}, key=repr), ids=AttentionCase.id)
def test_it_equals_the_reference(case: AttentionCase) -> None:
    inputs = aligned(attention_inputs(case, torch.bfloat16))
    ops = ops_over(BELOW_REFUSES if inputs.q.shape[0] else REFERENCE)
    plan = ops.attention_plan()
    begin(ops, plan, rows_of(case))
    close(run(ops, plan, inputs), inputs.run(REFERENCE))
    run(ops, plan, inputs)
    decode = all(queries == 1 for queries, _ in case.rows)
    assert [type(made) for made in stand_in._Wrapper.made] == [DECODE if decode else PREFILL] * (len(inputs.q) > 0)
    assert all((made.plans, made.runs) == (1, 2) for made in stand_in._Wrapper.made)


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 8])
def test_decoding_uses_the_matrix_units_for_many_heads(heads: int) -> None:
    case = replace(BASE, rows=((1, 3), (1, 40)), heads=2 * heads)
    inputs, ops = aligned(attention_inputs(case, torch.float16)), ops_over(BELOW_REFUSES)
    plan = ops.attention_plan()
    begin(ops, plan, rows_of(case))
    close(run(ops, plan, inputs), inputs.run(REFERENCE))
    [made] = stand_in._Wrapper.made
    assert isinstance(made, DECODE) and made.tensor_cores is (heads > 3)


@pytest.mark.parametrize("rows", [((1, 41), (1, 300)), ((5, 41), (1, 300), (40, 60))], ids=["decode", "extend"])
@pytest.mark.parametrize("page_size", [1, 16])
def test_pages_behind_a_window_are_not_named(rows: tuple[tuple[int, int], ...], page_size: int) -> None:
    """They may be gone: the stand-in would read a page that does not exist."""
    case = replace(BASE, rows=rows, page_size=page_size, window=20)
    inputs, ops = aligned(attention_inputs(case, torch.bfloat16)), ops_over(BELOW_REFUSES)
    expected = inputs.run(REFERENCE)
    for row, (queries, keys) in enumerate(rows):
        inputs.ragged[0][row, : max(0, keys - queries - 19) // page_size] = 1 << 30
    plan = ops.attention_plan()
    begin(ops, plan, rows_of(case))
    close(run(ops, plan, inputs), expected)


@pytest.mark.parametrize("kept", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_keys_in_float8(kept: torch.dtype) -> None:
    inputs, ops = aligned(attention_inputs(BASE, torch.bfloat16)), ops_over(BELOW_REFUSES)
    k, v = torch.zeros(2, *inputs.k_cache.shape).to(torch.bfloat16)
    k.copy_(inputs.k_cache.nan_to_num())
    v.copy_(inputs.v_cache.nan_to_num())
    inputs = replace(inputs, k_cache=k.to(kept), v_cache=v.to(kept))
    plan = ops.attention_plan()
    begin(ops, plan, rows_of(BASE))
    close(run(ops, plan, inputs), inputs.run(REFERENCE))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (replace(BASE, sinks=True), torch.bfloat16),
        (replace(BASE, head_dim=96), torch.bfloat16),
        (replace(BASE, v_dim=32), torch.bfloat16),
        (BASE, torch.float32),
    ],
    ids=["sinks", "head size", "value size", "float32"],
)
def test_the_table_below_does_the_rest(
    case: AttentionCase, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    inputs, ops = aligned(attention_inputs(case, dtype)), ops_over(REFERENCE)
    plan = ops.attention_plan()
    begin(ops, plan, rows_of(case))
    with caplog.at_level(logging.INFO, "pando.kernels"):
        for _ in range(2):
            assert torch.equal(run(ops, plan, inputs), inputs.run(REFERENCE))
    assert not stand_in._Wrapper.made
    [said] = [record.getMessage() for record in caplog.records]
    assert said.startswith("flashinfer has no attention for ") and said.endswith(": the kernels reference have")


def test_the_table_below_does_what_is_not_aligned_what_has_a_tree_and_what_nobody_planned() -> None:
    ops = ops_over(REFERENCE)
    plan = ops.attention_plan()
    odd = attention_inputs(BASE, torch.bfloat16)
    tree = aligned(odd)
    squares = sum(queries**2 for queries, _ in BASE.rows)
    tree.options["tree_mask"] = torch.ones(squares, dtype=torch.uint8)
    for inputs in (odd, tree):
        begin(ops, plan, rows_of(BASE))
        assert torch.equal(run(ops, plan, inputs), inputs.run(REFERENCE))
    plain = aligned(odd)
    assert torch.equal(plain.run(ops), plain.run(REFERENCE))
    assert torch.equal(run(ops, ops.attention_plan(), plain), plain.run(REFERENCE))
    assert not stand_in._Wrapper.made


def test_int8_rows_are_left_to_the_table_below() -> None:
    q = torch.zeros(1, 2, 64, dtype=torch.bfloat16)
    cache = torch.zeros(16, 2, 68, dtype=torch.int8)
    for kept in (cache, cache[..., :64]):
        assert "over keys in torch.int8" in flashinfer.obstacle(q, kept, kept)


def test_every_kind_of_layer_has_a_plan_of_its_own() -> None:
    """Windows, scales and page tables differ from layer to layer; a second step plans the same wrappers anew."""
    cases = [BASE, replace(BASE, window=3), replace(BASE, softcap=7.0), replace(BASE, heads=8), BASE]
    layers = [aligned(attention_inputs(case, torch.bfloat16, seed)) for seed, case in enumerate(cases)]
    layers[2].options["scale"] = 0.5
    ops = ops_over(BELOW_REFUSES)
    plan = ops.attention_plan()
    for step in range(2):
        begin(ops, plan, rows_of(BASE))
        for inputs in (*layers, *reversed(layers)):
            close(run(ops, plan, inputs), inputs.run(REFERENCE))
        assert [made.plans for made in stand_in._Wrapper.made] == [step + 1] * 5


def test_a_step_that_does_not_tell_its_rows_is_left_to_the_table_below() -> None:
    """The rows of the step before are not taken for its own."""
    first, second = (aligned(attention_inputs(replace(BASE, rows=rows), torch.bfloat16)) for rows in ROWS_TOLD)
    ops = ops_over(REFERENCE)
    plan = ops.attention_plan()
    begin(ops, plan, rows_of(replace(BASE, rows=ROWS_TOLD[0])))
    run(ops, plan, first)
    plan.reset()
    assert torch.equal(run(ops, plan, second), second.run(REFERENCE))
    assert [made.runs for made in stand_in._Wrapper.made] == [1]


def test_a_step_is_planned_once_however_often_it_is_begun() -> None:
    inputs, ops = aligned(attention_inputs(BASE, torch.bfloat16)), ops_over(BELOW_REFUSES)
    plan, rows = ops.attention_plan(), rows_of(BASE)
    for _ in range(3):
        begin(ops, plan, rows)
        run(ops, plan, inputs)
    assert [made.plans for made in stand_in._Wrapper.made] == [1]


@pytest.mark.parametrize("decode", [True, False])
def test_wrappers_of_a_recording_are_planned_before_it_is_replayed(decode: bool) -> None:
    """Their buffers stay where they are; the layers of two kinds, of one with a window, each have some."""
    lens = [((1, 9), (1, 40), (1, 5)), ((1, 33), (1, 2), (1, 64))] if decode else [((4, 9), (0, 0), (2, 5))] * 2
    if not decode:
        lens[1] = ((1, 64), (5, 33), (0, 0))
    cases = [[replace(BASE, rows=rows, window=window) for window in (0, 10)] for rows in lens]
    first, second = ([aligned(attention_inputs(case, torch.bfloat16)) for case in pair] for pair in cases)
    ops = ops_over(BELOW_REFUSES)
    plan = ops.attention_plan()
    wide = max(inputs.ragged[0].shape[1] for inputs in first + second)
    tables = [torch.zeros(3, wide, dtype=torch.int32) for _ in range(2)]

    def fill(step: list[AttentionInputs]) -> None:
        for table, inputs in zip(tables, step, strict=True):
            table[:, : inputs.ragged[0].shape[1]] = inputs.ragged[0].clamp(max=len(inputs.k_cache) // 16 - 1)

    def attend(step: list[AttentionInputs]) -> list[Tensor]:
        ragged = [(table, *inputs.ragged[1:]) for table, inputs in zip(tables, step, strict=True)]
        return [run(ops, plan, replace(inputs, ragged=own)) for inputs, own in zip(step, ragged, strict=True)]

    fill(first)
    begin(ops, plan, rows_of(cases[0][0], "shape"))
    for out, inputs in zip(attend(first), first, strict=True):
        close(out, inputs.run(REFERENCE))
    made = list(stand_in._Wrapper.made)
    places = [(w._paged_kv_indptr.data_ptr(), w._paged_kv_indices.data_ptr()) for w in made]
    assert len(made) == 2 and all(wrapper.graph for wrapper in made)
    fill(second)
    begin(ops, plan, rows_of(cases[1][0], "shape"))
    assert [wrapper.plans for wrapper in made] == [2, 2], "a replay calls nobody"
    for out, inputs in zip(attend(second), second, strict=True):
        close(out, inputs.run(REFERENCE))
    assert stand_in._Wrapper.made == made and [wrapper.plans for wrapper in made] == [2, 2]
    assert places == [(w._paged_kv_indptr.data_ptr(), w._paged_kv_indices.data_ptr()) for w in made]
    begin(ops, plan, rows_of(cases[1][0], "another shape"))
    assert [wrapper.plans for wrapper in made] == [2, 2]


def test_partial_results_of_a_recording_have_room() -> None:
    """FlashInfer refuses a plan that has less: with that, nothing smaller would be recorded either."""
    llama_2_7b = flashinfer.Kind(32, 32, 128, 16, 0, 0.0, 1.0, torch.bfloat16, torch.bfloat16, 0)
    assert flashinfer.float_bytes(llama_2_7b, 128, 256) == 32 * (2 + 127) * 128 * 129 * 4 + 32 > 256 << 20
    llama_3_8b = replace(llama_2_7b, kv_heads=8)
    assert flashinfer.float_bytes(llama_3_8b, 128, 256) == 32 * (8 + 127) * 32 * 129 * 4 + 32
    assert flashinfer.float_bytes(llama_3_8b, 256, 256) == 32 * (64 + 255) * 4 * 129 * 4 + 32, "tiles of 16"


def test_memory_for_partial_results_grows_and_what_was_given_stays() -> None:
    memory, device = flashinfer.FloatMemory(), torch.device("cpu")
    first = memory.on(device, 0)
    assert first.shape == (1 << 10,) and memory.on(device, 1 << 10) is first
    second = memory.on(device, 5000)
    assert second.shape == (5000,) and memory.on(device, 0) is second and first.shape == (1 << 10,)


def test_the_workspace_of_another_plan_is_noticed() -> None:
    """Of the stand-in itself: two wrappers of one workspace can not both be planned."""
    inputs, ops = aligned(attention_inputs(BASE, torch.bfloat16)), ops_over(BELOW_REFUSES)
    plan = ops.attention_plan()
    begin(ops, plan, rows_of(BASE))
    run(ops, plan, inputs)
    [made] = stand_in._Wrapper.made
    made.ints[:4] = 77
    with pytest.raises(AssertionError, match="the workspace is of another plan"):
        run(ops, plan, inputs)
