"""A small asyncio client for Realtime servers: events as dicts, audio as samples.

It offers the subprotocol `parley.v1` (audio as binary frames, playback reports) and speaks plain
JSON with base64 audio to a server that does not take it.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import json
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import NoReturn
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.frames import CloseCode
from websockets.typing import Subprotocol

from handlers.audio import from_pcm16, to_pcm16
from handlers.messages import Samples
from server.wire import Event, WireError, decode_audio_frame

SUBPROTOCOL = Subprotocol("parley.v1")
PLAIN_SUBPROTOCOL = Subprotocol("realtime")
MAX_MESSAGE_BYTES = 16 * 2**20
OPEN_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 2.0
PING_INTERVAL_S = 10.0
AUDIO_DELTAS = ("response.output_audio.delta", "response.audio.delta")  # GA name, beta name
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")


class RealtimeError(Exception):
    """Any failure of the connection."""


class ServerUnavailable(RealtimeError):
    """Nobody answers at that address, or what answers is not a Realtime server."""


class Refused(RealtimeError):
    """The server said no: an HTTP status, or `error` for a greeting or before a close."""

    def __init__(self, code: str, message: str, http_status: int | None = None) -> None:
        super().__init__(f"{message} ({code})")
        self.code = code
        self.message = message
        self.http_status = http_status


class Disconnected(RealtimeError):
    """The connection was lost or closed; `code` is the websocket close code (1006: no close)."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"connection closed: {reason or 'no reason given'} ({code})")
        self.code = code
        self.reason = reason


@dataclass(frozen=True, slots=True)
class AudioChunk:
    """Reply audio of `item_id` from `start_sample` of that item on."""

    item_id: str
    start_sample: int
    samples: Samples  # [T] float32 at 24 kHz


class Realtime:
    """One open session. Get it from `Realtime.connect`, read it with `async for`, once.

    Iteration ends only by exception: `Refused` when the server's last word was an `error`
    event, `Disconnected` otherwise, an orderly close by the server included.
    """

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._received_samples: dict[str, int] = {}  # per item, JSON variant
        self._last_error: Event | None = None
        self._first: Event | AudioChunk | None = None

    @staticmethod
    @contextlib.asynccontextmanager
    async def connect(
        url: str, api_key: str | None = None, binary: bool = True
    ) -> AsyncIterator[Realtime]:
        """Open `url` (`ws://host:port/v1/realtime`) and wait for the server's first event.

        `binary=False` does not offer the binary variant. Raises `ServerUnavailable`, `Refused`
        or `Disconnected`. That first event (`session.created`) is the first one iterated.
        """
        socket = await _open(url, api_key, SUBPROTOCOL if binary else None)
        try:
            client = Realtime(socket)
            await client._greeting(url)
            yield client
        finally:
            await socket.close()

    async def _greeting(self, url: str) -> None:
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                self._first = await self._receive()
        except TimeoutError:
            raise ServerUnavailable(f"{url} opened but sent no event") from None
        if self._last_error is not None:
            raise _refusal(self._last_error)

    @property
    def binary(self) -> bool:
        """Whether the server took the binary variant."""
        return self._socket.subprotocol == SUBPROTOCOL

    async def send(self, event: Event) -> None:
        """Send a client event. Raises `Disconnected`."""
        await self._send(json.dumps(event))

    async def send_audio(self, audio: bytes | Samples) -> None:
        """Append pcm16 little-endian bytes or float32 [T], 24 kHz mono. Raises `Disconnected`."""
        data = audio if isinstance(audio, bytes) else to_pcm16(audio)
        if self.binary:
            await self._send(data)
        else:
            encoded = base64.b64encode(data).decode("ascii")
            await self.send({"type": "input_audio_buffer.append", "audio": encoded})

    async def report_playback(self, item_id: str, played_samples: int) -> None:
        """Say how much of an item's audio has been heard; nothing in the JSON variant."""
        if self.binary:
            event = {"type": "parley.playback", "item_id": item_id}
            await self.send(event | {"played_samples": played_samples})

    async def __aiter__(self) -> AsyncIterator[Event | AudioChunk]:
        if self._first is not None:
            first, self._first = self._first, None
            yield first
        while True:
            yield await self._receive()

    async def _send(self, data: str | bytes) -> None:
        try:
            await self._socket.send(data)
        except ConnectionClosed as closed:
            self._raise_closed(closed)

    async def _receive(self) -> Event | AudioChunk:
        """The next event that means something to a client; unreadable frames are passed over."""
        while True:
            try:
                frame = await self._socket.recv()
            except ConnectionClosed as closed:
                self._raise_closed(closed)
            try:
                if isinstance(frame, bytes):
                    self._last_error = None
                    return AudioChunk(*decode_audio_frame(frame))
                return self._decode_event(frame)
            except (ValueError, RecursionError, WireError):
                continue

    def _decode_event(self, text: str) -> Event | AudioChunk:
        event = json.loads(text)
        if not isinstance(event, dict) or not isinstance(event.get("type"), str):
            raise ValueError("not an event")
        self._last_error = event if event["type"] == "error" else None
        if event["type"] not in AUDIO_DELTAS:
            return event
        item_id = str(event.get("item_id"))
        try:
            samples = from_pcm16(base64.b64decode(event["delta"], validate=True))
        except (binascii.Error, KeyError, TypeError) as error:
            raise ValueError("unreadable audio") from error
        start_sample = self._received_samples.get(item_id, 0)
        self._received_samples[item_id] = start_sample + len(samples)
        return AudioChunk(item_id, start_sample, samples)

    def _raise_closed(self, closed: ConnectionClosed) -> NoReturn:
        if closed.rcvd is None:
            raise Disconnected(1006, "connection lost") from None
        if self._last_error is not None and closed.rcvd.code != CloseCode.NORMAL_CLOSURE:
            raise _refusal(self._last_error) from None
        raise Disconnected(closed.rcvd.code, closed.rcvd.reason) from None


