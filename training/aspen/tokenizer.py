"""Train the byte-level BPE tokenizer on the text corpus and on the vocabulary of the synthetic exercises.

    python -m training.aspen.tokenizer --work DIR

Writes `DIR/tokenizer/{tokenizer.json,tokenizer_config.json,chat_template.jinja}`.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from training.aspen import banks, faq
from training.aspen.paths import default_work
from training.aspen.template import TEMPLATE_PATH

VOCAB_SIZE = 8192
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|fim_prefix|>",
    "<|fim_suffix|>",
    "<|fim_middle|>",
    "<|image_pad|>",
    *(f"<|reserved_{index}|>" for index in range(8)),
)
VISIBLE_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
"""Single tokens that stay in decoded text, because parsers look for them there."""

SCAFFOLD = """{"type": "function", "function": {"name": "get_weather", "description": "Get the weather of a city.",
"parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "The name"},
"count": {"type": "integer"}, "price": {"type": "number"}, "active": {"type": "boolean"}, "tags": {"type":
"array", "items": {"type": "string"}}, "size": {"type": "string", "enum": ["small", "medium", "large"]}},
"required": ["city"]}}} {"name": "get_weather", "arguments": {"city": "Paris"}} system user assistant tool
<tools> </tools> # Tools These functions can be called: To call one, write its name and arguments as JSON:
Answer: carry write ones tens hundreds plus minus times The pass code of is The value Extract as JSON schema
key keys What is Where does live work in How old How many years costs euros bought sold list sort uppercase
reverse order items words repeat"""


def training_texts(folder: Path) -> Iterator[str]:
    """Texts for the merges: documentation and docstrings in full, sources in part, exercise vocabulary many times."""
    for path in sorted(folder.glob("*.jsonl")):
        stride = 4 if "sources" in path.name else 2 if path.name.startswith(("torch", "transformers")) else 1
        for index, line in enumerate(path.read_text("utf-8").splitlines()):
            if index % stride == 0:
                yield json.loads(line)["text"]
    words = [
        *banks.FIRST_NAMES,
        *banks.LAST_NAMES,
        *banks.CITIES,
        *banks.COLOURS,
        *banks.ANIMALS,
        *banks.FRUITS,
        *banks.OBJECTS,
        *banks.FOODS,
        *banks.JOBS,
        *banks.HOBBIES,
        *banks.MONTHS,
        *banks.DAYS,
        *banks.COMPANIES,
        *banks.ADJECTIVES,
        *banks.PLAIN_WORDS,
        *banks.CAPITALS,
        *banks.CAPITALS.values(),
        *banks.OPPOSITES,
        *banks.OPPOSITES.values(),
        *banks.IRREGULAR_PLURALS.values(),
        *banks.SOUNDS.values(),
        *banks.NUMBER_WORDS,
    ]
    for _ in range(40):
        yield "\n".join(f'{word} {word} "{word}"' for word in words)
        yield SCAFFOLD
    for entries in (faq.GREETINGS, faq.PERSONA, faq.PANDO, faq.CREATIVE):
        for phrasings, answers in entries:
            yield "\n".join((*phrasings, *answers) * 15)
    yield "\n".join(tuple(faq.DEFINITIONS.values()) * 15)


def build(texts: Iterator[str]) -> Tokenizer:
    """Train and return the tokenizer. Digits are split one by one so that arithmetic is regular."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS) - len(VISIBLE_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        max_token_length=24,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in VISIBLE_TOKENS])
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(
            f"the vocabulary has {tokenizer.get_vocab_size()} entries, not {VOCAB_SIZE}: give the trainer more text"
        )
    return tokenizer


def tokenizer_config() -> dict[str, object]:
    """Contents of `tokenizer_config.json`."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 16384,
    }


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer, its configuration and the chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(), indent=2) + "\n", "utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE_PATH.read_text("utf-8"), "utf-8")


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=default_work())
    args = parser.parse_args()
    tokenizer = build(training_texts(args.work / "text"))
    save(tokenizer, args.work / "tokenizer")
    sample = "def add(a, b):\n    return a + b\n\nHello! The year 2024 has 366 days."
    print(len(sample), "characters,", len(tokenizer.encode(sample).ids), "tokens:", tokenizer.encode(sample).tokens)


if __name__ == "__main__":
    main()
