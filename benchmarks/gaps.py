"""A running stream beside an endless flow of 8K-token prompts: the distribution of the gaps between its tokens.

    python benchmarks/gaps.py [--model aspen] [--budget 512] [--prompt 8000] [--tokens 300]

The gap is bounded by the time of one full step (the token budget), however long the queue of prompts is.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

from pando.core.config import Config
from pando.core.messages import Generate, Output, Reply
from pando.core.sampling import SamplingParams
from pando.engine import build_engine
from pando.runtime.executor import ThreadedExecutor
from pando.transport import LocalInbox, LocalTransport


class TimedInbox(LocalInbox):
    """Notes when tokens of the stream leave the engine, and how many prompts were finished."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []
        self.prompts_done = 0

    def send(self, replies: list[Reply]) -> None:
        for reply in replies:
            if isinstance(reply, Output):
                if reply.rid == "stream":
                    self.times.extend([time.perf_counter()] * len(reply.token_ids))
                else:
                    self.prompts_done += 1


def main() -> None:
    """Run and print percentiles."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="aspen")
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=8000)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--overlap", default="auto", choices=["auto", "on", "off"])
    args = parser.parse_args()
    transport = LocalTransport()
    transport.inbox = inbox = TimedInbox()
    config = Config(
        model_path=args.model, overlap=args.overlap, chunked_prefill_size=args.budget, max_total_tokens=1 << 18
    )
    core = build_engine(config, inbox, lambda load: None)
    rng = random.Random(0)
    vocab = core.info.vocab_size

    def prompt(num: int) -> list[int]:
        return [rng.randrange(20, vocab) for _ in range(num)]

    greedy = SamplingParams(max_new_tokens=args.tokens, temperature=0, ignore_eos=True)
    transport.send(Generate(rid="stream", input_ids=prompt(20), sampling=greedy, stream=True))
    for _ in range(5):
        core.scheduler.step()
    alone_until = len(inbox.times)
    sent = 0
    one = SamplingParams(max_new_tokens=1, temperature=0)
    while core.scheduler.num_unfinished and len(inbox.times) < args.tokens:
        while sent - inbox.prompts_done < 8:  # the queue never runs dry
            transport.send(Generate(rid=f"p{sent}", input_ids=prompt(args.prompt), sampling=one))
            sent += 1
        core.scheduler.step()
    gaps = [b - a for a, b in zip(inbox.times[alone_until:], inbox.times[alone_until + 1 :], strict=False)]
    stats = core.scheduler.stats
    full_step = stats.step_seconds / max(1, stats.steps)
    points = statistics.quantiles(gaps, n=100)
    print(
        f"{len(gaps)} gaps beside {inbox.prompts_done} finished prompts of {args.prompt} tokens, budget {args.budget}"
    )
    print(f"mean step {full_step * 1e3:.1f} ms, prefill {args.budget / full_step:,.0f} tokens/s")
    print(
        "gap ms: "
        + ", ".join(f"p{p} {points[p - 1] * 1e3:.1f}" for p in (1, 50, 90, 95, 99))
        + f", max {max(gaps) * 1e3:.1f} ({max(gaps) / statistics.median(gaps):.2f}x the median)"
    )

    core.scheduler.abort(None)
    while core.scheduler.step():
        pass
    if isinstance(core.executor, ThreadedExecutor):
        core.executor.close()


if __name__ == "__main__":
    main()
