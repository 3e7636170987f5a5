"""What happens to a step before the model, in plain torch. Contracts are those of `pando.kernels.ops`.

Nothing here waits for a device: every size is known from the outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pando.kernels.ops import StepInputs


def write_pages_(pages_NP: Tensor, writes: Tensor) -> None:
    """pages[slot, index] = id for each write."""
    slots, indices, ids = writes.view(3, -1).unbind(0)
    pages_NP.index_put_((slots, indices), ids.to(pages_NP.dtype))


def fill_step_(out: StepInputs, columns: Tensor, tokens_NC: Tensor, pages_NP: Tensor, page_size: int) -> None:
    """The flattened step, all rows at once."""
    slots_R, starts_R, lens_R, emits_R = columns.view(4, -1).unbind(0)
    ends_R = starts_R + lens_R
    out.cu_q_lens[:1] = 0
    torch.cumsum(lens_R, 0, out=out.cu_q_lens[1:])
    out.kv_lens.copy_(ends_R)
    num_tokens = out.positions.shape[0]
    row_T = torch.repeat_interleave(lens_R, output_size=num_tokens)
    shift_R = starts_R - out.cu_q_lens[:-1]
    torch.add(torch.arange(num_tokens, device=row_T.device), shift_R[row_T], out=out.positions)
    slots_T = slots_R[row_T]
    out.input_ids.copy_(tokens_NC[slots_T, out.positions])
    pages_T = pages_NP[slots_T, out.positions // page_size].long()
    torch.add(pages_T * page_size, out.positions % page_size, out=out.out_loc)
    out.page_table.copy_(pages_NP[slots_R, : out.page_table.shape[1]])
    rows_E = torch.nonzero_static(emits_R, size=out.last.shape[0]).squeeze(1)
    out.last.copy_(out.cu_q_lens[1:][rows_E] - 1)
    out.emit_slots.copy_(slots_R[rows_E])
    out.emit_ends.copy_(ends_R[rows_E])
