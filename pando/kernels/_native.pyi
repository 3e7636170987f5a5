"""The compiled kernels (csrc/module.cpp): pointers, sizes and strides in elements. Called by `pando.kernels.cpu` only.

Strides in a tuple are (token or slot, head). ValueError on an index out of range or a level this processor lacks.
"""

interface: int

def levels() -> list[tuple[str, str]]: ...
def num_threads() -> int: ...
def set_num_threads(n: int, /) -> None: ...
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
    element_bytes: int,
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

    def __init__(self) -> None: ...
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
def logprobs(level: int, logits: int, rows: int, vocab: int, token_ids: int, out: int, /) -> None: ...