async def _open(url: str, api_key: str | None, subprotocol: Subprotocol | None) -> ClientConnection:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        local = urlsplit(url).hostname in LOOPBACK_HOSTS
        return await connect(
            url,
            additional_headers=headers,
            subprotocols=[subprotocol] if subprotocol else None,
            compression=None,
            proxy=None if local else True,
            open_timeout=OPEN_TIMEOUT_S,
            close_timeout=CLOSE_TIMEOUT_S,
            ping_interval=PING_INTERVAL_S,
            ping_timeout=PING_INTERVAL_S,
            max_size=MAX_MESSAGE_BYTES,
        )
    except InvalidStatus as error:
        status = error.response.status_code
        if status == 400 and subprotocol == SUBPROTOCOL:  # some servers decline a new one so
            return await _open(url, api_key, PLAIN_SUBPROTOCOL)
        raise _http_refusal(status, bytes(error.response.body or b"")) from None
    except ssl.SSLError as error:
        raise ServerUnavailable(f"no secure connection to {url}: {error.reason}") from error
    except (OSError, TimeoutError) as error:
        raise ServerUnavailable(f"no server answers at {url}") from error
    except (InvalidURI, InvalidHandshake, ValueError) as error:
        raise ServerUnavailable(f"{url} is not a Realtime server: {error}") from error


def _http_refusal(status: int, body: bytes) -> Refused:
    try:
        return _refusal(json.loads(body), status)
    except (ValueError, TypeError, AttributeError):
        text = body.decode("utf-8", "replace").strip()[:200]
        return Refused(f"http_{status}", text or f"HTTP status {status}", status)


def _refusal(event: Event, http_status: int | None = None) -> Refused:
    error = event.get("error") or {}
    code = str(error.get("code") or error.get("type") or "error")
    return Refused(code, str(error.get("message") or "The server refused."), http_status)
