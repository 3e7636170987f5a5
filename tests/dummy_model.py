"""A model folder without weights: a config for `load_format="dummy"`, and a tokenizer with a chat template."""

from __future__ import annotations

import json
from pathlib import Path

from pando.core.config import Config
from tests.tiny_tokenizers import write_folder

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 64,
    "vocab_size": 1024,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}


def dummy_config(folder: Path) -> Config:
    """Options of an engine that starts in a moment and talks nonsense."""
    write_folder(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return Config(
        model_path=str(folder), load_format="dummy", num_threads=1, max_total_tokens=4096, chunked_prefill_size=256
    )
