"""OpenVINO GenAI: the continuous batching pipeline with prefix caching, its steps driven here."""

from __future__ import annotations

import numpy as np
import openvino_genai
from openvino import Tensor
from openvino_genai import ContinuousBatchingPipeline, GenerationConfig, SchedulerConfig

from benchmarks.peers.session import Arrived, Settings, Timed, Work, serve

GB = 1 << 30
CACHE_GB = 4


class OpenVinoEngine:
    """Latency hint and 16-bit arithmetic; a larger token budget than its default, which costs long prompts."""

    def __init__(self, settings: Settings) -> None:
        self.version = openvino_genai.__version__
        scheduler = SchedulerConfig()
        scheduler.cache_size = CACHE_GB
        scheduler.enable_prefix_caching = True
        scheduler.max_num_batched_tokens = 2048
        scheduler.max_num_seqs = max(settings.requests, 2)
        properties = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "bf16",
            "INFERENCE_NUM_THREADS": settings.threads,
        }
        self.count = 0
        self.pipeline = ContinuousBatchingPipeline(settings.model, scheduler, "CPU", properties)

    def generate(self, work: Work, arrived: Arrived) -> None:
        config = GenerationConfig(
            max_new_tokens=work.num_tokens, min_new_tokens=work.num_tokens, ignore_eos=True, do_sample=False
        )
        handles = []
        for prompt in work.prompts:
            self.count += 1
            ids = Tensor(np.array([prompt], np.int64))
            handles.append(self.pipeline.add_request(self.count, ids, config))
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            for index, handle in enumerate(handles):
                while handle.can_read():
                    for output in handle.read().values():
                        arrived(index, output.generated_ids)


if __name__ == "__main__":
    serve(lambda settings: Timed(OpenVinoEngine(settings)))
