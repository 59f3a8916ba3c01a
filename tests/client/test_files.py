"""The files' clock: virtual time, no server."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from client.conversation import Conversation
from client.files import BLOCK_SAMPLES, FileAudio
from client.transcript import Transcript
from client.wav import WavWriter, read_wav
from handlers.messages import RATE_HZ, Samples
from tests.client.fakes import tone

pytestmark = pytest.mark.asyncio


class Recorder(Conversation):
    """Keeps what the microphone gives, and answers with what `reply` holds at a block."""

    def __init__(self, reply: dict[int, Samples] | None = None) -> None:
        self.out = io.StringIO()
        super().__init__(Transcript(self.out.write, live=False))
        self.sent: list[Samples] = []
        self._reply = reply or {}
        self.connected = True

    @property
    def online(self) -> bool:
        return self.connected

    def microphone(self, samples: Samples) -> None:
        self.sent.append(samples)
        if (answer := self._reply.get(len(self.sent))) is not None:
            self.playback.push("a", 0, answer)


class Clock:
    """Sleeping moves it; every block takes `late_s` longer than planned."""

    def __init__(self, late_s: float = 0.0) -> None:
        self.now_s = 100.0
        self.late_s = late_s
        self.waits_s: list[float] = []

    def __call__(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.waits_s.append(seconds)
        self.now_s += seconds + self.late_s


async def test_output_is_aligned_with_the_input(tmp_path: Path) -> None:
    clock, talk = Clock(), Recorder({10: tone(RATE_HZ // 2)})
    spoken = tone(10 * BLOCK_SAMPLES - 7, level=0.3)
    with WavWriter(tmp_path / "out.wav") as output:
        audio = FileAudio(spoken, output, quiet_s=1.0, sleep=clock.sleep, clock=clock)
        await audio.run(talk)
    sent = np.concatenate(talk.sent)
    np.testing.assert_array_equal(sent[: len(spoken)], spoken)
    assert not sent[len(spoken) :].any()
    heard = read_wav(tmp_path / "out.wav")
    # The tenth block is complete, and sent, at 200 ms: the answer to it is heard from there on.
    assert np.flatnonzero(heard)[0] == 10 * BLOCK_SAMPLES + 1
    assert np.abs(heard[10 * BLOCK_SAMPLES :][: RATE_HZ // 2]).max() > 0.4
    duration_s = len(heard) / RATE_HZ
    assert duration_s == pytest.approx(0.2 + 0.5 + 1.0, abs=0.05)  # input, answer, quiet


async def test_pace_does_not_drift() -> None:
    clock, talk = Clock(late_s=0.005), Recorder()
    audio = FileAudio(tone(RATE_HZ * 4), None, quiet_s=0.1, sleep=clock.sleep, clock=clock)
    await audio.run(talk)
    assert clock.now_s - 100.0 == pytest.approx(len(talk.sent) * 0.02, abs=0.011)
    assert clock.waits_s[2:] == pytest.approx([0.015] * (len(clock.waits_s) - 2))


async def test_a_conversation_without_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.files.MAX_AFTER_S", 5.0)
    clock, talk = Clock(), Recorder({1: tone(RATE_HZ * 10)})
    audio = FileAudio(tone(100), None, quiet_s=1.0, sleep=clock.sleep, clock=clock)
    await audio.run(talk)
    assert clock.now_s - 100.0 == pytest.approx(5.0, abs=0.1)
    assert "does not end" in talk.out.getvalue()


async def test_a_lost_connection_is_waited_for() -> None:
    clock, talk = Clock(), Recorder()
    talk.connected = False

    async def sleep(seconds: float) -> None:
        await clock.sleep(seconds)
        talk.connected = clock.now_s > 130

    await FileAudio(tone(100), None, quiet_s=1.0, sleep=sleep, clock=clock).run(talk)
    assert clock.now_s == pytest.approx(131, abs=0.1)
