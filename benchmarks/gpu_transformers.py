"""The offline workload with `transformers`: static batches, and its continuous batching where that works."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
)

from benchmarks.gpu_engine import first_line, prompt_tokens
from benchmarks.gpu_report import Figures
from benchmarks.gpu_shapes import Scale, config_of, write_folder
from benchmarks.gpu_steps import wait

NEVER = -1
"""An id that is no token: nothing ends a sequence before its length."""


def run_transformers(name: str, scale: Scale) -> Iterator[Figures]:
    """Output tokens a second of both ways, each in its second run: the first pays for what happens once.

    A way that does not work is left out, and says why; `failed` comes if neither does.
    """
    model, vocab_size = load(name, scale)
    requests, num_in, num_out = scale.offline
    runs: dict[str, Callable[[list[list[int]]], int]] = {
        "static": lambda prompts: generate_static(model, prompts, num_out),
        "continuous": lambda prompts: generate_continuous(model, prompts, num_out, scale),
    }
    num_worked = 0
    for way, run in runs.items():
        try:
            seconds = 0.0
            for salt in (7000, 8000):
                prompts = [prompt_tokens(num_in, salt + row, vocab_size) for row in range(requests)]
                wait(scale.device)
                begin = time.perf_counter()
                num_tokens = run(prompts)
                wait(scale.device)
                seconds = time.perf_counter() - begin
                if num_tokens != requests * num_out:
                    raise RuntimeError(f"{num_tokens} tokens came, not {requests * num_out}")
        except Exception as error:
            print(f"transformers, {way}: does not work here: {first_line(error)}", flush=True)
            traceback.print_exc()
            yield {f"{way} failed": first_line(error)}
            continue
        num_worked += 1
        rate = requests * num_out / seconds
        print(f"transformers, {way}, {requests} requests {num_in} + {num_out}: {rate:,.0f} tok/s", flush=True)
        yield {f"{way} tok/s": rate}
    yield {} if num_worked else {"failed": float(len(runs))}


def load(name: str, scale: Scale) -> tuple[PreTrainedModel, int]:
    """The shape with random weights, made on the device; and the size of its vocabulary."""
    config = AutoConfig.from_pretrained(write_folder({**config_of(name, tiny=scale.tiny), "eos_token_id": None}))
    dtype = torch.float32 if scale.tiny else torch.bfloat16
    with torch.device(scale.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.generation_config.eos_token_id = NEVER
    return model, int(config.vocab_size)


def generate_static(model: PreTrainedModel, prompts: list[list[int]], num_out: int) -> int:
    """All prompts as one batch; how many tokens came."""
    ids = torch.tensor(prompts, device=model.device)
    options: dict[str, Any] = {"max_new_tokens": num_out, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=NEVER, **options)
    return (out.shape[1] - ids.shape[1]) * out.shape[0]


def generate_continuous(model: PreTrainedModel, prompts: list[list[int]], num_out: int, scale: Scale) -> int:
    """The same through its scheduler and paged cache, kept from one call to the next; how many tokens came.

    A request that fails is only logged by it, so tokens are counted.
    """
    # On a GPU it sizes itself; on a CPU it would take most of the memory.
    sizes = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=256) if scale.device == "cpu" else None
    results = model.generate_batch(
        inputs=prompts,
        generation_config=GenerationConfig(max_new_tokens=num_out, do_sample=False, eos_token_id=NEVER, pad_token_id=0),
        continuous_batching_config=sizes,
        persistent_manager=True,
    )
    return sum(len(result.generated_tokens) for result in results.values() if result.error is None)
