"""One table of cases for the recurrent ops, their inputs, and how a step is cut into smaller ones."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pando.kernels.ops import OpTable

NUM_SLOTS = 24


@dataclass(frozen=True, slots=True)
class Case:
    """heads: of keys (gated_delta), else all; groups: value heads (gated_delta) or groups of b and c; channels in 1-dim
    ops are `heads`. key: key dim, state size or taps; value: value dim or head dim. decay: mean of -log(decay).
    """

    op: str
    heads: int = 2
    groups: int = 4
    key: int = 32
    value: int = 32
    rows: tuple[int, ...] = (5, 1, 0, 40)
    per_channel: bool = False
    normalize: bool = True
    plain: bool = False
    decay: float = 0.3
    inputs: float = 1.0

    def id(self) -> str:
        """Short name for test output."""
        default = BASE[self.op]
        names = [name for name in self.__dataclass_fields__ if name != "op"]
        changed = [f"{n}={getattr(self, n)}" for n in names if getattr(self, n) != getattr(default, n)]
        return "-".join((self.op, *changed)).replace(" ", "")


BASE = {
    "causal_conv": Case("causal_conv", heads=80, key=4),
    "gated_delta": Case("gated_delta"),
    "state_space": Case("state_space", heads=4, groups=2),
    "selective_scan": Case("selective_scan", heads=40, key=16),
}
OPS = tuple(BASE)


def _variants(op: str, *changes: dict[str, object]) -> tuple[Case, ...]:
    return tuple(replace(BASE[op], **change) for change in changes)  # type: ignore[arg-type]


CASES = (
    *BASE.values(),
    *(replace(case, rows=rows) for case in BASE.values() for rows in ((1, 1, 1), (0, 0), (33,), (2, 0, 70, 3, 32))),
    *(replace(BASE[op], decay=decay) for op in OPS[1:] for decay in (0.0, 40.0, 500.0)),
    *(replace(case, inputs=1e-22) for case in BASE.values()),
    *_variants(
        "causal_conv",
        *({"key": taps} for taps in (1, 2, 3, 5, 9)),
        *({"heads": channels} for channels in (1, 7, 64, 67, 300)),
        {"plain": True},
        {"plain": True, "key": 3, "heads": 5},
    ),
    *_variants(
        "gated_delta",
        *({"key": k, "value": v} for k, v in ((1, 1), (3, 5), (16, 100), (64, 64), (128, 128), (24, 72), (256, 20))),
        *({"heads": h, "groups": g} for h, g in ((1, 1), (1, 5), (3, 3), (2, 6))),
        {"normalize": False},
        {"per_channel": True},
        {"per_channel": True, "key": 7, "value": 65, "decay": 30.0},
        {"per_channel": True, "key": 128, "value": 128, "heads": 2, "groups": 2, "normalize": False},
    ),
    *_variants(
        "state_space",
        *({"key": n, "value": p} for n, p in ((1, 1), (5, 3), (16, 64), (128, 64), (20, 7), (256, 10), (130, 33))),
        *({"heads": h, "groups": g} for h, g in ((1, 1), (5, 1), (3, 3), (6, 2))),
        {"plain": True},
    ),
    *_variants(
        "selective_scan",
        *({"key": n} for n in (1, 3, 8, 17, 32, 70)),
        *({"heads": channels} for channels in (1, 7, 64, 131)),
        {"plain": True},
    ),
)
"""Odd sizes, empty rows, single tokens, ratios of heads, no decay, decays that underflow, subnormal products."""


@dataclass(slots=True)
class Inputs:
    """Arguments by name: `tokens` have one entry per token of the step, `fixed` are weights and options."""

    op: str
    tokens: dict[str, Tensor]
    fixed: dict[str, object]
    state_name: str
    state: Tensor
    row_lens: list[int]
    slots: Tensor
    fresh: Tensor
    saves: list[tuple[int, int, int]] = field(default_factory=list)
    """(row, tokens of the row so far, slot)"""

    def ragged(self) -> dict[str, Tensor]:
        """The arguments all ops share."""
        starts = torch.tensor([0, *self.row_lens]).cumsum(0)
        return {
            "cu_q_lens": starts.int(),
            "slots": self.slots,
            "fresh": self.fresh,
            "save_token": torch.tensor([int(starts[row]) + done - 1 for row, done, _ in self.saves], dtype=torch.int64),
            "save_slot": torch.tensor([slot for _, _, slot in self.saves], dtype=torch.int64),
        }

    def run(self, ops: OpTable) -> tuple[Tensor, Tensor]:
        """(output, states afterwards); the inputs stay as they are."""
        state = self.state.clone()
        op = getattr(ops, self.op)
        return op(**self.tokens, **self.fixed, **{self.state_name: state}, **self.ragged()), state

    def part(self, begins: list[int], ends: list[int], state: Tensor) -> Inputs:
        """The step that runs tokens begin..end - 1 of each row on `state`."""
        starts = torch.tensor([0, *self.row_lens]).cumsum(0).tolist()
        spans = list(zip(starts[:-1], begins, ends, strict=True))
        chosen = torch.cat([torch.arange(start + begin, start + end) for start, begin, end in spans])
        return replace(
            self,
            tokens={name: tensor[chosen] for name, tensor in self.tokens.items()},
            state=state,
            row_lens=[end - begin for begin, end in zip(begins, ends, strict=True)],
            fresh=self.fresh & (torch.tensor(begins) == 0),
            saves=[(r, done - begins[r], slot) for r, done, slot in self.saves if begins[r] < done <= ends[r]],
        )


def run_cut(inputs: Inputs, ops: OpTable, seed: int) -> tuple[Tensor, Tensor]:
    """As `Inputs.run`, in steps whose cuts are random; some of a step's rows may have no tokens."""
    generator = torch.Generator().manual_seed(seed)
    pieces: list[list[Tensor]] = [[] for _ in inputs.row_lens]
    done, state = [0] * len(inputs.row_lens), inputs.state
    empty = inputs.run(ops)[0][:0]
    while done != inputs.row_lens:
        lens = torch.randint(0, 12, (len(done),), generator=generator).tolist()
        ends = [min(at + n, end) for at, n, end in zip(done, lens, inputs.row_lens, strict=True)]
        step = inputs.part(done, ends, state)
        out, state = step.run(ops)
        for row, piece in enumerate(out.split(step.row_lens)):
            pieces[row].append(piece)
        done = ends
    return torch.cat([empty, *(piece for row in pieces for piece in row)]), state


