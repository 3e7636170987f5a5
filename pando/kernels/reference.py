"""Every op in plain torch, for any device: the fallback, and the oracle the native kernels are tested against.

Clear first. Contracts, shapes and the legend are those of `pando.kernels.ops`; arithmetic is float32 (float64 where a
distribution is sampled) and results are rounded once, to the dtype of the input.

The uniform number of (seed, position) is part of the contract, because every implementation must draw the same one.
With all arithmetic on 64-bit words modulo 2^64 and `mix` the finaliser of SplitMix64 (Steele, Lea, Flood 2014):

    mix(z):  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;  z = (z ^ z >> 27) * 0x94D049BB133111EB;  return z ^ z >> 31
    uniform = (mix(mix(seed + 0x9E3779B97F4A7C15) + position * 0x9E3779B97F4A7C15) >> 11) * 2^-53        in [0, 1)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pando.core.sampling import GREEDY_TEMPERATURE
from pando.errors import ConfigError
from pando.kernels.int8_rows import expand_rows, round_rows, row_size
from pando.kernels.ops import AttentionPlan, OpTable, PackedLinear, PackLinear
from pando.kernels.reference_recurrent import causal_conv, gated_delta, selective_scan, state_space
from pando.kernels.reference_step import TorchStepTable
from pando.kernels.reference_step import apply_token_mask_ as apply_token_mask_
from pando.kernels.weights import QuantizedWeight, UnroundedWeight, Weight

ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu2", "swiglu_oai")
"""Kinds of `gated_activation`; the index is the code the native kernels use."""


def _signed(word: int) -> int:
    """The int64 with the same bits as the unsigned 64-bit `word`."""
    return word - (1 << 64) if word >> 63 else word


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_A = _signed(0xBF58476D1CE4E5B9)
_MIX_B = _signed(0x94D049BB133111EB)


class Linear:
    """`PackedLinear` that keeps the weight as it is; a quantised one is expanded at each product."""

    def __init__(
        self,
        weight: Tensor | QuantizedWeight,
        bias: Tensor | None,
        activation: str | None,
        out_dtype: torch.dtype | None,
    ):
        self._weight, self._bias, self._activation, self._out_dtype = weight, bias, activation, out_dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the weight."""
        weight = self._weight
        parts = [weight] if isinstance(weight, Tensor) else [weight.values, weight.scale, weight.offset]
        return sum(part.nbytes for part in parts if part is not None)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]; [..., N / 2] with an activation."""
        out = self._product(x)
        if self._activation is not None:
            out = gated_activation(out.reshape(-1, out.shape[-1]), self._activation).view(*x.shape[:-1], -1)
        return out.to(self._out_dtype or x.dtype)

    def _product(self, x: Tensor) -> Tensor:
        if isinstance(self._weight, Tensor):
            return F.linear(x, self._weight, self._bias)
        wide = x.float()
        if self._weight.activation_bits == 8 and not self._weight.is_float:
            wide = rounded_to_int8(wide, self._weight.group_size)
        out = F.linear(wide, self._weight.dequantize(), None if self._bias is None else self._bias.float())
        return out if self._activation is not None else out.to(self._out_dtype or x.dtype)


def rounded_to_int8(x: Tensor, group_size: int) -> Tensor:
    """x [..., K] as int8 with one scale per group of inputs can hold it: max |x| / 127 per group, ties to even."""
    size = x.shape[-1]
    groups = F.pad(x, (0, -size % group_size)).unflatten(-1, (-1, group_size))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    rounded = (groups / scale.clamp(min=1e-38)).round() * scale
    return rounded.flatten(-2)[..., :size]


def pack_linear(
    weight: Weight, bias: Tensor | None = None, *, activation: str | None = None, out_dtype: torch.dtype | None = None
) -> Linear:
    """The weight as it is."""
    assert not isinstance(weight, UnroundedWeight), "only a table that rounds takes it"
    return Linear(weight, bias, activation, out_dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add x to the residual stream in place, rounded to its dtype, and norm the sum."""
    residual.add_(x)
    return rms_norm(residual, weight, eps)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / std * weight + bias over the last dim."""
    wide = F.layer_norm(x.float(), x.shape[-1:], None, None, eps)
    if weight is not None:
        wide = wide * weight
    if bias is not None:
        wide = wide + bias
    return wide.to(x.dtype)


def _rotate_(x_THD: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    half = cos.shape[-1]
    turning = x_THD[..., : 2 * half]
    wide = turning.float()
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
    else:
        first, second = wide[..., :half], wide[..., half:]
    turned = (first * cos - second * sin, second * cos + first * sin)
    joined = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    turning.copy_(joined)


def rope_(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> None:
    """Rotary embedding in place (Su et al. 2021)."""
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    _rotate_(q, cos, sin, interleaved)
    _rotate_(k, cos, sin, interleaved)


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, out_loc: Tensor) -> None:
    """Scatter this step's keys and values to their token slots."""
    for x, cache in ((k, k_cache), (v, v_cache)):
        if cache.dtype.itemsize > 1:
            cache[out_loc] = x.to(cache.dtype)
        else:  # by bytes, because torch can not index float8 everywhere
            rows = round_rows(x) if cache.dtype is torch.int8 else saturated(x, cache.dtype)
            cache.view(torch.uint8)[out_loc] = rows.view(torch.uint8)


