"""Mixers put together, and the step they are given."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pando.attention.paged import PagedAttentionBackend
from pando.cache.pool import KVPool
from pando.cache.spec import CachePlan, State
from pando.forward import AttentionBackend, ForwardBatch, StateBatch
from pando.kernels import op_table
from pando.layers.causal_conv import CausalConv
from pando.layers.mixer import Followed, SideBySide, TokenByToken

OPS = op_table("cpu", "reference")


def batch_of(*lengths: int, states: StateBatch | None = None) -> ForwardBatch:
    """A step of rows of these lengths, all of them new."""
    cu = torch.tensor([0, *lengths]).cumsum(0)
    total = int(cu[-1])
    tokens, lens = torch.arange(total), torch.tensor(lengths, dtype=torch.int32)
    table = torch.arange(total, dtype=torch.int32).repeat(len(lengths), 1)
    return ForwardBatch(
        tokens, tokens, (tokens,), cu.int(), lens, (table,), cu[1:] - 1, 1, max(lengths), max(lengths), states
    )


def backend(*layers: State) -> PagedAttentionBackend:
    return PagedAttentionBackend(KVPool(CachePlan.of(layers), 4, 1, "cpu", torch.float32, num_states=4), OPS)


class Times:
    """A mixer that multiplies, and remembers what it was called with."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.seen: list[ForwardBatch] = []

    def __call__(self, x_TM: Tensor, batch: ForwardBatch, attention: AttentionBackend) -> Tensor:
        self.seen.append(batch)
        return x_TM * self.factor


def test_side_by_side_adds_what_all_make_of_one_input() -> None:
    x, batch, mixers = torch.randn(3, 4), batch_of(3), [Times(2.0), Times(3.0), Times(0.5)]
    torch.testing.assert_close(SideBySide(mixers)(x, batch, backend()), 5.5 * x)
    assert all(mixer.seen == [batch] for mixer in mixers)


def test_followed_and_token_by_token() -> None:
    x, batch = torch.randn(3, 4), batch_of(3)
    assert torch.equal(Followed(Times(2.0), lambda y: y + 1)(x, batch, backend()), 2 * x + 1)
    assert torch.equal(TokenByToken(torch.neg)(x, batch, backend()), -x)


def test_convolution_reads_rows_apart_and_keeps_their_last_inputs() -> None:
    states = StateBatch(
        slots=torch.tensor([2, 0]),
        fresh=torch.tensor([True, False]),
        save_token=torch.tensor([1]),
        save_row=torch.tensor([0]),
        save_slot=torch.tensor([3]),
    )
    pool = backend(State((((2, 2), "float32"),))).pool
    (state,) = pool.states[0]
    state.fill_(7.0)
    x, weight, bias = torch.randn(5, 2), torch.randn(2, 3), torch.randn(2)
    y = CausalConv(weight, bias, None, OPS)(x, state, batch_of(3, 2, states=states))
    first, second = torch.cat((torch.zeros(2, 2), x[:3])), torch.cat((torch.full((2, 2), 7.0), x[3:]))
    for row, window in ((y[:3], first), (y[3:], second)):
        expected = torch.stack([(window[t : t + 3].T * weight).sum(1) + bias for t in range(len(row))])
        torch.testing.assert_close(row, expected)
    assert torch.equal(state[2], x[1:3].T) and torch.equal(state[0], x[3:].T)
    assert torch.equal(state[3], x[:2].T)


def test_a_step_without_states_is_our_mistake() -> None:
    pool = backend(State((((2, 2), "float32"),))).pool
    conv = CausalConv(torch.randn(2, 3), None, None, OPS)
    with pytest.raises(AssertionError, match="without states"):
        conv(torch.randn(3, 2), pool.states[0][0], batch_of(3))
