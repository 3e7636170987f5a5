"""Examines a machine and an installation (`pando doctor`) and plans a model's memory (`pando plan`)."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Literal

from pando.core.config import BUILTIN_MODELS, KV_DTYPES, Config
from pando.errors import ModelNotFound, PandoError

GIB = 1 << 30
PACKAGES = ("torch", "numpy", "tokenizers", "safetensors", "huggingface_hub", "jinja2", "msgspec")
SERVER_PACKAGES = ("starlette", "uvicorn", "uvloop", "httptools", "rich")

State = Literal["ok", "note", "slow", "broken"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. broken: Pando can not work; slow: it works below what this machine could do."""

    name: str
    state: State
    text: str
    details: tuple[str, ...] = ()


def examine(*, measure: bool = True) -> list[Finding]:
    """All findings; with `measure`, about two seconds of memory and matrix product speed among them."""
    checks: list[Callable[[], list[Finding]]] = [_pando, _packages, _processor, _kernels, _model, _hub_cache]
    if measure:
        checks.append(_speed)
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check()
        except (PandoError, ImportError, OSError) as error:
            findings.append(Finding(check.__name__.strip("_"), "broken", f"{type(error).__name__}: {error}"))
    return findings


def as_text(findings: list[Finding]) -> str:
    """The report for people."""
    marks = {"ok": "ok    ", "note": "      ", "slow": "slow  ", "broken": "BROKEN"}
    lines = []
    for finding in findings:
        lines.append(f"{marks[finding.state]}  {finding.name:<16} {finding.text}")
        lines += [f"{'':26}{detail}" for detail in finding.details]
    return "\n".join(lines)


def as_json(findings: list[Finding]) -> str:
    """The report for programs: {name: {state, text, details}}."""
    return json.dumps({finding.name: asdict(finding) for finding in findings}, indent=1)


def _pando() -> list[Finding]:
    from pando import __version__

    where = Path(__file__).resolve().parent
    python = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    return [Finding("pando", "ok", f"{__version__} in {where}, {python}")]


def _packages() -> list[Finding]:
    def versions(names: tuple[str, ...]) -> tuple[str, list[str]]:
        found, missing = [], []
        for name in names:
            try:
                found.append(f"{name} {metadata.version(name)}")
            except metadata.PackageNotFoundError:
                missing.append(name)
        return ", ".join(found), missing

    findings = []
    for label, names in (("libraries", PACKAGES), ("server libraries", SERVER_PACKAGES)):
        text, missing = versions(names)
        if missing:
            findings.append(Finding(label, "broken", f"missing: {', '.join(missing)}; install pando-llm again"))
        else:
            findings.append(Finding(label, "ok", text))
    return findings


def _processor() -> list[Finding]:
    from pando.device import resolve_device

    device = resolve_device("auto")
    free = device.free_bytes() / GIB
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), model)
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        Finding("device", "ok", f"{device.name}, {free:.1f} GiB free"),
        Finding("processor", "ok", f"{model}, {cores} cores for this process"),
    ]


def _kernels() -> list[Finding]:
    from pando.device import resolve_device
    from pando.kernels import explain

    found = explain(resolve_device("auto").name)
    details = [f"{name}: {why or 'usable'}" for name, why in found.levels.items()]
    details += [f"{name}: {how}" for name, how in found.ops.items() if not how.startswith("native")]
    if found.isa is None:
        return [Finding("kernels", "slow", found.table, tuple(dict.fromkeys(details)))]
    native = sum(how.startswith("native") for how in found.ops.values())
    return [Finding("kernels", "ok", f"{found.table}: {native} of {len(found.ops)} ops native", tuple(details))]


def _model() -> list[Finding]:
    from pando.models.load import resolve_model_path

    folders = {name: resolve_model_path(name) for name in BUILTIN_MODELS}
    sizes = {name: sum(file.stat().st_size for file in folder.iterdir()) for name, folder in folders.items()}
    text = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in sizes.items())
    return [Finding("built-in models", "ok", text)]


def _hub_cache() -> list[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE)
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    if os.access(parent, os.W_OK):
        return [Finding("model downloads", "ok", f"go to {folder}")]
    return [Finding("model downloads", "note", f"{folder} is not writable: set HF_HOME to download models")]


def best_rate(run: Callable[[], object], amount: float, seconds: float) -> float:
    """`amount` per second of the fastest of the calls that fit into `seconds`, after one that does not count."""
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        run()
        now = time.perf_counter()
        best = min(best, now - start)
        if now >= end:
            return amount / best


