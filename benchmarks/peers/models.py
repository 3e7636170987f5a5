"""Makes the test models: exact shapes, seeded random weights, in the format of every engine. Kept between runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.peers.workload import Shape

STD = 0.02
TEXT = ["The quick brown fox jumps over the lazy dog.", "A request, a batch, a page, a prefix; a token at a time."]
CONTEXT = 40960


def make_model(shape: Shape, folder: Path) -> Path:
    """The model as a Hugging Face folder (bf16 safetensors, config, tokenizer); nothing is done if it is there."""
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        _write_tokenizer(shape, folder)
        save_file(dict(_weights(shape)), folder / "model.safetensors", metadata={"format": "pt"})
        _write_json(folder / "generation_config.json", {"do_sample": False, "eos_token_id": 0})
        _write_json(folder / "config.json", _config(shape))  # last: it says that the folder is complete
    return folder


def make_w8a8(source: Path, folder: Path) -> Path:
    """The model in `source` with 8-bit weights (a scale per row) and dynamic 8-bit activations.

    The format is compressed-tensors' `int-quantized`. Embedding and head stay as they are.
    """
    if not (folder / "config.json").exists():
        from safetensors.torch import load_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in load_file(source / "model.safetensors").items():
            if "_proj." not in name:
                tensors[name] = tensor
                continue
            scale = tensor.float().abs().amax(1, keepdim=True) / 127
            tensors[name] = (tensor.float() / scale).round().to(torch.int8)
            tensors[name + "_scale"] = scale.bfloat16()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        for file in source.glob("*.json"):
            if file.name != "config.json":
                shutil.copy(file, folder)
        config = json.loads((source / "config.json").read_text())
        _write_json(folder / "config.json", {**config, "quantization_config": _w8a8_config()})
    return folder


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def _w8a8_config() -> dict[str, object]:
    common = {"num_bits": 8, "type": "int", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**common, "strategy": "channel", "dynamic": False},
                "input_activations": {**common, "strategy": "token", "dynamic": True},
            }
        },
    }


def _weights(shape: Shape) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.empty(size).normal_(0.0, STD, generator=generator).bfloat16()

    def ones(size: int) -> torch.Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", normal(shape.vocab, shape.hidden)
    yield "model.norm.weight", ones(shape.hidden)
    for layer in range(shape.layers):
        at = f"model.layers.{layer}."
        yield at + "input_layernorm.weight", ones(shape.hidden)
        yield at + "post_attention_layernorm.weight", ones(shape.hidden)
        yield at + "self_attn.q_norm.weight", ones(shape.head_dim)
        yield at + "self_attn.k_norm.weight", ones(shape.head_dim)
        yield at + "self_attn.q_proj.weight", normal(query, shape.hidden)
        yield at + "self_attn.k_proj.weight", normal(key, shape.hidden)
        yield at + "self_attn.v_proj.weight", normal(key, shape.hidden)
        yield at + "self_attn.o_proj.weight", normal(shape.hidden, query)
        yield at + "mlp.gate_proj.weight", normal(shape.ffn, shape.hidden)
        yield at + "mlp.up_proj.weight", normal(shape.ffn, shape.hidden)
        yield at + "mlp.down_proj.weight", normal(shape.hidden, shape.ffn)


def _write_tokenizer(shape: Shape, folder: Path) -> None:
    """Byte-level BPE with a few merges, filled up to the vocabulary with entries that no text gives."""
    small = Tokenizer(models.BPE())
    small.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=280, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    small.train_from_iterator(TEXT, trainer)
    state = json.loads(small.to_str())
    vocabulary = state["model"]["vocab"]
    for token in range(len(vocabulary), shape.vocab):
        vocabulary[f"<fill{token}>"] = token
    merges = [tuple(pair) for pair in state["model"]["merges"]]
    full = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    full.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    full.decoder = decoders.ByteLevel()
    full.add_special_tokens(["<|end|>"])
    full.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "model_max_length": CONTEXT},
    )


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=1))
