"""A compact hybrid decoder for training on CPU, with the mathematics and names of transformers' `Qwen3_5ForCausalLM`.

Three of four layers mix tokens by the gated delta rule (Yang et al. 2024, "Gated Delta Networks"), every fourth by
attention with an output gate. Norms inside the stream multiply by 1 + weight. Shape suffixes as in `model`, and
G delta key heads, H heads or delta value heads, K delta key dim, V delta value dim.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.aspen.delta_rule import gated_delta_rule, short_convolution
from training.aspen.model import FeedForward, RMSNorm, causal_attention, rotate
from training.aspen.shape import FULL, HybridShape

L2_EPS = 1e-6
HALF_LIVES = (4.0, 16.0, 64.0, 512.0)
"""Tokens after which an untrained delta head has forgotten half, in turn over the heads."""


class OffsetNorm(nn.Module):
    """Root-mean-square norm times 1 + weight, in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised tensor in the dtype of `x`."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * (1 + self.weight.float())).to(x.dtype)


class GatedAttention(nn.Module):
    """Causal grouped-query attention, partly rotated, whose output is gated by the sigmoid of a projection."""

    def __init__(self, shape: HybridShape) -> None:
        super().__init__()
        self.shape = shape
        width = shape.heads * shape.head_dim
        kv_width = shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, 2 * width, bias=False)  # of each head: its query, then its gate
        self.k_proj = nn.Linear(shape.hidden, kv_width, bias=False)
        self.v_proj = nn.Linear(shape.hidden, kv_width, bias=False)
        self.o_proj = nn.Linear(width, shape.hidden, bias=False)
        self.q_norm = OffsetNorm(shape.head_dim, shape.norm_eps)
        self.k_norm = OffsetNorm(shape.head_dim, shape.norm_eps)

    def rotated(self, x_BTHC: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        """[B, H, T, C] with the first `rotary_dim` dimensions rotated by their position."""
        turned, kept = x_BTHC.transpose(1, 2).split(
            (self.shape.rotary_dim, self.shape.head_dim - self.shape.rotary_dim), dim=-1
        )
        return torch.cat((rotate(turned, cos_TR, sin_TR), kept), dim=-1)

    def forward(self, x_BTD: Tensor, cos_TR: Tensor, sin_TR: Tensor, documents_BT: Tensor) -> Tensor:
        """Return the attention output [B, T, D]."""
        batch, length, _ = x_BTD.shape
        head_dim, heads, kv_heads = self.shape.head_dim, self.shape.heads, self.shape.kv_heads
        projected = F.linear(x_BTD, torch.cat((self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)))
        queries, keys, values = projected.split(
            (2 * heads * head_dim, kv_heads * head_dim, kv_heads * head_dim), dim=-1
        )
        q_BTHC, gate_BTHC = queries.view(batch, length, heads, 2 * head_dim).chunk(2, dim=-1)
        q_BHTC = self.rotated(self.q_norm(q_BTHC), cos_TR, sin_TR)
        k_BKTC = self.rotated(self.k_norm(keys.view(batch, length, kv_heads, head_dim)), cos_TR, sin_TR)
        k_BHTC = k_BKTC.repeat_interleave(heads // kv_heads, dim=1)
        v_BKTC = values.view(batch, length, kv_heads, head_dim).transpose(1, 2)
        out = causal_attention(q_BHTC, k_BHTC, v_BKTC.repeat_interleave(heads // kv_heads, dim=1), documents_BT)
        gated = out.transpose(1, 2) * torch.sigmoid(gate_BTHC)
        return self.o_proj(gated.reshape(batch, length, -1))


class DeltaNet(nn.Module):
    """The gated delta rule behind a short causal convolution, with a gated norm on its output."""

    def __init__(self, shape: HybridShape) -> None:
        super().__init__()
        self.shape = shape
        mixed = 2 * shape.key_width() + shape.value_width()
        self.in_proj_qkv = nn.Linear(shape.hidden, mixed, bias=False)
        self.in_proj_z = nn.Linear(shape.hidden, shape.value_width(), bias=False)
        self.in_proj_b = nn.Linear(shape.hidden, shape.delta_value_heads, bias=False)
        self.in_proj_a = nn.Linear(shape.hidden, shape.delta_value_heads, bias=False)
        self.conv1d = nn.Conv1d(mixed, mixed, shape.conv_width, groups=mixed, bias=False)
        self.dt_bias = nn.Parameter(torch.zeros(shape.delta_value_heads))
        self.A_log = nn.Parameter(torch.zeros(shape.delta_value_heads))
        self.norm = RMSNorm(shape.delta_value_dim, shape.norm_eps)
        self.out_proj = nn.Linear(shape.value_width(), shape.hidden, bias=False)

    def forward(self, x_BTD: Tensor, documents_BT: Tensor) -> Tensor:
        """Return the mixer's output [B, T, D]."""
        shape, (batch, length, _) = self.shape, x_BTD.shape
        key_width, value_width, heads = shape.key_width(), shape.value_width(), shape.delta_value_heads
        weights = (self.in_proj_qkv.weight, self.in_proj_z.weight, self.in_proj_b.weight, self.in_proj_a.weight)
        qkv, z, b, a = F.linear(x_BTD, torch.cat(weights)).split(
            (2 * key_width + value_width, value_width, heads, heads), dim=-1
        )
        starts = documents_BT != F.pad(documents_BT, (1, 0), value=-1)[:, :length]
        mixed = short_convolution(qkv.float(), self.conv1d.weight[:, 0].float().T, starts)
        q, k, v = mixed.split((key_width, key_width, value_width), dim=-1)
        q_BTGK, k_BTGK = (x.view(batch, length, -1, shape.delta_key_dim) for x in (q, k))
        q_BTGK = q_BTGK * torch.rsqrt(q_BTGK.square().sum(-1, keepdim=True) + L2_EPS) * shape.delta_key_dim**-0.5
        k_BTGK = k_BTGK * torch.rsqrt(k_BTGK.square().sum(-1, keepdim=True) + L2_EPS)
        g_BTH = -self.A_log.float().exp() * F.softplus(a.float() + self.dt_bias.float())
        v_BTHV = v.reshape(batch, length, heads, shape.delta_value_dim)
        out_BTHV, _ = gated_delta_rule(q_BTGK, k_BTGK, v_BTHV, g_BTH, b.float().sigmoid(), starts)
        gated = self.norm(out_BTHV) * F.silu(z.float().view(out_BTHV.shape))
        return self.out_proj(gated.to(x_BTD.dtype).reshape(batch, length, -1))


class DeltaLayer(nn.Module):
    """One pre-norm decoder layer with a delta net."""

    def __init__(self, shape: HybridShape) -> None:
        super().__init__()
        self.linear_attn = DeltaNet(shape)
        self.mlp = FeedForward(shape)
        self.input_layernorm = OffsetNorm(shape.hidden, shape.norm_eps)
        self.post_attention_layernorm = OffsetNorm(shape.hidden, shape.norm_eps)

    def forward(self, x_BTD: Tensor, cos_TR: Tensor, sin_TR: Tensor, documents_BT: Tensor) -> Tensor:
        """Return the residual stream after this layer; the rotary tables are not used."""
        x_BTD = x_BTD + self.linear_attn(self.input_layernorm(x_BTD), documents_BT)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class AttentionLayer(nn.Module):
    """One pre-norm decoder layer with attention."""

    def __init__(self, shape: HybridShape) -> None:
        super().__init__()
        self.self_attn = GatedAttention(shape)
        self.mlp = FeedForward(shape)
        self.input_layernorm = OffsetNorm(shape.hidden, shape.norm_eps)
        self.post_attention_layernorm = OffsetNorm(shape.hidden, shape.norm_eps)

    def forward(self, x_BTD: Tensor, cos_TR: Tensor, sin_TR: Tensor, documents_BT: Tensor) -> Tensor:
        """Return the residual stream after this layer."""
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos_TR, sin_TR, documents_BT)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class HybridDecoder(nn.Module):
    """Embedding, layers and final norm; named `model` inside `Willow` as in the published format."""

    def __init__(self, shape: HybridShape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(
            AttentionLayer(shape) if kind == FULL else DeltaLayer(shape) for kind in shape.kinds()
        )
        self.norm = OffsetNorm(shape.hidden, shape.norm_eps)


class Willow(nn.Module):
    """The whole model, with the interface of `Aspen`: `forward` returns hidden states, `logits` adds the tied head."""

    max_gain = 2.0
    """Largest weight of the norms on queries and keys: 1 + weight is the gain; see `model.causal_attention`."""

    def __init__(self, shape: HybridShape) -> None:
        super().__init__()
        self.shape = shape
        self.model = HybridDecoder(shape)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw initial weights: as `Aspen`'s; convolutions pass on the current token; delta heads forget unequally."""
        nn.init.normal_(self.model.embed_tokens.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
                nn.init.zeros_(parameter)
            elif name.endswith("conv1d.weight"):
                nn.init.normal_(parameter, std=0.1)
                parameter.data[..., -1] += 1
            elif name.endswith("dt_bias"):
                # softplus(dt_bias) = ln 2 / half-life with A = 1
                rates = torch.tensor([HALF_LIVES[head % len(HALF_LIVES)] for head in range(len(parameter))])
                parameter.data.copy_(torch.log(torch.expm1(torch.log(torch.tensor(2.0)) / rates)))
            elif parameter.ndim == 2 and "layers" in name:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)

    def rotary(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, rotary_dim] for positions 0..length-1."""
        size = self.shape.rotary_dim
        inverse = self.shape.rope_theta ** (-torch.arange(0, size, 2).float() / size)
        angles = torch.outer(torch.arange(length).float(), inverse)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def forward(self, tokens_BT: Tensor, cos_TR: Tensor, sin_TR: Tensor, documents_BT: Tensor) -> Tensor:
        """Return the normalised hidden states [B, T, D]; tokens see only their own document."""
        x_BTD = self.model.embed_tokens(tokens_BT)
        for layer in self.model.layers:
            x_BTD = layer(x_BTD, cos_TR, sin_TR, documents_BT)
        return self.model.norm(x_BTD)

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Return the logits [B, T, V] in the parameters' dtype."""
        cos, sin = self.rotary(tokens_BT.shape[1], self.model.embed_tokens.weight.dtype)
        return F.linear(self(tokens_BT, cos, sin, torch.zeros_like(tokens_BT)), self.model.embed_tokens.weight)