def _speed() -> list[Finding]:
    """Memory read bandwidth and matrix product rate with all threads: the two ceilings of a forward pass."""
    import torch

    from pando.device import resolve_device

    name = resolve_device("auto").name
    sync = resolve_device("auto").synchronize
    data = torch.ones(48 << 20, device=name)

    def read() -> None:
        data.sum()
        sync()

    rate = best_rate(read, data.numel() * data.element_size(), 0.5)
    findings = [Finding("memory read", "note", f"{rate / 1e9:.1f} GB/s with {torch.get_num_threads()} threads")]
    rates = []
    for dtype in (torch.float32, torch.bfloat16):
        rates.append(f"{str(dtype).removeprefix('torch.')} {_matmul_rate(dtype, name, sync) / 1e9:.0f} GFLOP/s")
    findings.append(Finding("matrix product", "note", ", ".join(rates)))
    return findings


def _matmul_rate(dtype: object, device: str, sync: Callable[[], None]) -> float:
    """FLOP/s at the largest of a few sizes that is quick: a type without hardware support can be very slow."""
    import torch

    assert isinstance(dtype, torch.dtype)
    rate = 0.0
    for size in (128, 512, 1024):
        a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))

        def multiply(a: torch.Tensor = a, b: torch.Tensor = b) -> None:
            torch.mm(a, b)
            sync()

        start = time.perf_counter()
        rate = best_rate(multiply, 2.0 * size**3, 0.15)
        if time.perf_counter() - start > 0.4:
            break
    return rate


def config_folder(config: Config) -> Path:
    """Folder with the model's config.json; of a hub id nothing else is downloaded. Raises ModelNotFound."""
    from pando.models.load import resolve_model_path

    name = config.model_path
    if name.count("/") != 1 or name.startswith((".", "~", "/")) or Path(name).is_dir():
        return resolve_model_path(name, config.revision)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "config.json", revision=config.revision)).parent
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelNotFound(
            f"can not fetch the config of {name!r} from the hub: {error}", param="model_path"
        ) from error


CONTEXTS = (512, 2048, 8192, 32768, 131072)


def plan_lines(config: Config) -> list[str]:
    """What a model needs and what of it fits into the free memory. Loads no weights. ConfigError, ModelNotFound."""
    from pando.device import resolve_device
    from pando.models.cached import cache_plan
    from pando.models.load import load_spec, resolve_dtype
    from pando.models.size import ModelSize
    from pando.quant.size import matrix_bits
    from pando.runtime.memory import ModelFacts, plan_memory

    spec, raw = load_spec(config_folder(config))
    dtype = str(resolve_dtype(config.dtype, raw)).removeprefix("torch.")
    size, device = ModelSize.of(spec), resolve_device(config.device)
    facts = ModelFacts.of(size, dtype, matrix_bits(config.quantization, raw.values))
    if (kept := KV_DTYPES.get(config.kv_cache_dtype)) is not None:
        facts = replace(facts, kv_bytes_per_token=cache_plan(spec, dtype).kept_in(kept).bytes_per_token)
    free = device.free_bytes() - facts.weight_bytes
    plan = plan_memory(config, facts, free, on_cpu=not device.asynchronous)
    assumed = not device.asynchronous and config.chunked_prefill_size is None
    lines = [
        f"{config.model_path}: {size.num_parameters / 1e6:,.1f} M parameters, {dtype} on {device.name}",
        f"  weights          {_bytes(facts.weight_bytes)}",
        f"  KV cache         {facts.kv_bytes_per_token:,} bytes a token",
        f"  free             {_bytes(plan.free_bytes)} after the weights",
        f"  KV pool          {_bytes(plan.kv_bytes)}: {plan.total_tokens:,} tokens",
        f"  largest step     {_bytes(plan.workspace_bytes)} for {plan.token_budget:,} tokens"
        + (" (an assumption: the budget is measured at start)" if assumed else ""),
        f"  request table    {_bytes(plan.table_bytes)} for {plan.max_running} requests",
        f"  context          {plan.context_length:,} tokens",
    ]
    lines += [f"  because          {reason}" for reason in plan.reasons]
    lines.append("  at once          " + _concurrency(plan.concurrency, plan.context_length))
    return lines


def _concurrency(fits: Callable[[int], int], context: int) -> str:
    lengths = sorted({*(length for length in CONTEXTS if length < context), context})
    return ", ".join(f"{fits(length)} x {length:,}" for length in lengths) + " tokens"


def _bytes(count: int) -> str:
    for unit, name in ((GIB, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} bytes"
