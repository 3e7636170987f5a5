"""Every native op against the reference: shapes, dtypes, layouts, levels; and what it may not do."""

from __future__ import annotations

import math
import multiprocessing
import os
import threading
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from pando.errors import ConfigError
from pando.kernels import cpu, reference
from pando.kernels.ops import OpTable
from pando.kernels.reference import REFERENCE
from tests.kernels.cases import (
    ATTENTION_CASES,
    DTYPES,
    LEVELS,
    LONG,
    AttentionCase,
    AttentionInputs,
    SampleInputs,
    attention_inputs,
    close,
    sample_inputs,
)

pytestmark = pytest.mark.skipif(not LEVELS, reason=f"no compiled kernels: {cpu.LOAD_ERROR}")

TABLES = {level: cpu.table(level) for level in LEVELS}


@pytest.fixture(params=LEVELS)
def ops(request: pytest.FixtureRequest) -> OpTable:
    """The native table of each level this machine runs."""
    return TABLES[request.param]


@pytest.fixture
def native_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a fall-back an error, so that a test can not compare the reference with itself."""

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("the native op fell back to the reference")

    names = [name for name in OpTable.__dataclass_fields__ if name != "name"]
    monkeypatch.setattr(cpu, "reference", SimpleNamespace(**dict.fromkeys(names, refuse)))


@cache
def attention_expected(case: AttentionCase, dtype: torch.dtype) -> tuple[AttentionInputs, Tensor]:
    """Inputs of a case and the reference's result, shared by the levels."""
    inputs = attention_inputs(case, dtype)
    return inputs, inputs.run(REFERENCE)


@pytest.mark.usefixtures("native_only")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=AttentionCase.id)
def test_attention(ops: OpTable, case: AttentionCase, dtype: torch.dtype) -> None:
    inputs, expected = attention_expected(case, dtype)
    close(inputs.run(ops), expected)


@pytest.mark.usefixtures("native_only")
def test_attention_row_does_not_depend_on_its_batch_or_on_threads(ops: OpTable) -> None:
    inputs = attention_inputs(AttentionCase(rows=(*LONG, (40, 90), (1, 5)), page_size=1), torch.bfloat16)
    results = []
    for threads, aside in ((1, 0), (2, 0), (3, 0), (3, 1), (3, 5), (1, 0)):
        cpu.set_num_threads(threads)
        cpu.set_aside(aside)
        results.append(inputs.run(ops))
        cpu.set_aside(-aside)
    cpu.set_num_threads(1)
    assert all(torch.equal(result, results[0]) for result in results)
    table, starts, kv_lens = inputs.ragged
    for row in range(len(kv_lens)):
        begin, end = int(starts[row]), int(starts[row + 1])
        inputs.ragged = (table[row : row + 1], torch.tensor([begin, end]).int() - begin, kv_lens[row : row + 1])
        whole, inputs.q = inputs.q, inputs.q[begin:end]
        assert torch.equal(inputs.run(ops), results[0][begin:end])
        inputs.q = whole


@pytest.mark.usefixtures("native_only")
def test_attention_passes_a_nan_on(ops: OpTable) -> None:
    inputs = attention_inputs(AttentionCase(rows=((2, 5), (1, 2050))))
    inputs.q[0, 1, 3] = inputs.q[2, 2, 0] = math.nan
    bad = inputs.run(ops).isnan().all(-1)
    assert bad.nonzero().tolist() == [[0, 1], [2, 2]]


@pytest.mark.usefixtures("native_only")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 64), (5, 100), (4, 1000), (0, 16), (2, 3, 80)], ids=str)
def test_rms_norm(ops: OpTable, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = torch.randn(shape).to(dtype) * 3, torch.randn(shape[-1])
    close(ops.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5))
    wide = torch.randn(*shape[:-2], shape[-2] + 2, shape[-1] + 5).to(dtype)
    view = wide[..., 1:-1, : shape[-1]]
    close(ops.rms_norm(view, weight, 1e-5), REFERENCE.rms_norm(view, weight, 1e-5))


@pytest.mark.usefixtures("native_only")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 64), (5, 100), (0, 16), (300, 257)], ids=str)
def test_add_rms_norm(ops: OpTable, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, residual, weight = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[1])
    other = residual.clone()
    out, expected = ops.add_rms_norm(x, residual, weight, 1e-6), REFERENCE.add_rms_norm(x, other, weight, 1e-6)
    assert torch.equal(residual, other)
    close(out, expected)


