"""Gaps between the tokens of 16 streams while 20 pathological grammars compile, beside the same run without them.

    python -m benchmarks.grammar_gaps [--model aspen] [--streams 16] [--rounds 5] [--tokens 8]

The engine runs in this process, as it would in its own. Runs take turns; a grammar is sent every few milliseconds, and
what compiles generates some tokens, too. The bound of the project: no gap grows by more than 10 ms.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from pando.core.config import Config
from pando.core.messages import Failure, Generate, Output, Reply
from pando.core.sampling import GrammarSpec, SamplingParams
from pando.engine import EngineCore, build_engine, settle
from pando.transport import LocalInbox, LocalTransport

BOUND_MS = 10.0
_CODE = "^[a-z]{1,40}-[0-9]{2,8}$"
EVERY_SECONDS = 0.03
"""Between two grammars."""


def _schema(**parts: object) -> GrammarSpec:
    return GrammarSpec("json_schema", json.dumps(parts))


def _closed(properties: dict[str, object]) -> dict[str, object]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _lists(levels: int) -> dict[str, object]:
    inner: dict[str, object] = {"type": "null"}
    for _ in range(levels):
        inner = {"type": "array", "items": inner}
    return inner


def _nested(levels: int) -> dict[str, object]:
    inner: dict[str, object] = {"type": "string"}
    for level in range(levels):
        inner = {"anyOf": [_closed({f"a{level}": inner}), {"type": "array", "items": inner}]}
    return inner


def _tagged(number: int) -> dict[str, object]:
    return _closed({"kind": {"const": f"kind {number}"}, f"value_{number}": {"type": "number"}})


def _references(number: int) -> dict[str, object]:
    return {
        f"d{i}": {
            "type": "object",
            "properties": {f"p{k}": {"$ref": f"#/$defs/d{(i * 7 + k) % number}"} for k in range(4)},
        }
        for i in range(number)
    }


PATHOLOGICAL: dict[str, Callable[[int], GrammarSpec]] = {
    "3,000 properties": lambda n: _schema(**_closed({f"field_{n}_{i}": {"type": "string"} for i in range(3000)})),
    "400 optional properties": lambda n: _schema(
        type="object", properties={f"o{n}_{i}": {"type": "integer"} for i in range(400)}, additionalProperties=False
    ),
    "60 patterns with lengths": lambda n: _schema(
        **_closed(
            {
                f"p{n}_{i}": {"type": "string", "pattern": "^[a-z]{1,40}-[0-9]{2,8}$", "maxLength": 60 + i}
                for i in range(60)
            }
        )
    ),
    "a string of 100,000": lambda n: _schema(type="string", minLength=100_000 + n),
    "lists 30 deep": lambda n: _schema(
        **json.loads('{"type":"array","items":' * 30 + '{"type":"null"}' + "}" * 30), title=str(n)
    ),
    "lists 300 deep": lambda n: _schema(
        **json.loads('{"type":"array","items":' * 300 + "{}" + "}" * 300), title=str(n)
    ),
    "an enum of 10,000": lambda n: _schema(enum=[f"value {n} {i * 7919 % 10007}" for i in range(10_000)]),
    "300 tagged alternatives": lambda n: _schema(oneOf=[_tagged(1000 * n + i) for i in range(300)]),
    "alternatives that double 8 times": lambda n: _schema(**_closed({f"x{n}": _nested(8)})),
    "30 conjunctions of alternatives": lambda n: _schema(
        allOf=[{"anyOf": [{"properties": {f"k{n}_{i}_{j}": {"type": "string"}}} for j in range(6)]} for i in range(30)]
    ),
    "100 conditions": lambda n: _schema(
        type="object",
        properties={"mode": {"type": "string"}},
        allOf=[
            {"if": {"properties": {"mode": {"const": f"m{i}"}}}, "then": {"required": [f"r{n}_{i}"]}}
            for i in range(100)
        ],
    ),
    "patterns of names that overlap": lambda n: _schema(
        type="object", patternProperties={f"^[a-z]{{{i},{i + 40}}}{n}": {"type": "integer"} for i in range(40)}
    ),
    "the negation of a large schema": lambda n: _schema(
        **{"not": {"anyOf": [_closed({f"n{n}_{i}": {"enum": [*range(20)]}}) for i in range(200)]}}
    ),
    "500 definitions that refer to each other": lambda n: _schema(
        **{"$defs": _references(500), "$ref": f"#/$defs/d{n % 500}"}
    ),
    "240 KB of descriptions": lambda n: _schema(
        **_closed({f"t{n}_{i}": {"type": "string", "description": "why " * 100} for i in range(550)})
    ),
    "dependent and unique lists": lambda n: _schema(
        type="object",
        properties={f"u{n}_{i}": {"type": "array", "uniqueItems": True, "contains": {"const": i}} for i in range(150)},
        dependentRequired={f"u{n}_{i}": [f"u{n}_{i + 1}"] for i in range(149)},
    ),
    "a regular expression that explodes": lambda n: GrammarSpec("regex", rf"(a|b)*a(a|b){{{20 + n % 10}}}[0-9]+"),
    "repeats of repeats": lambda n: GrammarSpec("regex", rf"(([a-z]{{1,{90 + n % 10}}} ){{1,90}}\n){{1,90}}"),
    "an ambiguous grammar": lambda n: GrammarSpec("ebnf", f'root ::= root root | root "a" root | "a" | "b{n}"'),
    "10,000 choices": lambda n: GrammarSpec(
        "choice", json.dumps([f"choice {n} {i * 7919 % 10007}" for i in range(10_000)])
    ),
}


class Gaps(LocalInbox):
    """Notes when tokens of the streams leave the engine, and how the others end."""

    def __init__(self) -> None:
        super().__init__()
        self.last: dict[str, float] = {}
        self.gaps: list[float] = []
        self.ends: dict[str, str] = {}

    def send(self, replies: list[Reply]) -> None:
        """Takes what a client would be sent."""
        now = time.perf_counter()
        for reply in replies:
            if isinstance(reply, Output) and reply.rid.startswith("stream"):
                if reply.finish is None:
                    self.gaps.append(now - self.last.get(reply.rid, now))
                    self.last[reply.rid] = now
            elif isinstance(reply, Output) and reply.finish is not None:
                self.ends[reply.rid] = reply.finish.kind
            elif isinstance(reply, Failure):
                self.ends[reply.rid] = f"{reply.code}: {reply.message[:60]}"


def run(core: EngineCore, transport: LocalTransport, streams: int, number: int, *, grammars: bool, tokens: int) -> Gaps:
    """One run: the streams decode until every grammar has ended its request; or as long as that takes at least."""
    inbox = transport.inbox
    assert isinstance(inbox, Gaps)
    inbox.last, inbox.gaps, inbox.ends = {}, [], {}
    specs = [(name, make(number)) for name, make in PATHOLOGICAL.items()]
    long = SamplingParams(max_new_tokens=12_000, temperature=0, ignore_eos=True)
    for i in range(streams):
        ids = [20 + (7 * i + j) % 200 for j in range(64)]
        transport.send(Generate(rid=f"stream {number} {i}", input_ids=ids, sampling=long, stream=True))
    for _ in range(30):
        core.scheduler.step()
    inbox.gaps.clear()
    began, sent = time.perf_counter(), 0
    while len(inbox.ends) < len(specs) if grammars else time.perf_counter() - began < len(specs) * EVERY_SECONDS:
        if grammars and sent < len(specs) and time.perf_counter() - began > sent * EVERY_SECONDS:
            name, spec = specs[sent]
            sampling = SamplingParams(max_new_tokens=tokens, temperature=0, grammar=spec)
            transport.send(Generate(rid=name, input_ids=[30, 31, 32], sampling=sampling))
            sent += 1
        core.scheduler.step()
    core.scheduler.abort(None)
    core.scheduler.step()
    return inbox


def report(name: str, worst: list[float], longest: list[float], seconds: float) -> None:
    """A line: the longest gap of each run."""
    print(
        f"{name:16} longest gap ms: median {statistics.median(longest):6.1f}, of all runs {max(longest):6.1f}; "
        f"p99.9 {statistics.median(worst):5.1f}; {seconds:.1f} s a run",
        flush=True,
    )


def measure(streams: int = 16, rounds: int = 5, tokens: int = 8, model: str = "aspen") -> float:
    """Print both runs' gaps and how the grammars ended; returns the growth of the longest gap in milliseconds."""
    transport = LocalTransport()
    transport.inbox = inbox = Gaps()
    core = build_engine(Config(model_path=model, max_total_tokens=1 << 18), inbox, lambda load: None)
    settle()
    longest: dict[bool, list[float]] = {False: [], True: []}
    worst: dict[bool, list[float]] = {False: [], True: []}
    seconds = {False: 0.0, True: 0.0}
    with torch.inference_mode():
        run(core, transport, streams, 0, grammars=True, tokens=tokens)  # reads the vocabulary, touches memory
        for number in range(1, rounds + 1):
            for grammars in (False, True):
                began = time.perf_counter()
                run(core, transport, streams, number, grammars=grammars, tokens=tokens)
                seconds[grammars] += time.perf_counter() - began
                gaps = sorted(1e3 * gap for gap in inbox.gaps)
                longest[grammars].append(gaps[-1])
                worst[grammars].append(gaps[len(gaps) * 999 // 1000])
                if grammars:
                    ends = dict(inbox.ends)
    for name, end in ends.items():
        print(f"  {name:42} {end}")
    report("streams alone", worst[False], longest[False], seconds[False] / rounds)
    report("beside grammars", worst[True], longest[True], seconds[True] / rounds)
    growth = statistics.median(longest[True]) - statistics.median(longest[False])
    print(f"growth of the longest gap: {growth:.1f} ms (bound {BOUND_MS:g})")
    return growth


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="aspen")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=8)
    args = parser.parse_args()
    measure(args.streams, args.rounds, args.tokens, args.model)


if __name__ == "__main__":
    main()
