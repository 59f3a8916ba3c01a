"""Samples: pcm16 at the wire, float32 inside, stateful resampling between the two rates."""

from __future__ import annotations

import numpy as np
import soxr

from handlers.messages import Samples

PCM16_SCALE = 32768.0


def from_pcm16(data: bytes | memoryview) -> Samples:
    """Little-endian 16-bit mono → float32 [T]. Raises ValueError on an odd byte count."""
    if len(data) % 2:
        raise ValueError("16-bit audio has an odd number of bytes")
    return np.frombuffer(data, "<i2").astype(np.float32) / np.float32(PCM16_SCALE)


def to_pcm16(samples: Samples) -> bytes:
    """float32 [T] → little-endian 16-bit mono, clipped; NaN becomes silence."""
    scaled = np.clip(np.rint(samples * np.float32(PCM16_SCALE)), -32768, 32767)
    if np.isnan(scaled.sum()):
        scaled = np.nan_to_num(scaled, nan=0.0)
    data: bytes = scaled.astype("<i2").tobytes()
    return data


class Resampler:
    """One stream from `from_hz` to `to_hz`; keeps its filter state between calls."""

    def __init__(self, from_hz: int, to_hz: int, quality: str = "MQ") -> None:
        same = from_hz == to_hz
        self._stream = None if same else soxr.ResampleStream(from_hz, to_hz, 1, "float32", quality)

    def push(self, samples: Samples, last: bool = False) -> Samples:
        """Feed [T] at `from_hz`, get what is ready at `to_hz`; `last` flushes the filter."""
        if self._stream is None:
            return samples
        out: Samples = self._stream.resample_chunk(samples, last=last)
        return out
