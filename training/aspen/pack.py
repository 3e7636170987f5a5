"""Packs: documents laid out in rows of equal length, as the trainer reads them.

A pack `NAME` of row length T is `NAME-T.tokens.npy` (uint16 [R, T]) and `NAME-T.weights.npy` (uint8 [R, T]: the loss
weight of predicting that token, in percent). Every document ends with `<|endoftext|>`; the trainer lets no document see
another one, and rotary positions are relative, so every document is trained as if it stood alone at position 0.

    python -m training.aspen.pack text --work DIR
    python -m training.aspen.pack synthetic --work DIR --tokens 20e6 --seed 1
"""

import argparse
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from training.aspen.paths import default_work

Document = tuple[list[int], list[int]]
"""Token ids and their loss weights in percent."""
OPEN_ROWS = 64
"""Rows filled at the same time: a document goes to the fullest one in which it fits."""


@dataclass(frozen=True, slots=True)
class Pack:
    """A pack opened for reading."""

    tokens: np.ndarray
    weights: np.ndarray

    @staticmethod
    def open(folder: Path, name: str, length: int) -> "Pack":
        """Map the pack `name` of row length `length` into memory."""
        stem = folder / f"{name}-{length}"
        return Pack(np.load(f"{stem}.tokens.npy", mmap_mode="r"), np.load(f"{stem}.weights.npy", mmap_mode="r"))


def write_pack(folder: Path, name: str, rows: list[tuple[np.ndarray, np.ndarray]], seed: int) -> None:
    """Shuffle rows and write them as a pack."""
    order = np.random.default_rng(seed).permutation(len(rows))
    length = len(rows[0][0])
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"{name}-{length}.tokens.npy", np.stack([rows[i][0] for i in order]))
    np.save(folder / f"{name}-{length}.weights.npy", np.stack([rows[i][1] for i in order]))
    supervised = sum(int((row[1] > 0).sum()) for row in rows)
    print(
        f"{name}-{length}: {len(rows)} rows, {len(rows) * length / 1e6:.2f} M tokens,"
        f" {supervised / 1e6:.2f} M of them supervised",
        flush=True,
    )


def finished_row(tokens: list[int], weights: list[int], length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Pad one row to `length`."""
    missing = length - len(tokens)
    return np.array(tokens + [pad] * missing, np.uint16), np.array(weights + [0] * missing, np.uint8)


def fill_rows(documents: Iterable[Document], length: int, pad: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Lay whole documents into rows (best fit); a document longer than a row is dropped."""
    opened: list[tuple[list[int], list[int]]] = []
    for tokens, weights in documents:
        if len(tokens) > length:
            continue
        fitting = [row for row in opened if len(row[0]) + len(tokens) <= length]
        if fitting:
            row = max(fitting, key=lambda candidate: len(candidate[0]))
        else:
            if len(opened) == OPEN_ROWS:
                fullest = max(range(OPEN_ROWS), key=lambda index: len(opened[index][0]))
                yield finished_row(*opened.pop(fullest), length, pad)
            row = ([], [])
            opened.append(row)
        row[0].extend(tokens)
        row[1].extend(weights)
    for row in opened:
        yield finished_row(*row, length, pad)


def text_rows(texts: Iterable[list[int]], length: int, end: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cut a stream of tokenized texts into rows; a text may go on in the next row."""
    buffer: list[int] = []
    for tokens in texts:
        buffer.extend(tokens)
        buffer.append(end)
        while len(buffer) >= length:
            row = np.array(buffer[:length], np.uint16)
            del buffer[:length]
            yield row, np.full(length, 100, np.uint8)


def chat_document(tokenizer: Tokenizer, text: str) -> Document:
    """Tokenize a rendered chat; only what the assistant writes is supervised.

    The prompt's names and numbers are random draws: predicting them would spend most of the gradient on noise. An
    opening `<think>` is part of the prompt (see the template's `enable_thinking`), so it is not supervised either.
    """
    tokens = tokenizer.encode(text).ids
    start, end, stop, think = (
        tokenizer.token_to_id(name) for name in ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>")
    )
    header = tokenizer.encode("assistant\n").ids
    weights = [0] * len(tokens)
    index = 0
    while index < len(tokens):
        if tokens[index] == start and tokens[index + 1 : index + 1 + len(header)] == header:
            index += 1 + len(header)
            if tokens[index] == think:
                index += 2
            while tokens[index] != end:
                weights[index] = 100
                index += 1
            weights[index] = 100
        index += 1
    return [*tokens, stop], [*weights, 0]


def pack_text(work: Path, length: int) -> None:
    """Write the packs `text` and `heldout-text`: prose twice, large source collections in part."""
    tokenizer = Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")
    train: list[list[int]] = []
    heldout: list[list[int]] = []
    for path in sorted((work / "text").glob("*.jsonl")):
        share = 0.15 if path.stem == "torch-sources" else 0.5 if path.stem == "transformers-docstrings" else 1.0
        rng = random.Random(path.stem)
        records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        records = [record for record in records if rng.random() < share]
        encoded = tokenizer.encode_batch([record["text"] for record in records])
        for record, encoding in zip(records, encoded, strict=True):
            (heldout if record["heldout"] else train).append(encoding.ids)
        print(path.stem, len(records), sum(len(encoding.ids) for encoding in encoded) / 1e6, "M tokens", flush=True)
    random.Random(0).shuffle(train)
    write_pack(work / "packs", "text", list(text_rows(train, length, end)), seed=0)
    write_pack(work / "packs", "heldout-text", list(text_rows(heldout, length, end)), seed=0)


def pack_synthetic(work: Path, name: str, num_tokens: int, seed: int, length: int) -> None:
    """Write a synthetic pack of about `num_tokens` tokens; names starting with `heldout` use the held-out split."""
    from training.aspen.synthetic import exercises  # the text packs can be built before any exercise exists

    tokenizer = Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json"))
    split = "heldout" if name.startswith("heldout") else "train"

    def documents() -> Iterator[Document]:
        total = 0
        for exercise in exercises(seed, split, "long" if length > 1024 else "short"):
            document = chat_document(tokenizer, exercise.text())
            total += len(document[0])
            yield document
            if total >= num_tokens:
                return

    write_pack(work / "packs", name, list(fill_rows(documents(), length, tokenizer.token_to_id("<|endoftext|>"))), seed)


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("text", "synthetic"))
    parser.add_argument("--work", type=Path, default=default_work())
    parser.add_argument("--length", type=int, default=512, help="tokens per row")
    parser.add_argument("--name", default="synthetic", help="name of a synthetic pack")
    parser.add_argument("--tokens", type=float, default=20e6, help="tokens of a synthetic pack")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.kind == "text":
        pack_text(args.work, args.length)
    else:
        pack_synthetic(args.work, args.name, int(args.tokens), args.seed, args.length)


if __name__ == "__main__":
    main()
