"""A scripted Realtime server on loopback: each connection runs the test's own coroutine."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import Any

import numpy as np
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

from client.realtime import SUBPROTOCOL
from handlers.audio import from_pcm16, to_pcm16
from handlers.messages import RATE_HZ, Samples
from server.wire import encode_audio_frame


class Peer:
    """The server's end of one connection."""

    def __init__(self, socket: ServerConnection) -> None:
        self.socket = socket
        self.binary = socket.subprotocol == SUBPROTOCOL

    async def send(self, kind: str, **fields: Any) -> None:
        await self.socket.send(json.dumps({"type": kind} | fields))

    async def greet(self) -> None:
        await self.send("session.created", session={"type": "realtime"})

    async def send_audio(self, item_id: str, start_sample: int, samples: Samples) -> None:
        if self.binary:
            await self.socket.send(encode_audio_frame(item_id, start_sample, samples))
        else:
            delta = base64.b64encode(to_pcm16(samples)).decode("ascii")
            await self.send("response.output_audio.delta", item_id=item_id, delta=delta)

    async def receive(self) -> dict[str, Any] | Samples:
        """The client's next event, or its audio as float32 samples at 24 kHz."""
        frame = await self.socket.recv()
        if isinstance(frame, bytes):
            return from_pcm16(frame)
        event: dict[str, Any] = json.loads(frame)
        if event["type"] == "input_audio_buffer.append":
            return from_pcm16(base64.b64decode(event["audio"]))
        return event

    async def receive_event(self, kind: str) -> dict[str, Any]:
        """The client's next event of that type; audio and other events are passed over."""
        while True:
            event = await self.receive()
            if isinstance(event, dict) and event["type"] == kind:
                return event

    async def receive_audio(self, n_samples: int) -> Samples:
        """At least `n_samples` of the client's audio; events are passed over."""
        got: list[Samples] = []
        while sum(map(len, got)) < n_samples:
            event = await self.receive()
            if not isinstance(event, dict):
                got.append(event)
        return np.concatenate(got)


Script = Callable[[Peer], Awaitable[None]]


@contextlib.asynccontextmanager
async def realtime_server(
    *scripts: Script,
    subprotocols: Sequence[Subprotocol] | None = (SUBPROTOCOL,),
    api_key: str | None = None,
) -> AsyncIterator[str]:
    """Serve on a free port; yields the URL. Connection n runs `scripts[n]`, the last one again.

    What a script raises, a failed assertion say, is raised at the end.
    """
    connections = 0
    failures: list[Exception] = []

    async def handle(socket: ServerConnection) -> None:
        nonlocal connections
        script = scripts[min(connections, len(scripts) - 1)]
        connections += 1
        try:
            await script(Peer(socket))
        except ConnectionClosed:
            pass
        except Exception as failure:
            failures.append(failure)

    def check_key(socket: ServerConnection, request: Request) -> Response | None:
        if api_key and request.headers.get("Authorization") != f"Bearer {api_key}":
            error = {"error": {"code": "invalid_api_key", "message": "Wrong API key."}}
            return socket.respond(HTTPStatus.UNAUTHORIZED, json.dumps(error))
        return None

    async with serve(
        handle,
        "127.0.0.1",
        0,
        subprotocols=subprotocols,
        process_request=check_key,
        compression=None,
        close_timeout=1,
    ) as server:
        port = server.sockets[0].getsockname()[1]
        yield f"ws://127.0.0.1:{port}/v1/realtime"
    if failures:
        raise failures[0]


def tone(n_samples: int, level: float = 0.5, hz: float = 440.0) -> Samples:
    """[T] sine at 24 kHz."""
    return (level * np.sin(2 * np.pi * hz * np.arange(n_samples) / RATE_HZ)).astype(np.float32)
