"""The op table: every kernel a model or sampler calls, with its contract. Implementations are peers behind it.

Legend: T tokens of the step, R rows (sequences), E experts, H query heads, K KV heads, D head dim, Dv value head dim,
M hidden size, I intermediate size, V vocabulary, S token slots of the KV pool, P pages per row (padded).
All tensors are contiguous unless said otherwise; `x` may be float32, bfloat16 or float16; arithmetic accumulates in
float32. The reference implementation is the fallback and the test oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from pando.kernels.mixing import MixingProgram
from pando.kernels.recurrent import CausalConv, GatedDelta, SelectiveScan, StateSpace
from pando.kernels.weights import Weight

Function = TypeVar("Function", bound=Callable[..., object])


class Fuse(Protocol):
    """Makes one kernel, or few, of a function of tensors in plain torch; the function changes none of them."""

    def __call__(self, function: Function, /) -> Function:
        """A function with the same results. Layers that give the same function share it."""
        ...


def as_it_is(function: Function, /) -> Function:
    """The function itself: one kernel for each of its operations."""
    return function


class AttentionPlan(Protocol):
    """How the attention calls of one step are cut into work: made once, used by every layer of the step.

    An implementation fills it on the first call of each kind of layer. It depends on cu_q_lens, kv_lens and page_table
    only, so it must be reset before a call in which any of these has changed, in place or not.
    """

    def reset(self) -> None:
        """Forget the step."""


@dataclass(frozen=True, slots=True, eq=False)
class StepRows:
    """The rows of a step as the host knows them: queries, and keys with this step's. One object per step.

    recorded: names the recording that the step is made for, or replays; None: the step runs as it is.
    """

    q_lens: Sequence[int]
    kv_lens: Sequence[int]
    recorded: Hashable | None = None


class PagedAttention(Protocol):
    """Causal attention over a paged cache that already holds this step's KV.

    Row r has queries q[cu_q_lens[r]:cu_q_lens[r+1]] (n of them, may be 0) at positions kv_lens[r]-n .. kv_lens[r]-1.
    Its key at position j is k_cache[page_table[r, j // page_size] * page_size + j % page_size]. A query at position i
    sees j <= i, and with window w > 0 only i - j < w. softcap c > 0: scores become c * tanh(score / c) after scaling.
    sinks [H] float32: one extra logit per head in the softmax's denominator.

    tree_mask (uint8 or bool, flat): the [n, n] masks of the rows one after the other; query i of a row sees its own
    step's token j where mask[i, j] is set, instead of j <= i. Everything before the step is visible as without it
    (a window counts i as if the tokens were a chain). Every token sees itself.

    Caches may also be of the table's `kv_dtypes`; int8 ones are rows of `pando.kernels.int8_rows`, 4 bytes longer than
    D and Dv.

    Rows whose page tables begin with the same pages hold the same KV there; an implementation may read it once.
    A row's result must not depend on the other rows of the call, nor on what it shares with them.
    """

    def __call__(
        self,
        q_THD: Tensor,
        k_cache_SKD: Tensor,
        v_cache_SKD: Tensor,
        page_table_RP: Tensor,
        cu_q_lens: Tensor,
        kv_lens: Tensor,
        *,
        page_size: int,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
        tree_mask: Tensor | None = None,
        plan: AttentionPlan | None = None,
    ) -> Tensor:
        """Output [T, H, Dv], dtype of q. cu_q_lens [R+1], kv_lens [R], page_table are int32.

        plan: of the same op table, and reset since the ragged arguments changed; None: the call makes its own.
        """
        ...


@dataclass(frozen=True, slots=True)
class Rope:
    """How a step's heads are turned: positions, cos_sin and interleaved as for `rope_`.

    norms: weights [D] float32 of an `rms_norm` of every head before it, of queries and of keys; eps is theirs.
    """

    positions: Tensor
    cos_sin: Tensor
    interleaved: bool
    norms: tuple[Tensor, Tensor] | None = None
    eps: float = 0.0


class RopeStore(Protocol):
    """Turn the heads of a step's queries and keys, and keep its keys and values."""

    def __call__(
        self,
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        rope: Rope,
        k_cache_SKD: Tensor,
        v_cache_SKD: Tensor,
        out_loc: Tensor,
    ) -> Tensor:
        """The turned queries [T, H, D]; caches and out_loc [T] as for `store_kv`.

        q, k and v may be strided views with a contiguous last dim. What q and k hold afterwards is not said: the
        result may be q itself.
        """
        ...


class Sample(Protocol):
    """Choose one token per row; a pure function of its arguments, independent of the other rows."""

    def __call__(
        self,
        logits_RV: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        seeds: Tensor,
        positions: Tensor,
    ) -> Tensor:
        """Tokens [R] int64.

        logits float32; temperature [R] float32 (< 1e-6: argmax, lowest id on a tie); top_k [R] int32 (<= 0: off), then
        top_p and min_p [R] float32 filter the temperature-scaled distribution in that order (each on the distribution
        renormalised after the one before; at least one token stays). The uniform number of a row is a counter-based
        hash of (seeds[r], positions[r]) int64, and the token is the inverse CDF of the kept tokens in id order.
        """
        ...


class PackedLinear(Protocol):
    """A linear map in the layout of one op table, made by `pack_linear`; the weight it was made of is not needed."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weight."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]; [..., N / 2] with an activation."""
        ...


class PackLinear(Protocol):
    """Prepare a weight for many products."""

    def __call__(
        self,
        weight: Weight,
        bias: Tensor | None = None,
        *,
        activation: str | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> PackedLinear:
        """x -> x @ weight.T + bias, for weight [N, K] and bias [N].

        activation: the outputs are a gate [N / 2], then an up part [N / 2]; the result is act(gate) * up, kinds as for
        `gated_activation`. out_dtype: of the result; None = that of x. Products accumulate in float32.
        """
        ...


class PackedExperts(Protocol):
    """Routed expert MLPs in the layout of one op table, made by `pack_experts`."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weights."""
        ...

    def __call__(self, x_TM: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Sum over the k chosen experts of weight * expert(x): [T, M]. topk_ids [T, k] int64, topk_weights [T, k]."""
        ...


class PackExperts(Protocol):
    """Prepare the experts of a mixture."""

    def __call__(
        self,
        gate_up: Sequence[Weight],
        down: Sequence[Weight],
        activation: str,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> PackedExperts:
        """One gate_up [2I, M] (gate first) and one down [M, I] per expert; biases [E, 2I] and [E, M]."""
        ...


@dataclass(frozen=True, slots=True)
class HeadsShape:
    """Attention heads of one layer. rotary_dim 0: no rotary embedding."""

    heads: int
    kv_heads: int
    head_dim: int
    v_dim: int
    rotary_dim: int
    interleaved: bool
    norm_after_rope: bool


class StateRows(Protocol):
    """Recurrent states of a step's rows, as `pando.forward.StateBatch` holds them."""

    slots: Tensor
    fresh: Tensor
    save_token: Tensor
    save_slot: Tensor


@dataclass(frozen=True, slots=True)
class StepTensors:
    """What a program needs to know of a step; shapes and dtypes as for `PagedAttention`, positions and out_loc [T].

    out_loc, page_table: one for each group of layers. groups: the group of each layer. states: the tensors of each
    layer's recurrent state; state_rows None: the model has none.
    """

    positions: Tensor
    out_loc: tuple[Tensor, ...]
    cu_q_lens: Tensor
    kv_lens: Tensor
    page_table: tuple[Tensor, ...]
    page_size: int
    k_caches: tuple[Tensor, ...]
    v_caches: tuple[Tensor, ...]
    groups: tuple[int, ...]
    states: tuple[tuple[Tensor, ...], ...] = ()
    state_rows: StateRows | None = None


class Program(MixingProgram, Protocol):
    """A model's layers as one list of instructions over numbered buffers [T, width], run with one call per step.

    Buffer 0 is the residual stream, buffer 1 the result, both of the model's width. Instructions run in the order they
    were added. No instruction's target may be its source.
    """

    def buffer(self, width: int) -> int:
        """A new buffer of `width` elements per token."""
        ...

    def embed(self, weight_VM: Tensor) -> bool:
        """Residual stream = rows of weight, the first of all instructions; False if this weight has no native form."""
        ...

    def norm(self, source: int, target: int, weight: Tensor, eps: float) -> None:
        """target = rms_norm(source)."""
        ...

    def linear(self, source: int, target: int, packed: PackedLinear, accumulate: bool) -> bool:
        """target = packed(source), or target += it; False if this linear map can not be part of the program."""
        ...

    def add(self, source: int, target: int) -> None:
        """target += source."""
        ...

    def scale(self, buffer: int, factor: float) -> None:
        """buffer *= factor."""
        ...

    def heads(
        self, qkv: int, layer: int, rotary: int, shape: HeadsShape, norms: tuple[Tensor, Tensor] | None, eps: float
    ) -> None:
        """Norm (norms [D] of queries and keys) and turn the heads of qkv in place, store keys and values.

        rotary: index into the tables given to `run`.
        """
        ...

    def attend(
        self,
        qkv: int,
        target: int,
        layer: int,
        shape: HeadsShape,
        scale: float,
        window: int,
        softcap: float,
        sinks: Tensor | None,
    ) -> None:
        """target [T, H * Dv] = attention of the queries in qkv over the layer's cache."""
        ...

    def run(self, start: Tensor, step: StepTensors, rotaries: Sequence[Tensor]) -> Tensor:
        """The result [T, M] of a step. rotaries: cos_sin tables, as for `rope_`.

        start: the token ids [T] int64 of a program that embeds; else the residual stream [T, M], which is used up.
        """
        ...


@dataclass(frozen=True, slots=True)
class SamplingColumns:
    """Sampling parameters by slot [N], as `Sample` takes them: seed int64, top_k int32, the others float32."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A flattened step: R rows, T tokens, E of which yield a token. Ids, indices and positions int64, the rest int32.

    input_ids, positions [T]; out_loc, [T] of each page group, the token's slot in the KV of the group's layers;
    cu_q_lens [R+1]; kv_lens [R], cached and this step's; page_table, [R, P] of each page group; logits_index [E + X],
    the indices into T of the tokens that yield one, then X entries for the caller to fill; emit_slots [E]; emit_ends
    [E], the positions of the tokens they yield.
    """

    input_ids: Tensor
    positions: Tensor
    out_loc: tuple[Tensor, ...]
    cu_q_lens: Tensor
    kv_lens: Tensor
    page_table: tuple[Tensor, ...]
    logits_index: Tensor
    emit_slots: Tensor
    emit_ends: Tensor


class StepTable(Protocol):
    """What happens around the model in a step, bound to one request table: N slots, C tokens and P pages each.

    Layers that keep different tokens (full attention, sliding windows) are different page groups, G of them: each has
    pages of its own for a slot's positions. An entry whose page was freed is stale: a valid id that nobody may read.
    Host integers come in, device tensors go out, and nothing waits for the device. The tensors of a step are memory of
    this object: they are overwritten by the next step, which runs behind it.
    """

    def reserve(self, shapes: Sequence[tuple[int, int, int]]) -> None:
        """Let the inputs of steps of R rows, T tokens and tables P wide stand in the same places every time.

        All but logits_index, emit_slots and emit_ends. To be called once; recorded steps read them there.
        """
        ...

    def write_pages(
        self, slots: Sequence[int], indices: Sequence[int], ids: Sequence[int], groups: Sequence[int] = ()
    ) -> None:
        """pages[group, slot, index] = id; of two writes to the same place the later one holds.

        groups: () = all in the first.
        """
        ...

    def write_tokens(self, slots: Sequence[int], positions: Sequence[int], ids: Sequence[int]) -> None:
        """tokens[slot, position] = id: what the host has chosen. No place is written twice."""
        ...

    def flatten(
        self,
        slots: Sequence[int],
        starts: Sequence[int],
        lens: Sequence[int],
        emits: Sequence[int],
        *,
        num_extra: int,
        num_pages: int,
    ) -> StepInputs:
        """The inputs of a step whose row r runs positions starts[r] .. starts[r] + lens[r] - 1 of slot slots[r].

        emits: how many of a row's last positions yield a token, 0 .. lens[r]. num_extra: the X of logits_index.
        num_pages: the width of page_table.
        """
        ...

    def choose(
        self,
        logits_EV: Tensor,
        slots_E: Tensor,
        ends_E: Tensor,
        *,
        greedy: bool,
        masks_MW: Tensor | None = None,
        masked: Sequence[int] = (),
    ) -> Tensor:
        """[2, E] int64: a token for each row, and 1 where its logits are all finite, else 0 (the token is any then).

        Tokens are those of `Sample` with the parameters of the rows' slots, which are those of `argmax` where all rows
        are greedy: say so if it is known. tokens[slot, end] is set to the row's token. masks [M, ceil(V/32)] int32, as
        `apply_token_mask_` reads them: only these tokens may come in the rows `masked` (ascending); 0 if none may.
        """
        ...


class MakeStepTable(Protocol):
    """Bind the step ops to a request table."""

    def __call__(
        self,
        tokens_NC: Tensor,
        pages_GNP: Tensor,
        sampling: SamplingColumns,
        page_size: int,
        upload: Callable[[list[int]], Tensor],
    ) -> StepTable:
        """tokens and pages int32: a slot's history, and by group the pages of its positions, page_size each.

        upload: host integers as int64 on the tables' device, without waiting for it.
        """
        ...


@dataclass(frozen=True, slots=True)
class OpTable:
    """One implementation of every op. Built once at start and passed to whoever calls ops; there is no global."""

    name: str

    pack_linear: PackLinear
    pack_experts: PackExperts

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    """(x [..., n], weight [n] float32, eps) -> x / rms(x) * weight, dtype of x. Gemma's 1 + w is folded at load."""

    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    """(x, residual, weight, eps): residual += x in place; returns rms_norm(residual)."""

    layer_norm: Callable[[Tensor, Tensor | None, Tensor | None, float], Tensor]
    """(x [..., n], weight, bias, eps) -> (x - mean) / std * weight + bias, dtype of x.

    weight and bias float32 [n], or [h, n] where x is [..., h, n], or None: 1 and 0.
    """

    rope_: Callable[[Tensor, Tensor, Tensor, Tensor, bool], None]
    """(q [T,H,D], k [T,K,D], positions [T] int64, cos_sin [max_pos, rotary_dim] float32, interleaved) in place.

    Row p of cos_sin is cos for the rotary_dim/2 frequencies, then sin. Only the first rotary_dim of D turn. Pairs are
    (i, i + rotary_dim/2), or (2i, 2i+1) when interleaved. q and k may be strided views with a contiguous last dim.
    """

    store_kv: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
    """(k [T,K,D], v [T,K,Dv], k_cache [S,K,D], v_cache [S,K,Dv], out_loc [T] int64): cache[out_loc] = kv.

    k, v and the caches may be strided views with a contiguous last dim, as may q and the caches of `paged_attention`.
    Into an int8 cache ([S,K,D+4], [S,K,Dv+4]) as rows of `pando.kernels.int8_rows`; into one of float8 without a
    scale, what is too large as its largest number.
    """

    gated_activation: Callable[[Tensor, str], Tensor]
    """(gate_up [T, 2I] (gate first), kind) -> act(gate) * up [T, I]; kind: silu, gelu_tanh, gelu, relu2, swiglu_oai.

    swiglu_oai (gpt-oss): gate clamped to <= 7, up to [-7, 7]; gate * sigmoid(1.702 * gate) * (up + 1).
    """

    paged_attention: PagedAttention

    attention_plan: Callable[[], AttentionPlan]
    """() -> an empty plan for `paged_attention`, to be kept and reset for each step."""

    causal_conv: CausalConv
    gated_delta: GatedDelta
    state_space: StateSpace
    selective_scan: SelectiveScan

    sample: Sample

    argmax: Callable[[Tensor], Tensor]
    """(logits [R,V] float32) -> the largest logit's id [R] int64, the lowest on a tie."""

    finite: Callable[[Tensor], Tensor]
    """(logits [R,V] float32) -> whether all logits of a row are finite [R] bool."""

    apply_token_mask_: Callable[[Tensor, Tensor], None]
    """(logits [R,V] float32, mask [R, ceil(V/32)] int32) in place: -inf where bit v % 32 of word v // 32 is 0."""

    apply_penalties_: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]
    """(logits [R,V] float32, history [R, L] int32, prompt_lens [R], lens [R], repetition [R], frequency [R],
    presence [R]) in place. history[r, :lens[r]] are the tokens so far; repetition (> 0 divides, < 0 multiplies) looks
    at all of them; frequency (times count) and presence at history[r, prompt_lens[r]:lens[r]]. Applied in that order.
    """

    logprobs: Callable[[Tensor, Tensor], Tensor]
    """(logits [R,V] float32, token_ids [R] int64) -> log-softmax at the token [R] float32."""

    step_table: MakeStepTable

    program: Callable[[torch.dtype, int], Program] | None = None
    """(dtype, model width) -> an empty program; None where layers are run op by op."""

    deterministic: bool = False
    """Whether what a program makes of a token is the same to the last bit however its sequence was cut into steps, and
    whatever else those held."""
    rope_store: RopeStore | None = None
    """Norms of heads, `rope_` and `store_kv` in one pass. None where these do it (`pando.kernels.rope_store`)."""

    kv_dtypes: frozenset[str] = frozenset()
    """Dtypes besides the inputs' of the caches that `store_kv`, `paged_attention` and programs take: int8 (rows of
    `pando.kernels.int8_rows`), float8_e4m3fn, float8_e5m2."""

    float8_weights: bool = False
    """Whether `pack_linear` and `pack_experts` keep weights of float8 as they are; others widen them."""

    capturable: bool = False
    """Whether calls may be recorded in a graph: no op waits for the device, or decides by what a tensor holds."""

    plan_rows: Callable[[AttentionPlan, StepRows], None] | None = None
    """(plan, rows): the step that the plan is used for next; again with the same rows nothing happens. Rows of a
    recording that the plan was used for are planned at once, because a replay does not call `paged_attention`. Never
    part of a recording. None where plans need no host.
    """

    fuse: Fuse = as_it_is
    """For what layers compute between ops, in plain torch."""

    rounds: bool = False
    """Whether `pack_linear` and `pack_experts` take an `UnroundedWeight`."""
