"""The ear: Silero's voice activity model for all sessions at once, and what STT gets to hear."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from handlers import onnx
from handlers.base import Emit, Handler, Observer, Overloaded, StageError
from handlers.messages import (
    EAR_RATE_HZ,
    RATE_HZ,
    AudioIn,
    Conclude,
    Failed,
    Finish,
    Heard,
    Listen,
    Message,
    Retain,
    Samples,
    Voice,
)
from handlers.options import option
from handlers.ticket import Ticket
from handlers.vad.prosody import ProsodyTracker
from handlers.vad.resample import (
    BLOCK_SAMPLES,
    DELAY_SAMPLES,
    HISTORY_SAMPLES,
    ready_samples,
    resample,
)

WINDOW_SAMPLES = 512  # at EAR_RATE_HZ: what the model takes per step, 32 ms
RAW_WINDOW_SAMPLES = WINDOW_SAMPLES * RATE_HZ // EAR_RATE_HZ
CONTEXT_SAMPLES = 64  # of the window before, in front of each window
STATE_SIZE = 128
WEIGHTS = "silero_vad_16k_op15.onnx"
"""Of the package's files that take a batch: the smallest with exact weights; as fast as any."""

ROUNDS_S = 0.005
"""New messages are looked at after so long, however much audio still waits."""
GATHER_S_PER_SESSION = 0.0001
GATHER_MAX_S = 0.008
"""A row in a batch costs half of a row alone, so batches gather; alone, nobody waits."""
WAITING_LIMIT = 1024
"""Messages per connection. Sessions feed at real time, half a second ahead: theirs are few."""
TOO_MUCH = StageError("vad_overloaded", "More audio is waiting than can be listened to.")
LEVEL_FLOOR = 1e-10  # mean square: -100 dB
RESUME_SHARE = 0.5
"""After `Finish`, audio goes on from this share of the speech threshold."""

Probabilities: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True)
class SileroOptions:
    thresh: float = option(0.5, "speech probability that counts (0-1)", "thresh")
    min_speech_ms: int = option(64, "shortest speech (ms)", "min_speech_ms")
    min_silence_ms: int = option(300, "silence that ends a finished turn (ms)", "min_silence_ms")
    speech_pad_ms: int = option(300, "audio kept before detected speech (ms)", "speech_pad_ms")
    look_back_s: float = option(2.0, "audio kept per session for a late start (s)", "look_back_s")
    max_look_back_s: float = option(
        60.0, "the same for push-to-talk, at most (s)", "max_look_back_s"
    )


class SileroModel:
    """Silero VAD for 16 kHz on one thread; the caller keeps each row's state."""

    def __init__(self) -> None:
        self._session = onnx.session(_weights())
        self._rate = np.array(EAR_RATE_HZ, np.int64)

    def __call__(self, windows: Samples, state: Samples) -> tuple[Probabilities, Samples]:
        """[B, CONTEXT_SAMPLES + WINDOW_SAMPLES], [2, B, STATE_SIZE] → [B], new state."""
        feed = {"input": windows, "state": state, "sr": self._rate}
        probabilities, new_state = self._session.run(None, feed)
        return probabilities[:, 0], new_state


def _weights() -> Path:
    found = onnx.packaged("silero_vad", f"data/{WEIGHTS}")
    if found is None:
        raise FileNotFoundError("the silero-vad package, which holds the VAD's weights, is missing")
    return found


@dataclass(slots=True)
class _Listening:
    """An utterance on its way to STT; `sent` counts the connection's samples at EAR_RATE_HZ."""

    utterance: Ticket
    sent: int
    language: str | None
    paused: bool = False
    tracker: ProsodyTracker | None = None


