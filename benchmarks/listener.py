"""A virtual person in a conversation: speaks clips, hears through the client's playback buffer.

`Conversation` has no socket and no clock: `tick` is called once per 10 ms quantum and `receive`
with everything that comes from the server. Both channels lie on one clock: sample n of the
recording is n / 24000 s after the beginning, for what the person said and for what sounded at
the ear. `hold` drives one over a real connection in real time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np

from benchmarks.clips import Clip
from benchmarks.measure import AUDIBLE_DBFS, Heard, to_samples
from client.conversation import interrupts
from client.playback import PlaybackBuffer
from client.realtime import AudioChunk, Realtime
from handlers.audio import to_pcm16
from handlers.messages import RATE_HZ, Samples
from server.wire import Event

QUANTUM_SAMPLES = RATE_HZ // 100
"""What the ear takes at a time: 10 ms, as a sound card would."""
REPORT_SAMPLES = RATE_HZ // 10
"""How often the client says what has been played."""
AUDIBLE_PEAK = 10.0 ** (AUDIBLE_DBFS / 20.0)
ROOM_SAMPLES = RATE_HZ
"""The end of a clip, played back and forth while the person is silent."""

Kind: TypeAlias = Literal["turn", "prompt", "barge_in", "noise"]
Script: TypeAlias = Generator[None, None, None]
"""Advanced once per quantum: what the person does next."""


@dataclass(frozen=True, slots=True)
class Said:
    """A clip on the conversation's clock."""

    clip: Clip
    kind: Kind
    start_sample: int  # of the clip's first sample; may lie before what was really sent of it

    @property
    def onset(self) -> int:
        return self.start_sample + self.clip.onset_sample

    @property
    def last_voiced(self) -> int:
        return self.start_sample + self.clip.last_voiced_sample

    @property
    def end(self) -> int:
        return self.start_sample + len(self.clip.samples)


@dataclass(frozen=True, slots=True)
class Happened:
    """An event of the server and the moment it arrived, on the conversation's clock."""

    name: str
    sample: int
    event: Event


@dataclass(frozen=True, slots=True)
class Outgoing:
    audio: tuple[bytes, ...]  # pcm16 frames
    events: tuple[Event, ...]


class Mouth:
    """The person's side: the clip being said, room noise otherwise."""

    def __init__(self) -> None:
        self._clip: Samples = np.zeros(0, np.float32)
        self._room: Samples = np.zeros(ROOM_SAMPLES, np.float32)
        self._next = 0

    def say(self, samples: Samples) -> None:
        tail = samples[-ROOM_SAMPLES:]
        self._clip, self._next = samples, 0
        self._room = np.concatenate((tail[::-1], tail))

    def pull(self, count: int) -> Samples:
        """The next [count] samples."""
        first = self._next
        self._next += count
        spoken = self._clip[first : self._next]
        if len(spoken) == count:
            return spoken
        begin = first + len(spoken) - len(self._clip)
        quiet = np.arange(begin, begin + count - len(spoken)) % len(self._room)
        return np.concatenate((spoken, self._room[quiet]))


@dataclass(slots=True)
class Trace:
    """What a conversation leaves behind, all in samples of its clock."""

    said: list[Said] = field(default_factory=list)
    heard: list[Heard] = field(default_factory=list)
    happened: list[Happened] = field(default_factory=list)
    received: dict[str, list[AudioChunk]] = field(default_factory=dict)  # by item
    lateness_s: list[float] = field(default_factory=list)  # of the generator's own ticks
    left: list[Samples] = field(default_factory=list)
    right: list[Samples] = field(default_factory=list)

    def recording(self) -> Samples:
        """[2, T]: the person, and what the person heard."""
        return np.stack((np.concatenate(self.left), np.concatenate(self.right)))

    def named(self, name: str) -> list[Happened]:
        return [happened for happened in self.happened if happened.name == name]

    def response_status(self, item_id: str) -> str | None:
        """How the response that holds an item ended; None when it never did."""
        for happened in self.named("response.done"):
            response = happened.event["response"]
            if item_id in (item.get("id") for item in response.get("output") or ()):
                return str(response.get("status"))
        return None

    def reply_audio(self, item_id: str) -> Samples:
        """[T]: an item's audio as received, put together by position."""
        chunks = self.received.get(item_id, [])
        length = max((c.start_sample + len(c.samples) for c in chunks), default=0)
        whole = np.zeros(length, np.float32)
        for chunk in chunks:
            whole[chunk.start_sample : chunk.start_sample + len(chunk.samples)] = chunk.samples
        return whole


