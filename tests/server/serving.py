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
from server.config import ServerVad, SessionConfig
from server.hub import Hub
from server.metrics import Metrics
from server.options import ServerOptions
from server.turns import TurnSettings
from tests.fakes import ScriptedStages


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
    vad = ServerVad(silence_duration_ms=320)
    config = SessionConfig(
        model="parley",
        voice="alloy",
        turn_detection=vad,
        server_vad=vad,
        transcription={"model": "fake"},
    )
    hub = Hub(ServerOptions(**options), TurnSettings(), config, stages, Metrics(), loop)
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
    config_ = server.config
    config_.load()
    server.lifespan = config_.lifespan_class(config_)
    await server.startup()
    try:
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Serving(hub, stages, port)
    finally:
        await server.shutdown()
