"""vLLM's CPU build: the engine in this process, its steps driven here. Its threads are bound by the environment."""

from __future__ import annotations

import vllm
from vllm import LLM, SamplingParams, TokensPrompt

from benchmarks.peers.session import Arrived, Settings, Timed, Work, serve


class VllmEngine:
    """Prefix caching and chunked prefill are on, as is its compiler; weights stay bf16 or come as W8A8."""

    def __init__(self, settings: Settings) -> None:
        self.version = vllm.__version__
        self.count = 0
        self.engine = LLM(
            settings.model,
            dtype="bfloat16",
            max_model_len=settings.context,
            max_num_seqs=max(settings.requests, 2),
            max_num_batched_tokens=max(2048, settings.context),
            enable_prefix_caching=True,
            disable_log_stats=True,
        ).llm_engine

    def generate(self, work: Work, arrived: Arrived) -> None:
        sampling = SamplingParams(max_tokens=work.num_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        indices: dict[str, int] = {}
        for index, prompt in enumerate(work.prompts):
            self.count += 1
            name = str(self.count)
            indices[name] = index
            self.engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), sampling)
        seen = [0] * len(work.prompts)
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                # V1 engines may append a suffix of their own to a request's name.
                index = indices[output.request_id.split("-")[0]]
                tokens = output.outputs[0].token_ids
                if len(tokens) > seen[index]:
                    arrived(index, list(tokens[seen[index] :]))
                    seen[index] = len(tokens)


if __name__ == "__main__":
    serve(lambda settings: Timed(VllmEngine(settings)))
