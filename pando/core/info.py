"""What an engine is and serves: one record, sent once from the engine to the API side."""

from __future__ import annotations

from typing import Any

import msgspec


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The engine's own account of itself, after every "auto" is resolved.

    context_length: longest prompt + output of one sequence, tokens. max_total_num_tokens: KV pool, tokens.
    max_queued_requests: waiting requests at most, beyond max_running_requests. generation_defaults: sampling
    parameters (names of SamplingParams) that the model's generation_config sets. num_parameters: weights, elements.
    """

    model_path: str
    served_model_names: list[str]
    context_length: int
    vocab_size: int
    max_total_num_tokens: int
    tokenizer_path: str = ""
    page_size: int = 1
    max_running_requests: int = 256
    max_queued_requests: int = 65536
    dtype: str = "float32"
    device: str = "cpu"
    kernels: str = "reference"
    architecture: str = ""
    eos_token_ids: list[int] = []
    weight_version: str = "default"
    version: str = ""
    num_parameters: int = 0
    generation_defaults: dict[str, Any] = {}
    is_builtin: bool = False

    @property
    def model_name(self) -> str:
        """The name put into replies: the first of `served_model_names`."""
        return self.served_model_names[0] if self.served_model_names else self.model_path
