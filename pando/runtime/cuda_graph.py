"""Recording and replay of work with CUDA graphs: the few lines of `pando.runtime.graph` that need a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class CudaRecording:
    """A captured graph. It keeps its output, and the memory pool it lives in, alive."""

    output: Tensor
    graph: torch.cuda.CUDAGraph

    def replay(self) -> None:
        """Queue the graph on the current stream."""
        self.graph.replay()


class CudaRecorder:
    """Captures on a stream of its own, all graphs into one memory pool: they never run at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def record(self, run: Callable[[], Tensor]) -> CudaRecording:
        """Run once, so that kernels are compiled and libraries have their workspaces; then capture."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()
        torch.cuda.current_stream().wait_stream(self._stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Threads that compile grammars or fill masks may go on meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            output = run()
        return CudaRecording(output, graph)
