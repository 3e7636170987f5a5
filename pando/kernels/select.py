"""Which implementation of the ops a device gets, and why: the one place that decides it."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from dataclasses import dataclass
from typing import Literal, cast

import torch

from pando.errors import ConfigError
from pando.kernels import cpu, flashinfer
from pando.kernels.ops import OpTable
from pando.kernels.reference import REFERENCE

logger = logging.getLogger("pando.kernels")

REMEDY = "install a C++ compiler (apt-get install g++) and install pando-llm again"
"""How to get the native kernels where they are missing."""

TRITON_REMEDY = "pip install 'pando-llm[gpu]'"
"""How to get the kernels of NVIDIA GPUs where they are missing."""

FLASHINFER_REMEDY = "pip install 'pando-llm[flashinfer]', or use --attention-backend auto"
"""How to get FlashInfer's attention where it is missing."""

_warned: set[str] = set()


@dataclass(frozen=True, slots=True)
class Explanation:
    """What `pando doctor` shows of the kernels.

    isa: the level or GPU architecture chosen for native ops, None if there is none. levels: every level with why it is
    or is not usable. ops: the implementation of each op of the table by name, with the reason where it is not native.
    """

    table: str
    isa: str | None
    levels: dict[str, str]
    ops: dict[str, str]

    def lines(self) -> list[str]:
        """Text for people, one fact per line."""
        head = f"kernels: {self.table}" + (f" ({self.isa})" if self.isa else "")
        levels = [f"  isa {name}: {why}" for name, why in self.levels.items()]
        return [head, *levels, *(f"  op {name}: {how}" for name, how in self.ops.items())]


def op_table(
    device_type: str,
    prefer: Literal["auto", "native", "reference"] | str = "auto",
    *,
    deterministic: bool = False,
    attention: Literal["auto", "triton", "flashinfer"] | str = "auto",
) -> OpTable:
    """The ops for tensors on `device_type` ("cpu", "cuda"...).

    auto: native where there is one (compiled for the CPU, Triton for "cuda"), else the reference with one warning.
    native: ConfigError where there is none, with the remedy. reference: plain torch. deterministic: a table that
    promises it (see `OpTable`), ConfigError if there is none. attention: auto (the table's own), triton or flashinfer;
    ConfigError where it can not be had.
    PANDO_ISA caps the level of the CPU kernels (ConfigError if it names none).
    """
    if prefer not in ("auto", "native", "reference"):
        raise ConfigError(f"kernels is {prefer!r}; choose one of auto, native, reference", param="kernels")
    table = _table(device_type, prefer, deterministic)
    if deterministic and not table.deterministic:
        raise ConfigError(
            f"enable_deterministic_inference needs the native kernels of a CPU, these are {table.name!r}",
            param="enable_deterministic_inference",
        )
    return _with_attention(table, device_type, attention)


def _with_attention(table: OpTable, device_type: str, attention: str) -> OpTable:
    """The table with the attention asked for."""
    if attention not in ("auto", "triton", "flashinfer"):
        raise ConfigError(
            f"attention_backend is {attention!r}; choose one of auto, triton, flashinfer", param="attention_backend"
        )
    if attention == "auto" or attention == table.name:
        return table
    if device_type != "cuda":
        raise ConfigError(
            f"attention_backend {attention!r} needs an NVIDIA GPU, the device is {device_type!r}: "
            "use --attention-backend auto",
            param="attention_backend",
        )
    if attention == "triton":
        raise ConfigError(
            f"attention_backend is 'triton', but the kernels are {table.name!r}: use --attention-backend auto, or "
            f"--kernels auto and {TRITON_REMEDY}",
            param="attention_backend",
        )
    return _flashinfer_table(table)


@functools.cache
def _flashinfer_table(below: OpTable) -> OpTable:
    """FlashInfer's attention over a table; made once, as its memory is."""
    try:
        library = importlib.import_module("flashinfer")
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"attention_backend is 'flashinfer', which can not be imported ({error}): {FLASHINFER_REMEDY}",
            param="attention_backend",
        ) from error
    return flashinfer.over(below, cast(flashinfer.Library, library))


def _table(device_type: str, prefer: str, deterministic: bool) -> OpTable:
    if prefer == "reference":
        return REFERENCE
    missing = _missing(device_type)
    if missing is None:
        if device_type == "cuda":
            return _triton_table()
        return cpu.table(cpu.best_isa(os.environ.get("PANDO_ISA")), deterministic=deterministic)
    if prefer == "native":
        raise ConfigError(f"native kernels were asked for, but {missing}", param="kernels")
    if device_type in ("cpu", "cuda") and missing not in _warned:
        _warned.add(missing)
        logger.warning("using the slower reference kernels: %s", missing)
    return REFERENCE


def _missing(device_type: str) -> str | None:
    """Why `device_type` has no native ops, with the remedy; None if it has."""
    if device_type == "cuda":
        return None if importlib.util.find_spec("triton") is not None else f"triton is not installed: {TRITON_REMEDY}"
    if device_type != "cpu":
        return f"there are none for {device_type!r} yet: use --kernels reference or auto"
    if cpu.LOAD_ERROR is not None:
        return f"the extension module is not there ({cpu.LOAD_ERROR}): {REMEDY}"
    return None


def _triton_table() -> OpTable:
    """The table of the Triton kernels, imported only where it is used."""
    from pando.kernels.triton.table import table

    return table()


def explain(device_type: str = "cpu", prefer: str = "auto") -> Explanation:
    """What `op_table` with the same arguments chooses, op by op, and why not something else. Raises as it does."""
    table = op_table(device_type, prefer)
    names = [name for name in OpTable.__dataclass_fields__ if name != "name"]
    if table is REFERENCE:
        why = "asked for" if prefer == "reference" else _missing(device_type)
        return Explanation(table.name, None, _levels(None), {name: f"reference ({why})" for name in names})
    if device_type == "cuda":
        reference = {name for name in names if getattr(table, name) is getattr(REFERENCE, name)}
        ops = {name: "torch (no kernel of its own)" if name in reference else "native triton" for name in names}
        return Explanation(table.name, _architecture(), {}, ops)
    isa = table.name.removeprefix("cpu-")
    reasons = {name: cpu.NOT_NATIVE.get(name) for name in names}
    ops = {name: f"native {table.name}" if why is None else f"torch ({why})" for name, why in reasons.items()}
    return Explanation(table.name, isa, _levels(isa), ops)


def _architecture() -> str:
    """The current GPU's, such as sm_90."""
    if not torch.cuda.is_available():
        return "no GPU"
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def _levels(chosen: str | None) -> dict[str, str]:
    """Every compiled level: "chosen", "usable", or why it is not."""
    return {name: why or ("chosen" if name == chosen else "usable") for name, why in cpu.levels().items()}