class _Stream:
    """One connection's audio: what has not made a window yet, and the windows looked back on."""

    __slots__ = (
        "clock_offset",
        "context",
        "keep_from",
        "listening",
        "raw",
        "state",
        "ticket",
        "waiting",
        "window_count",
        "windows",
    )

    def __init__(self, ticket: Ticket) -> None:
        self.ticket = ticket
        self.waiting: deque[Message] = deque()
        self.raw: Samples = np.zeros(HISTORY_SAMPLES, np.float32)  # history and incomplete window
        self.clock_offset = 0  # input clock minus samples received
        self.state: Samples = np.zeros((2, STATE_SIZE), np.float32)
        self.context: Samples = np.zeros(CONTEXT_SAMPLES, np.float32)
        self.windows: deque[tuple[Samples, float]] = deque()  # the latest ones, [WINDOW_SAMPLES]
        self.window_count = 0  # windows since the connection opened
        self.keep_from: int | None = None  # position at EAR_RATE_HZ
        self.listening: _Listening | None = None

    @property
    def pending_samples(self) -> int:
        return len(self.raw) - HISTORY_SAMPLES

    @property
    def ear_samples(self) -> int:
        return self.window_count * WINDOW_SAMPLES

    def add(self, message: AudioIn) -> None:
        received = self.window_count * RAW_WINDOW_SAMPLES + self.pending_samples
        # Audio that the session could not hand over leaves a gap in its clock.
        self.clock_offset = message.start_sample - received
        self.raw = np.concatenate([self.raw, message.samples], dtype=np.float32)

    def take_raw(self) -> Samples:
        """[HISTORY_SAMPLES + RAW_WINDOW_SAMPLES]: the next window; its end becomes history."""
        window = self.raw[: HISTORY_SAMPLES + RAW_WINDOW_SAMPLES]
        self.raw = self.raw[RAW_WINDOW_SAMPLES:]
        return window

    def keep(self, window: Samples, probability: float, look_back: int, most: int) -> None:
        self.windows.append((window, probability))
        self.window_count += 1
        keep_from = self.ear_samples - look_back
        if self.keep_from is not None:
            keep_from = max(min(keep_from, self.keep_from), self.ear_samples - most)
        while (self.window_count - len(self.windows) + 1) * WINDOW_SAMPLES <= keep_from:
            self.windows.popleft()

    def ear_position(self, clock_sample: int) -> int:
        """Input clock → samples at EAR_RATE_HZ since the connection opened."""
        received = clock_sample - self.clock_offset + DELAY_SAMPLES
        return max(0, received * EAR_RATE_HZ // RATE_HZ)

    def clock_position(self) -> int:
        """The input clock at the end of the last window."""
        return self.window_count * RAW_WINDOW_SAMPLES - DELAY_SAMPLES + self.clock_offset

    def from_position(self, start: int) -> list[tuple[Samples, float]]:
        """Audio from `start` (at EAR_RATE_HZ, or from what is left of it) with probabilities."""
        missing = self.ear_samples - start
        whole = min(-(-missing // WINDOW_SAMPLES), len(self.windows))
        found = [self.windows[i] for i in range(len(self.windows) - whole, len(self.windows))]
        if found and (skip := whole * WINDOW_SAMPLES - missing) > 0:
            found[0] = (found[0][0][skip:], found[0][1])
        return found

    def incomplete(self) -> Samples:
        """What the incomplete window holds so far, at EAR_RATE_HZ."""
        if not self.pending_samples:
            return np.zeros(0, np.float32)
        blocks = -(-self.pending_samples // BLOCK_SAMPLES)
        padded = np.zeros((1, HISTORY_SAMPLES + blocks * BLOCK_SAMPLES), np.float32)
        padded[0, : len(self.raw)] = self.raw
        return resample(padded)[0, : ready_samples(self.pending_samples)]


class SileroEar(Handler[_Stream]):
    """Judges every connection's audio and forwards an utterance's to STT, before its `Voice`.

    All connections with a whole window waiting share one model call, one window of each, so that
    one with much audio delays nobody. `forward` may raise `Overloaded`: that utterance then
    fails as `stt_overloaded`.

    After a `Finish` the audio pauses until there is speech again, then goes on `speech_pad_ms`
    before it: STT decodes no long silences, in which it would hear words. Without `prosody` it does
    not listen to how the voice ends: half of its work while somebody speaks. `least_gather_s`: how
    long audio may wait for that of others, where nothing waits for the ear.
    """

    stage: ClassVar[str] = "vad"
    Options: ClassVar[type[SileroOptions]] = SileroOptions

    def __init__(
        self,
        options: SileroOptions,
        *,
        emit: Emit,
        forward: Callable[[Message], None],
        observer: Observer | None = None,
        prosody: bool = True,
        least_gather_s: float = 0.0,
    ) -> None:
        super().__init__(emit, observer=observer)
        self.options = options
        self._forward = forward
        self._prosody = prosody
        self._least_gather_s = self._min_interval_s = least_gather_s
        self._active: dict[_Stream, None] = {}  # those with something waiting, in turn
        self._look_back = round(options.look_back_s * EAR_RATE_HZ)
        self._max_look_back = round(options.max_look_back_s * EAR_RATE_HZ)
        self._pad = options.speech_pad_ms * EAR_RATE_HZ // 1000

    def setup(self) -> None:
        self._model = SileroModel()
        silence = np.zeros((1, CONTEXT_SAMPLES + WINDOW_SAMPLES), np.float32)
        self._model(silence, np.zeros((2, 1, STATE_SIZE), np.float32))
        if self._prosody:  # NumPy's first median and quantile take 15 ms, which are not a turn's
            hum = np.sin(np.arange(EAR_RATE_HZ, dtype=np.float32) / 16)
            tracker = ProsodyTracker()
            tracker.push(hum, 1.0)
            tracker.describe()

    def open(self, ticket: Ticket) -> _Stream:
        self._pace(len(self._states) + 1)
        return _Stream(ticket)

    def close(self, ticket: Ticket, state: _Stream) -> None:
        self._active.pop(state, None)
        self._pace(len(self._states))

    def _pace(self, sessions: int) -> None:
        gather_s = min(GATHER_MAX_S, GATHER_S_PER_SESSION * (sessions - 1))
        self._min_interval_s = max(self._least_gather_s, gather_s)

    def process(self, batch: Sequence[Message]) -> Iterable[Message]:
        for message in batch:
            stream = self.state(message.ticket)
            if len(stream.waiting) < WAITING_LIMIT:
                stream.waiting.append(message)
                self._active[stream] = None
            else:
                self.emit(self._failure(message.ticket, TOO_MUCH))
        until = time.monotonic() + ROUNDS_S
        while self._active and time.monotonic() < until:
            self._round()
        self.busy = bool(self._active)
        return ()

    def _round(self) -> None:
        """One window of each connection that has one."""
        rows: list[_Stream] = []
        for stream in list(self._active):
            try:
                ready = stream.ticket.live and self._advance(stream)
            except Exception as error:
                self.emit(self._failure(stream.ticket, error))
                continue
            if ready:
                rows.append(stream)
            else:
                del self._active[stream]
        if not rows:
            return
        try:
            judged = self._judge(rows)
        except Exception as error:
            for stream in rows:
                self.emit(self._failure(stream.ticket, error))
            return
        for stream, (window, *judgement) in zip(rows, judged, strict=True):
            try:
                if stream.ticket.live:
                    self._perceive(stream, window, *judgement)
            except Exception as error:
                self.emit(self._failure(stream.ticket, error))

    def _advance(self, stream: _Stream) -> bool:
        """Take what waits until there is a window; False when all is taken."""
        while stream.pending_samples < RAW_WINDOW_SAMPLES:
            if not stream.waiting:
                return False
            match stream.waiting.popleft():
                case AudioIn() as audio:
                    stream.add(audio)
                case Retain(_, start_sample):
                    keep = start_sample
                    stream.keep_from = None if keep is None else stream.ear_position(keep)
                case Listen(_, utterance, start_sample, language):
                    start = stream.ear_position(start_sample)
                    tracker = ProsodyTracker() if self._prosody else None
                    stream.listening = _Listening(utterance, start, language, tracker=tracker)
                    self._send_on(stream)
                case Finish() as finish:
                    self._conclude(stream, finish)
                case other:
                    raise StageError("vad_error", f"The ear takes no {type(other).__name__}.")
        return True

    def _judge(self, rows: list[_Stream]) -> list[tuple[Samples, float, float, float]]:
        """The next window of each at EAR_RATE_HZ, its speech probability, level and tilt."""
        audio = resample(np.stack([stream.take_raw() for stream in rows]))  # [B, WINDOW_SAMPLES]
        context = np.stack([stream.context for stream in rows])
        state = np.stack([stream.state for stream in rows], axis=1)  # [2, B, STATE_SIZE]
        found, state = self._model(np.concatenate([context, audio], axis=1), state)
        power = np.square(audio).mean(axis=1)
        levels_db = 10 * np.log10(np.maximum(power, LEVEL_FLOOR))
        slope_power = np.square(np.diff(audio, axis=1)).mean(axis=1)
        tilts_db = 10 * np.log10(np.maximum(slope_power, LEVEL_FLOOR)) - levels_db
        for row, stream in enumerate(rows):
            stream.context = audio[row, -CONTEXT_SAMPLES:].copy()
            stream.state = state[:, row].copy()
        copies = [window.copy() for window in audio]  # a view would keep the whole batch
        numbers = (found.tolist(), levels_db.tolist(), tilts_db.tolist())
        return list(zip(copies, *numbers, strict=True))

    def _perceive(
        self, stream: _Stream, window: Samples, probability: float, level_db: float, tilt_db: float
    ) -> None:
        stream.keep(window, probability, self._look_back, self._max_look_back)
        listening = stream.listening
        if listening is not None:
            if listening.paused and probability >= RESUME_SHARE * self.options.thresh:
                listening.paused = False
                speech = stream.ear_samples - WINDOW_SAMPLES
                listening.sent = max(listening.sent, speech - self._pad)
            if not listening.paused:
                self._send_on(stream)
        self.emit(Voice(stream.ticket, stream.clock_position(), probability, level_db, tilt_db))

    def _send_on(self, stream: _Stream) -> None:
        """Forward the audio that the utterance has not got yet, whole windows only."""
        listening = stream.listening
        assert listening is not None
        if not listening.utterance.live:
            stream.listening = None
            return
        found = stream.from_position(listening.sent)
        if not found:
            return
        if listening.tracker is not None:
            for samples, probability in found:
                listening.tracker.push(samples, probability)
        pieces = [samples for samples, _ in found]
        self._pass(stream, pieces[0] if len(pieces) == 1 else np.concatenate(pieces))
        listening.sent = stream.ear_samples

    def _conclude(self, stream: _Stream, finish: Finish) -> None:
        listening = stream.listening
        if listening is None or listening.utterance is not finish.utterance:
            return
        if not listening.paused:
            self._send_on(stream)
            rest = stream.incomplete()[max(0, listening.sent - stream.ear_samples) :]
            if len(rest):
                self._pass(stream, rest)
                listening.sent = max(listening.sent, stream.ear_samples) + len(rest)
        listening.paused = True
        prosody = listening.tracker.describe() if listening.tracker else None
        self._pass(stream, Conclude(finish.utterance, finish.revision, prosody))

    def _pass(self, stream: _Stream, item: Samples | Conclude) -> None:
        listening = stream.listening
        if listening is None:  # failed a moment ago
            return
        ticket = listening.utterance
        if isinstance(item, Conclude):
            message: Message = item
        else:
            message = Heard(ticket, item, listening.language)
        try:
            self._forward(message)
        except Overloaded:
            stream.listening = None
            self._observer.failed(self.stage)
            self.emit(
                Failed(ticket, "stt", "stt_overloaded", "Speech recognition has too much to do.")
            )