@pytest.mark.usefixtures("native_only")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "rotary"), [(64, 64), (80, 80), (96, 24), (128, 2), (20, 20), (256, 128)])
def test_rope_on_views_of_a_joint_projection(
    ops: OpTable, dim: int, rotary: int, interleaved: bool, dtype: torch.dtype
) -> None:
    cos_sin, positions = torch.randn(50, rotary), torch.tensor([49, 0, 7, 7, 30])
    joint = torch.randn(5, 7 * dim).to(dtype)
    other = joint.clone()
    for run, values in ((ops.rope_, joint), (REFERENCE.rope_, other)):
        q, k, _ = values.split((4 * dim, 2 * dim, dim), dim=1)
        run(q.unflatten(1, (4, dim)), k.unflatten(1, (2, dim)), positions, cos_sin, interleaved)
    close(joint, other)
    assert torch.equal(joint[:, 6 * dim :], other[:, 6 * dim :])


@pytest.mark.usefixtures("native_only")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_store_kv_with_views_on_both_sides(ops: OpTable, dtype: torch.dtype) -> None:
    joint, pool = torch.randn(6, 9, 20).to(dtype), torch.zeros(2, 3, 40, 4, 24).to(dtype)
    k, v, where = joint[:, :4], joint[:, 4:8, :12], torch.tensor([39, 3, 0, 17, 5, 6])
    ops.store_kv(k, v, pool[0, 1, ..., :20], pool[1, 1, ..., :12], where)
    assert torch.equal(pool[0, 1, where, :, :20], k) and torch.equal(pool[1, 1, where, :, :12], v)
    pool[0, 1, where, :, :20] = pool[1, 1, where, :, :12] = 0
    assert not pool.any()


@pytest.mark.usefixtures("native_only")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", reference.ACTIVATIONS)
def test_gated_activation(ops: OpTable, kind: str, dtype: torch.dtype) -> None:
    for rows, size in ((0, 8), (1, 1), (3, 37), (5, 256), (70, 1000)):
        wide = (torch.randn(rows, 2 * size + 3) * 4).to(dtype)
        view = wide[:, : 2 * size]
        close(ops.gated_activation(view, kind), REFERENCE.gated_activation(view, kind))


@pytest.mark.parametrize("value", [0.0, -0.0, 88.0, -100.0, -1e38, 1e-30, math.nan])
def test_gated_activation_at_the_edges(ops: OpTable, value: float) -> None:
    for kind in ("silu", "gelu_tanh", "gelu", "relu2", "swiglu_oai"):
        x = torch.tensor([[value, 1.0]])
        torch.testing.assert_close(ops.gated_activation(x, kind), REFERENCE.gated_activation(x, kind), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_of_every_16_bit_value(ops: OpTable, dtype: torch.dtype) -> None:
    """relu2 with gate 1 copies `up` through a load and a store: all 65,536 values must come back."""
    up = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    out = ops.gated_activation(torch.cat((torch.ones_like(up), up)).unsqueeze(0), "relu2")[0]
    assert torch.equal(out.isnan(), up.isnan())
    assert torch.equal(out.nan_to_num(nan=0.0).view(torch.int16), up.nan_to_num(nan=0.0).view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_are_rounded_like_torch_rounds(ops: OpTable, dtype: torch.dtype) -> None:
    """add_rms_norm's residual, on sums that fall between, on the middle of and beyond 16-bit values."""
    x = (torch.randn(4000) * torch.logspace(-9, 5, 4000)).to(dtype)
    residual = (torch.randn(4000) * torch.logspace(-9, 5, 4000)).to(dtype)
    finite = (residual + x).isfinite()
    x, residual = x[finite], residual[finite]
    expected = residual + x
    ops.add_rms_norm(x, residual, torch.ones(len(x)), 1e-6)
    assert torch.equal(residual, expected)


SAMPLERS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.6},
    {"top_k": 1},
    {"top_k": 20},
    {"top_p": 0.9},
    {"top_p": 0.05},
    {"min_p": 0.1},
    {"temperature": 1.7, "top_k": 50, "top_p": 0.8, "min_p": 0.02},
    {"top_k": 4000, "top_p": 0.999},
    {"temperature": 50.0, "top_p": 0.5},
]


@cache
def sample_expected(vocab: int, sampler: int) -> tuple[SampleInputs, Tensor]:
    """Rows with ties, masked tokens and both zeros among them, and the reference's tokens, shared by the levels."""
    torch.manual_seed(vocab)
    logits = torch.randn(200, vocab) * 3
    logits[:50] = logits[:50].round()
    logits[50:80, ::3] = -math.inf
    logits[80:100, -1] = 0.0
    logits[80:100, 0] = -0.0
    inputs = sample_inputs(logits, **SAMPLERS[sampler])  # type: ignore[arg-type]
    return inputs, inputs.run(REFERENCE)


