"""The memory plan: how many tokens the KV pool holds and what follows from it. One pure function, explained in words.

free memory (measured after the weights are loaded)
|-- step workspace: activations and logits of the largest step, recorded steps --|-- KV pool --|-- left free --|

On a device the largest step's activations are measured; on a CPU they are estimated.
Layers with a sliding window have a pool of their own where that gains something: of a long sequence they keep a window
and the step under way, so the tokens of the other layers, and with them sequences, may be many more.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pando.cache.spec import DTYPE_BYTES
from pando.core.config import Config
from pando.errors import ConfigError
from pando.models.size import ModelSize
from pando.quant.size import MatrixBits

GIB = 1 << 30
CPU_SHARE = 0.5
"""Of free host memory; other programs live there too."""
CPU_POOL_BYTES = 4 * GIB
"""Default ceiling on a CPU, where the pool competes with everything else; --max-total-tokens lifts it."""
DEVICE_SHARE = 0.9
MAX_RUNNING = 256
STATES_PER_SEQUENCE = 64
"""Recurrent states kept at most, per sequence that can run: its own, and what the prefix cache remembers."""
MIN_BUDGET, MAX_BUDGET = 256, 8192
GRAPH_BYTES = 16 << 20
"""Kept free for a recorded step: its nodes in the driver, its result, its share of the memory that all share."""
WINDOW_REFERENCE = 8192
"""Length of the sequences, in tokens, that the two pools of a device with sliding windows are balanced for."""
STEP_SECONDS = 0.25
"""Longest step to aim for on a CPU: it bounds the gap between two tokens of a stream."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the plan needs to know of a model. Bytes, tokens and elements.

    kv_bytes_per_token: of all layers. window: tokens that layers with a sliding window read, 0 = there are none;
    window_bytes_per_token: of those layers.
    """

    weight_bytes: int
    kv_bytes_per_token: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_position: int
    dtype_bytes: int
    state_bytes: int = 0
    window: int = 0
    window_bytes_per_token: int = 0

    @classmethod
    def of(cls, size: ModelSize, dtype: str, bits: MatrixBits | None = None) -> ModelFacts:
        """Facts of a model with KV and weights in `dtype`; bits: of matrices that are quantised."""
        spec = size.spec
        return cls(
            weight_bytes=size.weight_bytes(dtype, bits),
            kv_bytes_per_token=size.kv_bytes_per_token(dtype),
            hidden_size=spec.hidden_size,
            intermediate_size=max(layer.intermediate for layer in spec.layers),
            vocab_size=spec.vocab_size,
            max_position=spec.max_position,
            dtype_bytes=DTYPE_BYTES[dtype],
            state_bytes=size.state_bytes(dtype),
            window=size.window,
            window_bytes_per_token=size.window_bytes_per_token(dtype),
        )


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """The pool of the layers with a sliding window. tokens: its size. held: of a decoding sequence, at most.

    bytes_per_token: of these layers; full_bytes_per_token: of the others.
    """

    tokens: int
    held: int
    bytes_per_token: int
    full_bytes_per_token: int

    def sequence_bytes(self, num_tokens: int) -> int:
        """Bytes that a decoding sequence of `num_tokens` tokens keeps in both pools."""
        return num_tokens * self.full_bytes_per_token + min(num_tokens, self.held) * self.bytes_per_token

    def concurrency(self, num_tokens: int, total_tokens: int, cache_bytes: int) -> int:
        """Decoding sequences of `num_tokens` tokens that fit both pools and the bytes they may take together."""
        fitting = min(self.tokens // min(num_tokens, self.held), cache_bytes // self.sequence_bytes(num_tokens))
        return min(fitting, total_tokens // num_tokens) if self.full_bytes_per_token else fitting


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The resolved sizes; `reasons` says in one line each where a number comes from.

    total_tokens: that all layers without a window have room for. windows: None = those with one keep all tokens too.
    num_states: slots for recurrent states. cache_bytes: what KV and states may take together. graph_bytes: kept for
    recorded steps, part of workspace_bytes.
    """

    total_tokens: int
    context_length: int
    max_running: int
    token_budget: int
    kv_bytes: int
    table_bytes: int
    workspace_bytes: int
    free_bytes: int
    reasons: list[str] = field(default_factory=list)
    num_states: int = 0
    cache_bytes: int = 0
    windows: WindowPlan | None = None
    graph_bytes: int = 0

    def concurrency(self, tokens: int) -> int:
        """Sequences of `tokens` tokens that fit the pool at once."""
        tokens = max(1, tokens)
        if self.windows is None:
            return min(self.max_running, self.total_tokens // tokens)
        return min(self.max_running, self.windows.concurrency(tokens, self.total_tokens, self.cache_bytes))


def plan_memory(
    config: Config,
    facts: ModelFacts,
    free_bytes: int,
    *,
    on_cpu: bool,
    tokens_per_second: float | None = None,
    activation_bytes: int | None = None,
    num_graphs: int = 0,
) -> MemoryPlan:
    """Size the pool from `free_bytes` (measured after the weights are in place).

    tokens_per_second: measured prefill rate, from which a CPU's token budget follows; None = assume the largest.
    activation_bytes: measured, what the largest step takes beside its logits; None = estimate it. num_graphs: steps
    that will be recorded.
    Raises ConfigError if not even one page fits, with the numbers.
    """
    reasons: list[str] = []
    budget = token_budget(config, on_cpu, tokens_per_second, reasons)
    workspace = _workspace_bytes(facts, budget, activation_bytes, reasons) + num_graphs * GRAPH_BYTES
    if num_graphs:
        reasons.append(f"{_gib(num_graphs * GRAPH_BYTES)} kept for {num_graphs} recorded steps")
    pool_bytes = _pool_bytes(config, facts, free_bytes - workspace, on_cpu, reasons)
    page = config.page_size
    kv_pool_bytes = pool_bytes if on_cpu else pool_bytes - _num_states(config, facts, pool_bytes) * facts.state_bytes
    total = _pool_tokens(config, facts, kv_pool_bytes, reasons) // page * page
    if config.max_total_tokens is not None:
        total = _asked_tokens(config.max_total_tokens, page, facts, free_bytes, reasons)
    if total < 2 * page:
        raise ConfigError(
            f"no room for a KV pool: {_gib(free_bytes)} free, the largest step needs {_gib(workspace)}, one token "
            f"takes {facts.kv_bytes_per_token} bytes; use a smaller model, fewer bits or --chunked-prefill-size 256"
        )
    kv_bytes = total * facts.kv_bytes_per_token
    lazy = on_cpu and 2 * kv_bytes <= free_bytes - workspace
    windows = _windows(config, facts, total, budget, lazy=lazy)
    if windows is not None:
        inside = windows.held + 2 * budget if lazy else windows.tokens
        total = _with_windows(config, facts, total, inside, windows, reasons)
    unbounded = windows is not None and not windows.full_bytes_per_token
    room = max(facts.max_position, config.context_length or 0) if unbounded else total
    context = _context(config, facts, room, reasons)
    running = min(config.max_running_requests or MAX_RUNNING, max(1, total // page))
    cache_bytes, num_states = kv_bytes, 0
    if facts.state_bytes:
        num_states, cache_bytes = _states(config, facts, pool_bytes, kv_bytes, reasons)
        running = min(running, max(1, num_states // 2))
    num_groups = 1 if windows is None else 2
    table = running * (context + 1) * 4 + running * -(-context // page) * 4 * num_groups
    return MemoryPlan(
        total, context, running, budget, kv_bytes, table, workspace, free_bytes, reasons, num_states, cache_bytes,
        windows, num_graphs * GRAPH_BYTES,
    )  # fmt: skip


def _asked_tokens(asked: int, page: int, facts: ModelFacts, free_bytes: int, reasons: list[str]) -> int:
    """Tokens of the pool where max_total_tokens says how many."""
    total = -(-asked // page) * page
    if total < 2 * page:
        raise ConfigError(
            f"max_total_tokens {asked} is less than two pages; give at least {2 * page}", param="max_total_tokens"
        )
    reasons.append(f"KV pool of {total} tokens as asked (max_total_tokens)")
    if total * facts.kv_bytes_per_token > free_bytes:
        raise ConfigError(
            f"max_total_tokens {total} needs {_gib(total * facts.kv_bytes_per_token)}, "
            f"but {_gib(free_bytes)} are free; ask for at most {free_bytes // facts.kv_bytes_per_token}",
            param="max_total_tokens",
        )
    return total


def _windows(config: Config, facts: ModelFacts, total: int, budget: int, *, lazy: bool) -> WindowPlan | None:
    """The pool of the layers with a window; None if they may as well keep all `total` tokens, like the others.

    lazy: memory is taken when it is first written, and there is enough of it should all of both pools be, at different
    times. Then this pool may hold as much as it would without windows, for short sequences, and the other one more, for
    long ones; at any time they stay within one budget. Else they are balanced for sequences of `WINDOW_REFERENCE`
    tokens.
    """
    if not facts.window:
        return None
    longest, page = config.context_length or facts.max_position, config.page_size
    held = facts.window + min(facts.window, 1024) // 4 + 2 * page
    least = held + 2 * budget  # a sequence's window, the step that extends it, and one in flight
    if longest <= held or total <= least:
        return None
    inner, outer = facts.window_bytes_per_token, facts.kv_bytes_per_token - facts.window_bytes_per_token
    tokens = total
    if not lazy and outer:
        share = min(1.0, 2 * facts.window / min(longest, WINDOW_REFERENCE))
        tokens = max(least, int(share * total * facts.kv_bytes_per_token / (outer + share * inner)))
    return WindowPlan(min(total, tokens) // page * page, held, inner, outer)


def _with_windows(
    config: Config, facts: ModelFacts, before: int, inside: int, windows: WindowPlan, reasons: list[str]
) -> int:
    """Tokens of the layers without a window, while those with one take `inside` tokens; all had `before` tokens."""
    outer, page = windows.full_bytes_per_token, config.page_size
    kv_bytes, total = before * facts.kv_bytes_per_token, before
    if outer and config.max_total_tokens is None:
        total = (kv_bytes - inside * windows.bytes_per_token) // outer // page * page
    length = min(config.context_length or facts.max_position, WINDOW_REFERENCE)
    fitting = windows.concurrency(length, total, kv_bytes)
    reasons.append(
        f"sliding windows of {facts.window} tokens: {windows.bytes_per_token:,} of {facts.kv_bytes_per_token:,} bytes "
        f"per token are kept for the last tokens only; a sequence of {length} tokens takes "
        f"{windows.sequence_bytes(length):,} bytes instead of {length * facts.kv_bytes_per_token:,}, "
        f"and {fitting} of them fit instead of {before // length}"
    )
    return total


def _pool_tokens(config: Config, facts: ModelFacts, pool_bytes: int, reasons: list[str]) -> int:
    """Tokens that the pool holds; of a model without KV, as many as can run."""
    if facts.kv_bytes_per_token:
        return pool_bytes // facts.kv_bytes_per_token
    reasons.append("no keys and values: what a request keeps does not depend on its length")
    return (config.max_running_requests or MAX_RUNNING) * (config.context_length or facts.max_position)


def _states(config: Config, facts: ModelFacts, pool_bytes: int, kv_bytes: int, reasons: list[str]) -> tuple[int, int]:
    """Slots for recurrent states, and the bytes that KV and states share.

    The slots take at most half of the pool, or all of it where there is no KV, and no more than the largest batch can
    make use of. On a CPU memory is taken when it is first written, so both pools may be as large as their share of the
    common budget can grow; on a device it is taken at once, so the KV gets what the states leave.
    """
    cache_bytes = pool_bytes if config.max_total_tokens is None else kv_bytes + pool_bytes // 2
    num_states = _num_states(config, facts, cache_bytes)
    if num_states < 4:
        raise ConfigError(
            f"no room for recurrent states: one takes {_gib(facts.state_bytes)}, the pool has {_gib(cache_bytes)}; "
            "use --mem-fraction-static or a smaller model"
        )
    reasons.append(f"{num_states} recurrent states of {facts.state_bytes:,} bytes share the pool with the KV")
    return num_states, cache_bytes


def _num_states(config: Config, facts: ModelFacts, cache_bytes: int) -> int:
    """Slots for recurrent states out of the bytes that they share with the KV."""
    if not facts.state_bytes:
        return 0
    running = config.max_running_requests or MAX_RUNNING
    share = cache_bytes // 2 if facts.kv_bytes_per_token else cache_bytes
    return min(share // facts.state_bytes, STATES_PER_SEQUENCE * running)


def token_budget(config: Config, on_cpu: bool, rate: float | None, reasons: list[str]) -> int:
    """Tokens of a step at most."""
    return config.chunked_prefill_size or _token_budget(on_cpu, rate, reasons)


def _token_budget(on_cpu: bool, rate: float | None, reasons: list[str]) -> int:
    if not on_cpu or rate is None:
        return MAX_BUDGET if not on_cpu else 2048
    budget = MIN_BUDGET
    while budget * 2 <= min(MAX_BUDGET, rate * STEP_SECONDS):
        budget *= 2
    reasons.append(f"token budget {budget}: {rate:.0f} tokens/s measured, a step of about {budget / rate:.2f} s")
    return budget


def _workspace_bytes(facts: ModelFacts, budget: int, measured: int | None, reasons: list[str]) -> int:
    """Activations, else those of one layer in its widest place; and three float32 copies of a full batch's logits."""
    activations = budget * (4 * facts.hidden_size + 3 * facts.intermediate_size) * facts.dtype_bytes
    if measured is not None:
        activations = measured
        reasons.append(f"a step of {budget} tokens takes {_gib(measured)} beside its logits (measured)")
    return activations + 3 * MAX_RUNNING * facts.vocab_size * 4


def _pool_bytes(config: Config, facts: ModelFacts, free: int, on_cpu: bool, reasons: list[str]) -> int:
    if config.mem_fraction_static is not None:
        pool = int((free + facts.weight_bytes) * config.mem_fraction_static) - facts.weight_bytes
        reasons.append(f"KV pool {_gib(pool)}: mem_fraction_static {config.mem_fraction_static} less the weights")
        return max(0, pool)
    if on_cpu:
        pool = min(int(free * CPU_SHARE), CPU_POOL_BYTES)
        reasons.append(f"KV pool {_gib(pool)}: half of the free {_gib(free)}, at most {_gib(CPU_POOL_BYTES)} on a CPU")
        return pool
    pool = int(free * DEVICE_SHARE)
    reasons.append(f"KV pool {_gib(pool)}: {DEVICE_SHARE:.0%} of the free {_gib(free)}")
    return pool


def _context(config: Config, facts: ModelFacts, total: int, reasons: list[str]) -> int:
    wanted = config.context_length or facts.max_position
    if config.context_length is not None and config.context_length > facts.max_position:
        reasons.append(
            f"context_length {config.context_length} is beyond the model's {facts.max_position}: quality may suffer"
        )
    if wanted > total:
        reasons.append(
            f"context cut from {wanted} to the pool's {total} tokens; for more: --max-total-tokens {wanted} "
            f"({_gib(wanted * facts.kv_bytes_per_token)}) or --mem-fraction-static"
        )
    return min(wanted, total)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
