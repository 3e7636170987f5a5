"""Typed reading of a Hugging Face `config.json`: every mistake names the key and the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from pando.errors import ConfigError


class HFConfig:
    """Read-only view of a JSON object. A key that is absent or null counts as not given."""

    def __init__(self, values: Mapping[str, object], source: str = "config.json") -> None:
        self.values = dict(values)
        self.source = source

    @classmethod
    def from_file(cls, path: Path) -> HFConfig:
        """Parse a JSON file. Raises ConfigError when it is missing or not an object."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"can not read {path}: {error.strerror or error}") from error
        except ValueError as error:
            raise ConfigError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds {type(values).__name__}, not an object")
        return cls(values, str(path))

    def has(self, name: str) -> bool:
        """Whether the key is there and not null."""
        return self.values.get(name) is not None

    def with_defaults(self, defaults: Mapping[str, object]) -> HFConfig:
        """The same config with values for keys that are not given."""
        return HFConfig({**defaults, **{k: v for k, v in self.values.items() if v is not None}}, self.source)

    def integer(self, *names: str, default: int | None = None) -> int:
        """The first given of `names`."""
        value = self._first(names, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or int(value) != value:
            raise self._wrong(names, value, "an integer")
        return int(value)

    def number(self, *names: str, default: float | None = None) -> float:
        """The first given of `names`."""
        value = self._first(names, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(names, value, "a number")
        return float(value)

    def flag(self, *names: str, default: bool | None = None) -> bool:
        """The first given of `names`."""
        value = self._first(names, default)
        if not isinstance(value, bool):
            raise self._wrong(names, value, "true or false")
        return value

    def text(self, *names: str, default: str | None = None) -> str:
        """The first given of `names`."""
        value = self._first(names, default)
        if not isinstance(value, str):
            raise self._wrong(names, value, "a string")
        return value

    def items(self, name: str) -> list[object] | None:
        """A list, or None when not given."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, list):
            raise self._wrong((name,), value, "a list")
        return value

    def section(self, name: str) -> HFConfig | None:
        """A nested object, or None when not given."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._wrong((name,), value, "an object")
        return HFConfig(cast("dict[str, object]", value), f"{self.source}: {name}")

    def _first(self, names: tuple[str, ...], default: object) -> object:
        for name in names:
            if self.has(name):
                return self.values[name]
        if default is None:
            raise ConfigError(f"{self.source} lacks {' or '.join(repr(n) for n in names)}")
        return default

    def _wrong(self, names: tuple[str, ...], value: object, expected: str) -> ConfigError:
        name = next((n for n in names if self.has(n)), names[0])
        return ConfigError(f"{self.source}: {name} is {value!r}; expected {expected}", param=name)
