"""The compiled kernels (csrc/module.cpp): pointers, sizes and strides in elements. Called by `pando.kernels.cpu` only.

Strides in a tuple are (token or slot, head). ValueError on an index out of range or a level this processor lacks.
"""

from collections.abc import Sequence

interface: int
max_taps: int

def levels() -> list[tuple[str, str]]: ...
def num_threads() -> int: ...
def set_num_threads(n: int, /) -> None: ...
def set_aside(change: int, /) -> None: ...
def norm(
    level: int,
    dtype: int,
    x: int,
    rows: int,
    inner: int,
    outer_stride: int,
    inner_stride: int,
    size: int,
    residual: int,
    weight: int,
    out: int,
    eps: float,
    /,
) -> None: ...
def rope(
    level: int,
    dtype: int,
    q: int,
    q_token_stride: int,
    q_head_stride: int,
    q_heads: int,
    k: int,
    k_token_stride: int,
    k_head_stride: int,
    k_heads: int,
    tokens: int,
    positions: int,
    cos_sin: int,
    max_position: int,
    rotary_dim: int,
    interleaved: bool,
    /,
) -> None: ...
def activation(
    level: int, dtype: int, kind: int, gate_up: int, row_stride: int, rows: int, size: int, out: int, /
) -> None: ...
def store(
    level: int,
    dtype: int,
    int8_kv: bool,
    k: int,
    k_strides: tuple[int, ...],
    v: int,
    v_strides: tuple[int, ...],
    k_cache: int,
    k_cache_strides: tuple[int, ...],
    v_cache: int,
    v_cache_strides: tuple[int, ...],
    tokens: int,
    heads: int,
    k_dim: int,
    v_dim: int,
    num_slots: int,
    out_loc: int,
    /,
) -> None: ...
def attention(
    level: int,
    dtype: int,
    int8_kv: bool,
    q: int,
    q_strides: tuple[int, ...],
    k: int,
    k_strides: tuple[int, ...],
    v: int,
    v_strides: tuple[int, ...],
    out: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    v_dim: int,
    num_slots: int,
    page_table: int,
    table_stride: int,
    table_width: int,
    cu_q_lens: int,
    kv_lens: int,
    rows: int,
    page_size: int,
    window: int,
    scale: float,
    softcap: float,
    sinks: int,
    tree_mask: int,
    tree_mask_size: int,
    plan: AttentionPlan | None,
    /,
) -> None: ...
def set_shared_prefix(on: bool, /) -> None: ...

class AttentionPlan:
    """How the work of one step's attention calls is cut; see csrc/attention_plan.hpp."""

    def __init__(self, whole: bool, /) -> None: ...
    def reset(self) -> None: ...
    @property
    def keys_read(self) -> int: ...
    @property
    def keys_seen(self) -> int: ...

def sample(
    level: int,
    logits: int,
    rows: int,
    vocab: int,
    temperature: int,
    top_k: int,
    top_p: int,
    min_p: int,
    seeds: int,
    positions: int,
    out: int,
    /,
) -> None: ...
def penalties(
    logits: int,
    rows: int,
    vocab: int,
    history: int,
    history_stride: int,
    history_len: int,
    prompt_lens: int,
    lens: int,
    repetition: int,
    frequency: int,
    presence: int,
    /,
) -> None: ...
def scan(level: int, logits: int, rows: int, vocab: int, argmax: int, finite: int, /) -> None: ...
def mask(level: int, logits: int, rows: int, vocab: int, mask: int, mask_stride: int, /) -> None: ...
def logprobs(level: int, logits: int, rows: int, vocab: int, token_ids: int, out: int, /) -> None: ...

# ---- linear maps (csrc/linear.hpp): a weight points to memory that its maker keeps ----

class Weight:
    def __init__(
        self,
        kind: int,
        n: int,
        k: int,
        group: int,
        activation: int,
        activation_bits: int,
        panels: int,
        bias: int,
        scale: int,
        has_offsets: bool,
        /,
    ) -> None: ...

class Experts:
    def __init__(self, gate_up: list[Weight], down: list[Weight], /) -> None: ...

