"""Functions compiled by torch: shared, few variants, and what happens where the compiler fails."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pando.kernels.compiled import Compiler, with_compiler
from pando.kernels.reference import REFERENCE
from pando.runtime.warmup import FIRST_TOKENS


def halves(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sigmoid() / 2


def looks(x: Tensor) -> Tensor:
    """No compiler takes this whole: the host decides by a value."""
    return x * 2 if float(x.sum()) > 0 else x


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "pando.kernels"]


class Counting:
    """A compiler that keeps the graphs it was given and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[Any] = []

    def __call__(self, graph: Any, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs.append(graph)
        return graph.forward  # type: ignore[no-any-return]


def test_sizes_and_layers_share_two_variants() -> None:
    """One token and more; layers of any width ask for the same function."""
    counting = Counting()
    compiler = Compiler(counting)
    for width in (6, 10, 16):
        fast = compiler(halves)
        for tokens in (9, 1, 5, 33, 2):
            x, y = torch.randn(2, tokens, width).unbind(0)
            assert torch.equal(fast(x, y), halves(x, y))
    assert list(compiler.functions) == [halves] and not compiler.functions[halves].failed
    assert len(counting.graphs) == 2


def test_the_first_pass_has_as_many_tokens_as_nothing_is_wide() -> None:
    """Sizes that are equal at first are one to the compiler: 16 tokens and 16 experts made a third variant."""

    def scaled(x: Tensor, weight: Tensor) -> Tensor:
        return (x * weight).sigmoid()

    counting = Counting()
    fast = Compiler(counting)(scaled)
    for tokens in (FIRST_TOKENS, 1, 23, 16):
        fast(torch.ones(tokens, 16), torch.ones(16))
    assert len(counting.graphs) == 2


def test_what_can_not_be_compiled_runs_as_it_is_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    compiler = Compiler(Counting())
    fast, x = compiler(looks), torch.ones(3)
    with caplog.at_level(logging.WARNING, "pando.kernels"):
        assert fast(x).tolist() == [2.0, 2.0, 2.0]
        assert fast(-x).tolist() == [-1.0, -1.0, -1.0]
    [message] = said(caplog)
    assert message.startswith("torch.compile has failed, looks runs as it is: ")
    assert compiler.functions[looks].failed


def test_a_compiler_that_breaks_is_left(caplog: pytest.LogCaptureFixture) -> None:
    def broken(graph: Any, inputs: list[Tensor]) -> Callable[..., Any]:
        raise OSError("no C++ compiler")

    fast, x = Compiler(broken)(halves), torch.ones(3)
    with caplog.at_level(logging.WARNING, "pando.kernels"):
        assert torch.equal(fast(x, x), halves(x, x))
    [message] = said(caplog)
    assert "halves runs as it is" in message and "no C++ compiler" in message


def test_wrong_arguments_are_the_callers_mistake(caplog: pytest.LogCaptureFixture) -> None:
    compiler = Compiler(Counting())
    with pytest.raises(RuntimeError, match="must match the size"):
        compiler(halves)(torch.ones(3), torch.ones(4))
    assert not compiler.functions[halves].failed and not said(caplog)


def test_tables_compile_nothing_unless_they_are_asked_to() -> None:
    assert REFERENCE.fuse(halves) is halves
    ops = with_compiler(REFERENCE, Compiler(Counting()))
    assert ops.fuse(halves) is ops.fuse(halves) is not halves and ops.rms_norm is REFERENCE.rms_norm
