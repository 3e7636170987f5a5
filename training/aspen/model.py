"""A compact Qwen3 decoder for training on CPU: the same mathematics and parameter names as transformers' `Qwen3ForCausalLM`.

Shape suffixes: B sequences, T tokens, D hidden, H query heads, K key/value heads, C head dim, M supervised positions, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.aspen.shape import Shape

IGNORED_TARGET = -100
HEAD_CHUNK = 1024
"""Positions per block of the language-model head: a block's fp32 logits (32 MB) should stay near the cache."""


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in fp32 as the reference model does."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised tensor in the dtype of `x`."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight.float()).to(x.dtype)


def rotate(x: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """Rotary position embedding of `x` [B, heads, T, C] (half-split layout)."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos_TC + torch.cat((-second, first), dim=-1) * sin_TC).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with a norm on queries and keys."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        width = shape.heads * shape.head_dim
        kv_width = shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, width, bias=False)
        self.k_proj = nn.Linear(shape.hidden, kv_width, bias=False)
        self.v_proj = nn.Linear(shape.hidden, kv_width, bias=False)
        self.o_proj = nn.Linear(width, shape.hidden, bias=False)
        self.q_norm = RMSNorm(shape.head_dim, shape.norm_eps)
        self.k_norm = RMSNorm(shape.head_dim, shape.norm_eps)

    def forward(self, x_BTD: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
        """Return the attention output [B, T, D]."""
        batch, length, _ = x_BTD.shape
        head_dim = self.shape.head_dim
        weight = torch.cat((self.q_proj.weight, self.k_proj.weight, self.v_proj.weight))
        heads = F.linear(x_BTD, weight).view(batch, length, -1, head_dim)
        q, k, v = heads.split((self.shape.heads, self.shape.kv_heads, self.shape.kv_heads), dim=2)
        q_BHTC = rotate(self.q_norm(q).transpose(1, 2), cos_TC, sin_TC)
        k_BKTC = rotate(self.k_norm(k).transpose(1, 2), cos_TC, sin_TC)
        groups = self.shape.heads // self.shape.kv_heads
        k_BHTC = k_BKTC.repeat_interleave(groups, dim=1)
        v_BHTC = v.transpose(1, 2).repeat_interleave(groups, dim=1)
        out = F.scaled_dot_product_attention(q_BHTC, k_BHTC, v_BHTC, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.down_proj = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the block's output [B, T, D]."""
        gate, up = F.linear(x_BTD, torch.cat((self.gate_proj.weight, self.up_proj.weight))).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Layer(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = FeedForward(shape)
        self.input_layernorm = RMSNorm(shape.hidden, shape.norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.hidden, shape.norm_eps)

    def forward(self, x_BTD: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
        """Return the residual stream after this layer."""
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos_TC, sin_TC)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Decoder(nn.Module):
    """Embedding, layers and final norm; named `model` inside `Aspen` as in the published format."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden, shape.norm_eps)


class Aspen(nn.Module):
    """The whole model. `forward` returns hidden states; `loss` adds the tied head at supervised positions only."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Decoder(shape)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw initial weights: narrow embeddings (the head is tied), fan-in scaled matrices, zero output projections."""
        nn.init.normal_(self.model.embed_tokens.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2 and "layers" in name:
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    nn.init.zeros_(parameter)
                else:
                    nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)

    def rotary(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, C] for positions 0..length-1."""
        head_dim = self.shape.head_dim
        inverse = self.shape.rope_theta ** (-torch.arange(0, head_dim, 2).float() / head_dim)
        angles = torch.outer(torch.arange(length).float(), inverse)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def forward(self, tokens_BT: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
        """Return the normalised hidden states [B, T, D]."""
        x_BTD = self.model.embed_tokens(tokens_BT)
        for layer in self.model.layers:
            x_BTD = layer(x_BTD, cos_TC, sin_TC)
        return self.model.norm(x_BTD)

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Return the logits [B, T, V] in the parameters' dtype."""
        cos, sin = self.rotary(tokens_BT.shape[1], self.model.embed_tokens.weight.dtype)
        return F.linear(self(tokens_BT, cos, sin), self.model.embed_tokens.weight)


def head_loss(hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, weights_M: Tensor) -> Tensor:
    """Weighted sum of the cross entropies (nats) at M positions."""
    logits = F.linear(hidden_MD, weight_VD).float()
    return (F.cross_entropy(logits, targets_M, reduction="none") * weights_M).sum()
