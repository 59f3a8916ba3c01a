"""The real HTTP and websocket surface on a loopback port, over scripted stages."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import uvicorn

from server import app
from server.__main__ import WebSocketProtocol
from server.brains import Cascade
from server.hub import Hub
from server.metrics import Metrics
from server.options import ServerOptions
from server.turns import TurnSettings
from tests.fakes import ScriptedStages
from tests.server.stage import fake_config


@dataclass
class Serving:
    hub: Hub
    stages: ScriptedStages
    port: int

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/v1/realtime"


@contextlib.asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[Serving]:
    loop = asyncio.get_running_loop()
    stages = ScriptedStages(loop)
    given = ServerOptions(**options)
    hub = Hub(given, TurnSettings(), fake_config(), stages, Metrics(), loop, Cascade())
    async with listening(hub) as port:
        yield Serving(hub, stages, port)


@contextlib.asynccontextmanager
async def listening(hub: Hub) -> AsyncIterator[int]:
    """The hub's server on a free port."""
    server = uvicorn.Server(
        uvicorn.Config(
            app.build(hub),
            port=0,
            ws=WebSocketProtocol,
            ws_max_size=hub.options.max_message_bytes,
            ws_per_message_deflate=False,
            lifespan="off",
            log_level="warning",
            timeout_graceful_shutdown=1,
        )
    )
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    await server.startup()
    try:
        port: int = server.servers[0].sockets[0].getsockname()[1]
        yield port
    finally:
        await server.shutdown()
