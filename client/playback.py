"""The listener's end of a reply: a jitter buffer that knows exactly what was played.

No device and no clock: whoever plays calls `pull`, and the samples pulled are the time.

The server sends a little ahead of real time, so a full buffer is normal and is never thrown
away. Lag is something else: silence that an underrun put into the middle of an item moves
everything after it. That debt is paid back inside later pauses of the speech, ten milliseconds
at a time, and only while more waits than the server's usual lead.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

import numpy as np

from handlers.messages import RATE_HZ, Samples

MS = RATE_HZ // 1000
"""Samples in a millisecond."""
FRAME_SAMPLES = 10 * MS
"""Pauses are shortened by this much at a time."""
FADE_SAMPLES = 3 * MS
"""Where sound breaks off or starts inside an item: short enough to be heard as immediate."""
NOTHING: Samples = np.zeros(0, np.float32)
FALL: Samples = np.linspace(1, 0, FADE_SAMPLES, endpoint=False, dtype=np.float32)
QUIET_LEVEL = 10 ** (-45 / 20)
"""RMS below which a frame is a pause: 45 dB below full scale, under the softest consonants of
synthesised speech, over the noise of a recorded voice."""


@dataclass(frozen=True)
class PlaybackOptions:
    """Depths in milliseconds."""

    start_ms: int = 40
    """Depth to wait for at the first reply; the wait is never longer than this."""
    min_start_ms: int = 20
    """It halves after each item without an underrun, down to this."""
    max_start_ms: int = 160
    """It grows by the length of each underrun, up to this."""
    lead_ms: int = 300
    """More than this waiting is more than the server's lead: lag may be paid back."""
    pause_ms: int = 60
    """Of every pause, this much is always played."""


@dataclass(frozen=True, slots=True)
class Progress:
    """The first `played_samples` of an item, at 24 kHz, have been given to the speaker."""

    item_id: str
    played_samples: int


@dataclass(frozen=True, slots=True)
class _Piece:
    item_id: str
    start_sample: int
    samples: Samples  # [T]

    @property
    def end_sample(self) -> int:
        return self.start_sample + len(self.samples)


