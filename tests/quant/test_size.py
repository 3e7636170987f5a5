"""Bits a quantised matrix takes, from options and configs alone."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from pando.core.config import Config
from pando.doctor import plan_lines
from pando.models.size import ModelSize
from pando.quant.size import MatrixBits, matrix_bits
from tests.models.test_size import QWEN3_06B


@pytest.mark.parametrize(
    ("quantization", "config", "expected"),
    [
        ("auto", {}, None),
        ("int8", {}, MatrixBits(8, 8)),
        ("w8a8", {}, MatrixBits(8, 8)),
        ("int4", {}, MatrixBits(4.5, 8)),
        ("auto", {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}, MatrixBits(4.25, 16)),
        ("gptq", {"quantization_config": {"quant_method": "gptq", "bits": 8, "group_size": -1}}, MatrixBits(8, 16)),
        ("auto", {"text_config": {"quantization_config": {"quant_method": "awq"}}}, MatrixBits(4, 16)),
        (
            "auto",
            {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "config_groups": {"a": {"weights": {"num_bits": 4, "group_size": 32}}},
                }
            },
            MatrixBits(5, 16),
        ),
    ],
)
def test_bits(quantization: str, config: dict[str, Any], expected: MatrixBits | None) -> None:
    assert matrix_bits(quantization, config) == expected


def test_a_published_model_shrinks() -> None:
    size = ModelSize.of_config(QWEN3_06B)
    linear, head, norms = 440_401_920, 155_582_464, 65_536
    assert linear + head + norms == size.num_parameters
    assert size.weight_bytes("bfloat16", MatrixBits(8, 8)) == linear + head + 2 * (head + norms)
    assert size.weight_bytes("bfloat16", MatrixBits(4.5, 8)) == linear * 9 // 16 + head + 2 * (head + norms)
    untied = ModelSize.of_config({**QWEN3_06B, "tie_word_embeddings": False})
    assert untied.weight_bytes("bfloat16", MatrixBits(8, 8)) == size.weight_bytes("bfloat16", MatrixBits(8, 8))


def test_the_plan_counts_with_them() -> None:
    plain, eight, four = (plan_lines(Config(quantization=mode))[1] for mode in ("auto", "int8", "int4"))
    assert plain.endswith("8.9 MiB") and eight.endswith("7.5 MiB") and four.endswith("6.2 MiB")


def test_counting_needs_no_torch() -> None:
    code = "import sys, pando.quant.size; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
