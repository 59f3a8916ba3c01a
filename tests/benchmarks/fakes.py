"""A server with known delays, and clips of noise with known ends. No socket, no clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.clips import Clip, Pause
from benchmarks.listener import Conversation
from benchmarks.measure import to_samples
from client.realtime import AudioChunk
from handlers.audio import from_pcm16
from handlers.messages import RATE_HZ, Samples
from server.wire import Event

FRAME = RATE_HZ // 100
VOICED_RMS = 0.01
CHUNK = to_samples(40)
LEAD = to_samples(200)


def noise(ms: float, seed: int = 0, rms: float = 0.1) -> Samples:
    rng = np.random.default_rng(seed)
    return np.asarray(rms * rng.standard_normal(to_samples(ms)), np.float32)


def clip(*parts_ms: float, name: str = "clip", lead_ms: float = 200.0) -> Clip:
    """Sound and pause by turns, in milliseconds, in a silent room."""
    lead, tail = np.zeros(to_samples(lead_ms), np.float32), np.zeros(RATE_HZ, np.float32)
    position, pauses, pieces = len(lead), [], [lead]
    for index, ms in enumerate(parts_ms):
        pieces.append(noise(ms, index) if index % 2 == 0 else np.zeros(to_samples(ms), np.float32))
        if index % 2:
            pauses.append(Pause(position, position + len(pieces[-1])))
        position += len(pieces[-1])
    samples = np.concatenate([*pieces, tail])
    return Clip(name, "plain", samples, "", len(lead), position, tuple(pauses))


@dataclass
class FakeServer:
    """Answers `answer_ms` after the last voiced frame, yields `stop_ms` after an onset."""

    answer_ms: float = 300.0
    stop_ms: float = 100.0
    reply_ms: float = 3000.0
    keep_ms: float = 250.0  # sound shorter than this over a reply does not end it
    mute_turns: tuple[int, ...] = ()  # these get no reply
    deaf: bool = False  # never yields
    skip_ms: float = 0.0  # resumes so much too late in the reply

    def __post_init__(self) -> None:
        self.heard = 0  # samples of the person
        self.last_voiced = 0
        self.voiced_run = 0
        self.in_turn = False
        self.turns = 0
        self.item: str | None = None
        self.paused = False
        self.audio = np.zeros(0, np.float32)
        self.sent = 0
        self.began = 0  # where on the input clock the first sample plays
        self.played: dict[str, int] = {}
        self.out: list[Event | AudioChunk] = []

    def event(self, event: Event) -> None:
        match event["type"]:
            case "parley.playback":
                self.played[event["item_id"]] = event["played_samples"]
            case "response.cancel":
                self.finish("cancelled")

    def hear(self, samples: Samples) -> list[Event | AudioChunk]:
        """Take the person's audio; returns what is sent back by now."""
        for first in range(0, len(samples), FRAME):
            self._frame(samples[first : first + FRAME])
        out, self.out = self.out, []
        return out

    def _frame(self, frame: Samples) -> None:
        self.heard += len(frame)
        voiced = float(np.sqrt(np.mean(np.square(frame)))) > VOICED_RMS
        self.voiced_run = self.voiced_run + len(frame) if voiced else 0
        silence = self.heard - self.last_voiced
        if voiced:
            self.last_voiced = self.heard
            if self.item is None:
                self.in_turn = True
            elif not self.deaf and self.voiced_run >= to_samples(self.stop_ms):
                self._yield()
        elif self.in_turn and silence >= to_samples(self.answer_ms):
            self.in_turn = False
            self._reply()
        elif self.paused and silence >= to_samples(self.answer_ms):
            self.paused = False
            self.say("input_audio_buffer.speech_stopped")
            assert self.item is not None
            self.sent = self.played[self.item] + to_samples(self.skip_ms)
            self.began = self.heard - self.sent
        self._send_audio()

    def say(self, name: str, **fields: Any) -> None:
        self.out.append({"type": name} | fields)

    def finish(self, status: str) -> None:
        if self.item is not None:
            output = [{"id": self.item}]
            self.say("response.done", response={"status": status, "output": output})
        self.item, self.paused = None, False

    def _yield(self) -> None:
        if not self.paused:
            self.paused = True
            self.say("input_audio_buffer.speech_started")
        if self.voiced_run >= to_samples(self.keep_ms):
            self.finish("cancelled")
            self.in_turn = True

    def _reply(self) -> None:
        self.say("input_audio_buffer.speech_stopped")
        self.turns += 1
        if self.turns - 1 in self.mute_turns:
            return
        self.item, self.sent, self.began = f"item_{self.turns}", 0, self.heard
        self.audio = noise(self.reply_ms, seed=100 + self.turns)
        self.say("response.created", response={})
        text = f"This is what I say to your turn number {self.turns}, and a little more."
        self.say("response.output_audio_transcript.delta", item_id=self.item, delta=text)

    def _send_audio(self) -> None:
        if self.item is None or self.paused:
            return
        while self.sent < min(len(self.audio), self.heard - self.began + LEAD):
            chunk = self.audio[self.sent : self.sent + CHUNK]
            self.out.append(AudioChunk(self.item, self.sent, chunk))
            self.sent += len(chunk)
        if self.heard - self.began >= len(self.audio):
            self.say("response.output_audio.done", item_id=self.item)
            self.finish("completed")


def run(talk: Conversation, server: FakeServer, limit_s: float = 120.0) -> None:
    """Hold the conversation on a virtual clock."""
    talk.begin(0.0)
    while not talk.over:
        assert talk.due_s < limit_s, "the script does not end"
        now_s = talk.due_s
        outgoing = talk.tick(now_s)
        for event in outgoing.events:
            server.event(event)
        for frame in outgoing.audio:
            for item in server.hear(from_pcm16(frame)):
                talk.receive(item, now_s)
