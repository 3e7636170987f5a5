"""A scheduler over the fake executor, driven step by step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pando.cache.budget import CacheLayout
from pando.cache.manager import CacheManager
from pando.core.messages import Command, ControlReply, Failure, Generate, Output, Reply, TokenLogprobs
from pando.core.sampling import SamplingParams
from pando.scheduler.admission import Admission, Limits
from pando.scheduler.gates import Gate, Gates
from pando.scheduler.policy import waiting_queue
from pando.scheduler.rules import Rules
from pando.scheduler.scheduler import Scheduler
from pando.scheduler.stats import Stats
from tests.scheduler.fake_executor import FakeExecutor

VOCAB = 1000
EOS = 7


class ListInbox:
    """An inbox fed by hand; replies are kept."""

    def __init__(self) -> None:
        self.commands: list[Command] = []
        self.replies: list[Reply] = []
        self.closed = False

    def drain(self, timeout: float | None) -> list[Command]:
        commands, self.commands = self.commands, []
        return commands

    def send(self, replies: list[Reply]) -> None:
        self.replies.extend(replies)


class NoStop:
    """A stop checker for tests without text."""

    def push(self, token_ids: list[int]) -> str | None:
        return None


@dataclass
class Bench:
    """Everything a scheduler test needs."""

    scheduler: Scheduler
    executor: Any
    cache: CacheManager
    inbox: ListInbox
    tokens: dict[str, list[int]] = field(default_factory=dict)
    logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    prompt_logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    ended: dict[str, Output | Failure] = field(default_factory=dict)
    replies: dict[int, ControlReply] = field(default_factory=dict)

    def add(self, rid: str, prompt: list[int], num: int, **options: Any) -> None:
        sampling = {k: options.pop(k) for k in list(options) if k in SamplingParams.__struct_fields__}
        params = SamplingParams(**{"max_new_tokens": num, "temperature": 0.0, **sampling})
        self.inbox.commands.append(Generate(rid=rid, input_ids=prompt, sampling=params, stream=True, **options))

    def step(self) -> bool:
        """One guarded iteration, as `Scheduler.run` does it; replies are sorted by request."""
        scheduler = self.scheduler
        try:
            busy = scheduler.step()
        except Exception as error:
            scheduler._recover(error)
            busy = True
        scheduler._send()
        for reply in self.inbox.replies:
            if isinstance(reply, Output):
                assert reply.rid not in self.ended, f"{reply.rid} goes on after its end"
                self.tokens.setdefault(reply.rid, []).extend(reply.token_ids)
                self.logprobs.setdefault(reply.rid, []).extend(reply.logprobs)
                self.prompt_logprobs.setdefault(reply.rid, []).extend(reply.prompt_logprobs)
                if reply.finish is not None:
                    self.ended[reply.rid] = reply
            elif isinstance(reply, Failure):
                assert reply.rid not in self.ended, f"{reply.rid} ends twice"
                self.ended[reply.rid] = reply
            elif isinstance(reply, ControlReply):
                self.replies[reply.call_id] = reply
        self.inbox.replies.clear()
        return busy

    def run(self, limit: int = 100_000) -> None:
        """Step until nothing is left."""
        for _ in range(limit):
            if not self.step() and not self.scheduler.num_unfinished and not self.inbox.commands:
                return
        raise AssertionError("the scheduler does not come to an end")

    def finish(self, rid: str) -> Any:
        """The finish of a request that ended normally."""
        end = self.ended[rid]
        assert isinstance(end, Output), end
        return end.finish


def bench(
    *,
    num_pages: int = 512,
    page_size: int = 1,
    token_budget: int = 64,
    max_running: int = 16,
    context_length: int = 400,
    policy: str = "lpm",
    depth: int = 0,
    sharing: bool = True,
    max_queued: int = 10_000,
    gates: list[Gate] | None = None,
    executor: Any = None,
    fail: Any = None,
    vocab: int = VOCAB,
    cache: CacheManager | None = None,
    window: int = 0,
    num_window_pages: int = 0,
) -> Bench:
    """A scheduler with small pools over a FakeExecutor (or the given one)."""
    if cache is None:
        layout = CacheLayout(page_size, 1, window=window, window_bytes_per_token=int(window > 0))
        spaces = [num_pages, num_window_pages] if window else [num_pages]
        cache = CacheManager(layout, sum(spaces) * page_size, num_slots=spaces, sharing=sharing)
    runner = executor or FakeExecutor(num_pages, page_size, VOCAB, depth, fail, window, num_window_pages)
    stats = Stats()
    limits = Limits(token_budget, max_running, min(context_length, num_pages * page_size), page_size)
    admission = Admission(cache, waiting_queue(policy, cache), limits, stats)
    rules = Rules(limits.context_length, vocab, max_queued, frozenset([EOS]), lambda sampling: NoStop(), {"ok": True})
    inbox = ListInbox()
    scheduler = Scheduler(runner, admission, inbox, Gates(gates or []), stats, rules)
    return Bench(scheduler, runner, cache, inbox)
