"""In llama.cpp's environment: a model folder to GGUF files; `python -m benchmarks.peers.convert_gguf FOLDER OUT`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
FILE_TYPES = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}


def gguf_name(name: str) -> str:
    """`blk.3.attn_q.weight` of `model.layers.3.self_attn.q_proj.weight`."""
    if not name.startswith("model.layers."):
        return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{LAYER_NAMES[rest.removesuffix('.weight')]}.weight"


def read_bf16(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and bit patterns of a safetensors file whose tensors are all bf16; numpy has no such type."""
    data = np.memmap(file, np.uint8, "r")
    start = 8 + int(data[:8].view("<u8")[0])
    for name, entry in json.loads(bytes(data[8:start])).items():
        if name != "__metadata__":
            assert entry["dtype"] == "BF16", (name, entry["dtype"])
            low, high = (start + offset for offset in entry["data_offsets"])
            yield name, data[low:high].view("<u2").reshape(entry["shape"])


def write_bf16(folder: Path, target: Path) -> None:
    """Matrices in bf16, norms in fp32."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(target, "qwen3")
    _add_config(writer, config)
    _add_vocabulary(writer, folder, config["vocab_size"])
    for name, bits in read_bf16(folder / "model.safetensors"):
        if bits.ndim == 1:
            writer.add_tensor(gguf_name(name), (bits.astype(np.uint32) << 16).view(np.float32))
        else:
            writer.add_tensor(gguf_name(name), bits.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_config(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)


def _add_vocabulary(writer: gguf.GGUFWriter, folder: Path, size: int) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    assert len(tokens) == size, (len(tokens), size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (size - 1))
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_eos_token_id(0)


def quantise(source: Path, target: Path, file_type: int) -> None:
    """llama.cpp's own quantiser, every matrix in the same type (`--pure`): its fastest file."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = file_type
    params.pure = True
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params):
        raise RuntimeError(f"llama.cpp could not quantise {source}")


def main(folder: Path, out: Path) -> None:
    """Write out/bf16.gguf, q8_0.gguf and q4_0.gguf."""
    out.mkdir(parents=True, exist_ok=True)
    write_bf16(folder, out / "bf16.gguf")
    for name, file_type in FILE_TYPES.items():
        quantise(out / "bf16.gguf", out / f"{name}.gguf", file_type)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
