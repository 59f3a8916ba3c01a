"""The person's audio on its way in: the input clock, a bounded backlog, fair feeding of the ear."""

from __future__ import annotations

from collections import deque

import numpy as np

from handlers.audio import to_pcm16
from handlers.messages import RATE_HZ, Samples

AHEAD_SAMPLES = RATE_HZ // 2
"""Audio that may be with the ear and not yet listened to. More waits here, so that a client that
sends faster than real time queues behind itself, not in front of others."""
FEED_SAMPLES = RATE_HZ // 10
"""Longest piece handed to the ear at a time."""
KEEP_S = 30.0
"""Audio kept for the item it becomes; of a longer turn the end is kept."""


class BacklogFull(Exception):
    """More audio is waiting than the session's bound allows; nothing of it was taken."""


class Intake:
    """Positions are input-clock samples: audio taken since the connection opened, at `RATE_HZ`."""

    def __init__(self, max_backlog_s: float) -> None:
        self._limit = round(max_backlog_s * RATE_HZ)
        self._waiting: deque[Samples] = deque()
        self._kept: deque[tuple[int, Samples]] = deque()
        self.received = 0  # end of the audio taken from the client
        self.fed = 0  # end of the audio handed to the ear
        self.listened = 0  # end of the audio the ear has answered for
        self.uncommitted = 0  # start of the input audio buffer
        self._keep_from: int | None = None

    def take(self, samples: Samples) -> None:
        """Accept audio from the client. Raises `BacklogFull`."""
        if self.received - self.listened + len(samples) > self._limit:
            raise BacklogFull
        self._waiting.append(samples)
        self._kept.append((self.received, samples))
        self.received += len(samples)
        floor = self.received - round(KEEP_S * RATE_HZ)
        if self._keep_from is None:
            floor = max(floor, self.listened - RATE_HZ)
        else:
            floor = max(floor, self._keep_from)
        while self._kept and self._kept[0][0] + len(self._kept[0][1]) <= floor:
            self._kept.popleft()

    def feed(self) -> list[tuple[int, Samples]]:
        """What the ear can be given now, as (start_sample, samples [T])."""
        out: list[tuple[int, Samples]] = []
        while self._waiting and self.fed - self.listened < AHEAD_SAMPLES:
            samples = self._waiting.popleft()
            if len(samples) > FEED_SAMPLES:
                self._waiting.appendleft(samples[FEED_SAMPLES:])
                samples = samples[:FEED_SAMPLES]
            out.append((self.fed, samples))
            self.fed += len(samples)
        return out

    @property
    def caught_up(self) -> bool:
        """The ear has listened to all audio but a last, incomplete window."""
        return self.received - self.listened < RATE_HZ // 16

    def keep_from(self, start_sample: int | None) -> None:
        """Hold on to audio from here for `audio`; None: only the last second."""
        self._keep_from = start_sample

    def audio(self, start_sample: int, end_sample: int) -> bytes:
        """pcm16le of what is still kept between the two positions."""
        pieces = [
            samples[max(0, start_sample - at) : max(0, end_sample - at)]
            for at, samples in self._kept
            if at < end_sample and at + len(samples) > start_sample
        ]
        return to_pcm16(np.concatenate(pieces)) if pieces else b""
