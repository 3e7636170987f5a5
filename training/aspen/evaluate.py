"""Judge aspen by exact match on held-out exercises, greedily, through transformers or through a server.

    python -m training.aspen.evaluate                                   # the shipped model
    python -m training.aspen.evaluate --model DIR/export --count 50
    python -m training.aspen.evaluate --base-url http://127.0.0.1:8000/v1 --name aspen

Through a server every question is one request to `/chat/completions` with `temperature: 0`, so that a change of cache,
kernels, quantisation or speculation shows as a change in this table. `--work DIR` adds bits per byte on held-out text.
"""

import argparse
import json
import math
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.aspen import chat_tasks, code_tasks, json_tasks, math_tasks, reading_tasks, recall_tasks, tool_tasks
from training.aspen.exercise import Exercise, visible_answer
from training.aspen.pack import Pack
from training.aspen.paths import MODEL_FOLDER
from training.aspen.synthetic import Maker, of_kind

SEED = 2026


@dataclass(frozen=True, slots=True)
class Task:
    """A line of the table: where its exercises come from, and how long an answer may get."""

    title: str
    maker: Maker
    max_new_tokens: int
    keep: Callable[[Exercise], bool] = lambda exercise: True


def recall_at(size: int) -> Maker:
    """Recall in a context of about `size` tokens."""
    return lambda draw: recall_tasks.recall_of(draw, size)


TASKS: dict[str, Task] = {
    "persona": Task("persona and Pando, new phrasing", chat_tasks.persona, 80),
    "chat": Task("chat, last of 1-4 turns", chat_tasks.conversation, 80),
    "introduction": Task("what the user has said of herself or himself", chat_tasks.introduction, 40),
    "facts": Task("short facts", chat_tasks.facts, 80),
    "reading": Task("question about a text", reading_tasks.reading, 40),
    "words": Task("words and lists", reading_tasks.words, 60),
    "copy": Task("repeat a passage", recall_tasks.passage, 160),
    "json": Task("JSON by schema", json_tasks.extraction, 160),
    "json_lists": Task("JSON from lists, changed JSON", json_tasks.conversion, 100),
    "tool_call": Task("one tool call", tool_tasks.single_call, 120),
    "parallel": Task("two tool calls at once", tool_tasks.parallel_calls, 200),
    "tool_answer": Task("answer from a tool's result", tool_tasks.tool_answer, 60),
    "no_tool": Task("tools at hand but not needed", tool_tasks.no_call, 80),
    "arithmetic": Task(
        "arithmetic, steps in the answer", math_tasks.arithmetic, 260, lambda exercise: not exercise.thinking
    ),
    "thinking": Task("arithmetic, steps in `<think>`", math_tasks.arithmetic, 280, lambda exercise: exercise.thinking),
    "story": Task("word problems", math_tasks.story, 260),
    "comparison": Task("comparing numbers", math_tasks.comparison, 40),
    "code": Task("Python function that runs", code_tasks.write_function, 120),
    "recall_300": Task("recall in 300 tokens", recall_at(300), 16),
    "recall_500": Task("recall in 500 tokens", recall_at(500), 16),
    "recall_1500": Task("recall in 1,500 tokens", recall_at(1500), 16),
    "recall_3000": Task("recall in 3,000 tokens", recall_at(3000), 16),
}


def heldout(task: Task, count: int) -> list[Exercise]:
    """The first `count` held-out exercises of a task."""
    found: Iterator[Exercise] = (exercise for exercise in of_kind(task.maker, SEED, "heldout") if task.keep(exercise))
    return list(islice(found, count))


class Answerer(Protocol):
    """Something that answers exercises greedily."""

    def __call__(self, questions: list[Exercise], max_new_tokens: int) -> list[str]:
        """The answers as text, tool calls written as in the chat template."""


