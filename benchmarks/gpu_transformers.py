"""The offline workload with `transformers`: static batches, and its continuous batching where that works."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.utils import WorkloadHints

from benchmarks.gpu_engine import first_line, prompt_tokens
from benchmarks.gpu_report import Figures
from benchmarks.gpu_shapes import Scale, config_of, write_folder
from benchmarks.gpu_steps import wait

NEVER = -1
"""An id that is no token: nothing ends a sequence before its length."""


Run = Callable[[list[list[int]]], int]
"""Generates for all prompts; how many tokens came."""


def run_transformers(name: str, scale: Scale) -> Iterator[Figures]:
    """Output tokens a second of both ways, each in its second run: the first pays for what happens once.

    A way that does not work is left out, and says why; `failed` comes if neither does.
    """
    model, vocab_size = load(name, scale)
    requests, num_in, num_out = scale.offline
    num_worked = 0
    for way, running in (("static", static), ("continuous", continuous)):
        try:
            with running(model, scale) as run:
                seconds = 0.0
                for salt in (7000, 8000):
                    prompts = [prompt_tokens(num_in, salt + row, vocab_size) for row in range(requests)]
                    seconds = seconds_of_run(run, prompts, num_out, scale.device)
                rate = requests * num_out / seconds
                print(f"transformers, {way}, {requests} requests {num_in} + {num_out}: {rate:,.0f} tok/s", flush=True)
                yield {f"{way} tok/s": rate}
            num_worked += 1
        except Exception as error:
            print(f"transformers, {way}: does not work here: {first_line(error)}", flush=True)
            traceback.print_exc()
            yield {f"{way} failed": first_line(error)}
    if not num_worked:
        yield {"failed": 2.0}


def seconds_of_run(run: Run, prompts: list[list[int]], num_out: int, device: str) -> float:
    """Time of one run. Raises RuntimeError if not all tokens came."""
    wait(device)
    begin = time.perf_counter()
    num_tokens = run(prompts)
    wait(device)
    seconds = time.perf_counter() - begin
    if num_tokens != len(prompts) * num_out:
        raise RuntimeError(f"{num_tokens} tokens came, not {len(prompts) * num_out}")
    return seconds


def load(name: str, scale: Scale) -> tuple[PreTrainedModel, int]:
    """The shape with random weights, made on the device; and the size of its vocabulary."""
    config = AutoConfig.from_pretrained(write_folder({**config_of(name, tiny=scale.tiny), "eos_token_id": None}))
    dtype = torch.float32 if scale.tiny else torch.bfloat16
    with torch.device(scale.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.generation_config.eos_token_id = NEVER
    return model, int(config.vocab_size)


@contextmanager
def static(model: PreTrainedModel, scale: Scale) -> Iterator[Run]:
    """All prompts as one batch."""
    num_out = scale.offline[2]
    options: dict[str, Any] = {"max_new_tokens": num_out, "do_sample": False, "pad_token_id": 0}

    def run(prompts: list[list[int]]) -> int:
        ids = torch.tensor(prompts, device=model.device)
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=NEVER, **options)
        return (out.shape[1] - ids.shape[1]) * out.shape[0]

    yield run


@contextmanager
def continuous(model: PreTrainedModel, scale: Scale) -> Iterator[Run]:
    """Its scheduler and paged cache, told what is to come and kept running, as `generate_batch` would start them.

    A request that fails is only logged there, so tokens are counted.
    """
    requests, num_in, num_out = scale.offline
    # On a GPU it sizes itself; on a CPU it would take most of the memory.
    sizes = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=256) if scale.device == "cpu" else None
    with model.continuous_batching_context_manager(
        generation_config=GenerationConfig(max_new_tokens=num_out, do_sample=False, eos_token_id=NEVER, pad_token_id=0),
        continuous_batching_config=sizes,
        workload_hints=WorkloadHints(num_in, num_out, requests),
        timeout=5,
    ) as manager:
        yield lambda prompts: through(manager, prompts, num_out)


def through(manager: ContinuousBatchingManager, prompts: list[list[int]], num_out: int) -> int:
    """Run prompts through a manager. Raises RuntimeError if its thread ends."""
    manager.add_requests(inputs=prompts, max_new_tokens=num_out)
    num_left, num_tokens = len(prompts), 0
    while num_left:
        result = manager.get_result(timeout=1)
        if result is None and not manager.is_running():
            raise RuntimeError("its thread ended")
        if result is not None and result.is_finished():
            num_left -= 1
            num_tokens += len(result.generated_tokens) if result.error is None else 0
    return num_tokens
