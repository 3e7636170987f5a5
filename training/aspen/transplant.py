"""Willow's warm start: a trained aspen's embeddings, feed-forward blocks, norms and two of its attentions.

    python -m training.aspen.transplant --work DIR --donor CHECKPOINT      # writes DIR/checkpoint.pt
    python -m training.aspen.train --work DIR --shape willow --align-to CHECKPOINT --minutes 8 --decay-minutes 3
    python -m training.aspen.train --work DIR --shape willow --resume final --peak 0.5 --minutes 60 ...

The attention kept is that of aspen's layers 4 and 6: with every other layer limited to a window of 32 tokens, the
held-out loss rises from 0.08 to 0.14 only (to 0.40 when 3 and 6 are kept). Aspen's layer 3, the least needed
(0.18 without it), gives way so that they come to stand at willow's layers 3 and 7. Layers without a donor start as
the identity, and so does every delta net, until it is aligned: trained alone to give what the replaced attention
gives for the same input.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from training.aspen.hybrid import AttentionLayer, DeltaLayer, DeltaNet, OffsetNorm, Willow
from training.aspen.model import Aspen, Attention, Layer
from training.aspen.optimizer import Optimizer
from training.aspen.paths import default_work
from training.aspen.shape import SHAPES, HybridShape, Shape

DONORS: tuple[int | None, ...] = (0, 1, 2, 4, 5, None, None, 6)
"""Aspen's layer behind each of willow's."""


def rotated_first(shape: HybridShape) -> Tensor:
    """Order of aspen's head dimensions in which those that stay rotated come first.

    Aspen rotates dimension i with i + C/2 at frequency base^(-2i/C). Willow rotates the first R dimensions, i with
    i + R/2: the R/2 fastest pairs. The slow rest turns by less than 0.004 a token and is left unrotated.
    """
    half, kept = shape.head_dim // 2, shape.rotary_dim // 2
    fast, slow = torch.arange(kept), torch.arange(kept, half)
    return torch.cat((fast, fast + half, slow, slow + half))


def transplant_attention(donor: Attention, target: AttentionLayer, shape: HybridShape) -> None:
    """Copy an attention; the gate starts closed to one half, which doubled outputs make up for."""
    order, mixer = rotated_first(shape), target.self_attn
    queries = donor.q_proj.weight.view(shape.heads, shape.head_dim, -1)[:, order]
    mixer.q_proj.weight.copy_(torch.cat((queries, torch.zeros_like(queries)), dim=1).flatten(0, 1))
    mixer.k_proj.weight.copy_(donor.k_proj.weight.view(shape.kv_heads, shape.head_dim, -1)[:, order].flatten(0, 1))
    mixer.v_proj.weight.copy_(donor.v_proj.weight)
    mixer.o_proj.weight.copy_(2 * donor.o_proj.weight)
    mixer.q_norm.weight.copy_(donor.q_norm.weight[order] - 1)
    mixer.k_norm.weight.copy_(donor.k_norm.weight[order] - 1)


def transplant_delta(donor: Attention, target: DeltaNet, shape: HybridShape) -> None:
    """Start a delta net from the keys and values of an attention, and from the mean query of each group.

    Heads are taken in turn and cut to the delta net's sizes. Only a direction to start from: the output stays zero.
    """
    hidden = shape.hidden
    groups = donor.shape.heads // donor.shape.kv_heads
    queries = donor.q_proj.weight.view(donor.shape.kv_heads, groups, -1, hidden).mean(1)
    keys = donor.k_proj.weight.view(donor.shape.kv_heads, -1, hidden)
    values = donor.v_proj.weight.view(donor.shape.kv_heads, -1, hidden).repeat_interleave(groups, dim=0)
    parts = (
        queries[: shape.delta_key_heads, : shape.delta_key_dim],
        keys[: shape.delta_key_heads, : shape.delta_key_dim],
        values[: shape.delta_value_heads, : shape.delta_value_dim],
    )
    target.in_proj_qkv.weight.copy_(torch.cat([part.flatten(0, 1) for part in parts]))


def copy_norm(donor: nn.Module, target: OffsetNorm) -> None:
    """Copy a norm whose weight is its gain into one whose gain is 1 + weight."""
    assert isinstance(donor.weight, Tensor)
    target.weight.copy_(donor.weight - 1)


@torch.no_grad()
def transplant(donor: Aspen, target: Willow) -> None:
    """Give a fresh willow what fits of a trained aspen of the same hidden size."""
    shape = target.shape
    target.model.embed_tokens.weight.copy_(donor.model.embed_tokens.weight)
    copy_norm(donor.model.norm, target.model.norm)
    for index, layer in zip(DONORS, target.model.layers, strict=True):
        if index is None:
            continue
        source = donor.model.layers[index]
        assert isinstance(source, Layer) and isinstance(layer, AttentionLayer | DeltaLayer)
        layer.mlp.load_state_dict(source.mlp.state_dict())
        copy_norm(source.input_layernorm, layer.input_layernorm)
        copy_norm(source.post_attention_layernorm, layer.post_attention_layernorm)
        if isinstance(layer, AttentionLayer):
            transplant_attention(source.self_attn, layer, shape)
        else:
            transplant_delta(source.self_attn, layer.linear_attn, shape)


def load_aspen(path: Path) -> Aspen:
    """The model of one of aspen's checkpoints, fp32."""
    state = torch.load(path, weights_only=True, map_location="cpu")
    shape = SHAPES[state["shape"]]
    assert isinstance(shape, Shape), f"{path} holds {state['shape']!r}, not aspen"
    model = Aspen(shape)
    model.load_state_dict(state["optimizer"]["master"])
    return model


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=default_work("willow"))
    parser.add_argument("--donor", type=Path, default=default_work() / "checkpoint-final.pt", help="aspen's checkpoint")
    parser.add_argument("--shape", default="willow")
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    if not isinstance(shape, HybridShape):
        parser.error(f"{args.shape} is no hybrid shape")
    torch.manual_seed(0)
    model = Willow(shape)
    transplant(load_aspen(args.donor), model)
    optimizer = Optimizer(model.named_parameters(), max_gain=model.max_gain)
    state = {"shape": args.shape, "optimizer": optimizer.state_dict(), "cursors": {}, "step": 0, "tokens": 0}
    torch.save(state, args.work / "checkpoint.pt")
    print("written", args.work / "checkpoint.pt")


if __name__ == "__main__":
    main()
