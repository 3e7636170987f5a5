"""Builds an engine, the only place that makes objects of a Config; and runs one, in a process or a thread."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec
import torch

import pando
from pando.attention.paged import PagedAttentionBackend
from pando.cache.budget import CacheLayout
from pando.cache.manager import CacheManager
from pando.cache.pool import KVPool
from pando.cache.spec import CachePlan
from pando.core.config import BUILTIN_MODELS, KV_DTYPES, Config
from pando.core.info import EngineInfo
from pando.core.messages import ControlReply, Failure, Load
from pando.device import Device, resolve_device
from pando.errors import ConfigError, PandoError
from pando.grammar.deferred import DeferredBackend
from pando.grammar.guidance import GuidanceBackend
from pando.grammar.manager import GrammarManager
from pando.grammar.vocabulary import Vocabulary
from pando.grammar.wrappers import ReasoningWrap
from pando.kernels import set_aside, set_num_threads
from pando.kernels.compiled import with_compiler
from pando.kernels.ops import OpTable
from pando.kernels.packed_cache import PackedCache, default_folder
from pando.kernels.select import op_table
from pando.log import setup as setup_log
from pando.models.decoder import DecoderModel
from pando.models.load import load_model, resolve_model_path
from pando.models.size import ModelSize
from pando.quant.size import matrix_bits
from pando.runtime.cuda_graph import CudaRecorder
from pando.runtime.executor import ThreadedExecutor
from pando.runtime.graph import GRAPH_ROWS, GraphShape, Recorder, StepGraphs, graph_shapes
from pando.runtime.memory import GIB, MAX_RUNNING, MemoryPlan, ModelFacts, plan_memory, token_budget
from pando.runtime.prefault import PrefaultingExecutor
from pando.runtime.runner import Runner
from pando.runtime.sampler import Sampler
from pando.runtime.table import RequestTable
from pando.runtime.warmup import first_choices, first_pass, first_sizes, prefill_rate, step_bytes
from pando.scheduler.admission import Admission, Limits
from pando.scheduler.gates import Gates
from pando.scheduler.grammar_gate import GrammarGate
from pando.scheduler.policy import waiting_queue
from pando.scheduler.rules import Rules
from pando.scheduler.scheduler import Executor, Scheduler
from pando.scheduler.stats import Stats
from pando.tokenizer.stop import StopChecker
from pando.tokenizer.tokenizer import Tokenizer
from pando.transport import Inbox, LocalTransport, SocketInbox

_log = logging.getLogger(__name__)

OnPhase = Callable[[Load], None]
STOP_SECONDS = 5.0


@dataclass(slots=True)
class EngineCore:
    """A built engine: its scheduler, what it is, and why its sizes are what they are."""

    scheduler: Scheduler
    info: EngineInfo
    plan: MemoryPlan
    executor: Runner | ThreadedExecutor | PrefaultingExecutor
    tokenizer: Tokenizer
    packed: PackedCache | None = None

    def run(self) -> None:
        """The scheduler's loop, to its end; then the executor's thread, which holds the model and the pool."""
        if self.packed is not None:
            self.packed.start_writing()
        try:
            with torch.inference_mode():  # once for the thread: entering it in every step costs as much as the sampling
                self.scheduler.run()
        finally:
            if self.packed is not None:
                self.packed.close()
            self.executor.close()


def build_engine(config: Config, inbox: Inbox, on_phase: OnPhase) -> EngineCore:
    """Load the model and build everything around it. Raises ConfigError, ModelNotFound, UnsupportedModel."""
    device = resolve_device(config.device)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
        set_num_threads(config.num_threads)
    path = resolve_model_path(config.model_path, config.revision)
    reading = ThreadPoolExecutor(1, "pando-tokenizer")
    tokenizer = reading.submit(load_tokenizer, config, path)  # beside the weights
    reading.shutdown(wait=False)

    def progress(fraction: float, detail: str) -> None:
        if tokenizer.done():
            tokenizer.result()  # raises now what is wrong with it, not after minutes of reading weights
        on_phase(Load("weights", fraction, detail))

    ops = op_table(
        device.name,
        config.kernels,
        deterministic=config.enable_deterministic_inference,
        attention=config.attention_backend,
    )
    if config.enable_torch_compile:
        ops = with_compiler(ops)
    packed = packed_cache(config)
    model = load_model(
        path,
        dtype=config.dtype,
        device=device.name,
        ops=ops,
        quantization=config.quantization,
        load_format=config.load_format,
        progress=progress,
        context_length=config.context_length,
        packed=packed,
    )
    model.cache_plan = _cache_plan(config, model, ops)
    if config.enable_deterministic_inference:
        _check_deterministic(model)
    on_phase(Load("warmup", 0.0, "first pass"))
    # What torch compiles, it compiles for the mode that the loop runs in.
    with torch.inference_mode(config.enable_torch_compile):
        plan = _plan(config, model, device, ops)
        on_phase(Load("memory", 1.0, f"KV pool of {plan.total_tokens:,} tokens"))
        model.set_context_length(plan.context_length)
        runner, pool = _runner(config, plan, model, device, ops, _recorder(config, device, ops))
        first_pass(runner, pool, device)
        if config.enable_torch_compile:
            first_sizes(runner, pool, model, device)
        if device.asynchronous:
            first_choices(runner, pool, model.vocab_size, device)
        _record_steps(runner, plan, model, device, on_phase)
    for reason in plan.reasons:
        _log.info(reason)
    info = _info(config, plan, model, device, ops, path)
    executor = _executor(config, runner, pool, device)
    scheduler = _scheduler(config, plan, model, executor, inbox, info, tokenizer.result())
    return EngineCore(scheduler, info, plan, executor, tokenizer.result(), packed)


def _executor(
    config: Config, runner: Runner, pool: KVPool, device: Device
) -> Runner | ThreadedExecutor | PrefaultingExecutor:
    if config.overlap == "off":
        runner.depth = 0
    if device.asynchronous:
        return runner
    executor = ThreadedExecutor(runner) if config.overlap == "on" else runner
    num_bytes = int(config.kv_prefault_gb * 1e9)
    return PrefaultingExecutor(executor, pool, num_bytes, device.free_bytes) if num_bytes else executor


def packed_cache(config: Config) -> PackedCache | None:
    """Where packed weights are kept; None if nowhere."""
    folder = default_folder() if config.packed_cache == "auto" else Path(config.packed_cache).expanduser()
    if config.packed_cache == "off" or folder is None or config.packed_cache_gb == 0.0:
        return None
    return PackedCache(folder, int(config.packed_cache_gb * 1e9))


def load_tokenizer(config: Config, model_folder: Path) -> Tokenizer:
    """The tokenizer of the configuration, with the chat template it names."""
    folder = model_folder if config.tokenizer_path is None else resolve_model_path(config.tokenizer_path)
    return Tokenizer.load(folder, Path(config.chat_template) if config.chat_template else None)


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` of torch.float32."""
    return str(dtype).removeprefix("torch.")


