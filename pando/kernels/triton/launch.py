"""What every kernel module shares: compile cases, and how much parallelism a device has.

A compile case is a call of a module's public functions with tensors on the "meta" device. The compile test records the
kernels such a call launches, with the very configurations that the functions choose, and compiles them for a GPU that
need not be there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DEFAULT_SMS = 132
"""Multiprocessors assumed where there is no device to ask: an H100's or H200's."""

DEFAULT_CAPABILITY = 90
"""Compute capability assumed where there is no device to ask: Hopper's."""


@dataclass(frozen=True, slots=True)
class CompileCase:
    """A launch to be compiled and looked at.

    name: unique in its module. call: a public function bound to tensors from `meta`. tensor_cores: whether all of
    its kernels with a product must use them. oldest: the least compute capability it is for.
    """

    name: str
    call: Callable[[], object]
    tensor_cores: bool = True
    oldest: int = 80


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


@functools.cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of a device, asked once; `DEFAULT_SMS` of what is no CUDA device."""
    if device.type != "cuda":
        return DEFAULT_SMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def capability(device: torch.device) -> int:
    """Compute capability as major * 10 + minor, asked once; `DEFAULT_CAPABILITY` of what is no CUDA device."""
    if device.type != "cuda":
        return DEFAULT_CAPABILITY
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


E4M3_CAPABILITY = 89
"""Compute capability from which there are instructions for float8 e4m3."""


def has_e4m3() -> bool:
    """Whether the current device, or the one assumed where there is none, has float8 e4m3."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return capability(device) >= E4M3_CAPABILITY
