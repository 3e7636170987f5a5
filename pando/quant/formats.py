"""Checkpoints that are quantised already: `quantization_config` names a method, a method is a format here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from pando.errors import ConfigError
from pando.quant.awq import AWQ
from pando.quant.compressed_tensors import CompressedTensors
from pando.quant.gptq import GPTQ
from pando.quant.order import InputWeight
from pando.quant.source import TensorSource


class QuantFormat(Protocol):
    """How one method stores the matrix of a module (`model.layers.0.self_attn.q_proj`)."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Endings of the tensors that together stand for `MODULE.weight`; the first is there if it is quantised."""

    def weight(self, source: TensorSource, module: str, rows: int, columns: int) -> InputWeight:
        """The matrix [rows, columns] of a quantised module. Raises WeightProblem that names the tensor."""


FORMATS: Mapping[str, Callable[[Mapping[str, object]], QuantFormat]] = {
    "awq": AWQ,
    "compressed-tensors": CompressedTensors,
    "gptq": GPTQ,
}
"""`quant_method` -> a format made of `quantization_config`; raises ConfigError on what it does not cover."""

REMEDY = "use the unquantised checkpoint with --quantization int8, w8a8 or int4, or one in AWQ, GPTQ or GGUF"


def stored_format(settings: Mapping[str, object], source: str) -> QuantFormat:
    """The format of a `quantization_config`. Raises ConfigError naming the scheme and the remedy.

    source: the file it comes from, for messages.
    """
    method = str(settings.get("quant_method", "unknown"))
    if method not in FORMATS:
        raise ConfigError(
            f"{source}: weights quantised with {method!r} are not supported ({', '.join(sorted(FORMATS))} are); "
            f"{REMEDY}",
            param="model_path",
        )
    try:
        return FORMATS[method](settings)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error.message}; {REMEDY}", param="model_path") from None
