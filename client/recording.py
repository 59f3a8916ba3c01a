"""A recording of the conversation: left the person as sent, right Parley as heard."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import numpy as np

from client.wav import WavWriter
from handlers.messages import RATE_HZ, Samples

MAX_SKEW_SAMPLES = RATE_HZ // 10
"""How far one side may run ahead: block sizes and scheduling stay well within it, a device that
has stopped or whose clock is slow does not."""


class Recording:
    """Pairs two streams at 24 kHz sample for sample and writes what is complete on both sides.

    A side that falls back by more than `MAX_SKEW_SAMPLES` is filled with silence. Use as a
    context manager; the file is valid at any moment.
    """

    def __init__(self, path: Path) -> None:
        self._writer = WavWriter(path, channels=2)
        self._person = self._parley = np.zeros(0, np.float32)

    def person(self, samples: Samples) -> None:
        """The next [T] of the person's side."""
        self._person = np.concatenate([self._person, samples])
        self._write()

    def parley(self, samples: Samples) -> None:
        """The next [T] of Parley's side."""
        self._parley = np.concatenate([self._parley, samples])
        self._write()

    def close(self) -> None:
        self._write(max_skew=0)
        self._writer.close()

    def __enter__(self) -> Recording:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def _write(self, max_skew: int = MAX_SKEW_SAMPLES) -> None:
        ahead = max(len(self._person), len(self._parley)) - max_skew
        self._person, self._parley = _filled(self._person, ahead), _filled(self._parley, ahead)
        ready = min(len(self._person), len(self._parley))
        if ready:
            self._writer.write(np.stack([self._person[:ready], self._parley[:ready]], axis=1))
            self._person, self._parley = self._person[ready:], self._parley[ready:]


def _filled(samples: Samples, length: int) -> Samples:
    return np.pad(samples, (0, max(0, length - len(samples))))
