"""The shapes in which aspen can be trained, and their Hugging Face configuration."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one Qwen3-style decoder (tied embeddings, qk-norm, grouped-query attention, SwiGLU)."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    head_dim: int = 64
    vocab: int = 8192
    rope_theta: float = 1e5
    norm_eps: float = 1e-6
    max_position_embeddings: int = 16384

    def num_parameters(self) -> int:
        """Number of distinct parameters (the tied embedding counts once)."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads) + 2 * self.head_dim
        layer = attention + 3 * self.hidden * self.ffn + 2 * self.hidden
        return self.vocab * self.hidden + self.layers * layer + self.hidden

    def hf_config(self, end_of_turn: int, end_of_text: int) -> dict[str, object]:
        """The `config.json` of a transformers `Qwen3ForCausalLM` of this shape; the two arguments are token ids."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": None,
            "eos_token_id": end_of_turn,
            "pad_token_id": end_of_text,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.ffn,
            "layer_types": ["full_attention"] * self.layers,
            "max_position_embeddings": self.max_position_embeddings,
            "max_window_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": self.norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "rope_theta": self.rope_theta,
            "rope_scaling": None,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": self.vocab,
        }


SHAPES: dict[str, Shape] = {
    "3m": Shape(hidden=192, layers=6, heads=3, kv_heads=1, ffn=512),
    "4m": Shape(hidden=192, layers=7, heads=4, kv_heads=2, ffn=512),
    "8m": Shape(hidden=256, layers=8, heads=4, kv_heads=2, ffn=768),
    "28m": Shape(hidden=512, layers=8, heads=8, kv_heads=4, ffn=1408),
}