class PlaybackBuffer:
    """`push` and `flush` from the event loop, `pull` from the audio callback. Thread-safe."""

    def __init__(self, options: PlaybackOptions | None = None) -> None:
        self._options = options or PlaybackOptions()
        self._lock = threading.Lock()
        self._pieces: deque[_Piece] = deque()
        self._depth = 0
        self._start_depth = self._options.start_ms * MS
        self._playing = False
        self._waited = 0  # samples pulled since audio waits to be started
        self._now: Progress | None = None  # the item in play, or the last one
        self._ended: str | None = None  # the last item known to be complete
        self._gap: int | None = None  # silence since the item in play ran dry, in samples
        self._underrun = False  # the item in play had one
        self._flushed = False  # and nothing has come since
        self._lag = 0
        self._quiet_run = 0
        self._unreported: dict[str, int] = {}
        self._last_level = 0.0
        self._rising = False  # sound is to start inside an item
        self._fade = NOTHING  # still to be played after a break

    @property
    def depth_samples(self) -> int:
        """Audio that waits to be played."""
        return self._depth

    @property
    def start_depth_samples(self) -> int:
        """The depth that is waited for before playing, as adapted so far."""
        return self._start_depth

    @property
    def lag_samples(self) -> int:
        """How much later than at its start the current item plays now."""
        return self._lag

    def push(self, item_id: str, start_sample: int, samples: Samples) -> None:
        """Append audio [T] of an item, beginning at `start_sample` of that item."""
        if not len(samples):
            return
        with self._lock:
            if self._gap is not None and not self._pieces:
                self._judge_gap(item_id, self._gap)
            self._flushed = False
            self._pieces.append(_Piece(item_id, start_sample, samples))
            self._depth += len(samples)

    def end(self, item_id: str) -> None:
        """No more audio of that item comes: what is there need not wait, running dry is no fault.

        A later `push` of the same item is taken all the same.
        """
        with self._lock:
            self._ended = item_id
            if not self._pieces:
                self._gap = None

    def pull(self, n_samples: int) -> Samples:
        """The next [n_samples] for the speaker; silence where there is nothing to play."""
        out = np.zeros(n_samples, np.float32)
        with self._lock:
            filled = 0
            if self._may_play(n_samples):
                self._pay_back()
                while filled < n_samples and self._pieces:
                    filled += self._play_into(out[filled:])
            if filled < n_samples:
                self._break_off()
                self._fade_into(out[filled:])
                if self._gap is not None:
                    self._gap += n_samples - filled
            self._note_quiet(out)
        return out

    def flush(self) -> Progress | None:
        """Drop what waits. Returns how far the item in play got; None if none was in play."""
        with self._lock:
            now = self._now
            if self._pieces and (now is None or now.item_id != self._pieces[0].item_id):
                now = Progress(self._pieces[0].item_id, self._pieces[0].start_sample)
            elif self._flushed or (not self._pieces and now and now.item_id == self._ended):
                now = None
            self._break_off()
            self._pieces.clear()
            self._depth = self._waited = self._lag = 0
            self._gap = None
            self._flushed = True
            if now is not None:
                self._unreported.pop(now.item_id, None)
            return now

    def take_progress(self) -> list[Progress]:
        """Per item, how far it has been played, if it changed since the last call."""
        with self._lock:
            changed = [Progress(item, played) for item, played in self._unreported.items()]
            self._unreported.clear()
        return changed

    def _may_play(self, n_samples: int) -> bool:
        if self._playing or not self._pieces:
            return self._playing
        enough = (
            self._depth >= self._start_depth
            or self._waited >= self._start_depth
            or self._pieces[0].item_id == self._ended
        )
        if not enough:
            self._waited += n_samples
            return False
        self._playing = True
        self._waited = 0
        self._fade = NOTHING
        self._rising = self._pieces[0].start_sample > 0
        if self._gap is not None:
            self._lag += self._gap
            self._gap = None
        return True

    def _play_into(self, out: Samples) -> int:
        """Play from the head piece into [T]; returns how many samples."""
        piece = self._pieces.popleft()
        self._begin(piece)
        count = min(len(out), len(piece.samples))
        out[:count] = piece.samples[:count]
        if self._rising:
            self._rising = False
            out[: min(count, FADE_SAMPLES)] *= FALL[::-1][:count]
        position = piece.start_sample + count
        if count < len(piece.samples):
            self._pieces.appendleft(_Piece(piece.item_id, position, piece.samples[count:]))
        self._depth -= count
        self._now = Progress(piece.item_id, position)
        self._unreported[piece.item_id] = position
        self._last_level = float(out[count - 1])
        return count

    def _begin(self, piece: _Piece) -> None:
        if self._now is None or self._now.item_id == piece.item_id:
            return
        if not self._underrun:
            smallest = self._options.min_start_ms * MS
            self._start_depth = max(smallest, self._start_depth // 2)
        self._underrun = False
        self._lag = 0

    def _judge_gap(self, item_id: str, gap: int) -> None:
        """Audio came after the buffer ran dry: an underrun, if it is the same item's."""
        if self._now is None or self._now.item_id != item_id:
            self._gap = None
            return
        self._underrun = True
        largest = self._options.max_start_ms * MS
        self._start_depth = min(largest, self._start_depth + gap)

    def _break_off(self) -> None:
        """Stop playing: out of audio, or flushed."""
        if self._playing and self._now is not None:
            self._playing = False
            self._gap = None if self._now.item_id == self._ended else 0
            self._fade = FALL * np.float32(self._last_level)

    def _fade_into(self, out: Samples) -> None:
        """Let the last level sink to zero instead of dropping: no click."""
        count = min(len(out), len(self._fade))
        out[:count] = self._fade[:count]
        self._fade = self._fade[count:]

    def _note_quiet(self, out: Samples) -> None:
        self._quiet_run = self._quiet_run + len(out) if _quiet(out) else 0

    def _pay_back(self) -> None:
        """Shorten the pause that is being played, if playback lags and enough waits.

        Two quiet frames become one, crossfaded; the frame after them must be quiet too, so that
        the onset of the next word keeps its approach.
        """
        while (
            self._lag >= FRAME_SAMPLES
            and self._depth > self._options.lead_ms * MS
            and self._quiet_run >= self._options.pause_ms * MS
        ):
            head = self._head(3 * FRAME_SAMPLES)
            frames = head.samples[: 3 * FRAME_SAMPLES].reshape(-1, FRAME_SAMPLES)
            if len(frames) < 3 or not all(_quiet(frame) for frame in frames):
                return
            rise = np.linspace(0, 1, FRAME_SAMPLES, dtype=np.float32)
            merged = frames[0] * (1 - rise) + frames[1] * rise
            rest = head.samples[2 * FRAME_SAMPLES :]
            start_sample = head.start_sample + FRAME_SAMPLES
            samples = np.concatenate([merged, rest])
            self._pieces[0] = _Piece(head.item_id, start_sample, samples)
            self._depth -= FRAME_SAMPLES
            self._lag -= FRAME_SAMPLES

    def _head(self, n_samples: int) -> _Piece:
        """The head piece, joined with what follows it seamlessly, up to [n_samples] if there."""
        while len(self._pieces) > 1 and len(self._pieces[0].samples) < n_samples:
            first, second = self._pieces[0], self._pieces[1]
            if (first.item_id, first.end_sample) != (second.item_id, second.start_sample):
                break
            self._pieces.popleft()
            samples = np.concatenate([first.samples, second.samples])
            self._pieces[0] = _Piece(first.item_id, first.start_sample, samples)
        return self._pieces[0]


def _quiet(samples: Samples) -> bool:
    return float(np.dot(samples, samples)) <= QUIET_LEVEL**2 * len(samples)
