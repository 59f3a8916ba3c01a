"""A conversation at the listener's end: events in, playback and transcript out."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

from client.playback import MS, PlaybackBuffer, Progress
from client.realtime import AudioChunk, Disconnected, Realtime
from client.recording import Recording
from client.transcript import Transcript
from handlers.messages import Samples
from server.wire import Event

REPORT_INTERVAL_S = 0.1
"""Between two playback reports while Parley speaks."""
MAX_UNSENT_BLOCKS = 50
"""Microphone blocks (10 or 20 ms) that wait for a slow network; then the oldest are dropped."""


class Conversation:
    """What lasts over reconnections: the playback buffer, the transcript, the recording.

    The audio ends call `microphone` and `played` on the event loop and pull from `playback` on
    whatever thread they like; `hold` carries one connection.
    """

    def __init__(self, transcript: Transcript, recording: Recording | None = None) -> None:
        self.transcript = transcript
        self.playback = PlaybackBuffer()
        self._recording = recording
        self._client: Realtime | None = None
        self._unsent: asyncio.Queue[Samples] = asyncio.Queue(MAX_UNSENT_BLOCKS)
        self._congested = False
        self._audible = asyncio.Event()
        self._events = 0
        self._speaking = False
        self._yields = True  # to the person's speech; else the server alone decides
        self._responses: set[str] = set()
        self._cut_items: set[str] = set()  # plain variant: what still comes of them is stale

    @property
    def events(self) -> int:
        """Server events and audio chunks so far: grows while anything happens."""
        return self._events

    @property
    def online(self) -> bool:
        return self._client is not None

    @property
    def busy(self) -> bool:
        """Somebody speaks, or a response is under way."""
        return self._speaking or bool(self._responses) or self.playback.depth_samples > 0

    def microphone(self, samples: Samples) -> None:
        """The next [T] of the person's audio at 24 kHz, to be sent (dropped while offline)."""
        if self._recording is not None:
            self._recording.person(samples if self.online else samples * 0)
        if not self.online:
            return
        if self._unsent.full():
            self._unsent.get_nowait()
            if not self._congested:
                self.transcript.notice("the network is too slow: microphone audio is dropped")
            self._congested = True
        self._unsent.put_nowait(samples)

    def played(self, samples: Samples) -> None:
        """What `playback.pull` has just given to the speaker, [T] at 24 kHz."""
        if self._recording is not None:
            self._recording.parley(samples)

    async def hold(self, client: Realtime, session: Event) -> None:
        """Converse until the connection ends, which raises `Disconnected` or `Refused`."""
        await client.send({"type": "session.update", "session": session})
        while not self._unsent.empty():
            self._unsent.get_nowait()
        self._client = client
        tasks = [
            asyncio.create_task(self._send_audio(client)),
            asyncio.create_task(self._report_playback(client)),
        ]
        try:
            async for event in client:
                self._events += 1
                if isinstance(event, AudioChunk):
                    if event.item_id not in self._cut_items:
                        self.playback.push(event.item_id, event.start_sample, event.samples)
                        self._audible.set()
                else:
                    await self._handle(client, event)
        finally:
            self._client = None
            self._speaking = False
            self._responses.clear()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.transcript.parley_done()

    async def _send_audio(self, client: Realtime) -> None:
        with contextlib.suppress(Disconnected):  # the reader tells
            while True:
                await client.send_audio(await self._unsent.get())
                if self._unsent.empty():
                    self._congested = False

    async def _report_playback(self, client: Realtime) -> None:
        with contextlib.suppress(Disconnected):
            while True:
                await self._audible.wait()
                progress = self.playback.take_progress()
                await self._report(client, progress)
                if not progress and not self.playback.depth_samples:
                    self._audible.clear()
                else:
                    await asyncio.sleep(REPORT_INTERVAL_S)

    async def _report(self, client: Realtime, progress: Sequence[Progress]) -> None:
        for item in progress:
            await client.report_playback(item.item_id, item.played_samples)

    async def _interrupt(self, client: Realtime) -> None:
        """The person speaks: fall silent now, then say what was heard."""
        cut = self.playback.flush()
        rest = self.playback.take_progress()
        if cut is not None:
            self.transcript.parley_cut()
        await self._report(client, rest if cut is None else [*rest, cut])
        if cut is not None and not client.binary:
            self._cut_items.add(cut.item_id)
            truncate = {"item_id": cut.item_id, "content_index": 0}
            heard = {"audio_end_ms": cut.played_samples // MS}
            await client.send({"type": "conversation.item.truncate"} | truncate | heard)

    async def _handle(self, client: Realtime, event: Event) -> None:
        item_id = str(event.get("item_id", ""))
        match event["type"]:
            case "session.created" | "session.updated":
                self._yields = interrupts(event)
            case "input_audio_buffer.speech_started":
                if self._yields:
                    await self._interrupt(client)
                self._speaking = True
            case "input_audio_buffer.speech_stopped":
                self._speaking = False
            case "conversation.item.input_audio_transcription.delta":
                self.transcript.person_delta(item_id, _text(event, "delta"))
            case "conversation.item.input_audio_transcription.completed":
                self.transcript.person_final(item_id, _text(event, "transcript"))
            case "conversation.item.input_audio_transcription.failed":
                self.transcript.notice(f"not understood: {_error(event)}")
            case "response.created":
                self._responses.add(_response_id(event))
            case (
                "response.output_audio_transcript.delta"
                | "response.audio_transcript.delta"
                | "response.output_text.delta"
                | "response.text.delta"
            ):
                if item_id not in self._cut_items:
                    self.transcript.parley_delta(item_id, _text(event, "delta"))
            case "response.output_audio.done" | "response.audio.done":
                self.playback.end(item_id)
            case "response.done":
                self._responses.discard(_response_id(event))
                self.transcript.parley_done()
            case "error":
                self.transcript.notice(f"error: {_error(event)}")


def interrupts(event: Event) -> bool:
    """Whether speech of the person interrupts a reply, as the event's session has it."""
    found: Any = event
    for name in ("session", "audio", "input", "turn_detection"):
        found = found.get(name) if isinstance(found, dict) else None
    return not isinstance(found, dict) or found.get("interrupt_response") is not False


def _text(event: Event, field: str) -> str:
    value = event.get(field)
    return value if isinstance(value, str) else ""


def _response_id(event: Event) -> str:
    response: Any = event.get("response")
    return str(response.get("id")) if isinstance(response, dict) else ""


def _error(event: Event) -> str:
    error: Any = event.get("error")
    if not isinstance(error, dict):
        return "no reason given"
    return f"{error.get('message')} ({error.get('code') or error.get('type')})"
