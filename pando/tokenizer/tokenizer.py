"""A model folder's tokenizer: tokenizer.json run by the `tokenizers` library, plus what its neighbour files add."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as RustTokenizer

from pando.errors import ConfigError
from pando.gguf import SUFFIX as GGUF_SUFFIX
from pando.gguf import read_gguf
from pando.tokenizer.chat_template import ChatTemplate
from pando.tokenizer.gguf import read_tokenizer
from pando.tokenizer.token_bytes import TokenBytes, make_token_bytes

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_NO_LIMIT = 10**9
"""Model length limits above this are placeholders that some tokenizers write for "none"."""


class Tokenizer:
    """Encodes text, decodes tokens, knows special tokens and the chat template. Made by `Tokenizer.load`."""

    def __init__(
        self,
        rust: RustTokenizer,
        *,
        special_tokens: dict[str, str] | None = None,
        chat_template: ChatTemplate | None = None,
        model_max_length: int | None = None,
        path: str = "",
    ) -> None:
        rust.no_truncation()
        rust.no_padding()
        self._rust = rust
        self.path = path
        self.special_tokens = dict(special_tokens or {})
        self.chat_template = chat_template
        self.model_max_length = model_max_length
        added = rust.get_added_tokens_decoder()
        self.added_tokens: dict[str, int] = {token.content: token_id for token_id, token in added.items()}
        self.special_ids: frozenset[int] = frozenset(token_id for token_id, token in added.items() if token.special)
        self.vocab_size = max(rust.get_vocab_size(with_added_tokens=True), max(added, default=-1) + 1)
        self.bytes_table: TokenBytes | None = make_token_bytes(rust)

    @classmethod
    def load(cls, path: Path, chat_template: Path | None = None) -> Tokenizer:
        """The tokenizer of a model folder or GGUF file; `chat_template` is a Jinja file that replaces its template.

        Raises ConfigError that names the missing or broken file and the remedy.
        """
        folder = Path(path)
        if folder.suffix == GGUF_SUFFIX and folder.is_file():
            return cls._of_gguf(folder, chat_template)
        rust = _load_rust(folder)
        config = _read_json(folder / "tokenizer_config.json")
        special = _special_tokens(config, _read_json(folder / "special_tokens_map.json"))
        limit = config.get("model_max_length")
        template = _load_template(folder, config, chat_template)
        return cls(
            rust,
            special_tokens=special,
            chat_template=template,
            model_max_length=int(limit) if isinstance(limit, int | float) and 0 < limit < _NO_LIMIT else None,
            path=str(folder),
        )

    @classmethod
    def _of_gguf(cls, path: Path, chat_template: Path | None) -> Tokenizer:
        found = read_tokenizer(read_gguf(path))
        source = found.chat_template if chat_template is None else _read_template(chat_template)
        template = None if source is None else ChatTemplate(source)
        return cls(found.rust, special_tokens=found.special_tokens, chat_template=template, path=str(path))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens (usually a first bos) are added as the model's post-processor says.

        Half of a surrogate pair, which JSON can carry, becomes U+FFFD.
        """
        try:
            ids: list[int] = self._rust.encode(text, add_special_tokens=add_special_tokens).ids
        except (UnicodeEncodeError, TypeError):
            clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            ids = self._rust.encode(clean, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence, as the model's decoder defines it. Unknown ids are left out."""
        text: str = self._rust.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_id(self, text: str) -> int | None:
        """Id of the token written exactly so in the vocabulary, or None."""
        token: int | None = self._rust.token_to_id(text)
        return token

    def token_name(self, token_id: int) -> str:
        """The vocabulary's spelling of a token (a space may be written as a letter of its own); "" if unknown."""
        return self._rust.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds to the text."""
        if self.bytes_table is not None:
            return self.bytes_table.of(token_id)
        return self.decode([token_id], skip_special_tokens=False).encode()

    def token_text(self, token_id: int) -> str:
        """The text of one token alone; bytes that are no whole character show as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def to_json(self) -> str:
        """The tokenizer as the text of a tokenizer.json."""
        text: str = self._rust.to_str()
        return text

    @property
    def bos_token_id(self) -> int | None:
        """Id of the beginning-of-sequence token, if there is one."""
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """Id of the end-of-sequence token, if there is one."""
        return self._special_id("eos_token")

    def _special_id(self, name: str) -> int | None:
        return self.token_id(self.special_tokens[name]) if name in self.special_tokens else None


def _load_rust(folder: Path) -> RustTokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        older = [name for name in ("tokenizer.model", "vocab.json", "vocab.txt") if (folder / name).is_file()]
        hint = f"it has {older[0]} only" if older else "it holds no tokenizer at all"
        raise ConfigError(
            f"{folder} has no tokenizer.json ({hint}). Convert once with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER), or name another with --tokenizer-path",
            param="tokenizer_path",
        )
    try:
        return RustTokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception for any file it can not read
        raise ConfigError(
            f"{file} can not be read: {error}. Download it again (an interrupted download or a git-lfs pointer looks "
            "like this)",
            param="tokenizer_path",
        ) from None


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}. Download it again", param="tokenizer_path") from None
    return value if isinstance(value, dict) else {}


def _token_text(value: object) -> str | None:
    """The text of a special token entry: a string, or an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _special_tokens(config: dict[str, Any], special_map: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _SPECIAL_NAMES:
        text = _token_text(config.get(name)) or _token_text(special_map.get(name))
        if text:
            found[name] = text
    return found


def _read_template(file: Path) -> str:
    if not file.is_file():
        raise ConfigError(f"chat template file {file} does not exist", param="chat_template")
    return file.read_text(encoding="utf-8")


def _load_template(folder: Path, config: dict[str, Any], override: Path | None) -> ChatTemplate | None:
    """The chat template: an explicit file, chat_template.jinja, chat_template.json, tokenizer_config.json, in order."""
    if override is not None:
        return ChatTemplate(_read_template(override))
    file = folder / "chat_template.jinja"
    if file.is_file():
        return ChatTemplate(file.read_text(encoding="utf-8"))
    source: object = _read_json(folder / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(source, list):
        named = {entry["name"]: entry["template"] for entry in source if isinstance(entry, dict)}
        default = named.get("default")
        return ChatTemplate(default, tool_source=named.get("tool_use")) if default else None
    return ChatTemplate(source) if isinstance(source, str) else None
