"""`GET /metrics`: Prometheus text. Own names, and those that existing dashboards and routers ask for.

Counters and gauges come from the engine, durations are measured in this process. No label tells requests apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from pando.core.metrics import Histogram
from pando.engine_client import EngineClient
from pando.errors import EngineUnavailable
from pando.server.exchange import get, service_of
from pando.server.service import Service

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Sample = tuple[str, str, float]
"""(name, kind, value)"""

_VLLM_COUNTERS = {
    "vllm:prompt_tokens_total": "prompt_tokens_total",
    "vllm:prompt_tokens_cached_total": "cached_tokens_total",
    "vllm:generation_tokens_total": "generation_tokens_total",
    "vllm:num_preemptions_total": "retracted_total",
    "vllm:prefix_cache_queries_total": "prompt_tokens_total",
    "vllm:prefix_cache_hits_total": "cached_tokens_total",
}
_SGLANG_COUNTERS = {
    "sglang:prompt_tokens_total": "prompt_tokens_total",
    "sglang:generation_tokens_total": "generation_tokens_total",
    "sglang:cached_tokens_total": "cached_tokens_total",
    "sglang:evicted_tokens_total": "evicted_tokens_total",
    "sglang:num_requests_total": "requests_total",
    "sglang:num_aborted_requests_total": "finished_abort_total",
}
_GAUGES = {
    "vllm:num_requests_running": "num_running",
    "vllm:num_requests_waiting": "num_waiting",
    "sglang:num_running_reqs": "num_running",
    "sglang:num_queue_reqs": "num_waiting",
    "sglang:kv_evictable_tokens": "kv_tokens_evictable",
    "sglang:max_total_num_tokens": "kv_tokens_total",
}
_TOTAL_GAUGES = frozenset({"kv_tokens_total"})
"""Sizes whose name ends like a counter's."""

_HISTOGRAMS = {
    "time_to_first_token_seconds": "time_to_first_token",
    "inter_token_latency_seconds": "inter_token_latency",
    "e2e_request_latency_seconds": "e2e_latency",
}


async def metrics(request: Request) -> ASGIApp:
    """All metrics. Before the engine is ready, and after its end, those of this process alone."""
    service = service_of(request)
    stats: dict[str, float] = {}
    if service.client is not None and service.client.closed is None:
        try:
            stats = await service.client.stats()
        except EngineUnavailable:
            stats = {}
    return Response("\n".join(_lines(service, stats)) + "\n", media_type=CONTENT_TYPE)


def _lines(service: Service, stats: Mapping[str, float]) -> Iterable[str]:
    yield from _plain("pando_up", "gauge", float(bool(stats)))
    yield from _http_lines(service)
    if service.client is None:
        return
    label = f'{{model_name="{_escape(service.client.info.model_name)}"}}'
    for name, kind, value in engine_samples(service.client, stats):
        yield from _plain(name, kind, value, label)
    yield from _finished_lines(service.client, stats)
    measured = service.client.metrics
    for prefix in ("pando_", "vllm:", "sglang:"):
        for name, field in _HISTOGRAMS.items():
            yield from _histogram(prefix + name, getattr(measured, field), label)
    yield from _histogram("vllm:request_prompt_tokens", measured.prompt_tokens, label)
    yield from _histogram("vllm:request_generation_tokens", measured.generation_tokens, label)
    info = service.client.info
    pages = info.max_total_num_tokens // info.page_size
    yield "# TYPE vllm:cache_config_info gauge"
    yield f'vllm:cache_config_info{{block_size="{info.page_size}",num_gpu_blocks="{pages}"}} 1'


def engine_samples(client: EngineClient, stats: Mapping[str, float]) -> list[Sample]:
    """The engine's counters and gauges under all their names; those it does not report are left out."""
    samples: list[Sample] = []
    for name, value in stats.items():
        if isinstance(value, int | float):
            is_counter = name.endswith("_total") and name not in _TOTAL_GAUGES
            samples.append((f"pando_{name}", "counter" if is_counter else "gauge", value))
    for table, kind in ((_VLLM_COUNTERS, "counter"), (_SGLANG_COUNTERS, "counter"), (_GAUGES, "gauge")):
        samples += [(name, kind, stats[source]) for name, source in table.items() if source in stats]
    samples += _derived(client, stats)
    return samples


def _derived(client: EngineClient, stats: Mapping[str, float]) -> list[Sample]:
    """Ratios, and facts of the configuration."""
    info = client.info
    samples: list[Sample] = [
        ("pando_open_sequences", "gauge", client.num_open),
        ("vllm:admission_rejections_total", "counter", client.metrics.rejected),
        ("pando_schema_relaxed_total", "counter", client.metrics.relaxed),
        ("pando_schema_violations_total", "counter", client.metrics.violations),
        ("sglang:page_size", "gauge", info.page_size),
        ("sglang:num_pages", "gauge", info.max_total_num_tokens // info.page_size),
        ("sglang:context_len", "gauge", info.context_length),
    ]
    total, used = stats.get("kv_tokens_total"), stats.get("kv_tokens_used")
    if total and used is not None:
        # Dashboards and routers mean what is not to be had: prefixes that may be evicted count as free.
        locked = used - stats.get("kv_tokens_evictable", 0)
        samples += [
            ("vllm:kv_cache_usage_perc", "gauge", locked / total),
            ("sglang:token_usage", "gauge", locked / total),
        ]
        samples += [("sglang:num_used_tokens", "gauge", locked), ("sglang:kv_used_tokens", "gauge", locked)]
        samples.append(("sglang:kv_available_tokens", "gauge", total - used))
    if stats.get("prompt_tokens_total") and "cached_tokens_total" in stats:
        rate = stats["cached_tokens_total"] / stats["prompt_tokens_total"]
        samples.append(("sglang:cache_hit_rate", "gauge", rate))
    return samples


def _finished_lines(client: EngineClient, stats: Mapping[str, float]) -> Iterable[str]:
    model = _escape(client.info.model_name)
    yield "# TYPE vllm:request_success_total counter"
    for kind in ("stop", "length", "abort", "error"):
        count = stats.get(f"finished_{kind}_total", client.metrics.finished[kind])
        yield f'vllm:request_success_total{{model_name="{model}",finished_reason="{kind}"}} {_number(count)}'


def _http_lines(service: Service) -> Iterable[str]:
    yield "# TYPE http_requests_total counter"
    totals: dict[tuple[str, str, str], int] = {}
    for (method, handler, status), count in service.http_replies.items():
        key = (method, handler, f"{status // 100}xx")
        totals[key] = totals.get(key, 0) + count
    for (method, handler, family), count in sorted(totals.items()):
        labels = f'method="{_escape(method)}",handler="{_escape(handler)}",status="{family}"'
        yield f"http_requests_total{{{labels}}} {count}"


def _plain(name: str, kind: str, value: float, label: str = "") -> Iterable[str]:
    yield f"# TYPE {name} {kind}"
    yield f"{name}{label} {_number(value)}"


def _histogram(name: str, histogram: Histogram, label: str) -> Iterable[str]:
    yield f"# TYPE {name} histogram"
    inner = label[1:-1]
    for bound, count in histogram.cumulative():
        yield f'{name}_bucket{{{inner},le="{bound}"}} {count}'
    yield f"{name}_sum{label} {_number(histogram.sum)}"
    yield f"{name}_count{label} {histogram.total}"


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(float(value))


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


routes = [get("/metrics", metrics)]
