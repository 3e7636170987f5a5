"""A file of schemas through a running server: how many replies are right, flagged, refused, unfinished or crashes.

    python -m benchmarks.structured_api --file FILE [--model aspen] [--tokenizer FOLDER] [--strict] [--concurrency 8]

FILE holds JSON lines `{"id", "schema", ...}` (see `pando grammar check`). A server is started on a free port; with
--tokenizer it serves a small model of random weights with that tokenizer, which writes what the grammar lets it, with a
bias towards ends. Every schema is a chat request (/generate where the tokenizer has no chat template); each finished
reply is validated here against the whole schema. Compile times are wall times of a request for the prompt alone, the
first less the second; measure them on a quiet machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from pando.grammar.check import spread
from pando.grammar.verify import Verifier
from pando.tokenizer.tokenizer import Tokenizer

SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
PROMPT = "Write a JSON document."
START_SECONDS = 120.0


@dataclass
class Outcome:
    """What became of one schema. kind: right, wrong, unfinished, refused or crash; message: why."""

    kind: str
    flagged: str = ""
    message: str = ""


@dataclass
class Report:
    """All outcomes, compile times in milliseconds."""

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    compile_ms: list[float] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """The summary for people."""
        times = ", ".join(f"{name} {value:.1f}" for name, value in spread(self.compile_ms).items())
        yield f"compile and wait, ms: {times}"
        if self.outcomes:
            yield from self._replies()

    def _replies(self) -> Iterator[str]:
        kinds = Counter(each.kind for each in self.outcomes.values())
        flags = Counter(each.flagged for each in self.outcomes.values() if each.flagged)
        total = max(1, len(self.outcomes))
        shares = ", ".join(
            f"{kind} {kinds[kind]} ({100 * kinds[kind] / total:.1f} %)"
            for kind in ("right", "unfinished", "wrong", "refused", "crash")
        )
        yield f"schemas {len(self.outcomes)}: {shares}"
        told = sum(each.kind == "wrong" and each.flagged == "schema_violation" for each in self.outcomes.values())
        yield f"flagged {sum(flags.values())}: {dict(flags)}"
        yield f"wrong replies that say so: {told} of {kinds['wrong']}"
        for name, each in self.outcomes.items():
            if each.kind in ("wrong", "refused", "crash"):
                yield f"  {each.kind} {name}: {each.message[:160]}"


class Bench:
    """Asks one server."""

    def __init__(
        self, http: httpx.AsyncClient, *, strict: bool, max_tokens: int, bias: dict[str, float] | None
    ) -> None:
        self._http = http
        self._bias = bias
        self._strict = strict
        self._max_tokens = max_tokens
        self._chat = bias is None
        self.report = Report()

    async def run(self, lines: list[dict[str, Any]], concurrency: int) -> None:
        """All schemas: compile times one after the other, then the replies side by side."""
        await self._post({"type": "object"}, 0)
        for line in lines:
            self.report.compile_ms.append(await self._compile_ms(line["schema"]))
        room = asyncio.Semaphore(concurrency)
        lines = lines if self._max_tokens else []

        async def one(line: dict[str, Any]) -> None:
            async with room:
                self.report.outcomes[str(line["id"])] = await self._outcome(line["schema"])

        await asyncio.gather(*(one(line) for line in lines))

    async def _compile_ms(self, schema: Any) -> float:
        times = []
        for _ in range(2):
            began = time.perf_counter()
            await self._post(schema, 0)
            times.append(time.perf_counter() - began)
        return max(0.0, (times[0] - times[1]) * 1e3)

    async def _outcome(self, schema: Any) -> Outcome:
        try:
            response = await self._post(schema, self._max_tokens)
        except httpx.HTTPError as error:
            return Outcome("crash", message=repr(error))
        if response.status_code == 400:
            return Outcome("refused", message=response.json()["error"]["message"])
        if response.status_code != 200:
            return Outcome("crash", message=response.text)
        text, finish, details = self._read(response.json())
        flagged = (details or {}).get("type", "")
        if finish != "stop":
            return Outcome("unfinished", flagged)
        fault = Verifier(schema).violation(text)
        return Outcome("right" if fault is None else "wrong", flagged, fault or "")

    async def _post(self, schema: Any, num_tokens: int) -> httpx.Response:
        if not self._chat or num_tokens == 0:
            options = {"strict": self._strict, "whitespace": "spaced"}
            grammar = {"kind": "json_schema", "source": json.dumps(schema), "options": options}
            sampling: dict[str, Any] = {
                "grammar": grammar,
                "max_new_tokens": num_tokens,
                "temperature": 0.8,
                "sampling_seed": 1,
            }
            sampling["logit_bias"] = self._bias or {}
            return await self._http.post("/generate", json={"text": PROMPT, "sampling_params": sampling})
        body = {
            "messages": [{"role": "user", "content": PROMPT}],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "reply", "schema": schema, "strict": self._strict},
            },
            "max_tokens": num_tokens,
            "temperature": 0.8,
            "seed": 1,
        }
        return await self._http.post("/v1/chat/completions", json=body)

    def _read(self, reply: dict[str, Any]) -> tuple[str, str, dict[str, Any] | None]:
        """(text, why it ended, finish_details)"""
        if "choices" in reply:
            choice = reply["choices"][0]
            return choice["message"]["content"], choice["finish_reason"], choice.get("finish_details")
        meta = reply["meta_info"]
        return reply["text"], meta["finish_reason"]["type"], meta.get("finish_details")


def small_model(tokenizer: Path, folder: Path) -> Path:
    """A folder with a small model's config and this tokenizer."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, folder / name)
    found = Tokenizer.load(tokenizer)
    config = {**SMALL, "vocab_size": found.vocab_size, "eos_token_id": found.eos_token_id}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@contextmanager
