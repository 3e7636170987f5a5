"""`--quantization int8|w8a8|int4` on plain checkpoints: what is rounded, how well, and that nothing else changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pando
from pando.core.config import ROUND_ON_LOAD
from pando.errors import ConfigError
from pando.kernels import cpu, op_table
from pando.kernels.weights import QuantizedWeight
from pando.models.load import load_model
from pando.models.size import ModelSize
from pando.quant.size import MIN_SIDE, matrix_bits
from tests.models.paged_loop import full_logits, greedy
from tests.quant.capture import Capture, as_floats, full_activations
from tests.tiny_models import FAMILIES, prompt_ids, tiny_checkpoint

IDS = prompt_ids(24)
REFERENCE = op_table("cpu", "reference")


def logits(family: str, quantization: str, capture: Capture) -> Tensor:
    ops = capture.table()
    model = load_model(tiny_checkpoint(family), dtype="float32", ops=ops, quantization=quantization)
    return full_logits(model, ops, IDS)


def spread_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).square().mean().sqrt() / expected.std())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ROUND_ON_LOAD)
def test_every_family_runs_on_the_rounded_weights(family: str, mode: str) -> None:
    """With activations as they are, the model is the one whose weights are what the rounded ones stand for."""
    rounded = Capture(full_activations)
    found = logits(family, mode, rounded)
    assert torch.allclose(found, logits(family, mode, Capture(as_floats)), atol=1e-3, rtol=1e-4)
    quantised = [weight for weight in rounded.weights if isinstance(weight, QuantizedWeight)]
    assert len(quantised) > len(rounded.weights) / 2
    for weight in rounded.weights:
        assert isinstance(weight, QuantizedWeight) or min(weight.shape) < MIN_SIDE


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "qwen3_moe"])
def test_more_bits_are_closer(family: str) -> None:
    exact = logits(family, "auto", Capture())
    errors = {mode: spread_error(logits(family, mode, Capture()), exact) for mode in ROUND_ON_LOAD}
    assert 0 < errors["int8"] <= errors["w8a8"] * 1.2
    assert errors["w8a8"] < errors["int4"]
    assert errors["int8"] < 0.15, errors


def test_schemes() -> None:
    for mode, bits, activations in (("int8", 8, 16), ("w8a8", 8, 8), ("int4", 4, 8), ("fp8", 8, 8)):
        capture = Capture()
        logits("llama", mode, capture)
        *layers, head = capture.weights
        assert all(
            isinstance(w, QuantizedWeight) and (w.bits, w.activation_bits) == (bits, activations) for w in layers
        )
        assert isinstance(head, QuantizedWeight) and head.bits == 8
        assert {w.is_float for w in capture.weights if isinstance(w, QuantizedWeight)} == {mode == "fp8"}


@pytest.mark.skipif(cpu.LOAD_ERROR is not None, reason="no compiled kernels")
def test_native_kernels_of_a_cpu_refuse_to_round_to_float8() -> None:
    with pytest.raises(ConfigError, match="no products with weights in float8 here; use --quantization int8") as caught:
        load_model(tiny_checkpoint("llama"), ops=op_table("cpu", "native"), quantization="fp8")
    assert caught.value.param == "quantization"


def test_routers_stay_as_they_are() -> None:
    capture = Capture()
    logits("qwen3_moe", "int4", capture)
    routers = [weight for weight in capture.weights if weight.shape[0] == 6]
    assert routers and all(isinstance(weight, Tensor) for weight in routers)
    experts = [weight for weight in capture.weights if tuple(weight.shape) == (96, 64)]
    assert len(experts) >= 6 and all(isinstance(weight, QuantizedWeight) for weight in experts)


def test_a_tied_embedding_stays_in_the_file() -> None:
    model = load_model(tiny_checkpoint("qwen3"), dtype="float32", ops=REFERENCE, quantization="int8")
    again = load_model(tiny_checkpoint("qwen3"), dtype="float32", ops=REFERENCE)
    assert torch.equal(model.embed.weight, again.embed.weight)
    assert model.head.linear.packed.num_bytes < model.embed.weight.nbytes / 3


def test_random_weights_are_rounded_too(tmp_path: Path) -> None:
    shutil.copy(tiny_checkpoint("llama") / "config.json", tmp_path / "config.json")
    plain, rounded = (
        load_model(tmp_path, dtype="bfloat16", ops=REFERENCE, load_format="dummy", quantization=mode)
        for mode in ("auto", "int8")
    )
    assert not torch.equal(full_logits(plain, REFERENCE, IDS), full_logits(rounded, REFERENCE, IDS))
    assert rounded.layers[0].mlp.down.packed.num_bytes == 64 * 96 + 64 * 4  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe", "gemma3"])
@pytest.mark.parametrize("mode", ROUND_ON_LOAD)
def test_planned_bytes_are_those_of_the_packed_weights(family: str, mode: str) -> None:
    """Values in their bits, scales and offsets in 16; what one scale per output takes is not planned for."""
    capture = Capture()
    logits(family, mode, capture)
    bits = matrix_bits(mode, {})
    assert bits is not None
    size = ModelSize.of_config(json.loads((tiny_checkpoint(family) / "config.json").read_text()))
    kept = sum(w.numel() * 4 for w in capture.weights if isinstance(w, Tensor))
    quantised = [w for w in capture.weights if isinstance(w, QuantizedWeight)]
    packed = sum(w.values.numel() * w.bits // 8 + w.scale.numel() * (2 if w.offset is None else 4) for w in quantised)
    beside = size.num_parameters - sum(w.shape.numel() for w in capture.weights)
    beside += capture.weights[-1].shape.numel() if size.spec.tied else 0
    assert size.weight_bytes("float32", bits) == pytest.approx(packed + kept + beside * 4, rel=0.08)


@pytest.mark.parametrize("mode", ROUND_ON_LOAD)
def test_the_engine_generates_what_the_reference_does(mode: str) -> None:
    folder = tiny_checkpoint("qwen3")
    model = load_model(folder, dtype="float32", ops=REFERENCE, quantization=mode)
    prompts = [prompt_ids(9, seed=1), prompt_ids(17, seed=2)]
    rows = greedy(model, REFERENCE, prompts, 8, chunk=32, page_size=1)
    options = {"dtype": "float32", "kernels": "reference", "max_total_tokens": 512, "num_threads": 1}
    with pando.Engine(model_path=str(folder), quantization=mode, **options) as engine:
        found = engine.generate(input_ids=prompts, sampling_params={"temperature": 0, "max_new_tokens": 8})
    assert [row.tokens[row.prompt_len :] for row in rows] == [out["output_ids"] for out in found]
