"""AWQ, GPTQ and compressed-tensors: tiny checkpoints of known weights, against the plain model of the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import pando
from pando.errors import ConfigError
from pando.kernels import cpu, op_table
from pando.kernels.reference import REFERENCE
from pando.kernels.weights import QuantizedWeight
from pando.models.load import load_model
from tests.models.paged_loop import full_logits, greedy
from tests.quant.capture import Capture, full_activations
from tests.quant.checkpoints import (
    Codes,
    Writer,
    awq,
    float_quantized,
    gptq,
    gptq_v2,
    int_quantized,
    pack_quantized,
    quantise,
    write,
)
from tests.tiny_models import prompt_ids

IDS = prompt_ids(20)


def float8(weight: Tensor, *, whole: bool = False) -> Codes:
    """Codes that are values of float8 e4m3, with a scale per output, or one of all."""
    most = weight.float().abs().amax() if whole else weight.float().abs().amax(1, keepdim=True)
    scale = (most / 448).expand(len(weight), 1).contiguous()
    code = (weight.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    return Codes(code, scale, torch.zeros_like(scale), torch.zeros(weight.shape[1], dtype=torch.int64), 8)


@dataclass(frozen=True)
class Case:
    """A format: its writer, `quantization_config`, and how codes are made."""

    name: str
    writer: Writer
    settings: dict[str, Any]
    make: Callable[[Tensor], Codes]
    bits: int = 4
    activations: int = 8


def compressed(
    form: str, bits: int, strategy: str, group: int | None = None, acts: bool = False, kind: str = "int"
) -> dict[str, Any]:
    inputs = {"num_bits": 8, "type": kind, "symmetric": True, "dynamic": True, "strategy": "token"} if acts else None
    weights = {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy, "group_size": group}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}


AWQ = {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4}
PACKED, INTS, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
WORDS = {"dtype": torch.int32}
CASES = (
    Case("awq-g32", awq, {**AWQ, "group_size": 32}, partial(quantise, bits=4, group_size=32, symmetric=False)),
    Case("awq-row", awq, {**AWQ, "group_size": -1}, partial(quantise, bits=4, group_size=-1, symmetric=False)),
    Case("gptq-g32", gptq, {**GPTQ, "group_size": 32}, partial(quantise, bits=4, group_size=32, symmetric=True)),
    Case("gptq-asym", gptq, {**GPTQ, "group_size": 16}, partial(quantise, bits=4, group_size=16, symmetric=False)),
    Case(
        "gptq-v2",
        gptq_v2,
        {**GPTQ, "group_size": 32, "checkpoint_format": "gptq_v2"},
        partial(quantise, bits=4, group_size=32, symmetric=False),
    ),
    Case(
        "gptq-act-order",
        gptq,
        {**GPTQ, "group_size": 32, "desc_act": True},
        partial(quantise, bits=4, group_size=32, symmetric=False, shuffled=True),
    ),
    Case(
        "gptq-8",
        gptq,
        {**GPTQ, "bits": 8, "group_size": 32},
        partial(quantise, bits=8, group_size=32, symmetric=False),
        8,
        16,
    ),
    Case(
        "gptq-8-sym",
        gptq,
        {**GPTQ, "bits": 8, "group_size": -1},
        partial(quantise, bits=8, group_size=-1, symmetric=True),
        8,
        16,
    ),
    Case(
        "packed-g32",
        pack_quantized,
        compressed(PACKED, 4, "group", 32),
        partial(quantise, bits=4, group_size=32, symmetric=True),
    ),
    Case(
        "packed-channel",
        pack_quantized,
        compressed(PACKED, 4, "channel"),
        partial(quantise, bits=4, group_size=-1, symmetric=True),
    ),
    Case(
        "packed-asym",
        pack_quantized,
        compressed(PACKED, 4, "group", 16),
        partial(quantise, bits=4, group_size=16, symmetric=False),
    ),
    Case(
        "packed-order",
        pack_quantized,
        compressed(PACKED, 4, "group", 32),
        partial(quantise, bits=4, group_size=32, symmetric=True, shuffled=True),
    ),
    Case(
        "packed-8",
        pack_quantized,
        compressed(PACKED, 8, "channel"),
        partial(quantise, bits=8, group_size=-1, symmetric=True),
        8,
        16,
    ),
    Case(
        "w8a8",
        int_quantized,
        compressed(INTS, 8, "channel", acts=True),
        partial(quantise, bits=8, group_size=-1, symmetric=True),
        8,
        8,
    ),
    Case(
        "naive",
        int_quantized,
        compressed("naive-quantized", 8, "channel"),
        partial(quantise, bits=8, group_size=-1, symmetric=True),
        8,
        16,
    ),
    Case("fp8", float_quantized, compressed(FLOAT, 8, "channel", acts=True, kind="float"), float8, 8, 8),
    Case(
        "fp8-tensor",
        partial(float_quantized, whole=True),
        compressed(FLOAT, 8, "tensor", kind="float"),
        partial(float8, whole=True),
        8,
        16,
    ),
)


def logits(folder: Path, capture: Capture) -> Tensor:
    ops = capture.table()
    return full_logits(load_model(folder, dtype="float32", ops=ops), ops, IDS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_model_is_the_plain_one_of_the_same_weights(case: Case, family: str, tmp_path: Path) -> None:
    quantised, plain = write(tmp_path, family, case.writer, case.settings, case.make)
    expected = logits(plain, Capture())
    capture = Capture(full_activations)
    assert torch.allclose(logits(quantised, capture), expected, atol=1e-4, rtol=1e-4)
    found = [weight for weight in capture.weights if isinstance(weight, QuantizedWeight)]
    assert {(weight.bits, weight.activation_bits) for weight in found} == {(case.bits, case.activations)}
    # Rounding activations to int8 moves each by at most half of 1/127 of its group's largest, 0.3 % of a product's
    # spread; three layers of it stay below 5 % of the logits'. The median over tokens, because a router that is nearly
    # undecided may send a token elsewhere.
    error = (logits(quantised, Capture()) - expected).square().mean(-1).sqrt() / expected.std()
    assert error.median() < 0.05


def test_symmetric_eight_bits_have_no_offset(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "gptq-8-sym")
    capture = Capture()
    logits(write(tmp_path, "llama", case.writer, case.settings, case.make)[0], capture)
    assert all(weight.offset is None for weight in capture.weights if isinstance(weight, QuantizedWeight))


@pytest.mark.skipif(cpu.LOAD_ERROR is not None, reason="no compiled kernels")
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_float8_becomes_bfloat16_on_a_cpu(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pando.kernels.cpu_linear._widens", set())
    case = next(case for case in CASES if case.name == "fp8")
    quantised, plain = write(tmp_path, family, case.writer, case.settings, case.make)
    ops = op_table("cpu", "native")
    with caplog.at_level("WARNING", "pando.kernels"):
        found = full_logits(load_model(quantised, dtype="float32", ops=ops), ops, IDS)
    expected = logits(plain, Capture())
    assert (found - expected).square().mean(-1).sqrt().median() / expected.std() < 0.03
    assert [record.message for record in caplog.records if "float8" in record.message] == [
        "weights in float8 become bfloat16 on a CPU, twice the memory: --quantization int8 keeps 8 bits"
    ]


def test_a_quantised_head_and_other_layers_left_plain(tmp_path: Path) -> None:
    case = CASES[0]
    quantised, plain = write(tmp_path, "llama", case.writer, case.settings, case.make, keep="layers.1.mlp")
    capture = Capture(full_activations)
    assert torch.allclose(logits(quantised, capture), logits(plain, Capture()), atol=1e-4, rtol=1e-4)
    assert isinstance(capture.weights[-1], QuantizedWeight)
    assert sum(isinstance(weight, Tensor) for weight in capture.weights) == 2


def test_one_plain_part_of_a_fused_projection(tmp_path: Path) -> None:
    case = CASES[0]
    quantised, plain = write(tmp_path, "llama", case.writer, case.settings, case.make, keep="no module")
    tensors = load_file(quantised / "model.safetensors")
    exact = load_file(plain / "model.safetensors")
    for layer in range(3):
        for part in ("self_attn.k_proj", "mlp.up_proj"):
            module = f"model.layers.{layer}.{part}"
            for suffix in (".qweight", ".qzeros", ".scales"):
                del tensors[module + suffix]
            tensors[module + ".weight"] = exact[module + ".weight"]
    save_file(tensors, quantised / "model.safetensors")
    found = logits(quantised, Capture(full_activations))
    assert torch.allclose(found, logits(plain, Capture()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["awq-g32", "gptq-act-order", "w8a8"])
def test_the_engine_generates_what_the_reference_does(name: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == name)
    folder, _ = write(tmp_path, "llama", case.writer, case.settings, case.make)
    model = load_model(folder, dtype="float32", ops=REFERENCE)
    prompts = [prompt_ids(9, seed=1), prompt_ids(17, seed=2)]
    rows = greedy(model, REFERENCE, prompts, 8, chunk=32, page_size=1)
    method = case.settings["quant_method"]
    options = {"dtype": "float32", "kernels": "reference", "max_total_tokens": 512, "num_threads": 1}
    with pando.Engine(model_path=str(folder), quantization=method, **options) as engine:
        found = engine.generate(input_ids=prompts, sampling_params={"temperature": 0, "max_new_tokens": 8})
    assert [row.tokens[row.prompt_len :] for row in rows] == [out["output_ids"] for out in found]


def with_settings(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "quantization_config": {**config["quantization_config"], **changes}}))
    return folder


def scheme(**weights: Any) -> dict[str, Any]:
    settings = compressed(PACKED, 4, "group", 32)
    settings["config_groups"]["group_0"]["weights"].update(weights)
    return settings


STATIC = compressed(INTS, 8, "channel", acts=True)
STATIC["config_groups"]["group_0"]["input_activations"]["dynamic"] = False
FLOATS = compressed(INTS, 8, "channel", acts=True)
FLOATS["config_groups"]["group_0"]["input_activations"]["type"] = "float"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "fp8"}, r"'fp8' are not supported \(awq, compressed-tensors, gptq are\)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes'"),
        ({"quant_method": "mxfp4"}, "'mxfp4'"),
        ({**AWQ, "version": "gemv"}, "AWQ with version 'gemv' can not be read"),
        ({**AWQ, "bits": 3}, "AWQ with bits 3"),
        ({**GPTQ, "bits": 3}, r"GPTQ with bits 3 can not be read \(4, 8 can\)"),
        ({**GPTQ, "bits": 2}, "GPTQ with bits 2"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "GPTQ with checkpoint_format 'marlin'"),
        ({**GPTQ, "is_marlin_format": True}, "GPTQ with is_marlin_format True"),
        ({**GPTQ, "group_size": "many"}, "group_size is 'many'; expected an integer"),
        (compressed("marlin-24", 4, "group", 32), "compressed-tensors with format 'marlin-24'"),
        (compressed("float-quantized", 8, "channel"), "int weights as float-quantized"),
        (scheme(type="float", num_bits=8), "float weights with strategy 'group'"),
        (scheme(type="float", num_bits=8, strategy="channel"), "float weights as pack-quantized"),
        (scheme(type="float", num_bits=4), "float weights of 4 bits"),
        (scheme(num_bits=2), "int weights of 2 bits"),
        (scheme(strategy="block"), "strategy 'block'"),
        (STATIC, "static activation scales"),
        (FLOATS, "float activations of 8 bits"),
        ({**scheme(), "sparsity_config": {"format": "sparse-24-bitmask"}}, r"sparse weights \(sparse-24-bitmask\)"),
        ({**scheme(), "config_groups": {}}, "without config_groups"),
    ],
)
def test_what_can_not_be_read_is_named_with_a_remedy(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    case = CASES[0]
    folder, _ = write(tmp_path, "llama", case.writer, settings, case.make)
    with pytest.raises(ConfigError, match=message) as caught:
        load_model(folder, dtype="float32", ops=REFERENCE)
    assert str(folder / "config.json") in caught.value.message
    assert "--quantization int8, w8a8 or int4" in caught.value.message


@pytest.mark.parametrize("quantization", ["int8", "w8a8", "int4"])
def test_quantised_weights_are_not_rounded_again(quantization: str, tmp_path: Path) -> None:
    folder, _ = write(tmp_path, "llama", CASES[0].writer, CASES[0].settings, CASES[0].make)
    with pytest.raises(ConfigError, match=r"already quantised \(awq\).*leave it out"):
        load_model(folder, dtype="float32", ops=REFERENCE, quantization=quantization)


def test_a_named_format_is_checked(tmp_path: Path) -> None:
    quantised, plain = write(tmp_path, "llama", CASES[0].writer, CASES[0].settings, CASES[0].make)
    load_model(quantised, dtype="float32", ops=REFERENCE, quantization="awq")
    with pytest.raises(ConfigError, match="--quantization gptq.*but the weights are awq; leave it out"):
        load_model(quantised, dtype="float32", ops=REFERENCE, quantization="gptq")
    with pytest.raises(ConfigError, match="the weights are plain; leave it out, or use int8, w8a8 or int4"):
        load_model(plain, dtype="float32", ops=REFERENCE, quantization="gptq")


def damaged(folder: Path, name: str, tensor: Tensor | None) -> Path:
    tensors = load_file(folder / "model.safetensors")
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")
    return folder


DOWN = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("case", "name", "tensor", "message"),
    [
        (
            "awq-g32",
            ".qweight",
            torch.zeros(96, 4, **WORDS),
            r"shape \[96, 4\], \[96, 8\] expected",
        ),
        ("awq-g32", ".scales", None, r"down_proj\.scales is missing"),
        ("awq-g32", ".scales", torch.zeros(5, 64), r"qzeros has shape \[3, 8\], \[5, 8\] expected"),
        (
            "gptq-g32",
            ".qweight",
            torch.zeros(9, 64, **WORDS),
            r"\[12, 64\] \(4 bits\) or \[24, 64\]",
        ),
        ("gptq-g32", ".g_idx", torch.zeros(96, **WORDS), "does not divide 96 inputs into groups of 32"),
        ("packed-g32", ".weight_scale", torch.zeros(64, 4), "scales of 4 groups; 96 inputs in groups of 32"),
        ("packed-g32", ".weight_packed", torch.zeros(64, 1, **WORDS), r"\[64, 12\] expected"),
        ("w8a8", ".weight", torch.zeros(64, 96), "holds torch.float32 for 8 bits; int8 expected"),
    ],
)
def test_damage_is_named(case: str, name: str, tensor: Tensor | None, message: str, tmp_path: Path) -> None:
    given = next(entry for entry in CASES if entry.name == case)
    folder, _ = write(tmp_path, "llama", given.writer, given.settings, given.make)
    with pytest.raises(ConfigError, match=message) as caught:
        load_model(damaged(folder, DOWN + name, tensor), dtype="float32", ops=REFERENCE)
    assert DOWN in caught.value.message


def test_dummy_weights_do_not_pretend_to_be_quantised(tmp_path: Path) -> None:
    folder, _ = write(tmp_path, "llama", CASES[0].writer, CASES[0].settings, CASES[0].make)
    with pytest.raises(ConfigError, match="load_format dummy makes plain weights up"):
        load_model(folder, dtype="float32", ops=REFERENCE, load_format="dummy")
