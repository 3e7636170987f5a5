"""Muon for the matrices inside the layers, Adam for embeddings and norms, on fp32 masters of bf16 parameters."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Quintic coefficients of Jordan et al. (2024), "Muon": steep at zero, so that five steps flatten the spectrum."""
MAX_GAIN = 3.0
"""Largest weight of the norms on queries and keys where the weight is the gain; see `model.causal_attention`."""


def orthogonalized(matrix: Tensor) -> Tensor:
    """Approximate U V^T of the singular value decomposition of `matrix`, by five Newton-Schulz steps in bf16."""
    a, b, c = NEWTON_SCHULZ
    wide = matrix.bfloat16()
    transposed = wide.shape[0] > wide.shape[1]
    if transposed:
        wide = wide.T
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return (wide.T if transposed else wide).float()


class Optimizer:
    """Holds the fp32 masters and their moments; `step` consumes fp32 gradients and refreshes the bf16 parameters."""

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        matrix_lr: float = 0.02,
        other_lr: float = 0.004,
        weight_decay: float = 0.05,
        max_gain: float = MAX_GAIN,
    ) -> None:
        self.named = dict(named)
        self.matrix_lr, self.other_lr, self.weight_decay = matrix_lr, other_lr, weight_decay
        self.max_gain = max_gain
        self.master = {name: parameter.detach().float().clone() for name, parameter in self.named.items()}
        self.first = {name: torch.zeros_like(value) for name, value in self.master.items()}
        self.second = {name: torch.zeros_like(value) for name, value in self.master.items() if not self.is_matrix(name)}
        self.num_steps = 0

    def is_matrix(self, name: str) -> bool:
        """Whether Muon, not AdamW, updates this parameter."""
        return self.named[name].ndim == 2 and ".layers." in name

    def step(self, gradients: dict[str, Tensor], factor: float) -> None:
        """Apply one update with both learning rates scaled by `factor`."""
        self.num_steps += 1
        for name, gradient in gradients.items():
            if self.is_matrix(name):
                self._muon(name, gradient, factor)
            else:
                self._adam(name, gradient, factor)
            self.named[name].data.copy_(self.master[name])

    def _muon(self, name: str, gradient: Tensor, factor: float) -> None:
        momentum, master = self.first[name], self.master[name]
        momentum.lerp_(gradient, 0.05)
        update = orthogonalized(torch.lerp(gradient, momentum, 0.95))
        rate = self.matrix_lr * factor
        master.mul_(1 - rate * self.weight_decay)
        master.add_(update, alpha=-rate * max(1.0, master.shape[0] / master.shape[1]) ** 0.5)

    def _adam(self, name: str, gradient: Tensor, factor: float) -> None:
        first, second, master = self.first[name], self.second[name], self.master[name]
        first.lerp_(gradient, 0.1)
        second.lerp_(gradient.square(), 0.05)
        corrected = first / (1 - 0.9**self.num_steps)
        scale = (second / (1 - 0.95**self.num_steps)).sqrt() + 1e-10
        master.addcdiv_(corrected, scale, value=-self.other_lr * factor)
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            master.clamp_(-self.max_gain, self.max_gain)

    def state_dict(self) -> dict[str, object]:
        """Everything needed to go on, masters included."""
        return {"master": self.master, "first": self.first, "second": self.second, "num_steps": self.num_steps}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restore `state_dict` and refresh the bf16 parameters."""
        for own, key in ((self.master, "master"), (self.first, "first"), (self.second, "second")):
            saved = state[key]
            assert isinstance(saved, dict) and saved.keys() == own.keys(), f"checkpoint does not fit: {key}"
            for name, value in saved.items():
                own[name].copy_(value)
        self.num_steps = int(str(state["num_steps"]))
        for name, parameter in self.named.items():
            parameter.data.copy_(self.master[name])
