"""Start-up options: one frozen record. Names follow SGLang's flags; the CLI maps vLLM's spellings onto them.

A field earns its place with a test and a line of docs. "auto" and None are resolved once, in `pando.engine`, logged,
and never written back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from pando.errors import ConfigError

BUILTIN_MODEL = "aspen"
"""Name of the model shipped inside the package that is used where none is named."""
BUILTIN_MODELS = (BUILTIN_MODEL, "willow")
"""Names of all models shipped inside the package: one with attention only, one hybrid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All options of an engine and its server. Raises ConfigError on a value out of range."""

    model_path: str = BUILTIN_MODEL
    """Built-in model name, local folder, or hub id."""
    tokenizer_path: str | None = None
    """Folder or hub id of the tokenizer; None = model_path."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    quantization: str = "auto"
    """auto (as the checkpoint is) | int8 | w8a8 (activations too) | int4 | fp8 (on a GPU): rounded on load from plain
    weights. awq | gptq | compressed-tensors | gguf: refuse a checkpoint of another kind."""
    load_format: str = "auto"
    """auto (safetensors) | dummy (random weights of the config's shape, for benchmarks)."""
    packed_cache: str = "auto"
    """Folder that keeps packed weights for later starts | auto (in the user's cache folder) | off."""
    packed_cache_gb: float = 20.0
    """Size of that folder at most, in GB; the files used least recently are removed."""
    served_model_name: tuple[str, ...] = ()
    """Names answered in the API; empty = the model path's last part."""
    chat_template: str | None = None
    """File with a Jinja chat template that replaces the model's own."""
    tool_call_parser: str = "auto"
    """How the model writes tool calls: auto (as its chat template tells) | none | a format of docs/tools.md, also by
    the names that SGLang and vLLM give them."""
    reasoning_parser: str = "auto"
    """How the model marks its reasoning: auto (as its chat template tells) | none | think | deepseek_r1 | qwen3 |
    kimi | mistral | seed_oss | harmony, also by the names that SGLang and vLLM give them."""
    device: str = "auto"
    """auto | cpu | cuda."""
    dtype: str = "auto"
    """auto (the checkpoint's) | float32 | bfloat16 | float16."""
    kv_cache_dtype: str = "auto"
    """auto (the model's) | bf16 (only if the model is) | int8: keys and values in half the memory, with a scale per
    token and head | fp8_e4m3, fp8_e5m2: without scales (on a GPU)."""
    kernels: str = "auto"
    """auto | native | reference."""
    attention_backend: str = "auto"
    """auto (that of the kernels) | triton | flashinfer (the library, for what it can do): on a GPU."""
    enable_deterministic_inference: bool = False
    """Tokens and logprobs are the same to the last bit whatever runs beside a request, however its prompt is cut and
    whatever of it is cached. CPU, native kernels."""
    num_threads: int | None = None
    """CPU threads of the forward pass; None = all cores."""
    page_size: int = 1
    """Tokens per cache page."""
    context_length: int | None = None
    """Longest prompt + output; None = the model's, cut to what the KV pool holds."""
    mem_fraction_static: float | None = None
    """Share of free memory for weights and KV pool; None = measured plan."""
    max_total_tokens: int | None = None
    """KV pool size in tokens; None = measured plan."""
    kv_prefault_gb: float = 1.0
    """KV memory on a CPU that idle moments take from the system before it is written, GB at most beyond what has been
    used, at most 16,384 tokens and half the pool; 0 = none. A prefill into memory that is there already is faster."""
    max_running_requests: int | None = None
    """Sequences in a batch at most; None = chosen from the pool."""
    max_queued_requests: int = 65536
    """Waiting requests at most; more get 429."""
    chunked_prefill_size: int | None = None
    """Token budget of a step; prompts are cut to it. None = chosen for the device."""
    schedule_policy: str = "lpm"
    """lpm (longest cached prefix first, bounded unfairness) | fcfs | priority."""
    disable_radix_cache: bool = False
    """Share no prefixes (for comparison)."""
    radix_eviction_policy: str = "reuse"
    """What the prefix cache forgets first: reuse | lru | lru_leaf | marconi:ALPHA | gdsf:BETA | tuned."""
    state_checkpoints: str = "branch+last+room"
    """Which recurrent states the prefix cache keeps: branch | last | room | prompt | every:TOKENS, or several of these
    joined by +. room: before a prompt's last token while room is free; prompt: always."""
    overlap: str = "auto"
    """Plan the next step while one runs: on | off | auto (on for a GPU; on a CPU both want the same cores)."""
    disable_cuda_graph: bool = False
    """Run every step kernel by kernel on a GPU, none from a recorded graph."""
    cuda_graph_max_bs: int | None = None
    """Largest batch of decoding requests that is recorded as a graph on a GPU; None = 256, or max_running_requests."""
    enable_torch_compile: bool = False
    """Compile with torch what layers compute between the kernels: routing, gates, decays, capped logits. Takes up to a
    minute at start-up; models that are all kernels gain nothing."""
    random_seed: int | None = None
    """Seed of requests that bring none; None = fresh at each start."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 opens it to the network."""
    port: int = 30000
    """Port to listen on."""
    api_key: tuple[str, ...] = ()
    """Keys accepted; empty = no authentication."""
    log_level: str = "info"
    """debug | info | warning | error."""

    def __post_init__(self) -> None:
        positive = ("page_size", "context_length", "max_total_tokens", "max_running_requests", "chunked_prefill_size")
        for name in (*positive, "max_queued_requests", "num_threads", "cuda_graph_max_bs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; give a positive number", param=name)
        if self.mem_fraction_static is not None and not 0.0 < self.mem_fraction_static <= 1.0:
            raise ConfigError(
                f"mem_fraction_static is {self.mem_fraction_static}; give a value in (0, 1]",
                param="mem_fraction_static",
            )
        for name in ("packed_cache_gb", "kv_prefault_gb"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; give 0 or more", param=name)
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(allowed)}", param=name)

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """All option names, in order."""
        return tuple(field.name for field in fields(cls))

    @classmethod
    def from_kwargs(cls, **options: Any) -> Config:
        """Config from keyword options; unknown names raise ConfigError with the nearest known one."""
        unknown = sorted(set(options) - set(cls.field_names()))
        if unknown:
            import difflib

            near = difflib.get_close_matches(unknown[0], cls.field_names(), 1)
            hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(cls.field_names())}"
            raise ConfigError(f"unknown option {unknown[0]!r}{hint}", param=unknown[0])
        for name in ("served_model_name", "api_key"):
            if isinstance(options.get(name), str):
                options[name] = (options[name],)
        return cls(**options)


ROUND_ON_LOAD = ("int8", "w8a8", "int4", "fp8")
"""Values of `quantization` that round plain weights."""

STORED_FORMATS = ("awq", "gptq", "compressed-tensors", "gguf")
"""Values of `quantization` that name what the checkpoint already is."""

KV_DTYPES = {"int8": "int8", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
"""Values of `kv_cache_dtype` that keep keys and values in 8 bits -> what `pando.cache.spec` calls them."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "quantization": ("auto", *ROUND_ON_LOAD, *STORED_FORMATS),
    "load_format": ("auto", "dummy"),
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "kv_cache_dtype": ("auto", "bf16", *KV_DTYPES),
    "kernels": ("auto", "native", "reference"),
    "attention_backend": ("auto", "triton", "flashinfer"),
    "overlap": ("auto", "on", "off"),
    "schedule_policy": ("lpm", "fcfs", "priority"),
    "log_level": ("debug", "info", "warning", "error"),
}
