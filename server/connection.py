"""One websocket: what comes in goes to the session, what the session sends goes out, bounded."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections import deque
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from handlers.messages import Samples
from server import wire
from server.hub import Hub
from server.session import Session

log = logging.getLogger(__name__)

SUBPROTOCOL = "parley.v1"


class Outbox:
    """Messages on their way to the client: bounded in bytes and in time.

    A client that does not read fills first the socket, then this; past either bound the
    connection is closed by name and, since nobody reads, its socket is dropped.
    """

    def __init__(self, websocket: WebSocket, hub: Hub, binary: bool) -> None:
        self._websocket = websocket
        self._hub = hub
        self._binary = binary
        self._waiting: deque[str | bytes] = deque()
        self._bytes = 0
        self._wake = asyncio.Event()
        self._closing: tuple[int, str] | None = None
        self._stuck: asyncio.TimerHandle | None = None
        self.closed = asyncio.Event()

    @property
    def unsent_bytes(self) -> int:
        return self._bytes

    def send(self, event: dict[str, Any]) -> None:
        if event["type"] == "error":
            self._hub.metrics.errors.labels(event["error"]["code"]).inc()
        self._put(json.dumps(event, separators=(",", ":"), ensure_ascii=False))

    def send_audio(
        self, response_id: str, item_id: str, start_sample: int, samples: Samples
    ) -> None:
        if self._binary:
            self._put(wire.encode_audio_frame(item_id, start_sample, samples))
        else:
            self._put(wire.audio_delta(response_id, item_id, samples))

    def close(self, code: int, reason: str) -> None:
        """Close once everything sent before has gone out. The first reason counts."""
        if self._closing is None:
            self._closing = (code, reason)
            self._wake.set()

    def _put(self, message: str | bytes) -> None:
        if self._closing is not None:
            return
        if self._bytes + len(message) > self._hub.options.max_unsent_bytes:
            self._abandon()
            return
        self._waiting.append(message)
        self._bytes += len(message)
        self._wake.set()

    def _abandon(self) -> None:
        """The client does not read: name it, then drop the socket without waiting for it."""
        log.info("connection closed: slow_consumer")
        self._hub.metrics.errors.labels("slow_consumer").inc()
        self._closing = (1008, "slow_consumer")
        self._waiting.clear()
        self._bytes = 0
        self.closed.set()

    async def write(self) -> None:
        """Send until closed. Ends by setting `closed`."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                while self._waiting:
                    message = self._waiting.popleft()
                    self._stuck = loop.call_later(self._hub.options.max_unsent_s, self._abandon)
                    if isinstance(message, str):
                        await self._websocket.send_text(message)
                    else:
                        await self._websocket.send_bytes(message)
                    self._stuck.cancel()
                    self._bytes -= len(message)
                if self._closing is not None:
                    with contextlib.suppress(RuntimeError):
                        await self._websocket.close(*self._closing)
                    return
                self._wake.clear()
                await self._wake.wait()
        except WebSocketDisconnect:
            pass
        finally:
            if self._stuck is not None:
                self._stuck.cancel()
            self.closed.set()


async def serve(websocket: WebSocket, hub: Hub) -> None:
    """Run one admitted or refused connection to its end."""
    offered = websocket.scope.get("subprotocols", [])
    binary = SUBPROTOCOL in offered
    chosen = SUBPROTOCOL if binary else ("realtime" if "realtime" in offered else None)
    await websocket.accept(subprotocol=chosen)
    outbox = Outbox(websocket, hub, binary)
    refusal = hub.refusal()
    if refusal is not None:
        code, message = refusal
        hub.metrics.refused.labels(code).inc()
        outbox.send(wire.error(code, message, kind="server_error"))
        outbox.close(1013, code)
        async with asyncio.timeout(hub.options.max_unsent_s):
            await outbox.write()
        return
    session = hub.brain.session(hub, outbox)
    hub.enter(session)
    writer = asyncio.create_task(outbox.write())
    reader = asyncio.create_task(_read(websocket, session, hub))
    closed = asyncio.create_task(outbox.closed.wait())
    try:
        session.start()
        await asyncio.wait((reader, closed), return_when=asyncio.FIRST_COMPLETED)
    finally:
        session.stop()
        hub.leave(session)
        for task in (reader, writer, closed):
            task.cancel()
        await asyncio.gather(reader, writer, closed, return_exceptions=True)
        _drop_socket(websocket)


def _drop_socket(websocket: WebSocket) -> None:
    """Whatever is left unsent is not waited for, unless the closing handshake is under way."""
    if websocket.application_state is not WebSocketState.DISCONNECTED:
        transport = websocket.scope["state"].get("transport")
        if transport is not None:
            transport.abort()


async def _read(websocket: WebSocket, session: Session, hub: Hub) -> None:
    """Feed the session until the client leaves or has been idle too long."""
    loop = asyncio.get_running_loop()
    idle_s = hub.options.idle_timeout_s
    last_s = loop.time()
    timer: asyncio.TimerHandle | None = None

    def watch() -> None:
        nonlocal timer
        if timer is not None and loop.time() - last_s >= idle_s:
            session.expire("idle_timeout", f"No message came for {idle_s:g} s.")
        else:
            timer = loop.call_at(last_s + idle_s, watch)

    watch()
    assert timer is not None
    try:
        while True:
            message = await websocket.receive()
            last_s = loop.time()
            if message["type"] == "websocket.disconnect":
                return
            data = message.get("bytes")
            if data is not None:
                session.receive_audio(data)
            else:
                session.receive_text(message["text"])
    finally:
        timer.cancel()
