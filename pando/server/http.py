"""The ASGI app: routing, keys, limits, errors. Everything that is not about one API dialect."""

from __future__ import annotations

import hmac
import logging
import re
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Mount, Route, Router
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pando.core.config import Config
from pando.engine_client import EngineClient
from pando.errors import AuthenticationFailed, PandoError
from pando.server import admin, health, metrics, native, openai_chat, openai_completions, openai_models, parsing, tokens
from pando.server.exchange import MethodNotAllowed, RouteNotFound, error_response
from pando.server.service import Service

logger = logging.getLogger(__name__)

UI_FOLDER = Path(__file__).parent / "ui"
OPEN_PATHS = frozenset({"/", "/health", "/health_generate", "/ready", "/live", "/ping", "/version", "/metrics"})
"""Paths that need no key; the page's files under /ui do not either. They hold nothing of anybody's requests."""
PAGE_POLICY = b"default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"


def create_app(client: EngineClient, config: Config) -> ASGIApp:
    """The server's app around a client that has been started."""
    return create_service_app(Service(config, client))


def create_service_app(service: Service) -> ASGIApp:
    """The server's app around a service whose engine may still be loading."""
    routes: Sequence[BaseRoute] = [
        *health.routes,
        *native.routes,
        *admin.routes,
        *tokens.routes,
        *parsing.routes,
        *metrics.routes,
        *openai_models.routes,
        *openai_chat.routes,
        *openai_completions.routes,
        Route("/", _front_page, methods=["GET"]),
        Mount("/ui", StaticFiles(directory=UI_FOLDER, html=True, check_dir=False)),
    ]
    return Gate(Router(routes, redirect_slashes=False), service)


async def _front_page(request: Request) -> Response:
    """The chat page for browsers, one line of text for everybody else."""
    page = UI_FOLDER / "index.html"
    if "text/html" in request.headers.get("accept", "") and page.is_file():
        return FileResponse(page, headers={"cache-control": "no-cache"})
    return PlainTextResponse("Pando is running")


class Gate:
    """Outermost ASGI layer: tidies the path, checks the key, numbers the request, turns exceptions into replies."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self.service = service
        self._keys = [key.encode() for key in service.config.api_key]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["pando"] = self.service
        scope["app"] = self  # makes the router raise its 404 and 405 instead of answering them in plain text
        _tidy_path(scope)
        reply = _Reply(scope, send)
        try:
            self._check_key(scope)
            await self._app(scope, receive, reply.send)
        except ClientDisconnect:
            reply.status = 499
        except Exception as error:
            if reply.status:  # the reply had begun: nothing can be said any more
                logger.exception("a reply broke off")
                return
            await error_response(_known_error(error, scope))(scope, receive, reply.send)
        finally:
            self.service.http_replies[scope["method"], _route_of(scope), reply.status] += 1
            logger.debug("%s %s -> %s in %.3f s", scope["method"], scope["path"], reply.status, reply.seconds)

    def _check_key(self, scope: Scope) -> None:
        path = scope["path"]
        if not self._keys or path in OPEN_PATHS or path.startswith("/ui") or scope["method"] == "OPTIONS":
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-api-key", b"")
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer":
            given = token.strip()
        # All keys are compared, each in constant time, so that timing tells nothing about any of them.
        if sum(hmac.compare_digest(given, key) for key in self._keys) == 0:
            what = "wrong API key" if given else "no API key"
            raise AuthenticationFailed(f"{what}; send the header 'Authorization: Bearer KEY' or 'x-api-key: KEY'")


class _Reply:
    """Notes the status and adds the request id to the headers."""

    def __init__(self, scope: Scope, send: Send) -> None:
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        self.request_id = given[:128] or uuid.uuid4().hex.encode()
        self.status = 0
        self._started = time.monotonic()
        self._send = send
        self._page = scope["path"] == "/" or scope["path"].startswith("/ui")

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self.request_id)]
            if self._page:
                message["headers"].append((b"content-security-policy", PAGE_POLICY))
        await self._send(message)


def _known_error(error: Exception, scope: Scope) -> PandoError:
    """The error to show. What we did not raise ourselves goes to the log, and only that it happened to the client."""
    if isinstance(error, PandoError):
        return error
    path = f"{scope['method']} {scope['path']}"
    if isinstance(error, HTTPException) and error.status_code == 405:
        return MethodNotAllowed(f"{path}: this path does not take {scope['method']}")
    if isinstance(error, HTTPException) and error.status_code == 404:
        return RouteNotFound(f"{path}: no such route{_route_hint(scope['path'])}")
    logger.exception("%s failed", path)
    return PandoError("internal error; the server's log has more")


def _route_hint(path: str) -> str:
    if path.startswith("/v1/v1/"):
        return "; the base URL should end in one /v1"
    if path in ("/chat/completions", "/completions", "/responses", "/messages", "/embeddings"):
        return f"; set the client's base URL to end in /v1 (/v1{path})"
    return ""


def _tidy_path(scope: Scope) -> None:
    """`//v1/models/` means /v1/models: base URLs get joined with a slash too many or end in one."""
    path: str = scope["path"]
    if "//" in path or (path.endswith("/") and len(path) > 1 and not path.startswith("/ui")):
        path = re.sub(r"/{2,}", "/", path)
        scope["path"] = (path.rstrip("/") or "/") if not path.startswith("/ui") else path
        scope["raw_path"] = scope["path"].encode()


def _route_of(scope: Scope) -> str:
    """The route's path for counters; never the client's own text, which could be endless in kind."""
    path = getattr(scope.get("route"), "path", None)
    return path if isinstance(path, str) else "unknown"