def linear(
    level: int,
    weight: Weight,
    x_dtype: int,
    x: int,
    rows: int,
    x_stride: int,
    out_dtype: int,
    out: int,
    out_stride: int,
    accumulate: bool,
    /,
) -> None: ...
def experts(
    level: int,
    experts: Experts,
    dtype: int,
    x: int,
    tokens: int,
    x_stride: int,
    ids: int,
    weights: int,
    top_k: int,
    out: int,
    out_stride: int,
    /,
) -> None: ...
def pack(
    kind: int, dtype: int, source: int, row_stride: int, n: int, k: int, activation: int, panels: int, /
) -> None: ...
def panel_bytes(kind: int, n: int, k: int, activation: int, /) -> int: ...

class QuantizedSource:
    """Pointers to a `QuantizedWeight`: values, scale and offset (0: none)."""

    def __init__(
        self,
        n: int,
        k: int,
        group: int,
        bits: int,
        activation: int,
        values: int,
        scale: int,
        offset: int,
        /,
    ) -> None: ...

def plan_quantized(source: QuantizedSource, /) -> tuple[int, bool, int, int]: ...
def pack_quantized(source: QuantizedSource, panels: int, scale: int, /) -> None: ...
def plan_rounded(n: int, k: int, group: int, bits: int, activation: int, /) -> tuple[int, bool, int, int]: ...
def pack_rounded(
    level: int,
    dtype: int,
    parts: list[tuple[int, int, int]],
    k: int,
    group: int,
    bits: int,
    activation: int,
    panels: int,
    scale: int,
    /,
) -> None: ...

panel_layout: int
checksum_chunk: int

def checksum(data: int, num_bytes: int, first_chunk: int, /) -> int: ...
def verify(file: int, ranges: Sequence[tuple[int, int, int]], /) -> bool: ...
def huge_pages(data: int, num_bytes: int, /) -> None: ...
def populate(data: int, num_bytes: int, /) -> bool: ...
def pack_outputs(source: int, n: int, activation: int, out: int, /) -> None: ...

# ---- limits of the machine, for benchmarks ----

def burn(level: int, kind: int, rounds: int, /) -> int: ...
def read_through(level: int, data: int, num_bytes: int, /) -> None: ...

class Program:
    def __init__(self, level: int, dtype: int, width: int, whole: bool, /) -> None: ...
    def bind(self, layers: list[tuple[int, int, int, int, int, int, int, int, bool]], /) -> None: ...
    def buffer(self, width: int, /) -> int: ...
    def embed(self, rows: int, vocab: int, /) -> None: ...
    def norm(self, source: int, target: int, weight: int, eps: float, /) -> None: ...
    def linear(self, source: int, target: int, weight: Weight, accumulate: bool, /) -> None: ...
    def add(self, source: int, target: int, /) -> None: ...
    def normalize(
        self,
        source: int,
        source_offset: int,
        target: int,
        target_offset: int,
        groups: int,
        size: int,
        weight: int,
        bias: int,
        weight_stride: int,
        eps: float,
        centered: bool,
        /,
    ) -> None: ...
    def modulate(self, source: int, offset: int, target: int, kind: int, broadcast: bool, /) -> None: ...
    def mixture(
        self,
        source: int,
        logits: int,
        target: int,
        experts: Experts,
        num_experts: int,
        top_k: int,
        score: int,
        correction: int,
        groups: int,
        top_groups: int,
        group_scores: int,
        renormalise: bool,
        scale: float,
        /,
    ) -> None: ...
    def gated_norm(
        self, y: int, z: int, offset: int, size: int, weight: int, weight_stride: int, eps: float, gate_first: bool, /
    ) -> None: ...
    def conv(
        self, source: int, offset: int, target: int, state: int, taps: int, weight: int, bias: int, silu: bool, /
    ) -> None: ...
    def delta(
        self,
        qkv: int,
        gates: int,
        target: int,
        state: int,
        key_heads: int,
        value_heads: int,
        key_dim: int,
        value_dim: int,
        rate: int,
        dt_bias: int,
        scale: float,
        /,
    ) -> None: ...
    def space(
        self,
        xbc: int,
        projected: int,
        target: int,
        state: int,
        heads: int,
        groups: int,
        head_dim: int,
        state_size: int,
        dt_offset: int,
        a: int,
        d: int,
        dt_bias: int,
        low: float,
        high: float,
        /,
    ) -> None: ...
    def bind_states(self, tensors: list[tuple[int, int, int]], /) -> None: ...
    def look_at_states(self, slots: int, fresh: int, save_token: int, save_slot: int, num_saves: int, /) -> None: ...
    def scale(self, buffer: int, factor: float, /) -> None: ...
    def heads(
        self,
        qkv: int,
        layer: int,
        rotary: int,
        q_heads: int,
        kv_heads: int,
        head_dim: int,
        v_dim: int,
        rotary_dim: int,
        q_norm: int,
        k_norm: int,
        eps: float,
        norm_after_rope: bool,
        interleaved: bool,
        /,
    ) -> None: ...
    def attend(
        self,
        qkv: int,
        target: int,
        layer: int,
        q_heads: int,
        kv_heads: int,
        head_dim: int,
        v_dim: int,
        window: int,
        scale: float,
        softcap: float,
        sinks: int,
        /,
    ) -> None: ...
    def look_at(
        self,
        tokens: int,
        rows: int,
        positions: int,
        cu_q_lens: int,
        kv_lens: int,
        groups: list[tuple[int, int, int, int]],
        page_size: int,
        rotaries: list[tuple[int, int]],
        /,
    ) -> None: ...
    def run(self, residual: int, input_ids: int, result: int, /) -> None: ...

