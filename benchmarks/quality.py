"""What quantisation costs: perplexity and right answers on held-out exercises, logit error on random weights.

    python -m benchmarks.quality                      # the built-in model, every mode
    python -m benchmarks.quality --tasks all --count 100

The exercises' answers are nearly certain and their prompts random draws nobody could predict, so perplexities move
little; the divergence of the next-token distribution from the float32 model's shows more. "ms/token" is the time of
those forward passes, a rough figure beside the others.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

import pando
from pando.attention.paged import PagedAttentionBackend
from pando.cache.pool import KVPool
from pando.core.config import ROUND_ON_LOAD
from pando.forward import ForwardBatch
from pando.kernels import op_table
from pando.kernels.ops import OpTable
from pando.models.decoder import DecoderModel
from pando.models.load import load_model, resolve_model_path
from training.aspen.evaluate import TASKS, evaluate
from training.aspen.exercise import Exercise
from training.aspen.pack import chat_document
from training.aspen.synthetic import exercises

SEED = 77
RANDOM_SHAPE = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 32768,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
"""A Qwen3 of 0.6 billion parameters, cut to six layers and a fifth of the vocabulary."""


@dataclass(frozen=True, slots=True)
class Mode:
    """A row of the table."""

    name: str
    dtype: str
    quantization: str
    kv_cache_dtype: str = "auto"


MODES = [Mode("float32", "float32", "auto"), Mode("bfloat16", "bfloat16", "auto")]
MODES += [Mode(name, "bfloat16", name) for name in ROUND_ON_LOAD]
MODES += [Mode("bfloat16, KV in int8", "bfloat16", "auto", "int8")]


@torch.inference_mode()
def run(model: DecoderModel, ops: OpTable, rows: Sequence[Sequence[int]]) -> Tensor:
    """Logits [T, V] at every token of several sequences, one after another, in one pass."""
    lens = [len(row) for row in rows]
    total = sum(lens)
    backend = PagedAttentionBackend(KVPool(model.cache_plan, total, 1, "cpu", model.dtype), ops)
    cu = torch.tensor([0, *lens]).cumsum(0).int()
    table = torch.zeros(len(rows), max(lens), dtype=torch.int32)
    for row, length in enumerate(lens):
        table[row, :length] = torch.arange(int(cu[row]), int(cu[row]) + length)
    batch = ForwardBatch(
        input_ids=torch.tensor([token for row in rows for token in row]),
        positions=torch.cat([torch.arange(length) for length in lens]),
        out_loc=(torch.arange(total),),
        cu_q_lens=cu,
        kv_lens=torch.tensor(lens, dtype=torch.int32),
        page_table=(table,),
        logits_index=cu[1:].long() - 1,
        page_size=1,
        max_q_len=max(lens),
        max_kv_len=max(lens),
    )
    return model.logits(model.forward(batch, backend))


def kept_as(model: DecoderModel, mode: Mode) -> DecoderModel:
    """The model, whose cache will hold keys and values as the mode says."""
    if mode.kv_cache_dtype == "int8":
        model.cache_plan = model.cache_plan.in_int8()
    return model


def chats(folder: Path, count: int) -> list[tuple[list[int], list[int]]]:
    """Held-out exercises as (tokens, weights); a weight above 0 marks what the assistant writes."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [chat_document(tokenizer, exercise.text()) for exercise in islice(exercises(SEED, "heldout"), count)]


@dataclass(frozen=True, slots=True)
class Closeness:
    """Perplexity of the assistant's tokens and of all, nats of divergence from the exact distribution per token."""

    answers: float
    all_tokens: float
    divergence: float
    ms_per_token: float


class Judge:
    """Compares models on the same chats; the first one is what the others diverge from."""

    def __init__(self, documents: Sequence[tuple[list[int], list[int]]], ops: OpTable) -> None:
        self.documents = documents
        self.ops = ops
        self._exact: list[Tensor] = []

    def __call__(self, model: DecoderModel) -> Closeness:
        """Run the model over all chats."""
        answers, everything, divergence, spent = [], [], 0.0, 0.0
        first = not self._exact
        for index, start in enumerate(range(0, len(self.documents), 16)):
            part = self.documents[start : start + 16]
            began = time.perf_counter()
            scores = run(model, self.ops, [tokens for tokens, _ in part]).log_softmax(-1)
            spent += time.perf_counter() - began
            if first:
                self._exact.append(scores)
            divergence += F.kl_div(scores, self._exact[index], log_target=True, reduction="sum").item()
            begin = 0
            for tokens, weights in part:
                nats = F.nll_loss(scores[begin : begin + len(tokens) - 1], torch.tensor(tokens[1:]), reduction="none")
                everything.append(nats)
                answers.append(nats[torch.tensor(weights[1:]) > 0])
                begin += len(tokens)
        count = sum(len(tokens) for tokens, _ in self.documents)
        means = [torch.cat(parts).double().mean().item() for parts in (answers, everything)]
        return Closeness(math.exp(means[0]), math.exp(means[1]), divergence / count, spent / count * 1e3)


