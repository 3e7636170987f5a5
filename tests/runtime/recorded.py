"""A recorder that does on a CPU what a CUDA graph does on a GPU: it keeps the operations and their tensors' addresses.

A replay runs the recorded operations on the recorded tensors: whatever the host decided, computed or read while it
recorded stays as it was, so a step that depends on it comes out wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.runtime.no_sync import no_sync

Call = tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]


class _Tape(TorchDispatchMode):
    """Keeps every operation with its arguments and the results it made anew."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = {_memory(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        fresh = [leaf if _memory(leaf) not in given else None for leaf in made]
        if not func.overloadpacket.__name__.startswith(("empty", "new_empty")):
            self.calls.append((func, args, kwargs, fresh))  # type: ignore[arg-type]
        return out


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@dataclass
class TapeRecording:
    """Recorded operations."""

    output: Tensor
    calls: list[Call] = field(repr=False)
    num_replays: int = 0

    def replay(self) -> None:
        """Run them again; results that were new go where they were."""
        self.num_replays += 1
        for func, args, kwargs, fresh in self.calls:
            made = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
            for old, new in zip(fresh, made, strict=True):
                if old is not None:
                    old.copy_(new)


@dataclass
class TapeRecorder:
    """Records with `_Tape`. fail_at: the number of the recording that fails."""

    fail_at: int = -1
    recordings: list[TapeRecording] = field(default_factory=list, repr=False)

    def record(self, run: Callable[[], Tensor]) -> TapeRecording:
        if len(self.recordings) == self.fail_at:
            raise RuntimeError("operation not permitted while recording")
        run()
        with no_sync(), _Tape() as tape:
            output = run()
        self.recordings.append(TapeRecording(output, tape.calls))
        return self.recordings[-1]

    @property
    def num_replays(self) -> int:
        """Of all recordings."""
        return sum(recording.num_replays for recording in self.recordings)
