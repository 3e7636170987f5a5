"""Is the server alive, is it ready, what does it serve."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp

import pando
from pando.core.sampling import SamplingParams
from pando.errors import EngineUnavailable
from pando.server.exchange import get, json_response, post, service_of
from pando.server.service import Service
from pando.server.sse import collect_connected

FRESH_SECONDS = 5.0
"""/health_generate needs no token of its own if one flowed this recently."""
PROBE_SECONDS = 60.0
STALL_SECONDS = 60.0
"""The engine gives a sign of life every second, and after each step; silence this long means that it hangs."""


async def health(request: Request) -> ASGIApp:
    """200 while the engine is there; 503 with the start-up phase before, and with the reason after its end."""
    status, body = _state(service_of(request))
    return json_response(body, status)


async def ready(request: Request) -> ASGIApp:
    """200 if new requests are taken: not while loading, paused or shutting down."""
    service = service_of(request)
    status, body = _state(service)
    if status == 200 and (service.draining or service.paused):
        status, body = 503, {"status": "draining" if service.draining else "paused"}
    return json_response({**body, "ready": status == 200}, status)


def _state(service: Service) -> tuple[int, dict[str, Any]]:
    phase = service.phase
    if service.client is None:
        detail = {"phase": phase.phase, "fraction": phase.fraction, "detail": phase.detail}
        return 503, {"status": "loading", **detail, "elapsed": round(time.time() - service.started_at, 3)}
    if service.client.closed is not None:
        return 503, {"status": "dead", "reason": service.client.closed}
    silent = time.monotonic() - service.client.last_reply_at
    if silent > STALL_SECONDS:
        return 503, {"status": "stalled", "reason": f"the engine has been silent for {silent:.0f} s"}
    return 200, {"status": "ok"}


async def health_generate(request: Request) -> ASGIApp:
    """200 if a token flowed in the last seconds; else one is generated for the purpose."""
    client = service_of(request).require()
    if time.monotonic() - client.last_token_at > FRESH_SECONDS or not client.last_token_at:
        params = SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True)
        generation = client.submit(client.sequences([0], params))
        try:
            done = await asyncio.wait_for(collect_connected(request.receive, generation), PROBE_SECONDS)
        except (asyncio.TimeoutError, TimeoutError):
            raise EngineUnavailable(f"no token came in {PROBE_SECONDS:.0f} s") from None
        finish = done[0].finish
        if finish is None or finish.kind == "abort":
            raise EngineUnavailable(f"generating a token failed: {finish.message if finish else 'no end'}")
    return json_response({"status": "ok"})


async def model_info(request: Request) -> ASGIApp:
    """What is served, briefly."""
    info = service_of(request).require().info
    return json_response(
        {
            "model_path": info.model_path,
            "tokenizer_path": info.tokenizer_path or info.model_path,
            "served_model_name": info.model_name,
            "is_generation": True,
            "weight_version": info.weight_version,
            "context_length": info.context_length,
            "architecture": info.architecture,
            "num_parameters": info.num_parameters,
        }
    )


async def server_info(request: Request) -> ASGIApp:
    """Everything about the engine, with its counters now."""
    service = service_of(request)
    client = service.require()
    info: dict[str, Any] = msgspec.to_builtins(client.info)
    stats = await client.stats()
    info["version"] = info["version"] or pando.__version__
    return json_response(
        {
            **info,
            "max_total_num_tokens": client.info.max_total_num_tokens,
            "has_chat_template": client.tokenizer.chat_template is not None,
            "uptime_seconds": round(time.time() - service.started_at, 3),
            "stats": stats,
            "internal_states": [stats],
        }
    )


async def stats(request: Request) -> ASGIApp:
    """The engine's counters and gauges as flat JSON."""
    return json_response(await service_of(request).require().stats())


async def version(request: Request) -> ASGIApp:
    """The version of the software."""
    return json_response({"version": pando.__version__})


routes = [
    get("/health", health),
    get("/live", version),
    get("/ping", health),
    get("/ready", ready),
    get("/health_generate", health_generate),
    get("/get_model_info", model_info),
    get("/model_info", model_info),
    get("/server_info", server_info),
    get("/get_server_info", server_info),
    get("/stats", stats),
    get("/version", version),
    post("/ping", health),
]
