"""One HTTP exchange: reading a JSON body within limits, writing JSON and errors, naming routes."""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from pando.errors import InvalidRequest, PandoError
from pando.server.service import Service
from pando.server.sse import encode_json, error_body

logger = logging.getLogger(__name__)

BODY_LIMIT = 64 * 1024 * 1024
"""Bytes of a request body at most."""

Handler = Callable[[Request], Awaitable[ASGIApp]]
T = TypeVar("T", bound=msgspec.Struct)


class BodyTooLarge(PandoError):
    """The request body is larger than BODY_LIMIT."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class RouteNotFound(PandoError):
    """No such path or method."""

    status = 404
    type = "not_found_error"
    code = "route_not_found"


class MethodNotAllowed(PandoError):
    """The path exists, but not with this method."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


def json_response(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON reply."""
    return Response(encode_json(value), status, headers, "application/json")


def error_response(error: PandoError) -> Response:
    """An error reply, with a hint for clients that retry by themselves."""
    headers = {}
    if error.status in (429, 503):
        headers["retry-after"] = "1"
    elif error.status >= 500:
        headers["x-should-retry"] = "false"
    return json_response(error_body(error), error.status, headers)


def service_of(request: Request) -> Service:
    """The service that this app was made for."""
    service = request.scope["pando"]
    assert isinstance(service, Service)
    return service


async def read_body(request: Request) -> bytes:
    """The body. Raises BodyTooLarge beyond BODY_LIMIT, before the rest is read."""
    too_large = BodyTooLarge(f"the body is larger than {BODY_LIMIT} bytes; send less in one request")
    if int(request.headers.get("content-length") or 0) > BODY_LIMIT:
        raise too_large
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > BODY_LIMIT:
            raise too_large
        parts.append(part)
    return b"".join(parts)


async def read_json(request: Request, kind: type[T]) -> T:
    """The JSON body as a `kind`. Unknown fields are ignored. Raises InvalidRequest that names the field."""
    body = await read_body(request)
    try:
        value = msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        path = re.search(r"at `\$\.?([^`]*)`", str(error))
        raise InvalidRequest(str(error), param=path.group(1) or None if path else None) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}", param=None) from None
    if logger.isEnabledFor(logging.DEBUG):
        unknown = set(msgspec.json.decode(body, type=dict[str, msgspec.Raw])) - set(kind.__struct_fields__)
        if unknown:
            logger.debug("%s: ignored fields: %s", request.url.path, ", ".join(sorted(unknown)))
    return value


def get(path: str, handler: Handler) -> Route:
    """A GET route."""
    return Route(path, handler, methods=["GET"])


def post(path: str, handler: Handler) -> Route:
    """A POST route."""
    return Route(path, handler, methods=["POST"])
