"""Small tokenizers of each family, made in memory, and folders of them as a model would ship."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as RustTokenizer

from pando.tokenizer.chat_template import ChatTemplate
from pando.tokenizer.tokenizer import Tokenizer

TEXT = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps, the fox runs.",
    "Hello world, hello there! What is the capital of France? The capital is Paris.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))\n",
    "Grüße aus München, naïve café. 你好,世界。 안녕하세요. Привет, мир!",
    '{"name": "get_weather", "arguments": {"city": "Oslo"}}',
]

SPECIAL = ("<|bos|>", "<|end|>", "<|im_start|>", "<|im_end|>", "<|my token|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

THINK_TEMPLATE = CHAT_TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")


@cache
def byte_level_rust() -> RustTokenizer:
    """Byte-level BPE; tokens may hold parts of characters."""
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=list(SPECIAL), show_progress=False
    )
    rust.train_from_iterator(TEXT, trainer)
    rust.add_tokens(["<think>", "</think>"])
    return rust


@cache
def sentencepiece_rust() -> RustTokenizer:
    """SentencePiece-style BPE with byte fallback, as Llama 2 has it."""
    specials = ["<unk>", "<s>", "</s>"]
    trained = RustTokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=specials, show_progress=False)
    trained.train_from_iterator([text for text in TEXT if text.isascii()], trainer)
    state = json.loads(trained.to_str())
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    learned = [name for name in state["model"]["vocab"] if name not in specials]
    vocabulary = {name: index for index, name in enumerate([*specials, *fallback, *learned])}
    merges = [tuple(pair) for pair in state["model"]["merges"]]
    rust = RustTokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    rust.normalizer = trained.normalizer
    rust.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    rust.decoder = decoders.Sequence(steps)
    return rust


@cache
def metaspace_rust() -> RustTokenizer:
    """Metaspace decoder: no table, so the generic path."""
    rust = RustTokenizer(models.BPE(unk_token="<unk>"))
    rust.pre_tokenizer = pre_tokenizers.Metaspace()
    rust.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"], show_progress=False)
    rust.train_from_iterator(TEXT, trainer)
    return rust


@cache
def wordpiece_rust() -> RustTokenizer:
    """WordPiece, as BERT has it: the generic path again."""
    rust = RustTokenizer(models.WordPiece(unk_token="[UNK]"))
    rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    rust.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    rust.train_from_iterator(TEXT, trainer)
    return rust


def byte_level(*, chat_template: str | None = CHAT_TEMPLATE) -> Tokenizer:
    """The byte-level tokenizer with special tokens and a chat template."""
    template = ChatTemplate(chat_template) if chat_template else None
    special = {"bos_token": "<|bos|>", "eos_token": "<|im_end|>"}
    return Tokenizer(byte_level_rust(), special_tokens=special, chat_template=template)


def families() -> dict[str, Tokenizer]:
    """One tokenizer of each family."""
    return {
        "byte_level": byte_level(),
        "sentencepiece": Tokenizer(sentencepiece_rust()),
        "metaspace": Tokenizer(metaspace_rust()),
        "wordpiece": Tokenizer(wordpiece_rust()),
    }


def write_folder(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """A model folder's tokenizer files."""
    folder.mkdir(parents=True, exist_ok=True)
    byte_level_rust().save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": "<|bos|>",
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True},
        "model_max_length": 4096,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
