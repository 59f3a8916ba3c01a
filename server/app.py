"""The HTTP surface: the websocket, the page, health and metrics; who may reach them."""

from __future__ import annotations

import hmac
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from server import connection
from server.hub import Hub
from server.options import ServerOptions, is_loopback

PAGE = Path(__file__).parent / "page"
KEY_SUBPROTOCOL = "openai-insecure-api-key."


def build(hub: Hub) -> Starlette:
    async def realtime(websocket: WebSocket) -> None:
        denied = denial(websocket, hub.options)
        if denied is None:
            await connection.serve(websocket, hub)
            return
        status, code, message = denied
        hub.metrics.refused.labels(code).inc()
        await websocket.send_denial_response(_error(status, code, message))

    async def healthz(_: Request) -> Response:
        state = "draining" if hub.draining else "ok"
        body = {"status": state, "sessions": len(hub.sessions), "limit": hub.options.max_sessions}
        return JSONResponse(body, 503 if hub.draining else 200)

    async def metrics(request: Request) -> Response:
        denied = denial(request, hub.options)
        if denied is not None:
            return _error(*denied)
        return Response(hub.metrics.exposition(), media_type="text/plain; version=0.0.4")

    async def voices(request: Request) -> Response:
        denied = denial(request, hub.options)
        if denied is not None:
            return _error(*denied)
        languages = hub.pipeline.voice_languages
        listed = [
            {"name": name} | ({"language": languages[name]} if name in languages else {})
            for name in hub.pipeline.voices
        ]
        return JSONResponse({"voices": listed, "default": hub.default_config.voice})

    async def page(_: Request) -> Response:
        return FileResponse(PAGE / "index.html")

    routes: list[BaseRoute] = [
        WebSocketRoute("/v1/realtime", realtime),
        Route("/healthz", healthz),
        Route("/metrics", metrics),
        Route("/v1/audio/voices", voices),
        Route("/", page),
        Mount("/page", StaticFiles(directory=PAGE)),
    ]
    return Starlette(routes=routes, middleware=[Middleware(SecurityHeaders)])


class SecurityHeaders:
    """What the page's own meta tag cannot say."""

    HEADERS = (
        (b"x-content-type-options", b"nosniff"),
        (b"content-security-policy", b"frame-ancestors 'none'"),
        (b"cache-control", b"no-cache"),
    )

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *self.HEADERS]
            await send(message)

        await self._app(scope, receive, send_with_headers)


def denial(request: HTTPConnection, options: ServerOptions) -> tuple[int, str, str] | None:
    """Why a request is turned away, as (HTTP status, code, message)."""
    origin = request.headers.get("origin")
    if origin is not None and not _origin_admitted(origin, request, options):
        return 403, "origin_not_allowed", "This origin is not allowed; see --allowed_origins."
    if options.api_key and not _has_key(request, options.api_key):
        return 401, "invalid_api_key", "A valid API key is needed: Authorization: Bearer …"
    return None


def _origin_admitted(origin: str, request: HTTPConnection, options: ServerOptions) -> bool:
    """The server's own page, or one that was named.

    On loopback the page's host must itself be a loopback name: a foreign name that resolves
    here (DNS rebinding) would otherwise pass for the server's own.
    """
    if origin in {one.strip() for one in options.allowed_origins.split(",")}:
        return True
    parts = urlsplit(origin)
    own = parts.netloc == request.headers.get("host")
    return own and (not options.loopback or is_loopback(parts.hostname or ""))


def _has_key(request: HTTPConnection, key: str) -> bool:
    """`Authorization: Bearer KEY`, or from a browser the subprotocol that carries the key."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    offered = [given.strip()] if scheme.lower() == "bearer" else []
    offered += [
        one.removeprefix(KEY_SUBPROTOCOL)
        for one in request.scope.get("subprotocols", [])
        if one.startswith(KEY_SUBPROTOCOL)
    ]
    return any(hmac.compare_digest(one.encode(), key.encode()) for one in offered)


def _error(status: int, code: str, message: str) -> JSONResponse:
    body = {"error": {"type": "invalid_request_error", "code": code, "message": message}}
    return JSONResponse(body, status)
