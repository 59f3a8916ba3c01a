"""Whisper's log-mel spectrogram (Radford et al. 2022, section 2.2) in numpy, for 8 s of audio.

As `transformers.WhisperFeatureExtractor(chunk_length=8)` with `do_normalize=True` computes it.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from handlers.messages import EAR_RATE_HZ, Samples

INPUT_SAMPLES = 8 * EAR_RATE_HZ
FFT_SAMPLES = EAR_RATE_HZ * 25 // 1000
HOP_SAMPLES = EAR_RATE_HZ // 100
FRAMES = INPUT_SAMPLES // HOP_SAMPLES
MELS = 80
LEAST_POWER = 1e-10
LEAST_VARIANCE = 1e-7
RANGE_DECADES = 8.0  # below the loudest; what is quieter is raised to that

LINEAR_HZ = 200 / 3  # Slaney's scale: per mel below the knee
KNEE_HZ, KNEE_MEL = 1000.0, 15.0
MELS_PER_LOG = 27 / np.log(6.4)

_WINDOW = np.hanning(FFT_SAMPLES + 1)[:-1].astype(np.float32)


def log_mel(audio: Samples) -> Samples:
    """[B, INPUT_SAMPLES] at `EAR_RATE_HZ`, zeros before shorter audio → [B, MELS, FRAMES]."""
    if audio.ndim != 2 or audio.shape[1] != INPUT_SAMPLES:
        raise ValueError(f"log_mel takes [B, {INPUT_SAMPLES}], not {list(audio.shape)}")
    scale = np.sqrt(audio.var(axis=1, keepdims=True) + LEAST_VARIANCE)
    normal = (audio - audio.mean(axis=1, keepdims=True)) / scale
    padded = np.pad(normal, ((0, 0), (FFT_SAMPLES // 2, FFT_SAMPLES // 2)), mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, FFT_SAMPLES, axis=1)
    spectrum = np.fft.rfft(frames[:, : FRAMES * HOP_SAMPLES : HOP_SAMPLES] * _WINDOW)
    power = np.square(spectrum.real) + np.square(spectrum.imag)  # [B, FRAMES, bins]
    levels = np.log10(np.maximum(power @ _filters(), LEAST_POWER))  # [B, FRAMES, MELS]
    levels = np.maximum(levels, levels.max(axis=(1, 2), keepdims=True) - RANGE_DECADES)
    return np.ascontiguousarray(levels.transpose(0, 2, 1) / 4 + 1, np.float32)


@functools.cache
def _filters() -> Samples:
    """[bins, MELS]: triangles evenly spaced in mel, each of the same area."""
    highest = KNEE_MEL + MELS_PER_LOG * np.log(EAR_RATE_HZ / 2 / KNEE_HZ)
    corners_hz = _hz(np.linspace(0.0, highest, MELS + 2))
    bins_hz = np.linspace(0.0, EAR_RATE_HZ / 2, FFT_SAMPLES // 2 + 1)[:, None]
    low, middle, high = corners_hz[:-2], corners_hz[1:-1], corners_hz[2:]
    rising, falling = (bins_hz - low) / (middle - low), (high - bins_hz) / (high - middle)
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    return np.asarray(triangles * 2 / (high - low), np.float32)


def _hz(mel: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    above = KNEE_HZ * np.exp((mel - KNEE_MEL) / MELS_PER_LOG)
    return np.where(mel < KNEE_MEL, LINEAR_HZ * mel, above)
