"""A compact Qwen3 decoder for training on CPU, with the mathematics and names of transformers' `Qwen3ForCausalLM`.

Shape suffixes: B sequences, T tokens, D hidden, H query heads, K key/value heads, C head dim, M supervised positions,
V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.aspen.optimizer import MAX_GAIN
from training.aspen.shape import Shape

QUERY_BLOCK = 128
MAX_BLOCKS = 8
"""Queries per block of `causal_attention`, and most blocks: a block's scores stay near the cache and about half of the
square is never computed, while long rows do not unroll into more code than the compiler digests in a minute."""


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


def causal_attention(q_BHTC: Tensor, k_BHTC: Tensor, v_BHTC: Tensor, documents_BT: Tensor) -> Tensor:
    """Causal softmax attention within each document, [B, H, T, C].

    `documents_BT` numbers the document of each token. Written out because the stock CPU kernel took half of the
    training time at these sizes (18 against 7 microseconds per token and layer at T=512). No row maximum is subtracted:
    with the norm on queries and keys a score is at most sqrt(C) * |gain_q * gain_k|, and the trainer keeps the gains
    below 3, so exp stays below e^72 and fits fp32 and bf16.
    """
    length, scale = q_BHTC.shape[2], q_BHTC.shape[3] ** -0.5
    block = max(QUERY_BLOCK, -(-length // MAX_BLOCKS))
    outputs = []
    for start in range(0, length, block):
        end = min(length, start + block)
        scores = (q_BHTC[:, :, start:end] @ k_BHTC[:, :, :end].transpose(-1, -2)).float() * scale
        causal = torch.arange(end)[None, :] <= torch.arange(start, end)[:, None]
        visible = causal & (documents_BT[:, None, start:end, None] == documents_BT[:, None, None, :end])
        weights = torch.exp(scores) * visible
        mixed = weights.to(v_BHTC.dtype) @ v_BHTC[:, :, :end]
        outputs.append((mixed.float() / weights.sum(-1, keepdim=True)).to(v_BHTC.dtype))
    return torch.cat(outputs, dim=2)


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

    def forward(self, x_BTD: Tensor, cos_TC: Tensor, sin_TC: Tensor, documents_BT: Tensor) -> Tensor:
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
        out = causal_attention(q_BHTC, k_BHTC, v_BHTC, documents_BT)
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

    def forward(self, x_BTD: Tensor, cos_TC: Tensor, sin_TC: Tensor, documents_BT: Tensor) -> Tensor:
        """Return the residual stream after this layer."""
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos_TC, sin_TC, documents_BT)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Decoder(nn.Module):
    """Embedding, layers and final norm; named `model` inside `Aspen` as in the published format."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden, shape.norm_eps)


class Aspen(nn.Module):
    """The whole model. `forward` returns hidden states; `logits` adds the tied head."""

    max_gain = MAX_GAIN
    """Largest weight of the norms on queries and keys; see `causal_attention`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Decoder(shape)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw initial weights: narrow embeddings (the head is tied), fan-in scaled matrices, zero outputs."""
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

    def forward(self, tokens_BT: Tensor, cos_TC: Tensor, sin_TC: Tensor, documents_BT: Tensor) -> Tensor:
        """Return the normalised hidden states [B, T, D]; tokens see only their own document."""
        x_BTD = self.model.embed_tokens(tokens_BT)
        for layer in self.model.layers:
            x_BTD = layer(x_BTD, cos_TC, sin_TC, documents_BT)
        return self.model.norm(x_BTD)

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Return the logits [B, T, V] in the parameters' dtype."""
        cos, sin = self.rotary(tokens_BT.shape[1], self.model.embed_tokens.weight.dtype)
        return F.linear(self(tokens_BT, cos, sin, torch.zeros_like(tokens_BT)), self.model.embed_tokens.weight)


def head_loss(hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, weights_M: Tensor) -> Tensor:
    """Weighted sum of the cross entropies (nats) at M positions."""
    logits = F.linear(hidden_MD, weight_VD).float()
    return (F.cross_entropy(logits, targets_M, reduction="none") * weights_M).sum()