def _cache_plan(config: Config, model: DecoderModel, ops: OpTable) -> CachePlan:
    """What the model's layers keep, in the dtype asked for. Raises ConfigError if that can not be had."""
    kept = KV_DTYPES.get(config.kv_cache_dtype)
    if kept is not None:
        if kept not in ops.kv_dtypes:
            others = " or ".join((*(name for name, dtype in KV_DTYPES.items() if dtype in ops.kv_dtypes), "auto"))
            raise ConfigError(
                f"the kernels {ops.name} have no attention over keys and values in {config.kv_cache_dtype} here; "
                f"use --kv-cache-dtype {others}",
                param="kv_cache_dtype",
            )
        return model.cache_plan.kept_in(kept)
    if config.kv_cache_dtype == "bf16" and model.dtype is not torch.bfloat16:
        raise ConfigError(
            f"kv_cache_dtype is 'bf16', the model's dtype {dtype_name(model.dtype)}; "
            "use --dtype bfloat16, or --kv-cache-dtype auto",
            param="kv_cache_dtype",
        )
    return model.cache_plan


def _check_deterministic(model: DecoderModel) -> None:
    """Raise ConfigError for models with parts that torch computes: its sums depend on the batch."""
    obstacle = ""
    if model.fused is None:
        obstacle = "has layers that native kernels have no instructions for"
    elif model.spec.final_softcap > 0:
        obstacle = "caps its logits"
    if obstacle:
        raise ConfigError(
            f"enable_deterministic_inference can not be promised: {model.spec.family} {obstacle}",
            param="enable_deterministic_inference",
        )