@pytest.mark.usefixtures("native_only")
@pytest.mark.parametrize("sampler", range(len(SAMPLERS)), ids=lambda index: str(SAMPLERS[index]))
@pytest.mark.parametrize("vocab", [1, 5, 257, 2048, 5003])
def test_sample_chooses_the_tokens_of_the_reference(ops: OpTable, vocab: int, sampler: int) -> None:
    inputs, expected = sample_expected(vocab, sampler)
    assert torch.equal(inputs.run(ops), expected)


@pytest.mark.usefixtures("native_only")
def test_sample_draws_from_the_filtered_distribution(ops: OpTable) -> None:
    torch.manual_seed(1)
    logits, draws = torch.randn(40) * 1.5, 20000
    options = {"temperature": 0.8, "top_k": 20, "top_p": 0.95, "min_p": 0.01}
    tokens = sample_inputs(logits.repeat(draws, 1), **options).run(ops)  # type: ignore[arg-type]
    ordered = torch.sort(torch.softmax(logits / 0.8, dim=-1), descending=True)
    p = ordered.values[:20] / ordered.values[:20].sum()
    p = p[: int((p.cumsum(0) < 0.95).sum()) + 1]
    p = p[p >= 0.01 * p[0]]
    expected = torch.zeros(40).index_put((ordered.indices[: len(p)],), p / p.sum()) * draws
    counts = torch.bincount(tokens, minlength=40).float()
    assert float(counts[expected == 0].sum()) == 0
    likely = expected > 0
    degrees = int(likely.sum()) - 1
    chi_squared = float(((counts - expected)[likely] ** 2 / expected[likely]).sum())
    assert chi_squared < degrees + 3.3 * math.sqrt(2 * degrees)


@pytest.mark.usefixtures("native_only")
def test_seeds_reproduce_across_batch_compositions(ops: OpTable) -> None:
    torch.manual_seed(2)
    inputs = sample_inputs(torch.randn(64, 1000), top_p=0.9, first_seed=-30)
    tokens = inputs.run(ops)
    order = torch.randperm(64)
    assert torch.equal(inputs.rows(order).run(ops), tokens[order])
    assert torch.equal(torch.cat([inputs.rows(torch.tensor([row])).run(ops) for row in range(64)]), tokens)
    again = sample_inputs(inputs.logits, top_p=0.9, first_seed=1000)
    assert not torch.equal(again.run(ops), tokens)


def test_sample_of_hopeless_logits_stays_in_the_vocabulary(ops: OpTable) -> None:
    logits = torch.stack([torch.full((100,), value) for value in (math.nan, -math.inf, math.inf)])
    for options in ({}, {"top_p": 0.5}, {"top_k": 3}, {"temperature": 0.0}):
        tokens = sample_inputs(logits, **options).run(ops)  # type: ignore[arg-type]
        assert bool(((tokens >= 0) & (tokens < 100)).all())


def penalty_inputs(rows: int = 5, vocab: int = 97, width: int = 60) -> tuple[Tensor, ...]:
    lens = torch.randint(0, width + 1, (rows,), dtype=torch.int32)
    return (
        torch.randn(rows, vocab),
        torch.randint(0, vocab, (rows, width + 7), dtype=torch.int32)[:, :width],
        (lens * torch.rand(rows)).int(),
        lens,
        torch.rand(rows) + 0.5,
        torch.randn(rows),
        torch.randn(rows),
    )


@pytest.mark.usefixtures("native_only")
def test_penalties(ops: OpTable) -> None:
    torch.manual_seed(3)
    for shape in ((1, 1, 1), (5, 97, 60), (3, 5000, 2000), (4, 30, 0)):
        inputs = penalty_inputs(*shape)
        other = (inputs[0].clone(), *inputs[1:])
        ops.apply_penalties_(*inputs)
        REFERENCE.apply_penalties_(*other)
        close(inputs[0], other[0])


