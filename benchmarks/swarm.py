"""Many streaming sessions from one event loop, as cheaply as can be.

The load generator shares the machine with the server, so it sends frames that were encoded once:
a websocket client must mask what it sends (RFC 6455, 5.3), and a mask of zero leaves the bytes
as they are. Only a session that speaks has a `Conversation`; the others send room noise, and of
what they receive only its kind is looked at.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import struct
from collections.abc import Sequence
from typing import cast
from urllib.parse import urlsplit

import numpy as np

from benchmarks.clips import noise
from benchmarks.listener import QUANTUM_SAMPLES, Conversation
from client.realtime import SUBPROTOCOL, AudioChunk
from handlers.audio import to_pcm16
from handlers.messages import RATE_HZ
from server.wire import decode_audio_frame

TEXT, BINARY, CLOSE, PING, PONG = 0x1, 0x2, 0x8, 0x9, 0xA
FRAME_QUANTA = 4
"""Idle sessions send 40 ms at a time, a quarter of them at every 10 ms quantum."""
ROOM_DBFS = (-75.0, -65.0, -55.0, -50.0)
"""Levels of room noise, by turns."""
ROOM_S = 2.0
OPEN_TIMEOUT_S = 10.0
OPENING_AT_A_TIME = 10


class LinkFailed(Exception):
    """A session that could not be opened, or that the server closed."""


def client_frame(opcode: int, payload: bytes) -> bytes:
    """A whole masked frame, the mask being zero."""
    head = bytes([0x80 | opcode])
    if len(payload) < 126:
        head += bytes([0x80 | len(payload)])
    elif len(payload) < 2**16:
        head += struct.pack(">BH", 0x80 | 126, len(payload))
    else:
        head += struct.pack(">BQ", 0x80 | 127, len(payload))
    return head + b"\0\0\0\0" + payload


def room_frames(level_dbfs: float, seed: int) -> list[bytes]:
    """Noise in frames ready to send, to be sent over and over."""
    rng = np.random.default_rng(seed)
    count = FRAME_QUANTA * QUANTUM_SAMPLES
    room = noise(rng, round(ROOM_S * RATE_HZ)) * np.float32(10.0 ** (level_dbfs / 20.0))
    pieces = (room[first : first + count] for first in range(0, len(room), count))
    return [client_frame(BINARY, to_pcm16(piece)) for piece in pieces]


class Link(asyncio.Protocol):
    """One session's websocket."""

    def __init__(self) -> None:
        self.talk: Conversation | None = None
        self.errors: list[str] = []
        self.unasked_replies = 0  # responses while nobody spoke here
        self.loop = asyncio.get_running_loop()
        self.opened: asyncio.Future[None] = self.loop.create_future()
        self.transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._upgraded = False
        self._closing = False

    @classmethod
    async def open(cls, url: str, api_key: str | None) -> Link:
        """Connect and wait for the server's first event. Raises `LinkFailed`."""
        parts = urlsplit(url)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                _, link = await loop.create_connection(cls, parts.hostname or "", parts.port or 80)
                link.send_bytes(_request(parts.netloc, parts.path, api_key))
                await link.opened
        except (OSError, TimeoutError) as error:
            raise LinkFailed(f"{type(error).__name__}: {error}") from error
        return link

    @property
    def alive(self) -> bool:
        return self.transport is not None and not self.transport.is_closing()

    def send_bytes(self, data: bytes) -> None:
        if self.transport is not None:
            self.transport.write(data)

    def close(self) -> None:
        self._closing = True
        self.send_bytes(client_frame(CLOSE, struct.pack(">H", 1000)))
        if self.transport is not None:
            self.transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._closing:
            self._fail("connection lost")
        self.transport = None

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._upgraded and not self._upgrade():
            return
        while self._next_frame():
            pass

    def _upgrade(self) -> bool:
        head, found, rest = bytes(self._buffer).partition(b"\r\n\r\n")
        if not found:
            return False
        status = head.split(b"\r\n", 1)[0].decode("latin-1")
        if " 101 " not in status + " ":
            self._closing = True
            self._fail(status)
            assert self.transport is not None
            self.transport.close()
            return False
        self._buffer = bytearray(rest)
        self._upgraded = True
        return True

    def _next_frame(self) -> bool:
        """Take one whole frame from the buffer. Servers do not mask, and ours never fragments."""
        buffer = self._buffer
        if len(buffer) < 2:
            return False
        length, start = buffer[1] & 0x7F, 2
        if length == 126:
            length, start = int.from_bytes(buffer[2:4], "big"), 4
        elif length == 127:
            length, start = int.from_bytes(buffer[2:10], "big"), 10
        if len(buffer) < start + length:
            return False
        payload = bytes(buffer[start : start + length])
        opcode = buffer[0] & 0x0F
        del buffer[: start + length]
        self._frame(opcode, payload)
        return True

    def _frame(self, opcode: int, payload: bytes) -> None:
        if opcode == PING:
            self.send_bytes(client_frame(PONG, payload))
        elif opcode == CLOSE:
            code = int.from_bytes(payload[:2], "big")
            self._fail(f"closed {code} {payload[2:].decode('utf-8', 'replace')}".strip())
            self.close()
        elif opcode == BINARY and self.talk is not None:
            self.talk.receive(AudioChunk(*decode_audio_frame(payload)), self.loop.time())
        elif opcode == TEXT:
            self._event(payload)

    def _event(self, payload: bytes) -> None:
        if not self.opened.done():
            self.opened.set_result(None)
        if self.talk is not None:
            self.talk.receive(json.loads(payload), self.loop.time())
        elif b'"response.created"' in payload:
            self.unasked_replies += 1
        elif b'"type":"error"' in payload.replace(b" ", b""):
            self.errors.append(str(json.loads(payload)["error"].get("code")))

    def _fail(self, reason: str) -> None:
        if not self.opened.done():
            self.opened.set_exception(LinkFailed(reason))
        elif not self._closing:
            self.errors.append(reason)


