"""Loading a model folder's tokenizer, and what it knows about tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pando.errors import ConfigError
from pando.tokenizer.tokenizer import Tokenizer
from tests.tiny_tokenizers import SPECIAL, byte_level, byte_level_rust, families, write_folder


def test_folder_gives_special_tokens_template_and_limit(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_folder(tmp_path / "model"))
    assert tokenizer.special_tokens == {"bos_token": "<|bos|>", "eos_token": "<|im_end|>"}
    assert tokenizer.bos_token_id == 0
    assert tokenizer.eos_token_id == SPECIAL.index("<|im_end|>")
    assert tokenizer.model_max_length == 4096
    assert tokenizer.chat_template is not None
    assert tokenizer.vocab_size == byte_level_rust().get_vocab_size()
    assert tokenizer.decode(tokenizer.encode("Hello world")) == "Hello world"


def test_template_file_goes_before_the_config(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "from json"}))
    assert _template(folder) == "from json"
    (folder / "chat_template.jinja").write_text("from jinja")
    assert _template(folder) == "from jinja"
    override = tmp_path / "mine.jinja"
    override.write_text("mine")
    template = Tokenizer.load(folder, override).chat_template
    assert template is not None and template.source == "mine"


def _template(folder: Path) -> str:
    template = Tokenizer.load(folder).chat_template
    return template.source if template is not None else ""


def test_named_templates_give_default_and_tool_use(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = Tokenizer.load(folder).chat_template
    assert template is not None
    messages = [{"role": "user", "content": "x"}]
    assert template.render(messages) == "plain"
    assert template.render(messages, tools=[{"type": "function"}]) == "with tools"


def test_folder_without_template_has_none(tmp_path: Path) -> None:
    assert Tokenizer.load(write_folder(tmp_path, chat_template=None)).chat_template is None


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "no tokenizer at all"),
        ({"tokenizer.model": "x"}, "tokenizer.model only"),
        ({"tokenizer.json": "version https://git-lfs"}, "can not be read"),
    ],
)
def test_missing_or_broken_files_name_a_remedy(tmp_path: Path, files: dict[str, str], words: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=words):
        Tokenizer.load(tmp_path)


def test_broken_template_is_refused_at_load(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 1"):
        Tokenizer.load(write_folder(tmp_path, chat_template="{% if %}"))


def test_missing_template_override_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        Tokenizer.load(write_folder(tmp_path / "m"), tmp_path / "nothing.jinja")


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
def test_token_bytes_join_to_the_text(name: str) -> None:
    tokenizer = families()[name]
    text = "Grüße, 你好 🙂 dog"
    data = b"".join(tokenizer.token_bytes(token) for token in tokenizer.encode(text))
    assert data.decode().removeprefix(" ") == text


def test_token_text_marks_partial_characters() -> None:
    tokenizer = byte_level()
    first = tokenizer.encode("🙂")[0]
    assert tokenizer.token_text(first) == "\ufffd"
    assert tokenizer.token_text(tokenizer.added_tokens["<|my token|>"]) == "<|my token|>"


def test_half_a_surrogate_pair_becomes_a_replacement() -> None:
    tokenizer = byte_level()
    assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a\ufffdb"
