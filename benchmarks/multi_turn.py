"""Multi-turn chat with the prefix cache on and off in one run, and against transformers' batched generate.

    python benchmarks/multi_turn.py [--model aspen] [--users 16] [--turns 6] [--hf]

Every user shares a system prompt; each turn appends the reply and a new question. All engines get the same token ids
and generate the same number of tokens per turn (greedy, end tokens ignored).
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

from pando.core.config import Config
from pando.core.messages import Generate, Output, Reply
from pando.core.sampling import SamplingParams
from pando.engine import EngineCore, build_engine
from pando.models.load import resolve_model_path
from pando.transport import LocalInbox, LocalTransport


class Collector(LocalInbox):
    """Keeps the tokens of finished requests."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: dict[str, list[int]] = {}

    def send(self, replies: list[Reply]) -> None:
        for reply in replies:
            if isinstance(reply, Output):
                self.tokens.setdefault(reply.rid, []).extend(reply.token_ids)


class PandoRun:
    """An engine with the prefix cache on or off."""

    def __init__(self, model: str, cache: bool) -> None:
        self.name = f"pando, prefix cache {'on' if cache else 'off'}"
        self.transport = LocalTransport()
        self.transport.inbox = self.inbox = Collector()
        config = Config(model_path=model, disable_radix_cache=not cache, max_total_tokens=1 << 17)
        self.core: EngineCore = build_engine(config, self.inbox, lambda load: None)
        self.count = 0

    def turn(self, prompts: list[list[int]], num: int) -> list[list[int]]:
        """Generate `num` tokens for each prompt."""
        rids = [f"r{self.count + i}" for i in range(len(prompts))]
        self.count += len(prompts)
        sampling = SamplingParams(max_new_tokens=num, temperature=0, ignore_eos=True)
        for rid, prompt in zip(rids, prompts, strict=True):
            self.transport.send(Generate(rid=rid, input_ids=prompt, sampling=sampling))
        self.core.scheduler.step()
        while self.core.scheduler.num_unfinished:
            self.core.scheduler.step()
        return [self.inbox.tokens.pop(rid) for rid in rids]

    def reset(self) -> None:
        """Forget everything between repetitions."""
        self.core.scheduler.admission.cache.flush()

    def hit_rate(self) -> float:
        """Share of prompt tokens found in the cache so far."""
        stats = self.core.scheduler.stats
        return stats.hit_tokens / max(1, stats.hit_tokens + stats.miss_tokens)


class TransformersRun:
    """transformers' generate on a left-padded batch."""

    name = "transformers generate, one batch"

    def __init__(self, model: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(resolve_model_path(model), dtype="auto").eval()

    def turn(self, prompts: list[list[int]], num: int) -> list[list[int]]:
        """Generate `num` tokens for each prompt."""
        longest = max(map(len, prompts))
        ids = self.torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = self.torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        with self.torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=num,
                min_new_tokens=num,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return [row[longest:].tolist() for row in out]

    def reset(self) -> None:
        """Nothing is kept between calls."""


def conversation(run: PandoRun | TransformersRun, users: int, turns: int, system: int, ask: int, num: int) -> float:
    """Seconds for all users' turns."""
    rng = random.Random(1)
    shared = [rng.randrange(20, 4000) for _ in range(system)]
    histories = [list(shared) for _ in range(users)]
    started = time.perf_counter()
    for _ in range(turns):
        for history in histories:
            history.extend(rng.randrange(20, 4000) for _ in range(ask))
        for history, reply in zip(histories, run.turn(histories, num), strict=True):
            history.extend(reply)
    return time.perf_counter() - started


def main() -> None:
    """Interleave the engines and print medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="aspen")
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--system", type=int, default=500)
    parser.add_argument("--ask", type=int, default=60)
    parser.add_argument("--new", type=int, default=40)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--hf", action="store_true", help="also run transformers")
    args = parser.parse_args()
    runs: list[PandoRun | TransformersRun] = [PandoRun(args.model, True), PandoRun(args.model, False)]
    if args.hf:
        runs.append(TransformersRun(args.model))
    times: dict[str, list[float]] = {run.name: [] for run in runs}
    for _ in range(args.repeat):
        for run in runs:
            run.reset()
            times[run.name].append(conversation(run, args.users, args.turns, args.system, args.ask, args.new))
    base = statistics.median(times[runs[0].name])
    tokens = args.users * args.turns * args.new
    for run in runs:
        median = statistics.median(times[run.name])
        rate = f", hit rate {run.hit_rate():.1%}" if isinstance(run, PandoRun) else ""
        spread = f"{min(times[run.name]):.2f}..{max(times[run.name]):.2f}"
        print(f"{run.name:32} {median:6.2f} s ({spread}), {tokens / median:6.0f} tok/s, {median / base:.2f}x{rate}")


if __name__ == "__main__":
    main()