class Swarm:
    """All sessions, moved on by one timer every 10 ms."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self.links: list[Link] = []
        self.refused: list[str] = []
        self.lateness_s: list[float] = []
        self._url = url
        self._api_key = api_key
        self._rooms = [room_frames(level, seed) for seed, level in enumerate(ROOM_DBFS)]
        self._done: dict[Link, asyncio.Future[None]] = {}
        self._loop = asyncio.get_running_loop()
        self._quantum_s = QUANTUM_SAMPLES / RATE_HZ
        self._began_s = self._loop.time()
        self._ticks = 0
        self._timer = self._loop.call_at(self._began_s, self._tick)

    async def grow(self, sessions: int) -> None:
        """Connect until there are `sessions`; what fails is counted in `refused`."""
        while len(self.links) < sessions:
            wanted = min(OPENING_AT_A_TIME, sessions - len(self.links))
            opening = (Link.open(self._url, self._api_key) for _ in range(wanted))
            results = await asyncio.gather(*opening, return_exceptions=True)
            self.links += [link for link in results if isinstance(link, Link)]
            failures = [str(error) for error in results if isinstance(error, BaseException)]
            self.refused += failures
            if failures:
                return

    async def speak(self, link: Link, talk: Conversation) -> None:
        """Hold a conversation on one of the links, to its end or the link's."""
        done = self._done[link] = self._loop.create_future()
        link.talk = talk
        talk.begin(self._loop.time())
        await done
        link.talk = None

    def close(self) -> None:
        self._timer.cancel()
        for link in self.links:
            link.close()

    def errors(self) -> list[str]:
        return [error for link in self.links for error in link.errors] + self.refused

    def _tick(self) -> None:
        now_s = self._loop.time()
        due_s = self._began_s + self._ticks * self._quantum_s
        self.lateness_s.append(now_s - due_s)
        for number in range(self._ticks % FRAME_QUANTA, len(self.links), FRAME_QUANTA):
            link = self.links[number]
            if link.talk is None:
                room = self._rooms[number % len(self._rooms)]
                link.send_bytes(room[self._ticks // FRAME_QUANTA % len(room)])
        for link in list(self._done):
            self._converse(link, now_s)
        self._ticks += 1
        self._timer = self._loop.call_at(due_s + self._quantum_s, self._tick)

    def _converse(self, link: Link, now_s: float) -> None:
        talk = link.talk
        assert talk is not None
        while not talk.over and link.alive and talk.due_s <= now_s:
            outgoing = talk.tick(now_s)
            for frame in outgoing.audio:
                link.send_bytes(client_frame(BINARY, frame))
            for event in outgoing.events:
                link.send_bytes(client_frame(TEXT, json.dumps(event).encode()))
        if talk.over or not link.alive:
            self._done.pop(link).set_result(None)


def _request(netloc: str, path: str, api_key: str | None) -> bytes:
    key = base64.b64encode(os.urandom(16)).decode("ascii")
    lines: Sequence[str] = (
        f"GET {path} HTTP/1.1",
        f"Host: {netloc}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Key: {key}",
        "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Protocol: {SUBPROTOCOL}",
        *([f"Authorization: Bearer {api_key}"] if api_key else ()),
    )
    return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")
