"""Operating the engine: flush the cache, abort requests, pause and continue."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp

from pando.errors import EngineUnavailable, InvalidRequest, PandoError
from pando.server.exchange import get, json_response, post, read_json, service_of


class AbortBody(msgspec.Struct):
    """The body of /abort_request: one exact request id, or all."""

    rid: str | None = None
    abort_all: bool = False


async def flush_cache(request: Request) -> ASGIApp:
    """Empty the prefix cache. 400 while requests run."""
    client = service_of(request).require()
    try:
        if client.num_open:
            raise InvalidRequest(f"{client.num_open} requests are running; flush the cache when none is")
        await client.control("flush_cache")
    except EngineUnavailable:
        raise
    except PandoError as error:
        raise InvalidRequest(f"the cache was not flushed: {error.message}") from None
    return json_response({"success": True, "message": "Cache flushed."})


async def abort_request(request: Request) -> ASGIApp:
    """Abort the request with exactly this id, or all. An id that is not running is no error: it may just have ended."""
    body = await read_json(request, AbortBody)
    if not body.abort_all and not body.rid:
        raise InvalidRequest("give rid, or abort_all: true", param="rid")
    service_of(request).require().abort(None if body.abort_all else body.rid)
    return json_response({"success": True})


async def pause_generation(request: Request) -> ASGIApp:
    """Stop after the current step. Requests are kept and wait."""
    service = service_of(request)
    await service.require().control("pause")
    service.paused = True
    return json_response({"success": True, "message": "Generation paused."})


async def continue_generation(request: Request) -> ASGIApp:
    """Go on after a pause."""
    service = service_of(request)
    await service.require().control("resume")
    service.paused = False
    return json_response({"success": True, "message": "Generation continued."})


routes = [
    get("/flush_cache", flush_cache),
    post("/flush_cache", flush_cache),
    post("/abort_request", abort_request),
    post("/pause_generation", pause_generation),
    post("/continue_generation", continue_generation),
]
