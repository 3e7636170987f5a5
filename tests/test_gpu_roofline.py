"""What `benchmarks/gpu.py` holds figures against, by hand: every element of the four shapes counted apart."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from benchmarks.gpu_shapes import SHAPES, Roofline, cache_bytes, config_of, weight_bytes
from pando.models.size import ModelSize

COPY, PRODUCTS = 4.3e12, 790e12
ROOF = Roofline(COPY, PRODUCTS)


@dataclass(frozen=True)
class ByHand:
    """Elements and operations, from the shapes' numbers alone.

    dense: what every token is multiplied with, head included; expert: of one; experts, chosen: of a layer, and of a
    token; mixtures: layers with experts. key: operations per key that a token sees, over all layers. kv, state: bytes.
    mixing: operations of a token in recurrent layers.
    """

    dense: int
    kv: int
    key: int
    expert: int = 0
    experts: int = 0
    chosen: int = 0
    mixtures: int = 0
    state: int = 0
    mixing: int = 0

    def weights(self, rows: int) -> float:
        """Bytes of weights that a step of so many tokens is expected to read."""
        seen = self.experts * (1 - (1 - self.chosen / self.experts) ** rows) if self.experts else 0
        return 2 * (self.dense + self.mixtures * seen * self.expert)

    def flops(self, context: int) -> int:
        """Of one token."""
        return 2 * (self.dense + self.mixtures * self.chosen * self.expert) + self.key * context + self.mixing


LLAMA = ByHand(
    # q and o, k and v, gate, up and down
    dense=32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 128256 * 4096,
    kv=32 * 2 * 8 * 128 * 2,
    key=32 * 32 * 128 * 4,
)
SMALL = ByHand(
    dense=28 * (2 * 1024 * 2048 + 2 * 1024 * 1024 + 3 * 1024 * 3072) + 151936 * 1024,
    kv=28 * 2 * 8 * 128 * 2,
    key=28 * 16 * 128 * 4,
)
MIXTURE = ByHand(
    dense=48 * (2 * 2048 * 4096 + 2 * 2048 * 512 + 2048 * 128) + 151936 * 2048,
    kv=48 * 2 * 4 * 128 * 2,
    key=48 * 32 * 128 * 4,
    expert=3 * 2048 * 768,
    experts=128,
    chosen=8,
    mixtures=48,
)
HYBRID = ByHand(
    dense=6 * (2048 * 2 * 4096 + 2 * 2048 * 512 + 4096 * 2048)  # attention: q with its gate, k and v, o
    + 18 * (2048 * (2 * 2048 + 2 * 4096) + 2048 * 64 + 4096 * 2048)  # q, k, v and z; a and b; out
    + 24 * (2048 * 512 + 3 * 2048 * 512 + 2048)  # router, shared expert, its gate
    + 151936 * 2048,
    kv=6 * 2 * 2 * 256 * 2,
    key=6 * 16 * 256 * 4,
    expert=3 * 2048 * 512,
    experts=512,
    chosen=10,
    mixtures=24,
    state=18 * (8192 * 3 * 2 + 32 * 128 * 128 * 4),  # three inputs of the convolution, float32 states
    mixing=18 * (8192 * 4 * 2 + 32 * 128 * 128 * 7),  # decay, read by k, write, read by q
)
SHAPES_BY_HAND = {"llama-8b": LLAMA, "qwen3-0.6b": SMALL, "qwen3-30b-a3b": MIXTURE, "qwen3-next-half": HYBRID}


def size_of(name: str) -> ModelSize:
    return ModelSize.of_config(config_of(name, tiny=False))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("rows", [1, 16, 64, 256])
def test_bytes_of_weights(name: str, rows: int) -> None:
    assert weight_bytes(size_of(name), "bfloat16", rows) == pytest.approx(SHAPES_BY_HAND[name].weights(rows), rel=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_bytes_of_a_rows_cache(name: str) -> None:
    hand = SHAPES_BY_HAND[name]
    assert cache_bytes(size_of(name), "bfloat16", 1000) == 1000 * hand.kv + 2 * hand.state


@pytest.mark.parametrize("name", SHAPES)
def test_operations_of_a_token(name: str) -> None:
    hand, size = SHAPES_BY_HAND[name], size_of(name)
    assert size.decode_flops(577) == pytest.approx(hand.flops(577), rel=2e-3)
    prompt = 8192 * (hand.flops(0) - 2 * head(name)) + 2 * head(name) + hand.key * 8192 * 8193 // 2
    assert size.prefill_flops(8192) == pytest.approx(prompt, rel=0.03 if hand.mixing else 2e-3)


def head(name: str) -> int:
    config = SHAPES[name]
    return int(str(config["vocab_size"])) * int(str(config["hidden_size"]))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("rows", [1, 64, 256])
def test_seconds_of_a_step(name: str, rows: int) -> None:
    hand = SHAPES_BY_HAND[name]
    by_bytes = (hand.weights(rows) + rows * (hand.kv * 576 + 2 * hand.state)) / COPY
    by_flops = rows * hand.flops(576) / PRODUCTS
    found = ROOF.decode_seconds(size_of(name), "bfloat16", rows, 576)
    assert found == pytest.approx(max(by_bytes, by_flops), rel=1e-3)


def test_a_shared_prefix_is_read_once() -> None:
    own, shared = 80, 8192
    by_bytes = (LLAMA.weights(64) + LLAMA.kv * (shared + 64 * own)) / COPY
    assert ROOF.decode_seconds(size_of("llama-8b"), "bfloat16", 64, shared + own, shared) == pytest.approx(by_bytes)
    apart = ROOF.decode_seconds(size_of("llama-8b"), "bfloat16", 64, shared + own)
    assert apart == pytest.approx((LLAMA.weights(64) + LLAMA.kv * 64 * (shared + own)) / COPY)
    assert apart / by_bytes > 4, "what can be gained at most"


def test_known_figures() -> None:
    """As anyone would say them: 15 GB of weights in 3.5 ms, 8K tokens in 0.17 s."""
    llama = size_of("llama-8b")
    assert weight_bytes(llama, "bfloat16", 1) == 15_009_316_864
    assert ROOF.decode_seconds(llama, "bfloat16", 1, 1) * 1e3 == pytest.approx(3.4906, abs=1e-3)
    assert ROOF.prefill_seconds(llama, "bfloat16", 8192) == pytest.approx(0.167, abs=0.001)
    assert ROOF.decode_seconds(llama, "bfloat16", 1024, 1) == pytest.approx(1024 * 2 * 7.5047e9 / PRODUCTS, rel=1e-3)
    moe = size_of("qwen3-30b-a3b")
    assert ROOF.decode_seconds(moe, "bfloat16", 1, 1) * 1e3 == pytest.approx(1.415, abs=2e-3)
    assert weight_bytes(moe, "bfloat16", 100_000) == pytest.approx(
        2 * (moe.num_parameters - head("qwen3-30b-a3b")), rel=1e-3
    )


def test_sizes_of_the_shapes() -> None:
    sizes = {name: size_of(name).num_parameters / 1e9 for name in SHAPES}
    assert sizes["llama-8b"] == pytest.approx(8.03, abs=0.01)
    assert sizes["qwen3-0.6b"] == pytest.approx(0.596, abs=0.001)
    assert sizes["qwen3-30b-a3b"] == pytest.approx(30.5, abs=0.1)
    assert 38 < sizes["qwen3-next-half"] < 42
