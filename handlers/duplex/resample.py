"""Between the wire's rate and a tokenizer's, frame by frame, for many rows.

A windowed sinc, 1 ms late. So many samples in, so many out, which keeps a frame a frame: a soxr
stream holds back up to 20 ms, in bursts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from handlers.messages import Samples

HALF_WIDTH_S = 0.001
KAISER_BETA = 6.0
CUTOFF_SHARE = 0.95  # of the lower rate's half
BLOCK_STEPS = 8
"""Periods of the rates' ratio that one product covers: dense, with few zeros in it."""


class FrameResampler:
    """Frames of `frame_samples` at `from_hz`, each row a stream of its own.

    Raises ValueError where such a frame is no whole number of samples at `to_hz`.
    """

    def __init__(self, from_hz: int, to_hz: int, frame_samples: int, rows: int) -> None:
        common = math.gcd(from_hz, to_hz)
        period = from_hz // common
        if frame_samples % period:
            raise ValueError(
                f"a frame of {frame_samples} samples at {from_hz} Hz is no whole number of "
                f"samples at {to_hz} Hz"
            )
        self._same = from_hz == to_hz
        self._block = period * math.gcd(frame_samples // period, BLOCK_STEPS)
        self._delay = round(HALF_WIDTH_S * from_hz)
        self._matrix = self._filter(from_hz, to_hz)
        self._history = np.zeros((rows, 2 * self._delay), np.float32)

    def reset(self, row: int) -> None:
        self._history[row] = 0.0

    def push(self, frames: Samples, rows: Sequence[int]) -> Samples:
        """The next frame of each of these rows, [len(rows), T] → [len(rows), T * to / from]."""
        if self._same:
            return frames
        joined = np.concatenate([self._history[list(rows)], frames], axis=1)
        self._history[list(rows)] = joined[:, -2 * self._delay :]
        span = len(self._matrix)
        windows = np.lib.stride_tricks.sliding_window_view(joined, span, axis=1)
        blocks = windows[:, :: self._block]  # [rows, T / block, span]
        # Row by row: a larger product wakes the BLAS library's threads, at many times the cost.
        return np.stack([(one @ self._matrix).reshape(-1) for one in blocks])

    def _filter(self, from_hz: int, to_hz: int) -> Samples:
        """[2 * delay + block, outputs of a block]: the taps at each output's phase."""
        outputs = np.arange(self._block * to_hz // from_hz)[None, :] * (from_hz / to_hz)
        inputs = np.arange(2 * self._delay + self._block)[:, None] - 2 * self._delay
        off_s = (outputs - self._delay - inputs) / from_hz
        inside = 1 - (off_s / HALF_WIDTH_S) ** 2
        window = np.i0(KAISER_BETA * np.sqrt(np.clip(inside, 0, None))) / np.i0(KAISER_BETA)
        cutoff_hz = CUTOFF_SHARE * min(from_hz, to_hz) / 2
        taps = np.sinc(2 * cutoff_hz * off_s) * np.where(inside >= 0, window, 0.0)
        matrix: Samples = (taps / taps.sum(axis=0)).astype(np.float32)
        return matrix