def _plan(config: Config, model: DecoderModel, device: Device, ops: OpTable) -> MemoryPlan:
    """The memory plan; on a CPU the prefill rate is measured first, because the token budget follows from it."""
    on_cpu = not device.asynchronous
    rate = None
    if on_cpu and config.chunked_prefill_size is None:
        probe = MemoryPlan(512, min(512, model.max_position), 1, 512, 0, 0, 0, 0, num_states=1)
        rate = prefill_rate(*_runner(config, probe, model, device, ops), device)
    activations = None
    if not on_cpu:
        budget = min(token_budget(config, on_cpu, None, []), model.max_position) + 2 * config.page_size
        probe = MemoryPlan(budget, budget, 1, budget, 0, 0, 0, 0, num_states=2)
        activations = step_bytes(*_runner(config, probe, model, device, ops), budget, device)
    num_graphs = 0
    if _recorder(config, device, ops) is not None:
        running = config.max_running_requests or MAX_RUNNING
        num_graphs = len(_graph_shapes(config, config.context_length or model.max_position, running))
    facts = ModelFacts.of(
        ModelSize.of(model.spec), dtype_name(model.dtype), matrix_bits(config.quantization, model.config_dict)
    )
    kept = model.cache_plan  # which may be in other bits than the model
    facts = replace(facts, kv_bytes_per_token=kept.bytes_per_token, window_bytes_per_token=kept.window_bytes_per_token)
    return plan_memory(
        config,
        facts,
        device.free_bytes(),
        on_cpu=on_cpu,
        tokens_per_second=rate,
        activation_bytes=activations,
        num_graphs=num_graphs,
    )


def _recorder(config: Config, device: Device, ops: OpTable) -> Recorder | None:
    """What records steps; None if they all run kernel by kernel."""
    wanted = device.asynchronous and not config.disable_cuda_graph and ops.capturable
    return CudaRecorder() if wanted else None


def _graph_shapes(config: Config, context_length: int, max_running: int) -> list[GraphShape]:
    return graph_shapes(min(config.cuda_graph_max_bs or GRAPH_ROWS, max_running), context_length, config.page_size)


def _record_steps(runner: Runner, plan: MemoryPlan, model: DecoderModel, device: Device, on_phase: OnPhase) -> None:
    """Record the steps of all shapes, if steps are recorded here. What can not be recorded runs as it is."""
    if runner.graphs is None:
        return
    model.reserve_positions(plan.context_length)  # recorded steps read these tables: they may not move
    graphs, before = runner.graphs, device.free_bytes()
    try:
        graphs.record_all(lambda done, total: on_phase(Load("graphs", done / total, f"{done} of {total} steps")))
    except RuntimeError as error:
        _log.warning("%d steps recorded, the others run kernel by kernel: %s", graphs.num_recorded, error)
    taken = before - device.free_bytes()
    plan.reasons.append(
        f"{graphs.num_recorded} recorded steps take {taken / GIB:.2f} GiB, {plan.graph_bytes / GIB:.2f} were kept"
    )


def _runner(
    config: Config,
    plan: MemoryPlan,
    model: DecoderModel,
    device: Device,
    ops: OpTable,
    recorder: Recorder | None = None,
) -> tuple[Runner, KVPool]:
    """A runner. With a recorder the pool and the table have room for one more sequence, which fills steps up."""
    page = config.page_size
    spare = int(recorder is not None)
    num_pages = [num + spare for num in _num_pages(plan, page)]
    pool = KVPool(
        model.cache_plan,
        num_pages[0],
        page,
        device.name,
        model.dtype,
        num_window_pages=sum(num_pages[1:]),
        num_states=plan.num_states + spare if plan.num_states else 0,
    )
    table = RequestTable(plan.max_running + spare, plan.context_length, page, device, ops, pool.num_groups)
    attention, graphs = PagedAttentionBackend(pool, ops), None
    if recorder is not None:
        shapes = _graph_shapes(config, plan.context_length, plan.max_running)
        graphs = StepGraphs(model, attention, table, recorder, shapes)
    return Runner(model, attention, table, Sampler(ops, table), device, graphs), pool


