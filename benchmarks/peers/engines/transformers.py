"""transformers: the model's forward pass with its own cache, prompts of equal length in one static batch."""

from __future__ import annotations

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.peers.session import Arrived, Settings, Timed, Work, serve


class TransformersEngine:
    """The loop of greedy `generate`, without what it does around it."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(settings.threads)
        self.version = transformers.__version__
        self.model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def generate(self, work: Work, arrived: Arrived) -> None:
        cache = DynamicCache(config=self.model.config)
        tokens = torch.tensor(work.prompts)
        for _ in range(work.num_tokens):
            logits = self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            tokens = logits[:, -1].argmax(-1, keepdim=True)
            for index, token in enumerate(tokens[:, 0].tolist()):
                arrived(index, [token])


if __name__ == "__main__":
    serve(lambda settings: Timed(TransformersEngine(settings)))
