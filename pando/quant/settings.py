"""Reading a `quantization_config` and checking shapes, with messages that name what is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from pando.errors import ConfigError
from pando.quant.source import TensorSource, WeightProblem


def integer(settings: Mapping[str, object], name: str, default: int) -> int:
    """A whole number. Raises ConfigError."""
    value = settings.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"quantization_config: {name} is {value!r}; expected an integer")
    return value


def section(settings: Mapping[str, object], name: str) -> Mapping[str, object]:
    """A nested object, empty when not given. Raises ConfigError."""
    value = settings.get(name) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"quantization_config: {name} is {value!r}; expected an object")
    return value


def read_shaped(source: TensorSource, name: str, *shape: int) -> Tensor:
    """A stored tensor of a known shape. Raises WeightProblem."""
    stored = source.read(name)
    if tuple(stored.shape) != shape:
        raise WeightProblem(f"{name} has shape {list(stored.shape)}, {list(shape)} expected")
    return stored


def group_of(columns: int, groups: int, group_size: int, name: str) -> int:
    """Inputs per scale: as configured, or the whole row. Raises WeightProblem if the scales do not come out so."""
    size = columns if group_size <= 0 or group_size > columns else group_size
    if groups == 1:
        return columns
    if -(-columns // size) != groups:
        raise WeightProblem(f"{name} holds scales of {groups} groups; {columns} inputs in groups of {size} expected")
    return size


def check_whole_words(count: int, per_word: int, name: str) -> None:
    """Raise WeightProblem unless `count` values fill whole 32-bit words."""
    if count % per_word:
        raise WeightProblem(f"{name} would hold {count} values in words of {per_word}: that does not come out even")


def require(settings: Mapping[str, object], name: str, allowed: Sequence[object], what: str) -> None:
    """Raise ConfigError unless a setting is absent or one of `allowed`."""
    value = settings.get(name)
    if value is not None and value not in allowed:
        shown = ", ".join(str(item) for item in allowed)
        raise ConfigError(f"{what} with {name} {value!r} can not be read ({shown} can)")