def saturated(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a float8 dtype; beyond its largest number that one, as GPUs convert."""
    largest = torch.finfo(dtype).max
    return x.float().clamp(-largest, largest).to(dtype)


def gated_activation(gate_up: Tensor, kind: str) -> Tensor:
    """act(gate) * up. Raises ConfigError on an unknown kind."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    if kind == "silu":
        out = F.silu(gate) * up
    elif kind == "gelu_tanh":
        out = F.gelu(gate, approximate="tanh") * up
    elif kind == "gelu":
        out = F.gelu(gate) * up
    elif kind == "relu2":
        out = F.relu(gate).square() * up
    elif kind == "swiglu_oai":
        gate = gate.clamp(max=7.0)
        out = gate * torch.sigmoid(1.702 * gate) * (up.clamp(-7.0, 7.0) + 1.0)
    else:
        raise ConfigError(f"activation {kind!r} is not known; known: {', '.join(ACTIVATIONS)}", param="activation")
    return out.to(gate_up.dtype)


MAX_SCORES = 1 << 24
"""Scores held at once by the reference attention (64 MiB of float32); longer prompts run in pieces."""


def _hidden(first_query: int, num_queries: int, first_key: int, num_keys: int, window: int, like: Tensor) -> Tensor:
    """Mask [N, L]: True where a query may not see a key, by their positions."""
    query = torch.arange(first_query, first_query + num_queries, device=like.device).unsqueeze(1)
    key = torch.arange(first_key, first_key + num_keys, device=like.device).unsqueeze(0)
    hidden = key > query
    return hidden | (query - key >= window) if window > 0 else hidden


def _tree_masks(tree_mask: Tensor | None, cu_q_lens: Tensor) -> list[Tensor]:
    """The [n, n] bool mask of each row."""
    if tree_mask is None:
        return []
    lens = cu_q_lens.diff().tolist()
    pieces = tree_mask[: sum(n * n for n in lens)].bool().split([n * n for n in lens])
    return [piece.view(n, n) for piece, n in zip(pieces, lens, strict=True)]


def _softmax(scores_KGNL: Tensor, sinks: Tensor | None) -> Tensor:
    if sinks is None:
        return torch.softmax(scores_KGNL, dim=-1)
    kv_heads = scores_KGNL.shape[0]
    sink = sinks.float().view(kv_heads, -1, 1, 1).expand(*scores_KGNL.shape[:-1], 1)
    return torch.softmax(torch.cat((scores_KGNL, sink), dim=-1), dim=-1)[..., :-1]


def _attend(
    q_NHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, hidden_NL: Tensor, scale: float, softcap: float, sinks: Tensor | None
) -> Tensor:
    """Attention [N, H, Dv] float32 of N queries over L keys of one row, heads grouped by their KV head."""
    num_queries, num_heads, head_dim = q_NHD.shape
    kv_heads = k_LKD.shape[1]
    q_KGND = q_NHD.float().transpose(0, 1).reshape(kv_heads, num_heads // kv_heads, num_queries, head_dim)
    scores = torch.matmul(q_KGND, k_LKD.permute(1, 2, 0).unsqueeze(1)) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    weights = _softmax(scores.masked_fill(hidden_NL, float("-inf")), sinks)
    return torch.matmul(weights, v_LKD.transpose(0, 1).unsqueeze(1)).flatten(0, 1).transpose(0, 1)


def _floats(cache: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a cache as float32; of an int8 one after rounding to `dtype`."""
    if cache.dtype is torch.int8:
        return expand_rows(cache[slots], dtype).float()
    rows = cache[slots] if cache.dtype.itemsize > 1 else cache.view(torch.uint8)[slots].view(cache.dtype)
    return rows.float()


class NoPlan:
    """The plan of an implementation that needs none."""

    def reset(self) -> None:
        """Nothing to forget."""


def paged_attention(
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
    """Causal attention over the paged cache: rows one by one, each with one batched product per piece of queries."""
    masks = _tree_masks(tree_mask, cu_q_lens)
    num_heads = q_THD.shape[1]
    out = q_THD.new_empty(q_THD.shape[0], num_heads, row_size(v_cache_SKD))
    offsets = torch.arange(page_size, device=q_THD.device)
    starts = cu_q_lens.tolist()
    for row, kv_len in enumerate(kv_lens.tolist()):
        begin, end = starts[row], starts[row + 1]
        if begin == end:
            continue
        shift = kv_len - end  # position of a query = its index in q + shift
        first_page = max(0, begin + shift - window + 1) // page_size if window > 0 else 0
        first_key = first_page * page_size
        pages = page_table_RP[row, first_page : -(-kv_len // page_size)].long()
        slots = (pages.unsqueeze(1) * page_size + offsets).flatten()[: kv_len - first_key]
        k, v = (_floats(cache, slots, q_THD.dtype) for cache in (k_cache_SKD, v_cache_SKD))
        piece = max(1, MAX_SCORES // (num_heads * len(slots)))
        for first in range(begin, end, piece):
            last = min(first + piece, end)
            keys = (last if tree_mask is None else end) + shift - first_key
            hidden = _hidden(first + shift, last - first, first_key, keys, window, q_THD)
            if tree_mask is not None:
                hidden[:, begin - end :] = ~masks[row][first - begin : last - begin]
            out[first:last] = _attend(q_THD[first:last], k[:keys], v[:keys], hidden, scale, softcap, sinks).to(
                out.dtype
            )
    return out


class Experts:
    """`PackedExperts`: expert by expert, accumulated in float32."""

    def __init__(self, experts: Sequence[tuple[PackedLinear, PackedLinear]]) -> None:
        self.pairs = experts

    @property
    def num_bytes(self) -> int:
        """Bytes of all experts."""
        return sum(gate_up.num_bytes + down.num_bytes for gate_up, down in self.pairs)

    def __call__(self, x_TM: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Weighted sum of the chosen experts' gated MLPs."""
        out = torch.zeros(x_TM.shape, dtype=torch.float32, device=x_TM.device)
        for expert in topk_ids.unique().tolist():
            token, choice = torch.where(topk_ids == expert)
            gate_up, down = self.pairs[expert]
            result = down(gate_up(x_TM[token]))
            out.index_add_(0, token, result.float() * topk_weights[token, choice].float().unsqueeze(1))
        return out.to(x_TM.dtype)


def pack_experts(
    gate_up: Sequence[Weight],
    down: Sequence[Weight],
    activation: str,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    pack: PackLinear = pack_linear,
) -> Experts:
    """Experts as pairs of linear maps, each packed by `pack`."""
    pairs = []
    for e, (up_weight, down_weight) in enumerate(zip(gate_up, down, strict=True)):
        first = pack(up_weight, None if gate_up_bias is None else gate_up_bias[e], activation=activation)
        pairs.append((first, pack(down_weight, None if down_bias is None else down_bias[e])))
    return Experts(pairs)


def _shift_right(word: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 words (torch's own is arithmetic)."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)


def _mix(word: Tensor) -> Tensor:
    word = (word ^ _shift_right(word, 30)) * _MIX_A
    word = (word ^ _shift_right(word, 27)) * _MIX_B
    return word ^ _shift_right(word, 31)


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """The uniform numbers of (seeds, positions) int64, float64 in [0, 1): the formula is in the module's docstring."""
    word = _mix(_mix(seeds + _GOLDEN) + positions * _GOLDEN)
    return _shift_right(word, 11).double() * 2.0**-53


def _kept_weights(weights: Tensor, logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Weights [R, V] float64 with 0 for tokens the filters drop.

    Tokens are ordered by descending logit, lower id first on a tie; every filter keeps a prefix of that order. top_p
    keeps a token if the mass before it is less than top_p of the mass top_k left; min_p keeps weights of at least
    min_p times the largest.
    """
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices
    ordered = weights.gather(-1, order)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    limit = torch.where(top_k > 0, top_k, logits.shape[-1]).unsqueeze(1)
    ordered = ordered.masked_fill(rank >= limit, 0.0)
    mass = ordered.cumsum(-1)
    nucleus = top_p.double().unsqueeze(1)
    beyond = (mass - ordered >= nucleus * mass[:, -1:]) & (nucleus < 1.0) & (rank > 0)
    ordered = ordered.masked_fill(beyond, 0.0)
    ordered = ordered.masked_fill(ordered < min_p.double().unsqueeze(1) * ordered[:, :1], 0.0)
    return torch.zeros_like(weights).scatter_(-1, order, ordered)


def sample(
    logits_RV: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    """One token per row; softmax and cumulative sums in float64."""
    vocab = logits_RV.shape[-1]
    ids = torch.arange(vocab, device=logits_RV.device)
    largest = logits_RV.amax(-1, keepdim=True)
    greedy = temperature < GREEDY_TEMPERATURE
    if bool(greedy.all()):
        return argmax(logits_RV)
    divisor = torch.where(greedy, 1.0, temperature).double().unsqueeze(1)
    weights = ((logits_RV.double() - largest.double()) / divisor).exp()
    filtered = ((top_k > 0) & (top_k < vocab) | (top_p < 1.0) | (min_p > 0.0)) & ~greedy
    if bool(filtered.any()):
        rows = filtered.nonzero().squeeze(1)
        weights[rows] = _kept_weights(weights[rows], logits_RV[rows], top_k[rows], top_p[rows], min_p[rows])
    mass = weights.cumsum(-1)
    target = uniform(seeds, positions).unsqueeze(1) * mass[:, -1:]
    last_kept = torch.where(weights > 0, ids, 0).amax(-1)
    drawn = torch.minimum((mass <= target).sum(-1), last_kept)
    return torch.where(greedy, argmax(logits_RV), drawn)


def apply_penalties_(
    logits: Tensor,
    history: Tensor,
    prompt_lens: Tensor,
    lens: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    """Repetition over all tokens so far, then frequency and presence over the output, in place."""
    place = torch.arange(history.shape[1], device=history.device).unsqueeze(0)
    written = place < lens.unsqueeze(1)
    tokens = torch.where(written, history, 0).long()
    seen = torch.zeros_like(logits).scatter_add_(1, tokens, written.to(logits.dtype)) > 0
    generated = (written & (place >= prompt_lens.unsqueeze(1))).to(logits.dtype)
    counts = torch.zeros_like(logits).scatter_add_(1, tokens, generated)
    factor = repetition.unsqueeze(1)
    repeated = torch.where(logits > 0, logits / factor, logits * factor)
    logits.copy_(torch.where(seen, repeated, logits))
    logits -= frequency.unsqueeze(1) * counts
    logits -= presence.unsqueeze(1) * (counts > 0)


def argmax(logits: Tensor) -> Tensor:
    """The lowest id of the largest logit of each row."""
    largest, vocab = logits.amax(-1, keepdim=True), logits.shape[-1]
    ids = torch.arange(vocab, device=logits.device)
    return torch.where(logits == largest, ids, vocab).amin(-1) % vocab  # 0 if no logit is a number


def finite(logits: Tensor) -> Tensor:
    """Whether each row holds only finite numbers: a NaN or an infinity makes the sum of 0 * x a NaN."""
    return (logits * 0.0).sum(dim=-1) == 0.0


def logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Log-softmax of each row at its token."""
    chosen = logits.gather(1, token_ids.unsqueeze(1)).squeeze(1)
    return chosen - torch.logsumexp(logits, dim=-1)


REFERENCE = OpTable(
    name="reference",
    pack_linear=pack_linear,
    pack_experts=pack_experts,
    rms_norm=rms_norm,
    add_rms_norm=add_rms_norm,
    layer_norm=layer_norm,
    rope_=rope_,
    store_kv=store_kv,
    gated_activation=gated_activation,
    paged_attention=paged_attention,
    attention_plan=NoPlan,
    causal_conv=causal_conv,
    gated_delta=gated_delta,
    state_space=state_space,
    selective_scan=selective_scan,
    sample=sample,
    argmax=argmax,
    finite=finite,
    apply_token_mask_=apply_token_mask_,
    apply_penalties_=apply_penalties_,
    logprobs=logprobs,
    step_table=partial(TorchStepTable, sample, argmax, finite),
    kv_dtypes=frozenset(("int8", "float8_e4m3fn", "float8_e5m2")),
    float8_weights=True,
)
"""The reference implementation of every op."""
