"""`/v1/models`: a union of the OpenAI and the Anthropic shape, since both SDKs ask this path."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp

from pando.errors import ModelNotFound
from pando.server.exchange import get, json_response, service_of
from pando.server.service import Service


def _model(service: Service, name: str) -> dict[str, Any]:
    info = service.require().info
    created = int(service.started_at)
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "pando",
        "root": info.model_path,
        "parent": None,
        "max_model_len": info.context_length,
        "type": "model",
        "display_name": name,
        "created_at": datetime.fromtimestamp(created, timezone.utc).isoformat().replace("+00:00", "Z"),
    }


async def list_models(request: Request) -> ASGIApp:
    """All served names."""
    service = service_of(request)
    data = [_model(service, name) for name in service.require().info.served_model_names]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return json_response({"object": "list", "data": data, "has_more": False, **ends})


async def retrieve_model(request: Request) -> ASGIApp:
    """One served name, which may contain slashes."""
    service = service_of(request)
    name = request.path_params["name"]
    if name not in service.require().info.served_model_names:
        raise ModelNotFound(f"the model {name!r} does not exist here; GET /v1/models lists what does", param="model")
    return json_response(_model(service, name))


routes = [
    get("/v1/models", list_models),
    get("/models", list_models),
    get("/v1/models/{name:path}", retrieve_model),
    get("/models/{name:path}", retrieve_model),
]
