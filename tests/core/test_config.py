"""Start-up options: checked, frozen, and misspellings answered with the nearest name."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import pytest

from pando.core.config import BUILTIN_MODEL, Config
from pando.errors import ConfigError

POSITIVE = (
    "page_size",
    "context_length",
    "max_total_tokens",
    "max_running_requests",
    "max_queued_requests",
    "chunked_prefill_size",
    "num_threads",
)
CHOICES = {
    "quantization": ["auto", "int8", "w8a8", "int4", "fp8", "awq", "gptq", "compressed-tensors", "gguf"],
    "load_format": ["auto", "dummy"],
    "device": ["auto", "cpu", "cuda"],
    "dtype": ["auto", "float32", "bfloat16", "float16"],
    "kv_cache_dtype": ["auto", "bf16", "int8", "fp8_e4m3", "fp8_e5m2"],
    "kernels": ["auto", "native", "reference"],
    "schedule_policy": ["lpm", "fcfs", "priority"],
    "log_level": ["debug", "info", "warning", "error"],
}


@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("value", [0, -1])
def test_counts_are_positive(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{name} is {value}; give a positive number") as e:
        Config(**{name: value})  # type: ignore[arg-type]
    assert e.value.param == name
    assert getattr(Config(**{name: 1}), name) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0.0, -0.5, 1.01, float("nan")])
def test_memory_share(value: float) -> None:
    with pytest.raises(ConfigError, match="mem_fraction_static") as e:
        Config(mem_fraction_static=value)
    assert e.value.param == "mem_fraction_static"
    assert Config(mem_fraction_static=1.0).mem_fraction_static == 1.0


@pytest.mark.parametrize("name", ["packed_cache_gb", "kv_prefault_gb"])
def test_sizes_in_gb(name: str) -> None:
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=name) as e:
            Config(**{name: value})
        assert e.value.param == name


def test_size_of_the_packed_cache() -> None:
    assert Config().packed_cache == "auto" and Config(packed_cache_gb=0.0).packed_cache_gb == 0.0


@pytest.mark.parametrize("name", CHOICES)
def test_choices(name: str) -> None:
    for value in CHOICES[name]:
        assert getattr(Config(**{name: value}), name) == value  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"{name} is 'nope'; choose one of {', '.join(CHOICES[name])}") as e:
        Config(**{name: "nope"})  # type: ignore[arg-type]
    assert e.value.param == name


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().port = 1  # type: ignore[misc]


def test_defaults_serve_the_builtin_model_on_this_machine_only() -> None:
    config = Config()
    assert (config.model_path, config.host, config.port) == (BUILTIN_MODEL, "127.0.0.1", 30000)
    assert config.api_key == () and config.page_size == 1 and config.schedule_policy == "lpm"


@pytest.mark.parametrize(
    ("given", "near"), [("page_sise", "page_size"), ("max_total_token", "max_total_tokens"), ("prot", "port")]
)
def test_a_near_miss_is_answered_with_the_name(given: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown option '{given}'; did you mean {near}") as e:
        Config.from_kwargs(**{given: 1})
    assert e.value.param == given


def test_a_far_miss_is_answered_with_all_names() -> None:
    with pytest.raises(ConfigError, match="unknown option 'zzzz'; known: model_path, ") as e:
        Config.from_kwargs(zzzz=1)
    assert all(name in str(e.value) for name in Config.field_names())


def test_from_kwargs_takes_one_name_for_a_list() -> None:
    config = Config.from_kwargs(served_model_name="a", api_key="k", page_size=16)
    assert (config.served_model_name, config.api_key, config.page_size) == (("a",), ("k",), 16)
    assert Config.from_kwargs(api_key=("a", "b")).api_key == ("a", "b")


def test_it_crosses_to_the_engine_process_as_json() -> None:
    values: dict[str, Any] = {"served_model_name": ("a", "b"), "mem_fraction_static": 0.5, "context_length": 77}
    config = Config(**values)
    assert msgspec.json.decode(msgspec.json.encode(config), type=Config) == config
    assert Config.field_names() == tuple(field.name for field in dataclasses.fields(Config))
