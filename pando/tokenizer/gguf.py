"""The tokenizer inside a GGUF file: byte-level BPE from its tokens, merges and the name of its pre-tokenizer, or
SentencePiece BPE from its tokens and scores."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as RustTokenizer

from pando.errors import ConfigError
from pando.gguf import GGUFFile

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_THREE_DIGITS = f"{_CONTRACTIONS}|{_REST}".replace("DIGITS", r"\p{N}{1,3}")
_ONE_DIGIT = f"{_CONTRACTIONS}|{_REST}".replace("DIGITS", r"\p{N}")


@dataclass(frozen=True, slots=True)
class Splitting:
    """How text is cut before merging. pattern None: GPT-2's own. digits: single ones are cut off first."""

    pattern: str | None = None
    digits: bool = False
    nfc: bool = False
    whole_tokens: bool = False
    """A piece that is a token stays one, whatever the merges say."""
    adds_bos: bool = False


SPLITTINGS = {
    "default": Splitting(),
    "gpt-2": Splitting(),
    "llama-bpe": Splitting(_THREE_DIGITS, whole_tokens=True, adds_bos=True),
    "llama3": Splitting(_THREE_DIGITS, whole_tokens=True, adds_bos=True),
    "qwen2": Splitting(_ONE_DIGIT, nfc=True),
    "command-r": Splitting(digits=True),
    "refact": Splitting(digits=True),
    "smollm": Splitting(digits=True),
    "starcoder": Splitting(digits=True),
}
"""`tokenizer.ggml.pre` -> what it stands for."""

_UNKNOWN, _CONTROL, _USER, _BYTE = 2, 3, 4, 6
"""Values of `tokenizer.ggml.token_type`."""

PARAM = "model_path"
REMEDY = "name the original tokenizer with --tokenizer-path (a folder or hub id with tokenizer.json)"


@dataclass(frozen=True, slots=True)
class GGUFTokenizer:
    """The parts of a `pando.tokenizer.tokenizer.Tokenizer`."""

    rust: RustTokenizer
    special_tokens: dict[str, str]
    chat_template: str | None


def read_tokenizer(file: GGUFFile) -> GGUFTokenizer:
    """Raises ConfigError, with the remedy, for a kind or a pre-tokenizer that is not known."""
    kind = file.text("tokenizer.ggml.model", "none")
    tokens = file.strings("tokenizer.ggml.tokens")
    types = file.array("tokenizer.ggml.token_type") or [1] * len(tokens)
    if kind not in ("gpt2", "llama") or not tokens or len(types) != len(tokens):
        raise ConfigError(f"{file.path} has a tokenizer of kind {kind!r}, which is not known; {REMEDY}", param=PARAM)
    special = {
        f"{name}_token": tokens[index]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if 0 <= (index := file.integer(f"tokenizer.ggml.{key}_token_id", -1)) < len(tokens)
    }
    rust = _byte_level(file, tokens) if kind == "gpt2" else _sentence_piece(file, tokens, types)
    rust.add_special_tokens([_added(token) for token, type_ in zip(tokens, types, strict=True) if type_ == _CONTROL])
    rust.add_tokens([_added(token) for token, type_ in zip(tokens, types, strict=True) if type_ == _USER])
    default = kind == "llama" or SPLITTINGS[file.text("tokenizer.ggml.pre", "default")].adds_bos
    if file.metadata.get("tokenizer.ggml.add_bos_token", default) and "bos_token" in special:
        _add_first(rust, special["bos_token"])
    template = file.metadata.get("tokenizer.chat_template")
    return GGUFTokenizer(rust, special, template if isinstance(template, str) else None)


def _added(token: str) -> AddedToken:
    return AddedToken(token, normalized=False)


def _byte_level(file: GGUFFile, tokens: list[str]) -> RustTokenizer:
    name = file.text("tokenizer.ggml.pre", "default")
    if name not in SPLITTINGS:
        known = ", ".join(sorted(SPLITTINGS))
        raise ConfigError(
            f"{file.path} names the pre-tokenizer {name!r}, which is not known ({known} are); {REMEDY}",
            param=PARAM,
        )
    splitting = SPLITTINGS[name]
    merges = [_pair(file, merge) for merge in file.strings("tokenizer.ggml.merges")]
    rust = RustTokenizer(models.BPE(_vocabulary(tokens), merges, ignore_merges=splitting.whole_tokens))
    if splitting.nfc:
        rust.normalizer = normalizers.NFC()
    parts: list[pre_tokenizers.PreTokenizer] = []
    if splitting.digits:
        parts.append(pre_tokenizers.Digits(individual_digits=True))
    if splitting.pattern is not None:
        parts.append(pre_tokenizers.Split(Regex(splitting.pattern), "isolated"))
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting.pattern is None))
    rust.pre_tokenizer = pre_tokenizers.Sequence(parts)
    rust.decoder = decoders.ByteLevel()
    return rust


def _pair(file: GGUFFile, merge: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not space or " " in right:
        raise ConfigError(f"{file.path} has a merge {merge!r} that is no pair; {REMEDY}", param=PARAM)
    return left, right


def _vocabulary(tokens: list[str]) -> dict[str, int]:
    """Token -> id; of equal ones the first."""
    found: dict[str, int] = {}
    for index, token in enumerate(tokens):
        found.setdefault(token, index)
    return found


def _sentence_piece(file: GGUFFile, tokens: list[str], types: list[object]) -> RustTokenizer:
    """SentencePiece's BPE joins the neighbours whose union has the best score: merges in the order of scores."""
    scores = [float(str(score)) for score in file.array("tokenizer.ggml.scores")]
    if len(scores) != len(tokens):
        raise ConfigError(f"{file.path} has no score for each token; {REMEDY}", param=PARAM)
    vocabulary = _vocabulary(tokens)
    plain = {token for token, kind in zip(tokens, types, strict=True) if kind not in (_UNKNOWN, _CONTROL, _USER, _BYTE)}
    merges: list[tuple[float, int, int, str, str]] = []
    for token in plain:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in plain and right in plain:
                order = (-scores[vocabulary[token]], vocabulary[left], vocabulary[right])
                merges.append((*order, left, right))
    merges.sort()
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    pairs = [(left, right) for *_, left, right in merges]
    rust = RustTokenizer(models.BPE(vocabulary, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = bool(file.metadata.get("tokenizer.ggml.add_space_prefix", True))
    steps: list[normalizers.Normalizer] = [normalizers.Prepend("▁")] if prefix else []
    rust.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    undo: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    rust.decoder = decoders.Sequence([*undo, decoders.Strip(" ", 1, 0)] if prefix else undo)
    return rust


def _add_first(rust: RustTokenizer, token: str) -> None:
    """Begin every encoded text with a token."""
    rust.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token}:1 $B:1", special_tokens=[(token, rust.token_to_id(token))]
    )