def server(model: str, *options: str) -> Iterator[str]:
    """A server of its own; gives its base URL once it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "pando", "serve", model, "--port", str(port), "--log-level", "error", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ.copy())
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start: {' '.join(command)}")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def towards_ends(tokenizer: Path) -> dict[str, float]:
    """A bias that makes random weights end their strings, lists and objects."""
    found = Tokenizer.load(tokenizer)
    tokens = {text: found.token_id(text) for text in ('"', '",', '"}', '"]', "}", "]", "},", "],", "]}", "}}")}
    return {str(token): 12.0 if text[0] == '"' else 9.0 for text, token in tokens.items() if token is not None}


async def ask(url: str, lines: list[dict[str, Any]], args: argparse.Namespace, bias: dict[str, float] | None) -> Report:
    """Run the bench against a server."""
    limits = httpx.Limits(max_connections=args.concurrency + 1)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
        bench = Bench(http, strict=args.strict, max_tokens=args.max_tokens, bias=bias)
        await bench.run(lines, args.concurrency)
        return bench.report


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--model", default="aspen")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--strict", action="store_true")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=768, help="of a reply; 0 = compile times only")
    parser.add_argument("--limit", type=int, help="schemas at most")
    args = parser.parse_args()
    texts = args.file.read_text(encoding="utf-8").split("\n")
    lines = [json.loads(line) for line in texts if line.strip()][: args.limit]
    with tempfile.TemporaryDirectory() as temporary:
        model, options = args.model, ["--max-total-tokens", "32768", "--chunked-prefill-size", "512"]
        if args.tokenizer is not None:
            model = str(small_model(args.tokenizer, Path(temporary)))
            options += ["--load-format", "dummy"]
        with server(model, *options) as url:
            bias = None if args.tokenizer is None else towards_ends(args.tokenizer)
            report = asyncio.run(ask(url, lines, args, bias))
    print(
        f"--- {args.model if args.tokenizer is None else args.tokenizer.name}, {'strict' if args.strict else 'default'}"
    )
    print("\n".join(report.lines()))


if __name__ == "__main__":
    main()
