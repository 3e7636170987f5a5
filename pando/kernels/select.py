"""Which implementation of the ops a device gets, and why: the one place that decides it."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Literal

from pando.errors import ConfigError
from pando.kernels import cpu
from pando.kernels.ops import OpTable
from pando.kernels.reference import REFERENCE

logger = logging.getLogger("pando.kernels")

REMEDY = "install a C++ compiler (apt-get install g++) and install pando-llm again"
"""How to get the native kernels where they are missing."""

_warned: set[str] = set()


@dataclass(frozen=True, slots=True)
class Explanation:
    """What `pando doctor` shows of the kernels.

    isa: the level chosen for native ops, None if there is none. levels: every level with why it is or is not usable.
    ops: the implementation of each op of the table by name, with the reason where it is not native.
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
    device_type: str, prefer: Literal["auto", "native", "reference"] | str = "auto", *, deterministic: bool = False
) -> OpTable:
    """The ops for tensors on `device_type` ("cpu", "cuda"...).

    auto: native where there is one, else the reference with one warning. native: ConfigError where there is none, with
    the remedy. reference: plain torch. deterministic: a table that promises it (see `OpTable`), ConfigError if there is
    none. PANDO_ISA caps the level of the CPU kernels (ConfigError if it names none).
    """
    if prefer not in ("auto", "native", "reference"):
        raise ConfigError(f"kernels is {prefer!r}; choose one of auto, native, reference", param="kernels")
    missing = _missing(device_type)
    if deterministic and (prefer == "reference" or missing is not None):
        why = "were asked for" if missing is None else f"are all there is: {missing}"
        raise ConfigError(
            f"enable_deterministic_inference needs native kernels, but the reference ones {why}",
            param="enable_deterministic_inference",
        )
    if prefer == "reference":
        return REFERENCE
    if missing is None:
        return cpu.table(cpu.best_isa(os.environ.get("PANDO_ISA")), deterministic=deterministic)
    if prefer == "native":
        raise ConfigError(f"native kernels were asked for, but {missing}", param="kernels")
    if device_type == "cpu" and missing not in _warned:
        _warned.add(missing)
        logger.warning("using the slower reference kernels: %s", missing)
    return REFERENCE


def _missing(device_type: str) -> str | None:
    """Why `device_type` has no native ops, with the remedy; None if it has."""
    if device_type != "cpu":
        return f"there are none for {device_type!r} yet: use --kernels reference or auto"
    if cpu.LOAD_ERROR is not None:
        return f"the extension module is not there ({cpu.LOAD_ERROR}): {REMEDY}"
    return None


def explain(device_type: str = "cpu", prefer: str = "auto") -> Explanation:
    """What `op_table` with the same arguments chooses, op by op, and why not something else. Raises as it does."""
    table = op_table(device_type, prefer)
    names = [name for name in OpTable.__dataclass_fields__ if name != "name"]
    if table is REFERENCE:
        why = "asked for" if prefer == "reference" else _missing(device_type)
        return Explanation(table.name, None, _levels(None), {name: f"reference ({why})" for name in names})
    isa = table.name.removeprefix("cpu-")
    reasons = {name: cpu.NOT_NATIVE.get(name) for name in names}
    ops = {name: f"native {table.name}" if why is None else f"torch ({why})" for name, why in reasons.items()}
    return Explanation(table.name, isa, _levels(isa), ops)


def _levels(chosen: str | None) -> dict[str, str]:
    """Every compiled level: "chosen", "usable", or why it is not."""
    return {name: why or ("chosen" if name == chosen else "usable") for name, why in cpu.levels().items()}