def _scheduler(
    config: Config,
    plan: MemoryPlan,
    model: DecoderModel,
    executor: Executor,
    inbox: Inbox,
    info: EngineInfo,
    tokenizer: Tokenizer,
) -> Scheduler:
    cache = _cache(config, plan, model)
    limits = Limits(plan.token_budget, plan.max_running, plan.context_length, config.page_size)
    stats = Stats()
    rules = Rules(
        context_length=plan.context_length,
        vocab_size=info.vocab_size,
        max_queued=config.max_queued_requests,
        eos_token_ids=frozenset(info.eos_token_ids),
        stop_checker=lambda sampling: StopChecker(sampling, tokenizer),
        info=msgspec.to_builtins(info),
    )
    admission = Admission(cache, waiting_queue(config.schedule_policy, cache), limits, stats)
    return Scheduler(executor, admission, inbox, Gates([_grammar_gate(info, tokenizer, stats)]), stats, rules)


SHORT_STEP_SECONDS = 0.008


@contextlib.contextmanager
def _processor_aside(stats: Stats) -> Iterator[None]:
    """Leave a processor to a compile while steps are short: without it they take a little longer, but none waits for a
    turn of the system's scheduler. Long steps lose more by the missing processor than by such turns."""
    change = int(stats.forward_seconds < SHORT_STEP_SECONDS * stats.steps)
    set_aside(change)
    try:
        yield
    finally:
        set_aside(-change)


def _grammar_gate(info: EngineInfo, tokenizer: Tokenizer, stats: Stats) -> GrammarGate:
    def backend() -> GuidanceBackend:
        return GuidanceBackend(Vocabulary.of(tokenizer, info.eos_token_ids, info.vocab_size), apart=True)

    width = max(tokenizer.vocab_size, info.vocab_size)
    wrap = ReasoningWrap(tokenizer.vocab_size, width, info.eos_token_ids)
    return GrammarGate(GrammarManager(DeferredBackend(backend), around=partial(_processor_aside, stats)), wrap=wrap)


def _cache(config: Config, plan: MemoryPlan, model: DecoderModel) -> CacheManager:
    kept, page = model.cache_plan, config.page_size
    num_pages = _num_pages(plan, page) if kept.bytes_per_token else [0]
    size = ModelSize.of(model.spec)
    return CacheManager(
        cache_layout(kept, page, windows=plan.windows is not None),
        max(plan.cache_bytes, plan.kv_bytes),
        num_slots=[*num_pages, plan.num_states] if kept.bytes_per_state else num_pages,
        policy=config.radix_eviction_policy,
        admission=config.state_checkpoints,
        profile=_Flops(size),
        sharing=not config.disable_radix_cache,
    )


def cache_layout(kept: CachePlan, page_size: int, *, windows: bool) -> CacheLayout:
    """What the cache accounts for; windows: layers with a sliding window have pages of their own."""
    inside = kept.window_bytes_per_token if windows else 0
    return CacheLayout(
        page_size,
        kept.bytes_per_token - inside,
        window=kept.window if windows else 0,
        window_bytes_per_token=inside,
        state_bytes=kept.bytes_per_state,
    )


