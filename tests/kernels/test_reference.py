"""The reference ops against independent oracles: torch's SDPA, plain Python, published formulas."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from pando.errors import ConfigError
from pando.kernels import reference
from pando.kernels.reference import REFERENCE, rounded_to_int8
from pando.kernels.weights import QuantizedWeight, concatenate
from tests.kernels.cases import ATTENTION_CASES, AttentionCase, AttentionInputs, attention_inputs, sample_inputs


def gathered(inputs: AttentionInputs, row: int, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [L, K, D] of a row in order of position, token by token."""
    table, _, kv_lens = inputs.ragged
    slots = [int(table[row, j // page_size]) * page_size + j % page_size for j in range(int(kv_lens[row]))]
    return inputs.k_cache[slots], inputs.v_cache[slots]


def visible(queries: int, keys: int, window: int) -> torch.Tensor:
    """[N, L] mask by the definition in `pando.kernels.ops`."""
    i = torch.arange(keys - queries, keys).unsqueeze(1)
    j = torch.arange(keys).unsqueeze(0)
    return (j <= i) & ((i - j < window) if window else torch.tensor(True))


@pytest.mark.parametrize("case", [case for case in ATTENTION_CASES if not case.softcap], ids=AttentionCase.id)
def test_attention_equals_sdpa_with_an_explicit_mask(case: AttentionCase) -> None:
    inputs = attention_inputs(case)
    out = inputs.run(REFERENCE)
    sinks, scale = inputs.options["sinks"], case.head_dim**-0.5
    begin = 0
    for row, (queries, keys) in enumerate(case.rows):
        if queries == 0:
            continue
        k, v = gathered(inputs, row, case.page_size)
        q = inputs.q[begin : begin + queries].transpose(0, 1)
        group = case.heads // case.kv_heads
        k, v = (x.repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))
        bias = torch.zeros(case.heads, queries, keys).masked_fill(~visible(queries, keys, case.window), -math.inf)
        if isinstance(sinks, torch.Tensor):
            # A sink is a key of zeros with a bias of its own and no value.
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            bias = torch.cat((bias, sinks.view(-1, 1, 1).expand(-1, queries, 1)), dim=-1)
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).transpose(0, 1)
        torch.testing.assert_close(out[begin : begin + queries], expected, rtol=1e-5, atol=2e-6)
        begin += queries
    assert out.shape == (begin, case.heads, case.v_dim or case.head_dim)


def test_attention_softcap_and_sink_by_hand() -> None:
    case = AttentionCase(rows=((2, 3),), heads=1, kv_heads=1, head_dim=8, softcap=0.5, sinks=True, page_size=1)
    inputs = attention_inputs(case)
    k, v = gathered(inputs, 0, 1)
    sink = inputs.options["sinks"]
    assert isinstance(sink, torch.Tensor)
    for index, position in enumerate((1, 2)):
        scores = [0.5 * math.tanh(float(inputs.q[index, 0] @ k[j, 0]) * 8**-0.5 / 0.5) for j in range(position + 1)]
        weights = [math.exp(score) for score in scores]
        total = sum(weights) + math.exp(float(sink[0]))
        expected = sum(w / total * v[j, 0] for j, w in enumerate(weights))
        torch.testing.assert_close(inputs.run(REFERENCE)[index, 0], expected, rtol=1e-5, atol=1e-6)


def test_attention_in_pieces_equals_attention_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = attention_inputs(AttentionCase(rows=((9, 30), (1, 4)), window=7))
    whole = inputs.run(REFERENCE)
    monkeypatch.setattr(reference, "MAX_SCORES", 4 * 30 * 2)
    torch.testing.assert_close(inputs.run(REFERENCE), whole, rtol=1e-5, atol=1e-6)


def test_rms_norm_equals_torch() -> None:
    x, weight = torch.randn(3, 5, 24), torch.randn(24)
    torch.testing.assert_close(REFERENCE.rms_norm(x, weight, 1e-6), F.rms_norm(x, (24,), weight, 1e-6))


def test_add_rms_norm_updates_the_residual_stream() -> None:
    x, residual, weight = torch.randn(4, 24), torch.randn(4, 24), torch.randn(24)
    summed = x + residual
    out = REFERENCE.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, summed)
    torch.testing.assert_close(out, F.rms_norm(summed, (24,), weight, 1e-5))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_turns_pairs_like_complex_numbers(interleaved: bool) -> None:
    rotary, dim = 8, 12
    angles = torch.randn(10, rotary // 2)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    q, k, positions = torch.randn(3, 2, dim), torch.randn(3, 1, dim), torch.tensor([9, 0, 4])
    q_before, k_before = q.clone(), k.clone()
    REFERENCE.rope_(q, k, positions, cos_sin, interleaved)
    for before, after in ((q_before, q), (k_before, k)):
        assert torch.equal(before[..., rotary:], after[..., rotary:])
        for i in range(rotary // 2):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + rotary // 2)
            turned = (
                torch.complex(before[..., a], before[..., b])
                * torch.polar(torch.ones(3), angles[positions, i])[:, None]
            )
            torch.testing.assert_close(torch.complex(after[..., a], after[..., b]), turned)


def test_store_kv_writes_only_its_slots() -> None:
    k_cache, v_cache = torch.zeros(9, 2, 4), torch.zeros(9, 2, 3)
    k, v, where = torch.randn(3, 2, 4), torch.randn(3, 2, 3), torch.tensor([7, 0, 3])
    REFERENCE.store_kv(k, v, k_cache, v_cache, where)
    assert torch.equal(k_cache[where], k) and torch.equal(v_cache[where], v)
    assert int((k_cache.abs().sum((1, 2)) > 0).sum()) == 3


def test_gated_activation_formulas() -> None:
    gate, up = torch.linspace(-9, 9, 40), torch.linspace(9, -8, 40)
    both = torch.stack((torch.cat((gate, up)), torch.cat((up, gate))))
    expected = {
        "silu": lambda g, u: g / (1 + math.exp(-g)) * u,
        "gelu": lambda g, u: g * 0.5 * math.erfc(-g / math.sqrt(2)) * u,
        "gelu_tanh": lambda g, u: 0.5 * g * (1 + math.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) * u,
        "relu2": lambda g, u: max(g, 0.0) ** 2 * u,
        "swiglu_oai": lambda g, u: min(g, 7) / (1 + math.exp(-1.702 * min(g, 7))) * (min(max(u, -7), 7) + 1),
    }
    assert set(expected) == set(reference.ACTIVATIONS)
    for kind, formula in expected.items():
        wanted = torch.tensor([formula(float(g), float(u)) for g, u in zip(gate, up, strict=True)])
        torch.testing.assert_close(REFERENCE.gated_activation(both, kind)[0], wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="'swish'.*silu"):
        REFERENCE.gated_activation(both, "swish")


def quantized(
    bits: int, group_size: int, with_offset: bool, activation_bits: int, n: int = 6, k: int = 20
) -> QuantizedWeight:
    """A random quantised weight."""
    groups = -(-k // group_size)
    values = torch.randint(-127, 128, (n, k)).to(torch.int8) if bits == 8 else torch.randint(0, 16, (n, k)).byte()
    offset = torch.randn(n, groups) if with_offset else None
    return QuantizedWeight(values, torch.rand(n, groups), offset, bits, group_size, activation_bits)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [20, 8])
@pytest.mark.parametrize("with_offset", [False, True])
def test_a_quantized_linear_is_the_formula(bits: int, group_size: int, with_offset: bool) -> None:
    weight, x, bias = quantized(bits, group_size, with_offset, 16), torch.randn(3, 20), torch.randn(6)
    expected = bias.repeat(3, 1)
    for n in range(6):
        for k in range(20):
            g = k // group_size
            shift = weight.offset[n, g] if weight.offset is not None else 0.0
            expected[:, n] += x[:, k] * (weight.scale[n, g] * weight.values[n, k] + shift)
    torch.testing.assert_close(REFERENCE.pack_linear(weight, bias)(x), expected, rtol=1e-4, atol=1e-3)


def test_activations_are_rounded_per_token_and_group() -> None:
    x = torch.tensor([[127.0, -63.5, 0.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0, -5.0]])
    expected = torch.tensor([[127.0, -64.0, 0.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0, -5.0]])
    torch.testing.assert_close(rounded_to_int8(x, 5), expected)
    expected[0, 3] = round(127 / 2) / 127 * 2.0
    torch.testing.assert_close(rounded_to_int8(x, 3), expected)
    weight = quantized(8, 3, False, 8, k=5)
    rounded = REFERENCE.pack_linear(replace(weight, activation_bits=16))(rounded_to_int8(x, 3))
    torch.testing.assert_close(REFERENCE.pack_linear(weight)(x), rounded)


def test_a_linear_may_end_in_an_activation_and_another_dtype() -> None:
    x, weight, bias = torch.randn(2, 3, 8).bfloat16(), torch.randn(10, 8).bfloat16(), torch.randn(10).bfloat16()
    plain = REFERENCE.pack_linear(weight, bias)
    gate, up = plain(x).float().chunk(2, -1)
    gated = REFERENCE.pack_linear(weight, bias, activation="silu")(x)
    assert gated.shape == (2, 3, 5) and gated.dtype is torch.bfloat16
    torch.testing.assert_close(gated.float(), F.silu(gate) * up, rtol=2e-2, atol=2e-2)
    assert REFERENCE.pack_linear(weight, out_dtype=torch.float32)(x).dtype is torch.float32
    assert plain.num_bytes == 160 and REFERENCE.pack_linear(quantized(8, 5, True, 16)).num_bytes == 120 + 2 * 4 * 24


def test_fused_projections_keep_their_own_scales() -> None:
    parts = [quantized(4, 8, True, 16), quantized(4, 8, False, 16)]
    whole = concatenate(parts)
    assert isinstance(whole, QuantizedWeight) and whole.shape == (12, 20)
    torch.testing.assert_close(whole.dequantize(), torch.cat([part.dequantize() for part in parts]))
    torch.testing.assert_close(whole.rows(slice(6, 12)).dequantize(), parts[1].dequantize())
    with pytest.raises(ValueError, match="quantised differently"):
        concatenate([parts[0], quantized(8, 8, False, 16)])


def test_experts_equal_a_loop_over_tokens() -> None:
    x, gate_up, down = torch.randn(5, 6), torch.randn(4, 16, 6), torch.randn(4, 6, 8)
    gate_up_bias, down_bias = torch.randn(4, 16), torch.randn(4, 6)
    ids, weights = torch.tensor([[0, 2], [2, 3], [3, 0], [2, 0], [0, 3]]), torch.rand(5, 2)
    experts = REFERENCE.pack_experts(list(gate_up), list(down), "silu", gate_up_bias, down_bias)
    out = experts(x, ids, weights)
    for token in range(5):
        expected = torch.zeros(6)
        for choice in range(2):
            expert = int(ids[token, choice])
            gate, up = (gate_up[expert] @ x[token] + gate_up_bias[expert]).chunk(2)
            expected += weights[token, choice] * (down[expert] @ (F.silu(gate) * up) + down_bias[expert])
        torch.testing.assert_close(out[token], expected, rtol=1e-4, atol=1e-5)


def plain_uniform(seed: int, position: int) -> float:
    """The formula of the module's docstring in plain Python."""
    word = (1 << 64) - 1

    def mix(z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & word
        z = (z ^ z >> 27) * 0x94D049BB133111EB & word
        return z ^ z >> 31

    first = mix(seed + 0x9E3779B97F4A7C15 & word)
    return (mix(first + position * 0x9E3779B97F4A7C15 & word) >> 11) * 2.0**-53


def test_uniform_numbers_follow_the_published_formula() -> None:
    pairs = [(0, 0), (0, 1), (1, 0), (-1, 5), (2**63 - 1, 2**40), (-(2**63), 3), (123456789, 987)]
    seeds, positions = (torch.tensor(column) for column in zip(*pairs, strict=True))
    assert reference.uniform(seeds, positions).tolist() == [plain_uniform(*pair) for pair in pairs]


def test_uniform_numbers_are_uniform_and_uncorrelated_along_either_argument() -> None:
    n = 20000
    zeros, counter = torch.zeros(n, dtype=torch.int64), torch.arange(n)
    for numbers in (reference.uniform(counter, zeros), reference.uniform(zeros, counter)):
        counts = torch.histc(numbers.float(), bins=100, min=0, max=1)
        assert float(((counts - n / 100) ** 2 / (n / 100)).sum()) < 149  # chi squared, 99 degrees: p > 0.001
        neighbours = torch.corrcoef(torch.stack((numbers[1:], numbers[:-1])))[0, 1]
        assert abs(float(neighbours)) < 4 / math.sqrt(n)


def plain_kept(logits: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    """Tokens left by the filters, one after the other, each on the renormalised distribution."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    weights = {token: math.exp(logits[token] - max(logits)) for token in order}
    if top_k > 0:
        order = order[:top_k]
    if top_p < 1:
        mass, total, kept = 0.0, sum(weights[token] for token in order), []
        for token in order:
            kept.append(token)
            mass += weights[token]
            if mass >= top_p * total:
                break
        order = kept
    return {token for token in order if weights[token] >= min_p * weights[order[0]]}


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(0, 0.5, 0.0), (3, 1.0, 0.0), (1, 1.0, 0.0), (0, 1.0, 0.2), (5, 0.7, 0.3), (0, 0.001, 0.0), (99, 0.95, 0.01)],
)
def test_filters_keep_what_the_definition_keeps(top_k: int, top_p: float, min_p: float) -> None:
    torch.manual_seed(top_k)
    logits = (torch.randn(12) * 2).round(decimals=1)
    logits[4] = logits[7] = logits[9]
    draws = sample_inputs(logits.repeat(4000, 1), top_k=top_k, top_p=top_p, min_p=min_p).run()
    kept = plain_kept(logits.tolist(), top_k, top_p, min_p)
    assert set(draws.tolist()) <= kept
    likely = {token for token in kept if float((logits[token] - logits.max()).exp()) > 0.02}
    assert likely <= set(draws.tolist())


def test_ties_are_kept_from_the_lowest_id() -> None:
    draws = sample_inputs(torch.zeros(2000, 10), top_p=0.25).run()
    assert set(draws.tolist()) == {0, 1, 2}
    assert set(sample_inputs(torch.zeros(2000, 10), top_k=4).run().tolist()) == {0, 1, 2, 3}


def test_greedy_takes_the_lowest_id_of_a_tie() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0]])
    assert sample_inputs(logits, temperature=0.0).run().tolist() == [1]


def test_masked_tokens_are_never_drawn() -> None:
    logits = torch.full((3000, 50), -math.inf)
    logits[:, [3, 40]] = 0.0
    assert set(sample_inputs(logits, temperature=2.0).run().tolist()) == {3, 40}


def test_penalties_equal_plain_python() -> None:
    torch.manual_seed(0)
    rows, vocab, width = 4, 11, 9
    logits, history = torch.randn(rows, vocab), torch.randint(0, vocab, (rows, width), dtype=torch.int32)
    prompt_lens, lens = torch.tensor([2, 0, 5, 3]).int(), torch.tensor([9, 6, 5, 0]).int()
    repetition, frequency = torch.tensor([1.5, 0.7, 2.0, 1.3]), torch.tensor([0.5, -0.3, 1.0, 2.0])
    presence = torch.tensor([0.25, 1.0, -1.0, 2.0])
    expected = logits.clone()
    for row in range(rows):
        tokens = history[row, : lens[row]].tolist()
        for token in set(tokens):
            x = expected[row, token]
            expected[row, token] = x / repetition[row] if x > 0 else x * repetition[row]
        for token, count in Counter(tokens[prompt_lens[row] :]).items():
            expected[row, token] -= frequency[row] * count + presence[row]
    REFERENCE.apply_penalties_(logits, history, prompt_lens, lens, repetition, frequency, presence)
    torch.testing.assert_close(logits, expected)


def test_argmax_is_the_lowest_id_of_the_largest() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [-math.inf, -2.0, -math.inf], [0.0, 0.0, 0.0], [math.nan] * 3])
    assert REFERENCE.argmax(logits).tolist() == [1, 1, 0, 0]
    assert REFERENCE.finite(logits).tolist() == [True, False, True, False]
    assert not REFERENCE.finite(torch.tensor([[math.inf, -math.inf, 1.0]]))[0]


def test_a_token_mask_hides_what_it_does_not_name() -> None:
    logits = torch.arange(70.0).repeat(2, 1)
    words = torch.zeros(2, 3, dtype=torch.int32)
    words[0, 0], words[0, 2], words[1, 0] = 5, 1, -(2**31)
    REFERENCE.apply_token_mask_(logits, words)
    kept = [[v for v in range(70) if logits[row, v] > -math.inf] for row in range(2)]
    assert kept == [[0, 2, 64], [31]] and logits[0, 64] == 64.0


def test_logprobs_equal_log_softmax() -> None:
    logits, tokens = torch.randn(3, 40) * 10, torch.tensor([0, 39, 7])
    expected = F.log_softmax(logits, dim=-1)[torch.arange(3), tokens]
    torch.testing.assert_close(REFERENCE.logprobs(logits, tokens), expected)
