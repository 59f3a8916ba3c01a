"""How a reply's audio goes out: paced a little ahead of real time, and what of it was heard.

Pure: time is an argument in seconds, positions are samples of the reply's audio at `RATE_HZ`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from handlers.messages import RATE_HZ, Samples


@dataclass(frozen=True, slots=True)
class PlayoutSettings:
    lead_s: float = 0.2
    """How far sending runs ahead of playing: covers network jitter, bounds what a flush loses."""
    max_lead_s: float = 0.6
    """How far it may grow for a listener that runs dry all the same."""
    chunk_s: float = 0.04
    """Audio per message."""
    keep_s: float = 2.0
    """Sent audio kept for a resume, in case the listener reports an earlier position."""


class Playout:
    """The audio of one reply, from synthesis to the listener's ear.

    Positions: 0 ≤ heard ≤ sent ≤ total. `pause` freezes; `resume` sends again from the heard
    sample. Where the listener reports positions those count; otherwise playing is assumed to
    start with the first send and to go on in real time.
    """

    def __init__(self, settings: PlayoutSettings | None = None) -> None:
        s = settings or PlayoutSettings()
        self._lead = round(s.lead_s * RATE_HZ)
        self._max_lead = max(self._lead, round(s.max_lead_s * RATE_HZ))
        self._chunk = round(s.chunk_s * RATE_HZ)
        self._keep = round(s.keep_s * RATE_HZ)
        self._parts: deque[tuple[int, Samples]] = deque()  # (start, samples), contiguous
        self.total = 0
        self.sent = 0
        self.ended = False
        self.paused = False
        self._furthest = 0  # the most ever sent: a rewind does not lower it
        self._reported = 0  # the listener's latest word
        self._anchor_sample = 0  # playing was here ...
        self._anchor_s = 0.0  # ... at this time

    def push(self, samples: Samples) -> None:
        if len(samples):
            self._parts.append((self.total, samples))
            self.total += len(samples)

    def end(self) -> None:
        """No more `push`."""
        self.ended = True

    def heard(self, now_s: float) -> int:
        """The sample up to which the listener has heard the reply."""
        if self.paused:
            return self._anchor_sample
        played = self._anchor_sample + round((now_s - self._anchor_s) * RATE_HZ)
        return max(0, min(self.sent, played))

    @property
    def drained(self) -> bool:
        """All audio has been sent."""
        return self.ended and self.sent == self.total

    def finished(self, now_s: float) -> bool:
        """All audio has been heard."""
        return self.drained and self.heard(now_s) == self.total

    def ahead_samples(self, now_s: float) -> int:
        """Audio made but not yet heard: what bounds synthesis."""
        return self.total - self.heard(now_s)

    def report(self, played_samples: int, now_s: float) -> None:
        """The listener says that it has played so much. Positions never sent are clamped.

        One that has played all it was sent, while pacing held back more, gets a longer lead. One
        that was sent everything and does not play on has flushed: it is not waited for.
        """
        if self.drained and not self.paused and played_samples <= self._reported:
            return
        self._reported = played_samples
        if not self.paused and 0 < self.sent <= played_samples and self.sent < self.total:
            self._lead = min(self._max_lead, self._lead * 3 // 2)
        self._anchor_sample = max(0, min(played_samples, self._furthest))
        self._anchor_s = now_s

    def pause(self, now_s: float) -> None:
        if not self.paused:
            self._anchor_sample = self.heard(now_s)
            self._anchor_s = now_s
            self.paused = True

    def resume(self, now_s: float) -> None:
        """Go on from the heard sample."""
        if self.paused:
            self.paused = False
            oldest = self._parts[0][0] if self._parts else self.total
            self.sent = max(self._anchor_sample, min(oldest, self.sent))
            self._anchor_sample = self.sent
            self._anchor_s = now_s

    def due(self, now_s: float) -> list[tuple[int, Samples]]:
        """What to send now, as (start_sample, samples [T])."""
        out: list[tuple[int, Samples]] = []
        while not self.paused and self.sent < self.total:
            ahead = self.sent - self.heard(now_s)
            wanted = min(self._chunk, self.total - self.sent)
            if ahead == 0:  # start, or the listener ran dry: playing goes on from here
                self._anchor_sample = self.sent
                self._anchor_s = now_s
            elif ahead + wanted > self._lead:
                break
            out.append((self.sent, self._slice(self.sent, self.sent + wanted)))
            self.sent += wanted
            self._furthest = max(self._furthest, self.sent)
        self._forget()
        return out

    def deadline_s(self, now_s: float) -> float | None:
        """When `due` or `finished` may next have something new to say."""
        if self.paused:
            return None
        ahead = self.sent - self.heard(now_s)
        if self.sent < self.total:
            wait = max(0, ahead + min(self._chunk, self.total - self.sent) - self._lead)
        elif self.ended and ahead > 0:
            wait = ahead
        else:
            return None
        return now_s + (wait + 2) / RATE_HZ  # late enough for rounding

    def _slice(self, start: int, stop: int) -> Samples:
        pieces = [
            part[max(0, start - at) : stop - at]
            for at, part in self._parts
            if at < stop and at + len(part) > start
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _forget(self) -> None:
        floor = self.sent - self._keep
        while self._parts and self._parts[0][0] + len(self._parts[0][1]) <= floor:
            self._parts.popleft()
