"""In OpenVINO's environment: a model folder to IR; `python -m benchmarks.peers.convert_openvino FOLDER OUT`."""

from __future__ import annotations

import sys
from pathlib import Path

import openvino
import torch
from openvino_tokenizers import convert_tokenizer
from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
from transformers import AutoTokenizer

WEIGHTS = {
    "bf16": None,
    "int8": OVWeightQuantizationConfig(bits=8, sym=True),
    "int4": OVWeightQuantizationConfig(bits=4, sym=True, group_size=128, ratio=1.0),
}


def main(folder: Path, out: Path) -> None:
    """Write out/bf16, out/int8 and out/int4, each with model, tokenizer and detokenizer."""
    tokenizer, detokenizer = convert_tokenizer(AutoTokenizer.from_pretrained(folder), with_detokenizer=True)
    for name, config in WEIGHTS.items():
        model = OVModelForCausalLM.from_pretrained(
            folder,
            export=True,
            compile=False,
            load_in_8bit=False,
            quantization_config=config,
            torch_dtype=torch.bfloat16,
        )
        model.save_pretrained(out / name)
        openvino.save_model(tokenizer, out / name / "openvino_tokenizer.xml")
        openvino.save_model(detokenizer, out / name / "openvino_detokenizer.xml")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
