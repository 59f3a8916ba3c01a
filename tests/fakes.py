"""Supported fakes, scripted by time: a virtual clock, stages that answer when told, an outbox."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from handlers.messages import (
    RATE_HZ,
    Ask,
    AudioIn,
    Finish,
    Listen,
    Message,
    Retain,
    Samples,
    Say,
    Speech,
    Spoken,
    TextDelta,
    TextDone,
    Transcript,
    Voice,
)
from handlers.ticket import Ticket
from server.hub import Clock

WINDOW_SAMPLES = 768  # 32 ms at RATE_HZ


class VirtualTimer:
    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class VirtualClock:
    """Time that moves only when told. Implements `server.hub.Clock`."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self._due: list[tuple[float, int, VirtualTimer]] = []
        self._count = itertools.count()

    def time(self) -> float:
        return self._now_s

    def call_at(self, when: float, callback: Callable[[], None]) -> VirtualTimer:
        timer = VirtualTimer(callback)
        heapq.heappush(self._due, (when, next(self._count), timer))
        return timer

    def advance(self, seconds: float) -> None:
        """Let time pass, running what falls due in order."""
        end_s = self._now_s + seconds
        while self._due and self._due[0][0] <= end_s:
            when, _, timer = heapq.heappop(self._due)
            self._now_s = max(self._now_s, when)
            if timer.callback is not None:
                timer.callback()
        self._now_s = end_s

    @property
    def pending(self) -> int:
        return sum(timer.callback is not None for _, _, timer in self._due)


class RecordingOutbox:
    """What a session sends. Implements `server.session.Outbox`."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.audio: list[tuple[str, int, Samples]] = []
        self.closed: tuple[int, str] | None = None
        self.unsent_bytes = 0

    def send(self, event: dict[str, Any]) -> None:
        self.events.append(event)

    def send_audio(
        self, response_id: str, item_id: str, start_sample: int, samples: Samples
    ) -> None:
        self.audio.append((item_id, start_sample, samples))

    def close(self, code: int, reason: str) -> None:
        self.closed = self.closed or (code, reason)

    @property
    def types(self) -> list[str]:
        return [event["type"] for event in self.events]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["type"] == kind]


def tone(seconds: float) -> Samples:
    """Audible and never zero: [T] at RATE_HZ."""
    return np.full(round(seconds * RATE_HZ), 0.25, np.float32)


@dataclass
class ScriptedStages:
    """Ear, STT, LM and TTS that do what a test says, each after its own delay.

    Speech is what is not zero: the VAD says 0.99 for a window with a sample in it. STT gives
    `words` one by one, one per `word_s` of voiced audio. The LM answers with `answer(question)`
    and TTS speaks `char_s` per character, with a word mark at the end. A delay of None: that
    stage never answers.
    """

    clock: Clock
    words: list[str] = field(default_factory=lambda: ["what", "time", "is", "it"])
    word_s: float = 0.25
    answer: Callable[[str], str] = lambda question: f"You said {question}."
    stt_delay_s: float | None = 0.01
    lm_delay_s: float | None = 0.02
    tts_delay_s: float | None = 0.02
    char_s: float = 0.05
    end_probability: float | None = 0.3
    voices: tuple[str, ...] = ("alloy", "verse")
    voice_languages: Mapping[str, str] = field(default_factory=lambda: {"verse": "en"})
    heard: list[Message] = field(default_factory=list)
    asked: list[Ask] = field(default_factory=list)
    said: list[Say] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._ends: dict[Ticket, int] = {}
        self._rest: dict[Ticket, Samples] = {}
        self._utterances: dict[Ticket, Ticket] = {}
        self._voiced: dict[Ticket, int] = {}
        self._voiced_ends: dict[Ticket, list[int]] = {}

    def later(self, delay_s: float | None, message: Message) -> None:
        if delay_s is not None:
            self.clock.call_at(self.clock.time() + delay_s, lambda: deliver(message))

    def hear(self, message: AudioIn | Retain | Listen | Finish) -> None:
        self.heard.append(message)
        match message:
            case AudioIn(ticket, samples):
                self._listen(ticket, samples)
            case Listen(ticket, utterance, start_sample):
                self._utterances[ticket] = utterance
                back = [end for end in self._voiced_ends.get(ticket, []) if end > start_sample]
                self._voiced[utterance] = WINDOW_SAMPLES * len(back)
            case Finish(_, utterance, revision):
                text = self._text(utterance)
                final = Transcript(utterance, text, revision, self.end_probability)
                self.later(self.stt_delay_s, final)
            case _:
                pass

    def _text(self, utterance: Ticket) -> str:
        count = round(self._voiced.get(utterance, 0) / (self.word_s * RATE_HZ) + 0.5)
        return " ".join(self.words[:count])

    def _listen(self, ticket: Ticket, samples: Samples) -> None:
        rest = np.concatenate([self._rest.get(ticket, np.zeros(0, np.float32)), samples])
        while len(rest) >= WINDOW_SAMPLES:
            window, rest = rest[:WINDOW_SAMPLES], rest[WINDOW_SAMPLES:]
            end = self._ends.get(ticket, 0) + WINDOW_SAMPLES
            self._ends[ticket] = end
            voiced = bool(np.any(window))
            if voiced:
                self._voiced_ends.setdefault(ticket, []).append(end)
            utterance = self._utterances.get(ticket)
            if voiced and utterance is not None and utterance.live:
                self._voiced[utterance] += WINDOW_SAMPLES
                self.later(0.0, Transcript(utterance, self._text(utterance)))
            self.later(
                0.0, Voice(ticket, end, 0.99 if voiced else 0.01, -20.0 if voiced else -90.0)
            )
        self._rest[ticket] = rest

    def ask(self, message: Ask) -> None:
        self.asked.append(message)
        if self.lm_delay_s is None:
            return
        reply = self.answer(message.messages[-1].content if message.messages else "")
        self.later(self.lm_delay_s, TextDelta(message.ticket, reply))
        self.later(self.lm_delay_s, TextDone(message.ticket, "stop", 3, len(reply.split())))

    def say(self, message: Say) -> None:
        self.said.append(message)
        if self.tts_delay_s is None:
            return
        samples = tone(self.char_s * len(message.text))
        self.later(self.tts_delay_s, Speech(message.ticket, message.index, samples))
        self.later(self.tts_delay_s, Spoken(message.ticket, message.index))


def deliver(message: Message) -> None:
    """As the pipeline's outlet does it: to the session of a live ticket."""
    if message.ticket.live:
        message.ticket.sink.receive(message)
