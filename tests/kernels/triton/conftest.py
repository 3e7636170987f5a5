"""Triton kernels run on the GPU where there is one, and in Triton's interpreter on the CPU where there is none."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import numpy
import pytest
import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
collect_ignore_glob = [] if HAS_TRITON else ["test_*.py"]


def mend_the_interpreter() -> None:
    """Make the interpreter round float32 to bfloat16 and to 8 bits as GPUs do, and multiply matrices of bfloat16.

    As it comes it cuts bits off for bfloat16, lets a carry run over for 8 bits, and takes integers for the bits of
    bfloat16, and those for integers in products.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float
    rounded = {
        tl.bfloat16: (torch.bfloat16, torch.int16),
        tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8),
        tl.float8e5: (torch.float8_e5m2, torch.uint8),
    }

    def convert_float(data, source, target, rounding_mode):  # type: ignore[no-untyped-def]
        if source != tl.float32 or target not in rounded:
            return convert(data, source, target, rounding_mode)
        dtype, bits = rounded[target]
        flat = torch.from_numpy(numpy.ascontiguousarray(data).reshape(-1).copy())
        return flat.to(dtype).view(bits).numpy().reshape(data.shape)

    create_dot = interpreter.InterpreterBuilder.create_dot

    def dot(self, a, b, *rest):  # type: ignore[no-untyped-def]
        wide = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return create_dot(self, *wide, *rest)

    cast = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self, source, target):  # type: ignore[no-untyped-def]
        if target.scalar == tl.bfloat16 and source.dtype.scalar.is_int():
            source = cast(self, source, tl.float32)
        return cast(self, source, target)

    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.cast_impl = cast_impl
    interpreter.InterpreterBuilder.create_dot = dot


if not torch.cuda.is_available() and HAS_TRITON:
    # Before any kernel is imported: decorators look at it.
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    mend_the_interpreter()


@pytest.fixture(scope="session")
def device() -> str:
    """Where the tensors of a kernel test live."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """Random inputs are the same in every run: tolerances are tried out on them."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def overflow_is_quiet() -> Iterator[None]:
    """exp of a large number is infinity on a GPU, without a warning as from numpy."""
    with numpy.errstate(all="ignore"):
        yield