# ---- around the model ----

_Table = tuple[int, int, int, int]
"""Address, rows, width, row stride."""

class StepTable:
    def __init__(
        self,
        level: int,
        tokens: _Table,
        pages: list[_Table],
        page_size: int,
        temperature: int,
        top_k: int,
        top_p: int,
        min_p: int,
        seed: int,
        /,
    ) -> None: ...
    def write_pages(
        self, slots: Sequence[int], indices: Sequence[int], ids: Sequence[int], groups: Sequence[int], /
    ) -> None: ...
    def bind(
        self,
        num_tokens: int,
        num_emitting: int,
        input_ids: int,
        positions: int,
        groups: list[tuple[int, _Table]],
        cu_q_lens: int,
        kv_lens: int,
        last: int,
        emit_slots: int,
        emit_ends: int,
        /,
    ) -> None: ...
    def flatten(
        self, slots: Sequence[int], starts: Sequence[int], lens: Sequence[int], emits: Sequence[int], /
    ) -> None: ...
    def write_tokens(self, slots: Sequence[int], positions: Sequence[int], ids: Sequence[int], /) -> None: ...
    def choose(
        self,
        logits: int,
        rows: int,
        vocab: int,
        slots: int,
        ends: int,
        greedy: bool,
        out: int,
        mask: int,
        stride: int,
        masked: Sequence[int],
        /,
    ) -> None: ...

# Recurrent ops. ragged: rows, tokens, slots of the pool, saves; addresses of cu_q_lens, slots, fresh, save_token and
# save_slot.
def causal_conv(
    level: int,
    dtype: int,
    x: int,
    token_stride: int,
    weight: int,
    bias: int,
    state: int,
    slot_stride: int,
    out: int,
    channels: int,
    taps: int,
    silu: bool,
    ragged: tuple[int, ...],
    /,
) -> None: ...
def gated_delta(
    level: int,
    dtype: int,
    q: int,
    q_strides: tuple[int, ...],
    k: int,
    k_strides: tuple[int, ...],
    v: int,
    v_strides: tuple[int, ...],
    log_decay: int,
    beta: int,
    state: int,
    slot_stride: int,
    out: int,
    key_heads: int,
    value_heads: int,
    key_dim: int,
    value_dim: int,
    channels: bool,
    normalize: bool,
    scale: float,
    ragged: tuple[int, ...],
    /,
) -> None: ...
def state_space(
    level: int,
    dtype: int,
    x: int,
    x_strides: tuple[int, ...],
    b: int,
    b_strides: tuple[int, ...],
    c: int,
    c_strides: tuple[int, ...],
    dt: int,
    a: int,
    d: int,
    state: int,
    slot_stride: int,
    out: int,
    heads: int,
    groups: int,
    head_dim: int,
    state_size: int,
    ragged: tuple[int, ...],
    /,
) -> None: ...
def selective_scan(
    level: int,
    dtype: int,
    x: int,
    x_stride: int,
    b: int,
    b_stride: int,
    c: int,
    c_stride: int,
    dt: int,
    a: int,
    d: int,
    state: int,
    slot_stride: int,
    out: int,
    channels: int,
    state_size: int,
    ragged: tuple[int, ...],
    /,
) -> None: ...
