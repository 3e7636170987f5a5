"""`Fuse` by torch.compile: what layers compute between ops becomes a kernel or two of the compiler's.

Each function is compiled by itself, whole, and for any sizes. The compiler still makes two of it, because it takes a
size of 1 for a constant; others where dtypes or modes differ. What it can not compile runs as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import cast

import torch

from pando.kernels.ops import Function, OpTable

logger = logging.getLogger("pando.kernels")


class Compiled:
    """A function that runs compiled, or plain from the first time on that this fails."""

    __slots__ = ("plain", "_fast")

    def __init__(self, function: Callable[..., object], compile_: Callable[..., Callable[..., object]]) -> None:
        self.plain = function
        self._fast: Callable[..., object] | None = compile_(function)

    @property
    def failed(self) -> bool:
        """Whether the compiler has given up on it."""
        return self._fast is None

    def __call__(self, *args: object) -> object:
        """The function's result."""
        if self._fast is None:
            return self.plain(*args)
        try:
            return self._fast(*args)
        # A compiler fails in any way: no C++ compiler, an operation it does not know, too many variants. What is wrong
        # with the arguments is raised again by the function.
        except Exception as error:
            result = self.plain(*args)
            reason = " ".join(str(error).split()[:40]) or type(error).__name__
            logger.warning("torch.compile has failed, %s runs as it is: %s", self.plain.__name__, reason)
            self._fast = None
            return result


class Compiler:
    """`Fuse`. backend: of torch.compile."""

    def __init__(self, backend: str | Callable[..., object] = "inductor") -> None:
        self.functions: dict[Callable[..., object], Compiled] = {}
        # fullgraph: a part of a function compiled would cost more than it saves.
        self._compile = partial(torch.compile, fullgraph=True, dynamic=True, backend=backend)

    def __call__(self, function: Function, /) -> Function:
        """A function with the same results; the same object for the same function."""
        if function not in self.functions:
            self.functions[function] = Compiled(function, self._compile)
        return cast(Function, self.functions[function])


def with_compiler(ops: OpTable, compiler: Compiler | None = None) -> OpTable:
    """The table whose layers compile what they compute between ops."""
    return replace(ops, fuse=compiler or Compiler())
