"""Objectives that make a transplanted willow do what aspen does, before it is trained to answer.

`Mixers` trains every delta net alone, on the inputs of the attention it replaces; `Stream` trains all layers together,
each to leave the stream as aspen's layer does. Neither needs the language-model head, and every token of a row teaches,
not only the supervised ones.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from training.aspen.hybrid import DeltaLayer, Willow
from training.aspen.model import Layer
from training.aspen.transplant import DONORS, load_aspen


def relative_error(got: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error as a share of the mean square of `wanted`."""
    return (got.float() - wanted.float()).square().mean() / wanted.float().square().mean()


class Pair(nn.Module):
    """One of aspen's layers and the delta layer in its place."""

    def __init__(self, donor: Layer, target: DeltaLayer) -> None:
        super().__init__()
        self.donor, self.target = donor, target

    def forward(self, x_BTD: Tensor, cos_TC: Tensor, sin_TC: Tensor, documents_BT: Tensor) -> Tensor:
        """Relative error of the delta net for the attention, on the same stream."""
        with torch.no_grad():
            wanted = self.donor.self_attn(self.donor.input_layernorm(x_BTD), cos_TC, sin_TC, documents_BT)
        return relative_error(self.target.linear_attn(self.target.input_layernorm(x_BTD), documents_BT), wanted)


class Mixers:
    """The objective that trains every delta net with a donor on the donor's own inputs and outputs."""

    def __init__(self, model: nn.Module, donor: Path) -> None:
        assert isinstance(model, Willow), "only willow can be aligned"
        self.aspen = load_aspen(donor).bfloat16().requires_grad_(False)
        self.pairs: dict[int, Pair] = {}
        for index, layer in zip(DONORS, model.model.layers, strict=True):
            if index is not None and isinstance(layer, DeltaLayer):
                source = self.aspen.model.layers[index]
                assert isinstance(source, Layer)
                self.pairs[index] = Pair(source, layer)
                self.pairs[index].compile(dynamic=False)
        for layer in self.aspen.model.layers:
            layer.compile(dynamic=False)
        self.tables: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, tokens_BT: Tensor, documents_BT: Tensor) -> tuple[float, float]:
        """Sum of the pairs' losses and their number; leaves gradients on the delta nets and the norms before them."""
        length = tokens_BT.shape[1]
        if length not in self.tables:
            self.tables[length] = self.aspen.rotary(length, torch.bfloat16)
        x_BTD, total = self.aspen.model.embed_tokens(tokens_BT), 0.0
        for index, layer in enumerate(self.aspen.model.layers):
            if index in self.pairs:
                loss = self.pairs[index](x_BTD, *self.tables[length], documents_BT)
                loss.backward()
                total += loss.item()
            if index < max(self.pairs):
                with torch.no_grad():
                    x_BTD = layer(x_BTD, *self.tables[length], documents_BT)
        return total, float(len(self.pairs))


class Stream:
    """The objective that trains all of willow's layers together to leave the stream as their donors do."""

    def __init__(self, model: nn.Module, donor: Path) -> None:
        assert isinstance(model, Willow), "only willow can be aligned"
        self.model = model
        self.aspen = load_aspen(donor).bfloat16().requires_grad_(False)
        for layer in self.aspen.model.layers:
            layer.compile(dynamic=False)
        self.error = torch.compile(relative_error, dynamic=False)
        self.tables: dict[int, tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]] = {}

    def __call__(self, tokens_BT: Tensor, documents_BT: Tensor) -> tuple[float, float]:
        """Sum of the layers' relative errors and their number; leaves gradients on everything inside the layers."""
        length = tokens_BT.shape[1]
        if length not in self.tables:
            self.tables[length] = (
                self.aspen.rotary(length, torch.bfloat16),
                self.model.rotary(length, torch.bfloat16),
            )
        theirs, ours = self.tables[length]
        wanted: dict[int, Tensor] = {}
        with torch.no_grad():
            x_BTD = self.aspen.model.embed_tokens(tokens_BT)
            for index, layer in enumerate(self.aspen.model.layers):
                wanted[index] = x_BTD = layer(x_BTD, *theirs, documents_BT)
            x_BTD = self.model.model.embed_tokens(tokens_BT)
        errors = []
        for source, layer in zip(DONORS, self.model.model.layers, strict=True):
            x_BTD = layer(x_BTD, *ours, documents_BT)
            if source is not None:
                errors.append(self.error(x_BTD, wanted[source]))
        loss = torch.stack(errors).sum()
        loss.backward()
        return loss.item(), float(len(errors))


OBJECTIVES = {"mixers": Mixers, "stream": Stream}
"""By the name they have on the command line."""
