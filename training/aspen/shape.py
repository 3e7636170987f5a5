"""The shapes in which aspen and willow can be trained, and their Hugging Face configuration."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one Qwen3-style decoder (tied embeddings, qk-norm, grouped-query attention, SwiGLU)."""

    family: ClassVar[str] = "aspen"
    """Name of the shipped model of this architecture."""
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


LINEAR, FULL = "linear_attention", "full_attention"


@dataclass(frozen=True, slots=True)
class HybridShape:
    """Sizes of one Qwen3.5-style decoder: gated delta net, with gated full attention in every fourth layer."""

    family: ClassVar[str] = "willow"
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    delta_key_heads: int
    delta_value_heads: int
    delta_key_dim: int
    delta_value_dim: int
    head_dim: int = 64
    rotary_dim: int = 32
    conv_width: int = 4
    vocab: int = 8192
    rope_theta: float = 1e5**0.5
    """With half of the head rotated, the square root keeps the faster half of aspen's frequencies (base 100,000)."""
    norm_eps: float = 1e-6
    max_position_embeddings: int = 16384

    def kinds(self) -> list[str]:
        """The kind of every layer, in the words of the published format."""
        return [FULL if index % 4 == 3 else LINEAR for index in range(self.layers)]

    def key_width(self) -> int:
        """Width of the delta net's keys, and of its queries."""
        return self.delta_key_heads * self.delta_key_dim

    def value_width(self) -> int:
        """Width of the delta net's values."""
        return self.delta_value_heads * self.delta_value_dim

    def num_parameters(self) -> int:
        """Number of distinct parameters (the tied embedding counts once)."""
        attention = self.hidden * self.head_dim * (3 * self.heads + 2 * self.kv_heads) + 2 * self.head_dim
        mixed = 2 * self.key_width() + self.value_width()
        delta = self.hidden * (mixed + 2 * self.value_width() + 2 * self.delta_value_heads)
        delta += self.conv_width * mixed + 2 * self.delta_value_heads + self.delta_value_dim
        num_full = self.kinds().count(FULL)
        mixers = num_full * attention + (self.layers - num_full) * delta
        others = self.layers * (3 * self.hidden * self.ffn + 2 * self.hidden)
        return self.vocab * self.hidden + mixers + others + self.hidden

    def hf_config(self, end_of_turn: int, end_of_text: int) -> dict[str, object]:
        """The `config.json` of a transformers `Qwen3_5ForCausalLM` of this shape; the two arguments are token ids."""
        return {
            "architectures": ["Qwen3_5ForCausalLM"],
            "model_type": "qwen3_5_text",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "attn_output_gate": True,
            "bos_token_id": None,
            "eos_token_id": end_of_turn,
            "pad_token_id": end_of_text,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.ffn,
            "full_attention_interval": 4,
            "layer_types": self.kinds(),
            "linear_conv_kernel_dim": self.conv_width,
            "linear_key_head_dim": self.delta_key_dim,
            "linear_num_key_heads": self.delta_key_heads,
            "linear_num_value_heads": self.delta_value_heads,
            "linear_value_head_dim": self.delta_value_dim,
            "max_position_embeddings": self.max_position_embeddings,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "partial_rotary_factor": self.rotary_dim / self.head_dim,
            "rms_norm_eps": self.norm_eps,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": self.rope_theta,
                "partial_rotary_factor": self.rotary_dim / self.head_dim,
            },
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": self.vocab,
        }


SHAPES: dict[str, Shape | HybridShape] = {
    "3m": Shape(hidden=192, layers=6, heads=3, kv_heads=1, ffn=512),
    "4m": Shape(hidden=192, layers=7, heads=4, kv_heads=2, ffn=512),
    "8m": Shape(hidden=256, layers=8, heads=4, kv_heads=2, ffn=768),
    "28m": Shape(hidden=512, layers=8, heads=8, kv_heads=4, ffn=1408),
    "willow": HybridShape(
        hidden=192,
        layers=8,
        heads=4,
        kv_heads=2,
        ffn=512,
        delta_key_heads=2,
        delta_value_heads=4,
        delta_key_dim=64,
        delta_value_dim=48,
    ),
}
