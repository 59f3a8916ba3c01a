"""The person's audio between the network, which delivers as it likes, and the tick, which is exact.

Pure; positions and lengths are samples at the wire's rate.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from handlers.messages import RATE_HZ, Samples

ABSENT_S = 10.0
"""Silence from a client for longer than any stall of the network that its pings survive: it chose
not to send, and what it sends next is not late."""
TAIL_S = 0.25
"""Nothing for so long, longer than the blocks in which clients send: what waits is all there is."""
SPARE_S = 2.0
"""Audio that lay about for so long is spare: the next silence of the person is shortened by it."""
SILENCE_LEVEL = 10 ** (-50 / 20)  # RMS


@dataclass(frozen=True, slots=True)
class StreamSettings:
    frame_samples: int  # a tick's worth
    jitter_samples: int  # beyond a frame, before the person is heard at first
    max_late_samples: int  # audio that came late and waits; more is passed over


class UserStream:
    """Frame by frame what the person says; silence where nothing has come.

    A frame that is missing is replaced by silence, and what comes in its place later is late.
    Late audio waits, which moves the person against the model: by `max_late_samples` at most,
    beyond which it is passed over, and only until the person is silent. Audio that is early, from
    a client faster than real time, is kept and taken at its pace.
    """

    def __init__(self, settings: StreamSettings) -> None:
        self._s = settings
        self._parts: deque[Samples] = deque()
        self.waiting = 0  # samples that have come and were not taken
        self.received = 0
        self.passed_over = 0  # samples, since somebody last set it to 0
        self._begun = False  # anything has come
        self._primed = False  # there is enough to begin, or to begin again
        self._idle = 0  # frames since anything has come
        self._owed = 0  # silence given in place of what may still come
        self._least = 0  # the least that waited lately
        self._since = 0  # frames since that is counted

    @property
    def position(self) -> int:
        """The end of what was taken, by the input clock."""
        return self.received - self.waiting

    def push(self, samples: Samples) -> None:
        if len(samples):
            self._parts.append(samples)
            self.waiting += len(samples)
            self.received += len(samples)
            self._begun, self._idle = True, 0

    def take(self) -> Samples | None:
        """The next frame [T]; None: silence in its place."""
        frame = self._s.frame_samples
        self._pass_over()
        self._idle += 1
        enough = frame if self._primed else frame + self._s.jitter_samples
        if self.waiting >= enough:
            self._primed = True
            taken = self._remove(frame)
            return self._remove(frame) if self._is_spare(taken) else taken
        self._primed = False
        if not self._begun:
            return None
        idle_s = self._idle * frame / RATE_HZ
        if idle_s >= TAIL_S and self.waiting:
            tail = self._remove(min(frame, self.waiting))
            self._owed += frame - len(tail)
            return np.pad(tail, (0, frame - len(tail)))
        self._owed += frame
        if idle_s >= ABSENT_S:
            self._owed = 0
        return None

    def skip(self, frames: int) -> None:
        """So many frames were not asked for: their audio is passed over."""
        count = min(frames * self._s.frame_samples, self.waiting)
        self._remove(count)
        self.passed_over += count

    def _pass_over(self) -> None:
        late = min(self._owed, self.waiting - self._s.frame_samples - self._s.max_late_samples)
        if late > 0:
            self._remove(late)
            self._owed -= late
            self.passed_over += late

    def _is_spare(self, taken: Samples) -> bool:
        """Whether this frame is silent, and the one behind it can stand for both."""
        self._since += 1
        self._least = self.waiting if self._since == 1 else min(self._least, self.waiting)
        if self._since * len(taken) < SPARE_S * RATE_HZ:
            return False
        enough = self._least >= len(taken) + self._s.jitter_samples
        spare = enough and float(np.sqrt(np.mean(np.square(taken)))) < SILENCE_LEVEL
        if spare or not enough:
            self._since = 0
        if spare:
            self._owed = max(0, self._owed - len(taken))
        return spare

    def _remove(self, count: int) -> Samples:
        pieces: list[Samples] = []
        self.waiting -= count
        while count:
            part = self._parts.popleft()
            if len(part) > count:
                self._parts.appendleft(part[count:])
                part = part[:count]
            pieces.append(part)
            count -= len(part)
        return np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