class LocalModel:
    """Greedy decoding with transformers, in batches of similar length."""

    def __init__(self, folder: Path, batch_tokens: int = 12_000) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.batch_tokens = batch_tokens

    def __call__(self, questions: list[Exercise], max_new_tokens: int) -> list[str]:
        """Answer all questions."""
        prompts = [exercise.prompt() for exercise in questions]
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        answers = [""] * len(prompts)
        while order:
            longest = len(self.tokenizer(prompts[order[-1]]).input_ids)
            chosen, order = (
                order[-max(1, self.batch_tokens // longest) :],
                order[: -max(1, self.batch_tokens // longest)],
            )
            batch = self.tokenizer([prompts[index] for index in chosen], return_tensors="pt", padding=True)
            with torch.inference_mode():
                output = self.model.generate(
                    **batch, do_sample=False, temperature=None, top_p=None, max_new_tokens=max_new_tokens
                )
            texts = self.tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
            for index, text in zip(chosen, texts, strict=True):
                answers[index] = text
        return answers


class Server:
    """An OpenAI-compatible server."""

    def __init__(self, base_url: str, name: str, concurrency: int = 8) -> None:
        self.base_url, self.name, self.concurrency = base_url.rstrip("/"), name, concurrency

    def __call__(self, questions: list[Exercise], max_new_tokens: int) -> list[str]:
        """Answer all questions, `concurrency` at a time."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(lambda exercise: self.ask(exercise, max_new_tokens), questions))

    def ask(self, exercise: Exercise, max_new_tokens: int) -> str:
        """One request; tool calls come back as text in the template's form."""
        body: dict[str, object] = {
            "model": self.name,
            "messages": wire_messages(exercise),
            "temperature": 0,
            "max_tokens": max_new_tokens,
        }
        if exercise.tools:
            body["tools"] = list(exercise.tools)
        if exercise.thinking:
            body["chat_template_kwargs"] = {"enable_thinking": True}
        request = urllib.request.Request(
            f"{self.base_url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as reply:
            message = json.load(reply)["choices"][0]["message"]
        parts = [message["content"]] if message.get("content") else []
        for call in message.get("tool_calls") or ():
            function = call["function"]
            parts.append(
                f'<tool_call>\n{{"name": {json.dumps(function["name"])}, "arguments": {function["arguments"]}}}\n'
                "</tool_call>"
            )
        return "\n".join(parts)


def wire_messages(exercise: Exercise) -> list[dict[str, object]]:
    """The question in the OpenAI form: arguments of tool calls as strings, results with the id of their call."""
    messages: list[dict[str, object]] = []
    pending: list[str] = []
    for message in exercise.question():
        message = dict(message)
        calls = message.get("tool_calls")
        if isinstance(calls, list):
            pending = [call["id"] for call in calls]
            message["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
                for call in calls
            ]
        if message["role"] == "tool":
            message["tool_call_id"] = pending.pop(0)
        messages.append(message)
    return messages


def is_valid_json(text: str) -> bool:
    """Whether an answer is JSON and nothing else."""
    try:
        json.loads(visible_answer(text))
    except json.JSONDecodeError:
        return False
    return True


def evaluate(answerer: Answerer, names: list[str], count: int, *, show: int = 0) -> dict[str, float]:
    """Share of right answers (0..1) per line of the table; prints each line, and `show` wrong answers of each task."""
    shares: dict[str, float] = {}
    for name in names:
        task, started = TASKS[name], time.time()
        questions = heldout(task, count)
        answers = answerer(questions, task.max_new_tokens)
        right = [exercise.check(answer) for exercise, answer in zip(questions, answers, strict=True)]
        if name == "json":
            valid = sum(map(is_valid_json, answers)) / count
            shares["JSON by schema: valid JSON"] = valid
            print(f"| JSON by schema: valid JSON | {100 * valid:.0f} % |", flush=True)
        shares[task.title] = sum(right) / count
        print(f"| {task.title} | {100 * shares[task.title]:.0f} % |    ({time.time() - started:.0f} s)", flush=True)
        wrong = [pair for pair, good in zip(zip(questions, answers, strict=True), right, strict=True) if not good]
        for exercise, answer in wrong[:show]:
            print(
                f"    question {str(exercise.question()[-1]['content'])[-300:]!r}\n"
                f"    wanted   {exercise.reference()!r}\n    got      {answer!r}"
            )
    return shares


def bits_per_byte(folder: Path, work: Path, num_rows: int = 64) -> float:
    """Compression of held-out text in windows of 512 tokens."""
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
    )
    rows = torch.from_numpy(Pack.open(work / "packs", "heldout-text", 512).tokens[:num_rows].astype("int64"))
    nats, num_bytes = 0.0, 0
    for row in rows:
        with torch.inference_mode():
            logits = model(row[None]).logits[0, :-1]
        nats += F.cross_entropy(logits, row[1:], reduction="sum").item()
        num_bytes += len(tokenizer.decode(row[1:], skip_special_tokens=True).encode())
    return nats / math.log(2) / num_bytes


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER, help="model folder")
    parser.add_argument("--base-url", help="evaluate through this OpenAI-compatible server instead")
    parser.add_argument("--name", default="aspen", help="model name for --base-url")
    parser.add_argument("--count", type=int, default=100, help="exercises per task")
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma-separated task names")
    parser.add_argument("--show", type=int, default=0, help="wrong answers to print per task")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 keeps the default")
    parser.add_argument("--work", type=Path, help="training folder, for bits per byte on held-out text")
    parser.add_argument("--out", type=Path, help="write the shares as JSON")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    unknown = [name for name in args.tasks.split(",") if name not in TASKS]
    if unknown:
        parser.error(f"unknown tasks {unknown}; there are {', '.join(TASKS)}")
    answerer: Answerer = Server(args.base_url, args.name) if args.base_url else LocalModel(args.model)
    shares = evaluate(answerer, args.tasks.split(","), args.count, show=args.show)
    if args.work:
        shares["bits per byte of held-out text"] = bits_per_byte(args.model, args.work)
        print(f"bits per byte of held-out text: {shares['bits per byte of held-out text']:.3f}")
    if args.out:
        args.out.write_text(json.dumps(shares, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