class Conversation:
    """One person talking to one server, following a script."""

    def __init__(
        self,
        script: Callable[[Conversation], Script],
        *,
        binary: bool = True,
        frame_ms: float = 20.0,
        on_event: Callable[[Happened], None] = lambda _: None,
    ) -> None:
        self.trace = Trace()
        self.binary = binary
        self.sample = 0
        self.over = False
        self.replying = False  # the server is making a response
        self.audible_sample = -RATE_HZ  # end of the last quantum in which something was heard
        self._script = script(self)
        self._on_event = on_event
        self._mouth = Mouth()
        self._ear = PlaybackBuffer()
        self._frame_samples = to_samples(frame_ms)
        self._unsent: list[Samples] = []
        self._events: list[Event] = []
        self._played: dict[str, int] = {}  # per item, not reported yet
        self._cut_items: set[str] = set()  # JSON variant: what still comes of them is stale
        self._playing: str | None = None  # the item last heard
        self._yields = True  # falls silent when told that the person speaks
        self._began_s: float | None = None

    # For scripts.

    def say(self, clip: Clip, kind: Kind, lead_ms: float | None = None) -> Said:
        """Begin a clip now, or so late in it that its onset comes after `lead_ms`."""
        lead = clip.onset_sample if lead_ms is None else to_samples(lead_ms)
        skip = max(0, clip.onset_sample - lead)
        said = Said(clip, kind, self.sample - skip)
        self._mouth.say(clip.samples[skip:])
        self.trace.said.append(said)
        return said

    def send(self, event: Event) -> None:
        self._events.append(event)

    def until(self, condition: Callable[[], bool], timeout_s: float) -> Generator[None, None, bool]:
        """Wait for `condition`; False when `timeout_s` of conversation passed first."""
        limit = self.sample + round(timeout_s * RATE_HZ)
        while not condition():
            if self.sample >= limit:
                return False
            yield
        return True

    def wait(self, seconds: float) -> Script:
        yield from self.until(lambda: False, seconds)

    @property
    def quiet_s(self) -> float:
        """How long the ear has heard nothing."""
        return (self.sample - self.audible_sample) / RATE_HZ

    @property
    def at_rest(self) -> bool:
        """Nothing is being made, nothing waits to be played, nothing sounds."""
        return not self.replying and self._ear.depth_samples == 0 and self.quiet_s > 0.3

    def hush(self) -> None:
        """The person's "stop" button: cancel the response, forget what is buffered."""
        if self.replying:
            self.send({"type": "response.cancel"})
        self._flush()

    # For the driver.

    def begin(self, now_s: float) -> None:
        self._began_s = now_s

    @property
    def due_s(self) -> float:
        """When the next `tick` is to happen."""
        return (self._began_s or 0.0) + self.sample / RATE_HZ

    def tick(self, now_s: float) -> Outgoing:
        """Advance by one quantum; returns what is to be sent now."""
        self.trace.lateness_s.append(now_s - self.due_s)
        frames = self._full_frames()
        try:
            next(self._script)
        except StopIteration:
            self.over = True
        mine = self._mouth.pull(QUANTUM_SAMPLES)
        self.trace.left.append(mine)
        self._unsent.append(mine)
        self._listen()
        self.sample += QUANTUM_SAMPLES
        events, self._events = tuple(self._events), []
        return Outgoing(frames, events)

    def receive(self, item: Event | AudioChunk, now_s: float) -> None:
        """Take what the server sent."""
        began_s = now_s if self._began_s is None else self._began_s
        # A tick that runs late takes what came since it was due: that belongs before it.
        sample = min(round((now_s - began_s) * RATE_HZ), self.sample)
        if isinstance(item, AudioChunk):
            chunks = self.trace.received.setdefault(item.item_id, [])
            if not chunks:
                self._note(Happened("audio", sample, {"item_id": item.item_id}))
            chunks.append(item)
            if item.item_id not in self._cut_items:
                self._ear.push(item.item_id, item.start_sample, item.samples)
            return
        self._note(Happened(item["type"], sample, item))
        match item["type"]:
            case "session.created" | "session.updated":
                self._yields = interrupts(item)
            case "input_audio_buffer.speech_started" if self._yields:
                self._flush()
            case "response.created":
                self.replying = True
            case "response.output_audio.done" | "response.audio.done":
                self._ear.end(str(item.get("item_id")))
            case "response.done":
                self.replying = False

    def _note(self, happened: Happened) -> None:
        self.trace.happened.append(happened)
        self._on_event(happened)

    def _full_frames(self) -> tuple[bytes, ...]:
        if len(self._unsent) * QUANTUM_SAMPLES < self._frame_samples:
            return ()
        frame = to_pcm16(np.concatenate(self._unsent))
        self._unsent.clear()
        return (frame,)

    def _listen(self) -> None:
        """Take a quantum from the playback buffer, as a sound card does."""
        sound = self._ear.pull(QUANTUM_SAMPLES)
        self.trace.right.append(sound)
        end = self.sample + QUANTUM_SAMPLES
        progress = {p.item_id: p.played_samples for p in self._ear.take_progress()}
        audible = bool(np.max(np.abs(sound)) >= AUDIBLE_PEAK)
        if progress:
            self._playing = list(progress)[-1]
            self._played |= progress
        if self._playing is not None and (progress or audible):
            self._label(self._playing, end)
        if audible:
            self.audible_sample = end
        if end % REPORT_SAMPLES == 0:
            self._report()

    def _label(self, item_id: str, end: int) -> None:
        heard = self.trace.heard
        if heard and heard[-1].item_id == item_id and heard[-1].end == self.sample:
            heard[-1] = Heard(item_id, heard[-1].start, end)
        else:
            heard.append(Heard(item_id, self.sample, end))

    def _flush(self) -> None:
        """Fall silent at once, and tell the server how far it was heard."""
        cut = self._ear.flush()
        if cut is not None:
            self._played[cut.item_id] = cut.played_samples
        self._report()
        if cut is not None and not self.binary and cut.item_id not in self._cut_items:
            self._cut_items.add(cut.item_id)
            truncate = {"type": "conversation.item.truncate", "item_id": cut.item_id}
            end_ms = cut.played_samples * 1000 // RATE_HZ
            self.send(truncate | {"content_index": 0, "audio_end_ms": end_ms})

    def _report(self) -> None:
        if self.binary:
            for item_id, played in self._played.items():
                report = {"type": "parley.playback", "item_id": item_id}
                self.send(report | {"played_samples": played})
        self._played.clear()


async def hold(client: Realtime, talk: Conversation) -> None:
    """Drive a conversation in real time until its script ends. Raises `RealtimeError`."""
    loop = asyncio.get_running_loop()
    opened = asyncio.Event()
    reader = asyncio.create_task(_read(client, talk, opened))
    try:
        await opened.wait()
        talk.begin(loop.time())
        while not talk.over:
            wait_s = talk.due_s - loop.time()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            outgoing = talk.tick(loop.time())
            for frame in outgoing.audio:
                await client.send_audio(frame)
            for event in outgoing.events:
                await client.send(event)
            if reader.done():
                reader.result()
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)


async def _read(client: Realtime, talk: Conversation, opened: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    try:
        async for item in client:
            talk.receive(item, loop.time())
            opened.set()
    finally:
        opened.set()