def _token_tensors(case: Case, generator: torch.Generator, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """Activations as views into one wide tensor, as a fused projection gives them; and the state of all slots."""
    count = sum(case.rows)
    heads, groups, key, value = case.heads, case.groups, case.key, case.value
    shapes: dict[str, tuple[int, ...]] = {
        "causal_conv": {"x_TC": (heads,)},
        "gated_delta": {"q_THK": (heads, key), "k_THK": (heads, key), "v_TGV": (groups, value)},
        "state_space": {"x_THP": (heads, value), "b_TGN": (groups, key), "c_TGN": (groups, key)},
        "selective_scan": {"x_TC": (heads,), "b_TN": (key,), "c_TN": (key,)},
    }[case.op]
    state_shape = {
        "causal_conv": (heads, key - 1),
        "gated_delta": (groups, key, value),
        "state_space": (heads, value, key),
        "selective_scan": (heads, key),
    }[case.op]
    sizes = [int(torch.tensor(shape).prod()) for shape in shapes.values()]
    wide = (torch.randn(count, sum(sizes) + 3, generator=generator) * case.inputs).to(dtype)
    parts = wide[:, : sum(sizes)].split(sizes, dim=1)
    tokens = {name: part.unflatten(1, shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    state = torch.randn(NUM_SLOTS, *state_shape, generator=generator) * case.inputs
    return tokens, state.to(dtype) if case.op == "causal_conv" else state


def make_inputs(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
    """Random inputs with scattered slots, every other row fresh on a slot of NaN, and saves at many tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens, state = _token_tensors(case, generator, dtype)
    count, heads = sum(case.rows), case.heads
    fixed: dict[str, object] = {}

    def positive(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) * 2 * case.decay

    if case.op == "causal_conv":
        fixed["weight_CX"] = torch.randn(heads, case.key, generator=generator)
        fixed["bias_C"] = None if case.plain else torch.randn(heads, generator=generator) * case.inputs
        fixed["activation"] = None if case.plain else "silu"
    elif case.op == "gated_delta":
        tokens["log_decay"] = -positive(count, case.groups, *((case.key,) if case.per_channel else ()))
        tokens["beta_TG"] = torch.rand(count, case.groups, generator=generator)
        fixed["scale"], fixed["normalize"] = case.key**-0.5, case.normalize
        if not case.normalize:
            tokens["k_THK"] = tokens["k_THK"] / case.key**0.5
    elif case.op == "state_space":
        tokens["dt_TH"] = positive(count, heads)
        fixed["a_H"] = -torch.rand(heads, generator=generator) - 0.5
        fixed["d_H"] = None if case.plain else torch.randn(heads, generator=generator)
    else:
        tokens["dt_TC"] = positive(count, heads)
        fixed["a_CN"] = -torch.rand(heads, case.key, generator=generator) - 0.5
        fixed["d_C"] = None if case.plain else torch.randn(heads, generator=generator)
    names = {"causal_conv": "Y", "gated_delta": "GKV", "state_space": "HPN", "selective_scan": "CN"}
    suffix = "CY" if case.op == "causal_conv" else names[case.op]
    order = torch.randperm(NUM_SLOTS, generator=generator)
    fresh = torch.arange(len(case.rows)) % 2 == 0
    state[order[: len(fresh)][fresh]] = float("nan")
    spans = [(row, done) for row, n in enumerate(case.rows) for done in {1, 2, n // 2, n} if 0 < done <= n]
    spans += [spans[-1]] if spans else []  # two saves of one state
    chosen = torch.randperm(len(spans), generator=generator)[: NUM_SLOTS - len(fresh) - 1].tolist()
    free = order[len(fresh) :].tolist()
    return Inputs(
        op=case.op,
        tokens=tokens,
        fixed=fixed,
        state_name=f"state_S{suffix}",
        state=state,
        row_lens=list(case.rows),
        slots=order[: len(fresh)].clone(),
        fresh=fresh,
        saves=[(*spans[i], slot) for i, slot in zip(chosen, free, strict=False)],
    )
