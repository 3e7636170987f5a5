"""The gated delta rule and its convolution for training on one core: C++ kernels with gradients, as torch operators.

Written as the recurrence itself instead of the chunked form: at these sizes (states of 64 x 48) a state stays in the
first-level cache, and the recurrence does a fraction of the work of the chunks' matrix products (see LOG.md). Documents
that share a row are separated by emptying the state.

Shape suffixes: B sequences, T tokens, G key heads, H value heads, K key dim, V value dim,
M channels.
"""

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from training.aspen.paths import default_work

SOURCE = Path(__file__).with_name("delta_rule.cpp")
FLAGS = ("-O3", "-march=native", "-ffast-math", "-std=c++17", "-shared", "-fPIC")


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernel; compiled by `$CXX` (or g++) on first use and kept beside the default work folder."""
    folder = default_work().parent / "native"
    # Compiled for this machine: a home folder shared with another one must not hand its code over.
    made_of = SOURCE.read_bytes() + " ".join(platform.uname()).encode()
    path = folder / f"delta_rule-{hashlib.sha256(made_of).hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / path.name
            subprocess.run([os.environ.get("CXX", "g++"), *FLAGS, str(SOURCE), "-o", str(built)], check=True)
            os.replace(built, path)
    loaded = ctypes.CDLL(str(path))
    loaded.delta_rule_segment.restype = ctypes.c_int64
    return loaded


def _run(name: str, sizes: tuple[int, ...], tensors: tuple[Tensor, ...]) -> int:
    status = library()[name](
        *(ctypes.c_int64(size) for size in sizes), *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors)
    )
    return int(status)


def _call(name: str, sizes: tuple[int, ...], tensors: tuple[Tensor, ...]) -> None:
    status = _run(name, sizes, tensors)
    assert status == 0, f"{name}: value dim {sizes[-1]} is none of 16, 32, 48, 64"


def _sizes(q_BTGK: Tensor, v_BTHV: Tensor) -> tuple[int, int, int, int, int, int]:
    batch, length, key_heads, key_dim = q_BTGK.shape
    value_heads, value_dim = v_BTHV.shape[2:]
    assert key_dim % 16 == 0 and value_heads % key_heads == 0, f"{q_BTGK.shape} {v_BTHV.shape}"
    return batch, length, key_heads, value_heads, key_dim, value_dim


def _num_segments(length: int) -> int:
    return -(-length // 32)


@torch.library.custom_op("aspen_training::gated_delta_rule", mutates_args=())
def gated_delta_rule(
    q_BTGK: Tensor, k_BTGK: Tensor, v_BTHV: Tensor, g_BTH: Tensor, beta_BTH: Tensor, starts_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, H, V] and the states before every 32nd token [B, H, ceil(T / 32), K, V], which the gradient needs.

    All fp32 but `starts_BT` (bool): true where a document begins. `g_BTH` is the logarithm of the decay; queries come
    normalised and scaled, keys normalised.
    """
    q, k, v, a, beta, starts = (x.contiguous() for x in (q_BTGK, k_BTGK, v_BTHV, g_BTH.exp(), beta_BTH, starts_BT))
    sizes = _sizes(q, v)
    assert library().delta_rule_segment() == 32
    out = torch.empty_like(v)
    states = v.new_empty(sizes[0], sizes[3], _num_segments(sizes[1]), sizes[4], sizes[5])
    _call("delta_rule_forward", sizes, (q, k, v, a, beta, starts, out, states))
    return out, states


@gated_delta_rule.register_fake
def _(
    q_BTGK: Tensor, k_BTGK: Tensor, v_BTHV: Tensor, g_BTH: Tensor, beta_BTH: Tensor, starts_BT: Tensor
) -> tuple[Tensor, Tensor]:
    batch, length, heads, value_dim = v_BTHV.shape
    states = v_BTHV.new_empty(batch, heads, _num_segments(length), q_BTGK.shape[3], value_dim)
    return v_BTHV.new_empty(v_BTHV.shape), states


@torch.library.custom_op("aspen_training::gated_delta_rule_backward", mutates_args=())
def gated_delta_rule_backward(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    starts_BT: Tensor,
    states: Tensor,
    grad_BTHV: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g and beta from that of the output."""
    q, k, v, a, beta, starts, saved, grad = (
        x.contiguous() for x in (q_BTGK, k_BTGK, v_BTHV, g_BTH.exp(), beta_BTH, starts_BT, states, grad_BTHV)
    )
    gradients = (
        torch.zeros_like(q),
        torch.zeros_like(k),
        torch.empty_like(v),
        torch.empty_like(a),
        torch.empty_like(beta),
    )
    _call("delta_rule_backward", _sizes(q, v), (q, k, v, a, beta, starts, saved, grad, *gradients))
    return gradients


@gated_delta_rule_backward.register_fake
def _(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    starts_BT: Tensor,
    states: Tensor,
    grad_BTHV: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v, g, beta = (x.new_empty(x.shape) for x in (q_BTGK, k_BTGK, v_BTHV, g_BTH, beta_BTH))
    return q, k, v, g, beta


def _setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *gated_delta_rule_backward(*ctx.saved_tensors, grad), None  # type: ignore[attr-defined]


gated_delta_rule.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("aspen_training::short_convolution", mutates_args=())
def short_convolution(x_BTM: Tensor, taps_4M: Tensor, starts_BT: Tensor) -> Tensor:
    """SiLU of the causal convolution of four taps (the last for the current token) within each document; all fp32."""
    assert taps_4M.shape == (4, x_BTM.shape[2]), f"{taps_4M.shape} for {x_BTM.shape}"
    x, taps, starts = x_BTM.contiguous(), taps_4M.contiguous(), starts_BT.contiguous()
    out = torch.empty_like(x)
    _run("short_convolution_forward", tuple(x.shape), (x, taps, starts, out))
    return out


@short_convolution.register_fake
def _(x_BTM: Tensor, taps_4M: Tensor, starts_BT: Tensor) -> Tensor:
    return x_BTM.new_empty(x_BTM.shape)


@torch.library.custom_op("aspen_training::short_convolution_backward", mutates_args=())
def short_convolution_backward(
    x_BTM: Tensor, taps_4M: Tensor, starts_BT: Tensor, grad_BTM: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the input and of the taps."""
    x, taps, starts, grad = (tensor.contiguous() for tensor in (x_BTM, taps_4M, starts_BT, grad_BTM))
    gradients = torch.zeros_like(x), torch.zeros_like(taps)
    _run("short_convolution_backward", tuple(x.shape), (x, taps, starts, grad, *gradients))
    return gradients


@short_convolution_backward.register_fake
def _(x_BTM: Tensor, taps_4M: Tensor, starts_BT: Tensor, grad_BTM: Tensor) -> tuple[Tensor, Tensor]:
    return x_BTM.new_empty(x_BTM.shape), taps_4M.new_empty(taps_4M.shape)


def _setup_convolution(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_convolution(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *short_convolution_backward(*ctx.saved_tensors, grad), None  # type: ignore[attr-defined]


short_convolution.register_autograd(_backward_convolution, setup_context=_setup_convolution)