class EngineAnswerer:
    """Answers exercises greedily through `pando.Engine`."""

    def __init__(self, engine: pando.Engine) -> None:
        self.engine = engine

    def __call__(self, questions: list[Exercise], max_new_tokens: int) -> list[str]:
        """The answers as text, tool calls written as in the chat template."""
        sampling = {"temperature": 0, "max_new_tokens": max_new_tokens}
        replies = self.engine.generate([exercise.prompt() for exercise in questions], sampling)
        assert isinstance(replies, list)
        return [reply["text"] for reply in replies]


def builtin_table(model_path: str, kernels: str, count: int, tasks: list[str], task_count: int) -> None:
    """Closeness and tasks of a trained model in every mode."""
    folder, ops = resolve_model_path(model_path), op_table("cpu", kernels)
    documents = chats(folder, count)
    judge = Judge(documents, ops)
    total = sum(len(tokens) for tokens, _ in documents)
    print(f"{model_path}: {len(documents)} held-out chats, {total:,} tokens, kernels {ops.name}")
    print("| mode | perplexity of answers | of all tokens | divergence, nats | ms/token | right answers |")
    print("|---|---|---|---|---|---|")
    for mode in MODES:
        model = load_model(folder, dtype=mode.dtype, ops=ops, quantization=mode.quantization)
        found = judge(kept_as(model, mode))
        right = task_share(model_path, kernels, mode, tasks, task_count) if tasks else "-"
        print(
            f"| {mode.name} | {found.answers:.4f} | {found.all_tokens:.2f} | {found.divergence:.5f} | "
            f"{found.ms_per_token:.3f} | {right} |",
            flush=True,
        )


def task_share(model_path: str, kernels: str, mode: Mode, tasks: list[str], count: int) -> str:
    """Mean share of right answers, after one line per task."""
    options = {"dtype": mode.dtype, "quantization": mode.quantization, "kv_cache_dtype": mode.kv_cache_dtype}
    options |= {"kernels": kernels, "log_level": "warning"}
    with pando.Engine(model_path, **options) as engine:
        shares = evaluate(EngineAnswerer(engine), tasks, count)
    return f"{100 * sum(shares.values()) / len(shares):.1f} %"


def random_rows(count: int, length: int, vocab: int) -> Iterator[list[int]]:
    """Random sequences."""
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(count):
        yield torch.randint(0, vocab, (length,), generator=generator).tolist()


def random_table(kernels: str) -> None:
    """Error of the logits, in units of their spread, on random weights of `RANDOM_SHAPE`."""
    ops = op_table("cpu", kernels)
    rows = list(random_rows(2, 64, RANDOM_SHAPE["vocab_size"]))  # type: ignore[arg-type]
    print(f"random weights, 6 layers of a 0.6 B Qwen3, {sum(map(len, rows))} tokens, kernels {ops.name}")
    print("| mode | logit error, RMS / spread | largest | same best token |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(RANDOM_SHAPE))
        exact = None
        for mode in MODES:
            # The bfloat16 noise is what every mode rounds; float32 has it exactly.
            model = load_model(
                Path(folder), dtype=mode.dtype, ops=ops, load_format="dummy", quantization=mode.quantization
            )
            logits = run(kept_as(model, mode), ops, rows)
            exact = logits if exact is None else exact
            error = (logits - exact) / exact.std()
            same = (logits.argmax(-1) == exact.argmax(-1)).float().mean()
            print(
                f"| {mode.name} | {error.square().mean().sqrt():.4f} | {error.abs().max():.3f} | {100 * same:.0f} % |",
                flush=True,
            )


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="aspen")
    parser.add_argument("--kernels", default="auto", choices=["auto", "native", "reference"])
    parser.add_argument("--chats", type=int, default=96, help="exercises for perplexity and divergence")
    parser.add_argument("--tasks", default="", help="comma-separated task names, or all; empty = none")
    parser.add_argument("--count", type=int, default=50, help="exercises per task")
    parser.add_argument("--skip-random", action="store_true", help="leave out the table on random weights")
    args = parser.parse_args()
    tasks = list(TASKS) if args.tasks == "all" else [name for name in args.tasks.split(",") if name]
    builtin_table(args.model, args.kernels, args.chats, tasks, args.count)
    if not args.skip_random:
        random_table(args.kernels)


if __name__ == "__main__":
    main()
