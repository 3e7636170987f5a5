"""What happens around the model in a step, in plain torch: `StepTable` of `pando.kernels.ops`, on any device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor

from pando.kernels.ops import Sample, SamplingColumns, StepInputs
from pando.kernels.step_memory import StepMemory


class TorchStepTable:
    """All rows of a step at once. Every size is known on the host, so nothing waits for the device."""

    def __init__(
        self,
        sample: Sample,
        argmax: Callable[[Tensor], Tensor],
        finite: Callable[[Tensor], Tensor],
        tokens_NC: Tensor,
        pages_GNP: Tensor,
        sampling: SamplingColumns,
        page_size: int,
        upload: Callable[[list[int]], Tensor],
    ) -> None:
        self._sample, self._argmax, self._finite = sample, argmax, finite
        self._tokens_NC, self._pages_GNP, self._sampling, self._page_size = tokens_NC, pages_GNP, sampling, page_size
        self._upload = upload
        self._memory = StepMemory(tokens_NC.device, pages_GNP.shape[0])

    def reserve(self, shapes: Sequence[tuple[int, int, int]]) -> None:
        """Keep memory for steps of these shapes."""
        self._memory.reserve(shapes)

    def write_pages(
        self, slots: Sequence[int], indices: Sequence[int], ids: Sequence[int], groups: Sequence[int] = ()
    ) -> None:
        """One write for each place: the order of an indexed write is not defined on every device."""
        places = zip(groups or (0,) * len(ids), slots, indices, strict=True)
        writes = dict(zip(places, ids, strict=True))
        columns = self._upload([*chain.from_iterable(zip(*writes, strict=True)), *writes.values()])
        group, slot, index, page = columns.view(4, -1).unbind(0)
        self._pages_GNP.index_put_((group, slot, index), page.to(torch.int32))

    def write_tokens(self, slots: Sequence[int], positions: Sequence[int], ids: Sequence[int]) -> None:
        """All at once."""
        slot, position, token = self._upload([*slots, *positions, *ids]).view(3, -1).unbind(0)
        self._tokens_NC.index_put_((slot, position), token.to(torch.int32))

    def flatten(
        self,
        slots: Sequence[int],
        starts: Sequence[int],
        lens: Sequence[int],
        emits: Sequence[int],
        *,
        num_extra: int,
        num_pages: int,
    ) -> StepInputs:
        """The inputs of a step."""
        num_tokens, num_emitting = sum(lens), sum(emits)
        out = self._memory.carve(len(slots), num_tokens, num_emitting, num_extra, num_pages)
        slots_R, starts_R, lens_R, emits_R = self._upload([*slots, *starts, *lens, *emits]).view(4, -1).unbind(0)
        ends_R = starts_R + lens_R
        out.cu_q_lens[:1].zero_()
        torch.cumsum(lens_R, 0, out=out.cu_q_lens[1:])
        out.kv_lens.copy_(ends_R)
        row_T = torch.repeat_interleave(lens_R, output_size=num_tokens)
        shift_R = starts_R - out.cu_q_lens[:-1]
        torch.add(torch.arange(num_tokens, device=row_T.device), shift_R[row_T], out=out.positions)
        slots_T, page = slots_R[row_T], self._page_size
        out.input_ids.copy_(self._tokens_NC[slots_T, out.positions])
        pages_T, offset_T = out.positions // page, out.positions % page
        for pages_NP, out_loc, page_table in zip(self._pages_GNP, out.out_loc, out.page_table, strict=True):
            out_loc.copy_(pages_NP[slots_T, pages_T].long() * page + offset_T)
            page_table.copy_(pages_NP[slots_R, :num_pages])
        row_E = torch.repeat_interleave(emits_R, output_size=num_emitting)
        # Entry e of a row whose last entry is number `after - 1` lies that far before the row's end.
        before_E = torch.cumsum(emits_R, 0)[row_E] - torch.arange(num_emitting, device=row_E.device) - 1
        out.logits_index[:num_emitting] = out.cu_q_lens[1:][row_E] - 1 - before_E
        out.emit_slots.copy_(slots_R[row_E])
        out.emit_ends.copy_(ends_R[row_E] - before_E)
        return out

    def choose(
        self,
        logits_EV: Tensor,
        slots_E: Tensor,
        ends_E: Tensor,
        *,
        greedy: bool,
        masks_MW: Tensor | None = None,
        masked: Sequence[int] = (),
    ) -> Tensor:
        """Finite or not, a token, and the history."""
        finite_E = self._finite(logits_EV)
        if masks_MW is not None:
            logits_EV, rows = logits_EV.clone(), self._upload([*masked])
            part = logits_EV[rows]
            apply_token_mask_(part, masks_MW)
            logits_EV[rows] = part
        if greedy:
            tokens = self._argmax(logits_EV)
        else:
            of, at = self._sampling, slots_E
            columns = of.temperature[at], of.top_k[at], of.top_p[at], of.min_p[at], of.seed[at]
            tokens = self._sample(logits_EV, *columns, ends_E)
        self._tokens_NC.index_put_((slots_E, ends_E), tokens.to(torch.int32))
        return torch.stack((tokens, finite_E.long()))


def apply_token_mask_(logits: Tensor, mask: Tensor) -> None:
    """-inf where a token's bit is not set."""
    bits = torch.arange(32, dtype=torch.int32, device=mask.device)
    allowed = (mask.unsqueeze(-1) >> bits & 1).flatten(1)[:, : logits.shape[1]]
    logits.masked_fill_(allowed == 0, float("-inf"))