@pytest.mark.usefixtures("native_only")
@pytest.mark.parametrize("vocab", [1, 5, 31, 32, 33, 257, 5003])
def test_argmax_finite_and_token_mask(ops: OpTable, vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randint(-5, 6, (7, vocab), generator=generator).float()  # many ties
    logits[1, vocab // 2] = math.inf
    logits[2] = -math.inf
    logits[3, -1] = math.nan
    assert torch.equal(ops.argmax(logits[:3]), REFERENCE.argmax(logits[:3]))
    assert ops.finite(logits).tolist() == REFERENCE.finite(logits).tolist() == [True, False, False, False] + [True] * 3
    assert 0 <= int(ops.argmax(torch.full((1, vocab), math.nan))) < vocab
    words = torch.randint(-(2**31), 2**31, (7, (vocab + 31) // 32 + 1), generator=generator).int()
    words[0], words[4] = -1, 0
    expected = logits.clone()
    REFERENCE.apply_token_mask_(expected, words)
    ops.apply_token_mask_(logits, words)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("native_only")
def test_logprobs(ops: OpTable) -> None:
    for rows, vocab in ((1, 1), (3, 7), (4, 1000), (2, 40001)):
        logits, tokens = torch.randn(rows, vocab) * 5, torch.randint(0, vocab, (rows,))
        close(ops.logprobs(logits, tokens), REFERENCE.logprobs(logits, tokens))


def test_what_is_not_covered_runs_the_reference(ops: OpTable) -> None:
    """float64, half-precision weights, gaps in the last dim, foreign integer types: same results, no native code."""
    x, weight = torch.randn(4, 32, dtype=torch.float64), torch.randn(32)
    assert torch.equal(ops.rms_norm(x, weight, 1e-6), REFERENCE.rms_norm(x, weight, 1e-6))
    gaps = torch.randn(4, 64)[:, ::2]
    assert torch.equal(ops.rms_norm(gaps, weight, 1e-6), REFERENCE.rms_norm(gaps, weight, 1e-6))
    half = weight.bfloat16()
    assert torch.equal(ops.rms_norm(x.float(), half, 1e-6), REFERENCE.rms_norm(x.float(), half, 1e-6))
    residual, other = torch.randn(32, 4).t(), torch.empty(4, 32)
    other.copy_(residual)
    close(ops.add_rms_norm(gaps, residual, weight, 1e-6), REFERENCE.add_rms_norm(gaps, other, weight, 1e-6))
    assert torch.equal(residual, other)
    assert torch.equal(ops.gated_activation(x, "silu"), REFERENCE.gated_activation(x, "silu"))
    inputs = attention_inputs(AttentionCase(), torch.float32)
    inputs.q = inputs.q.bfloat16()
    assert torch.equal(inputs.run(ops), inputs.run(REFERENCE))
    draws = sample_inputs(torch.randn(3, 50))
    draws.top_k = draws.top_k.long()
    assert torch.equal(draws.run(ops), draws.run(REFERENCE))
    k, cache = torch.randn(2, 1, 4), torch.zeros(2, 8, 1, 4, dtype=torch.bfloat16)
    ops.store_kv(k, k, cache[0], cache[1], torch.tensor([1, 5]))
    assert torch.equal(cache[0, [1, 5]], k.bfloat16())
    q, cos_sin = torch.randn(2, 1, 8, dtype=torch.float64), torch.randn(4, 8)
    turned = q.clone()
    ops.rope_(turned, q.clone(), torch.tensor([0, 3]), cos_sin, False)
    REFERENCE.rope_(q, q.clone(), torch.tensor([0, 3]), cos_sin, False)
    assert torch.equal(turned, q)
    penalties = penalty_inputs()
    logits = penalties[0].clone()
    ops.apply_penalties_(penalties[0], penalties[1].long(), *penalties[2:])
    REFERENCE.apply_penalties_(logits, *penalties[1:])
    assert torch.equal(penalties[0], logits)
    wide = torch.randn(3, 9, dtype=torch.float64)
    assert torch.equal(ops.logprobs(wide, torch.arange(3)), REFERENCE.logprobs(wide, torch.arange(3)))


def test_indices_out_of_range_raise_and_write_nothing(ops: OpTable) -> None:
    cache, kv = torch.zeros(8, 1, 4), torch.ones(2, 1, 4)
    for slots in ([0, 8], [-1, 0]):
        with pytest.raises(ValueError, match="out_loc out of range"):
            ops.store_kv(kv, kv, cache, cache, torch.tensor(slots))
    assert float(cache.abs().sum()) == 0
    with pytest.raises(ValueError, match="positions out of range"):
        ops.rope_(kv, kv, torch.tensor([0, 9]), torch.ones(9, 4), False)
    with pytest.raises(ValueError, match="token_ids out of range"):
        ops.logprobs(torch.zeros(1, 4), torch.tensor([4]))
    penalties = penalty_inputs()
    penalties[1][0, 0], penalties[3][0] = 97, 1
    with pytest.raises(ValueError, match="history out of range"):
        ops.apply_penalties_(*penalties)
    inputs = attention_inputs(AttentionCase())
    table, starts, kv_lens = inputs.ragged
    for broken, name in (
        ((table + 10_000, starts, kv_lens), "page_table"),
        ((table - 10_000, starts, kv_lens), "page_table"),
        ((table, starts, kv_lens + 1000), "kv_lens"),
        ((table, starts, kv_lens * 0), "kv_lens"),
        ((table, starts + 1, kv_lens), "cu_q_lens"),
        ((table, starts.flip(0).contiguous(), kv_lens), "cu_q_lens"),
    ):
        inputs.ragged = broken
        with pytest.raises(ValueError, match=f"{name} out of range"):
            inputs.run(ops)


def test_shapes_that_do_not_fit_are_refused(ops: OpTable) -> None:
    inputs = attention_inputs(AttentionCase(sinks=True))
    table, starts, kv_lens = inputs.ragged
    for broken in ((table, starts[:-1], kv_lens), (table[:-1], starts, kv_lens), (table, starts, kv_lens[:-1])):
        inputs.ragged = broken
        with pytest.raises(AssertionError):
            inputs.run(ops)
    x, kv, cos_sin = torch.ones(3, 4), torch.ones(3, 1, 4), torch.ones(9, 4)
    with pytest.raises(AssertionError):
        ops.rms_norm(x, torch.ones(3), 1e-6)
    with pytest.raises(AssertionError):
        ops.rope_(kv, kv, torch.arange(2), cos_sin, False)
    with pytest.raises(AssertionError):
        ops.rope_(kv[..., :2], kv, torch.arange(3), cos_sin, False)
    with pytest.raises(AssertionError):
        ops.store_kv(kv, kv, kv.clone(), kv.clone(), torch.arange(2))
    with pytest.raises(AssertionError):
        ops.store_kv(kv, kv, kv.clone(), torch.ones(3, 1, 5), torch.arange(3))
    with pytest.raises(AssertionError):
        ops.logprobs(x, torch.arange(2))


def test_the_module_under_test_is_the_one_asked_for() -> None:
    wanted = os.environ.get("PANDO_TEST_NATIVE")
    assert wanted is None or cpu._native.__file__ == wanted


def test_levels_are_checked() -> None:
    with pytest.raises(ConfigError, match="'avx1024'.*no such level"):
        cpu.table("avx1024")
    with pytest.raises(ConfigError, match="PANDO_ISA is 'sse9'; choose one of portable, avx2"):
        cpu.best_isa("sse9")
    assert cpu.best_isa("portable") == "portable"
    assert cpu.best_isa(None) == LEVELS[-1]


def test_the_number_of_threads_can_be_set() -> None:
    before = cpu.num_threads()
    cpu.set_num_threads(3)
    assert cpu.num_threads() == 3
    for wrong in (0, -1, 5000):
        with pytest.raises(ConfigError, match=f"num_threads is {wrong}"):
            cpu.set_num_threads(wrong)
    cpu.set_num_threads(before)


def _norm_in_child(connection: multiprocessing.connection.Connection) -> None:
    connection.send(_some_norms())


def _some_norms() -> list[list[float]]:
    """Nothing here may start torch's own threads, which do not survive a fork."""
    x = torch.from_numpy(np.arange(400_000, dtype=np.float32).reshape(400, 1000))
    return cpu.table("portable").rms_norm(x, torch.ones(1000), 1e-6)[::100, ::250].tolist()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_the_pool_works_again_in_a_forked_child() -> None:
    cpu.set_num_threads(2)
    here, there = multiprocessing.Pipe()
    expected = _some_norms()
    child = multiprocessing.get_context("fork").Process(target=_norm_in_child, args=(there,))
    child.start()
    assert here.poll(30), "the child hangs"
    assert here.recv() == expected
    child.join(10)
    assert child.exitcode == 0
    cpu.set_num_threads(1)


def test_python_threads_may_call_at_the_same_time() -> None:
    cpu.set_num_threads(2)
    ops, inputs = cpu.table(LEVELS[-1]), attention_inputs(AttentionCase(rows=LONG))
    expected, wrong = inputs.run(ops), []

    def call() -> None:
        for _ in range(10):
            if not torch.equal(inputs.run(ops), expected):
                wrong.append(1)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cpu.set_num_threads(1)
    assert not wrong
