"""The option table: every field has a flag, aliases mean the same, and the page is current."""

from __future__ import annotations

from pathlib import Path

import pytest

from pando.cli.flags import ALIASES, ALWAYS_ON, NOT_HERE, config_from, markdown, table
from pando.cli.parser import UsageError, build_parser, parse, subparsers
from pando.core.config import Config
from pando.errors import ConfigError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "flags.md"


def config(*words: str) -> Config:
    args = parse(["serve", *words])
    return config_from(args, args.model)


def test_every_field_has_a_flag_and_a_sentence() -> None:
    assert [flag.field for flag in table()] == list(Config.field_names())
    assert [flag.field for flag in table() if not flag.help] == []
    assert set(ALIASES) <= set(Config.field_names())


def test_no_flag_gives_the_defaults() -> None:
    assert config() == Config()


@pytest.mark.parametrize(
    ("flag", "value", "field", "expected"),
    [
        ("--page-size", "16", "page_size", 16),
        ("--block-size", "16", "page_size", 16),
        ("--gpu-memory-utilization", "0.5", "mem_fraction_static", 0.5),
        ("--max-num-seqs", "8", "max_running_requests", 8),
        ("--max-model-len", "99", "context_length", 99),
        ("--max-num-batched-tokens", "512", "chunked_prefill_size", 512),
        ("--model", "m", "model_path", "m"),
        ("--tokenizer", "t", "tokenizer_path", "t"),
        ("--scheduling-policy", "fcfs", "schedule_policy", "fcfs"),
        ("--seed", "3", "random_seed", 3),
        ("--quantization", "int4", "quantization", "int4"),
        ("--host", "0.0.0.0", "host", "0.0.0.0"),
        ("--api-key", "k", "api_key", ("k",)),
    ],
)
def test_values_and_aliases(flag: str, value: str, field: str, expected: object) -> None:
    assert getattr(config(flag, value), field) == expected
    assert getattr(config(f"{flag}={value}"), field) == expected


def test_switches_and_lists() -> None:
    assert config("--no-enable-prefix-caching").disable_radix_cache is True
    assert config("--served-model-name", "a", "--served-model-name", "b").served_model_name == ("a", "b")


def test_model_by_position() -> None:
    assert config("folder").model_path == "folder"
    assert config("folder", "--model-path", "folder").model_path == "folder"
    with pytest.raises(ConfigError, match="two models"):
        config("folder", "--model-path", "other")


def test_spellings_are_unique() -> None:
    names = [name for flag in table() for name in flag.names] + list(ALWAYS_ON) + list(NOT_HERE)
    assert len(names) == len(set(names))


def test_bad_value_names_the_field() -> None:
    with pytest.raises(ConfigError, match="page_size is 0"):
        config("--page-size", "0")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["serve", "--pot", "1"], "did you mean --port"),
        (["serve", "--pagesize", "1"], "did you mean --page-size"),
        (["serve", "--max_model_len", "1"], "did you mean --max-model-len"),
        (["serve", "--zzzzzz"], "unknown flag --zzzzzz"),
        (["serve", "--tp", "2"], "--tp has no counterpart: Pando runs a model on one device"),
        (["serve", "a", "b"], "unexpected argument 'b'"),
        (["serve", "--port", "many"], "invalid int value"),
        (["server"], "unknown command server; did you mean serve"),
        (["qqqq"], "there are serve, chat, generate"),
        (["bench"], "required"),
    ],
)
def test_usage_errors(words: list[str], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        parse(words)


def test_flags_for_what_is_always_on_are_accepted_with_a_note() -> None:
    args = parse(["serve", "--enable-prefix-caching", "--enable-metrics"])
    assert len(args.notes) == 2 and "always shared" in args.notes[0]
    assert config_from(args) == Config()


def test_abbreviations_are_not_guessed() -> None:
    for parser in subparsers(build_parser()):
        assert parser.allow_abbrev is False, parser.prog


def test_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == markdown(), "run `make docs`"