def _num_pages(plan: MemoryPlan, page: int) -> list[int]:
    """Pages of each group; none of the first if all layers have a window of their own pages."""
    if plan.windows is None:
        return [-(-plan.total_tokens // page)]
    full = plan.total_tokens // page if plan.windows.full_bytes_per_token else 0
    return [full, plan.windows.tokens // page]


@dataclass(frozen=True, slots=True)
class _Flops:
    """What the cache's policies ask of a model."""

    size: ModelSize

    def flops(self, num_tokens: int) -> float:
        """Operations of a prefill of `num_tokens` tokens."""
        return float(self.size.prefill_flops(num_tokens)) if num_tokens else 0.0


def _info(
    config: Config, plan: MemoryPlan, model: DecoderModel, device: Device, ops: OpTable, path: Path
) -> EngineInfo:
    names = list(config.served_model_name) or [Path(config.model_path).name or config.model_path]
    architectures = model.config_dict.get("architectures")
    return EngineInfo(
        model_path=config.model_path,
        served_model_names=names,
        context_length=plan.context_length,
        vocab_size=model.vocab_size,
        max_total_num_tokens=plan.total_tokens,
        tokenizer_path=str(config.tokenizer_path or path),
        page_size=config.page_size,
        max_running_requests=plan.max_running,
        max_queued_requests=config.max_queued_requests,
        dtype=dtype_name(model.dtype),
        device=device.name,
        kernels=ops.name,
        architecture=str(architectures[0]) if isinstance(architectures, list) and architectures else "",
        eos_token_ids=list(model.eos_token_ids),
        version=pando.__version__,
        num_parameters=model.num_parameters,
        generation_defaults=_generation_defaults(path),
        is_builtin=config.model_path in BUILTIN_MODELS,
    )


_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def _generation_defaults(path: Path) -> dict[str, float]:
    """Sampling defaults that the model's generation_config sets, under our names."""
    file = path / "generation_config.json"
    if not file.is_file():
        return {}
    values = msgspec.json.decode(file.read_bytes(), type=dict[str, object])
    found = {name: value for name in _DEFAULTS if isinstance(value := values.get(name), (int, float))}
    if values.get("do_sample") is False:
        found["temperature"] = 0.0
    if found.get("top_k") == 0:
        found["top_k"] = -1
    return found


# -- in a thread of this process


@dataclass(slots=True)
class EngineThread:
    """A running engine in this process."""

    transport: LocalTransport
    core: EngineCore
    thread: threading.Thread

    def join(self, timeout: float = STOP_SECONDS) -> None:
        """Wait for the loop's end, after a shutdown command or a closed transport."""
        self.thread.join(timeout)


def start_engine_thread(config: Config, on_phase: OnPhase = lambda load: None) -> EngineThread:
    """Build an engine and run its loop in a daemon thread."""
    transport = LocalTransport()
    core = build_engine(config, transport.inbox, on_phase)

    def loop() -> None:
        try:
            core.run()
        finally:
            transport.inbox.close("the engine was shut down")

    thread = threading.Thread(target=loop, name="pando-engine", daemon=True)
    thread.start()
    return EngineThread(transport, core, thread)


# -- in a process of its own; pando.engine_process starts it, through pando.engine_main


def main(fd: int) -> int:
    """Entry of the engine process: config on standard input, the socket as file descriptor `fd`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the API process decides when to stop
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # nothing is left to save
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=Config)
    setup_log(config.log_level)
    sock = socket.socket(fileno=fd)
    threading.Thread(target=_end_with_parent, args=(sock,), name="pando-parent", daemon=True).start()
    inbox = SocketInbox(sock)
    last, phase = 0.0, ""

    def report(load: Load) -> None:
        nonlocal last, phase
        now = time.monotonic()
        if load.phase != phase or load.fraction >= 1.0 or now - last > 0.1:
            last, phase = now, load.phase
            inbox.send([load])

    try:
        core = build_engine(config, inbox, report)
    except PandoError as error:
        inbox.send([Failure(rid="", code=error.code, message=error.message, param=error.param)])
        return 1
    except Exception as error:
        _log.exception("the engine could not start")
        inbox.send([Failure(rid="", code="internal_error", message=f"the engine could not start: {error!r}")])
        return 1
    settle()
    inbox.send([ControlReply(0, msgspec.to_builtins(core.info))])
    core.run()
    return 0


def settle() -> None:
    """Make this process one that serves: short turns of the interpreter, and no collection of what is there already.

    The loop gives the interpreter up in every native call, and waits at most this long to have it back from a thread
    that reads a grammar, instead of 5 ms.
    """
    sys.setswitchinterval(0.0002)
    gc.collect()
    gc.freeze()


def _end_with_parent(sock: socket.socket) -> None:
    """End this process when the API process is gone, however it ended and whatever is running here."""
    watch = select.poll()
    watch.register(sock, getattr(select, "POLLRDHUP", 0))  # and POLLHUP, which is always reported
    watch.poll()
    os._exit(0)
