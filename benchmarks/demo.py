"""A spoken conversation with Parley: `make demo`.

Starts a server on loopback and talks to it over the real wire in real time: an eSpeak voice is
the person, with a pause inside a question, an interruption and a "mm-hm". Leaves the recording,
a picture and the figures in `out/demo/`.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.clips import Clip, Speaker, Synthesizer, joined, noise, placed, trimmed
from benchmarks.listener import Conversation, Happened, Kind, Script, hold
from benchmarks.measure import AUDIBLE_DBFS
from benchmarks.pictures import draw_conversation
from benchmarks.report import (
    SPREAD_HEADERS,
    Spread,
    environment,
    environment_lines,
    table,
    write_json,
    write_recording,
)
from benchmarks.scenes import INTERRUPTION_LEAD_MS, REPLY_TIMEOUT_S, answered
from benchmarks.score import Scores
from benchmarks.server_process import Server, ServerFailed, running
from client.realtime import Realtime, RealtimeError
from client.transcript import Transcript
from handlers.messages import RATE_HZ

PERSON = Speaker(voice="en-us+m3", speed_wpm=150, pitch=35, intonation=60)
MM_HM = "[[m'mh'Vm]]"
LEVEL_DBFS, ROOM_DBFS = -22.0, -62.0
LEAD_S, TAIL_S = 0.3, 1.5
PAUSE_S = 0.45
STORY_S = 3.0
"""How much of the story is heard before the interruption."""
THINKING_S = 0.5
"""Between a reply and the person's next turn."""


class NoReply(Exception):
    """Parley stayed silent; the message says after which turn."""


@dataclass
class Dialogue:
    """The person's side. `missed` is the first turn without an answer."""

    clips: dict[str, Clip]
    missed: str | None = None
    notes: list[str] = field(default_factory=list)

    def script(self, talk: Conversation) -> Script:
        yield from talk.wait(0.3)
        for name in ("hello", "arithmetic"):
            yield from self._ask(talk, name)
            yield from self._hear_out(talk)
        yield from self._ask(talk, "story")
        yield from talk.wait(STORY_S)
        yield from talk.until(lambda: talk.quiet_s == 0.0, 1.0)
        yield from self._ask(talk, "interruption", "barge_in")
        yield from self._hear_out(talk)
        yield from self._ask(talk, "counting")
        yield from talk.wait(1.0)
        talk.say(self.clips["mm-hm"], "noise", INTERRUPTION_LEAD_MS)
        yield from talk.wait(1.0)
        yield from self._hear_out(talk)
        yield from self._ask(talk, "goodbye")
        yield from self._hear_out(talk)

    def _ask(self, talk: Conversation, name: str, kind: Kind = "turn") -> Script:
        """Say it and wait for the answer to begin."""
        clip = self.clips[name]
        said = talk.say(clip, kind, INTERRUPTION_LEAD_MS if kind == "barge_in" else None)
        there = yield from answered(talk, said)
        if not there and self.missed is None:
            self.missed = clip.text

    def _hear_out(self, talk: Conversation) -> Generator[None, None, None]:
        yield from talk.until(lambda: talk.at_rest, REPLY_TIMEOUT_S)
        yield from talk.wait(THINKING_S)


def make_dialogue() -> Dialogue:
    with Synthesizer() as synthesizer:
        rng = np.random.default_rng(0)

        def spoken(name: str, *parts: str, text: str | None = None) -> Clip:
            speech = trimmed(synthesizer.say(PERSON, parts[0])[0])
            for part in parts[1:]:
                speech = joined(speech, trimmed(synthesizer.say(PERSON, part)[0]), PAUSE_S)
            speech = speech * np.float32(_level(LEVEL_DBFS) / np.sqrt(np.mean(np.square(speech))))
            room = [noise(rng, int(s * RATE_HZ)) * _level(ROOM_DBFS) for s in (LEAD_S, TAIL_S)]
            said = " … ".join(parts) if text is None else text
            return placed(name, "plain", speech, room[0], room[1], said, PERSON.voice)

        clips = (
            spoken("hello", "Hello there."),
            spoken("arithmetic", "What is seventeen", "times twenty three?"),
            spoken("story", "Tell me a story."),
            spoken("interruption", "Stop. What time is it?"),
            spoken("counting", "Count from one to ten."),
            spoken("mm-hm", MM_HM, text="mm-hm"),
            spoken("goodbye", "Goodbye."),
        )
        return Dialogue({clip.name: clip for clip in clips})


def _level(dbfs: float) -> np.float32:
    return np.float32(10.0 ** (dbfs / 20.0))


class LiveTranscript:
    """Both sides on the terminal while they speak, from the server's events."""

    def __init__(self) -> None:
        live = sys.stdout.isatty()
        columns = shutil.get_terminal_size().columns
        self.lines: list[str] = []
        self._terminal = Transcript(self._write, live, columns)

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def __call__(self, happened: Happened) -> None:
        event, show = happened.event, self._terminal
        item_id = str(event.get("item_id", ""))
        match happened.name:
            case "input_audio_buffer.speech_started":
                show.parley_cut()
            case "conversation.item.input_audio_transcription.delta":
                show.person_delta(item_id, str(event["delta"]))
            case "conversation.item.input_audio_transcription.completed":
                show.person_final(item_id, str(event["transcript"]))
            case "response.output_audio_transcript.delta":
                show.parley_delta(item_id, str(event["delta"]))
            case "response.done":
                show.parley_done()
            case "error":
                show.notice(f"error: {event['error'].get('message')}")

    def close(self) -> None:
        self._terminal.close()
