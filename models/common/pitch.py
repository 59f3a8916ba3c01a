"""Pitch of clean speech by autocorrelation, for making training targets. M frames."""

from __future__ import annotations

import torch
from torch import Tensor

VOICED_ABOVE = 0.5
"""Normalised autocorrelation of a voiced frame."""
SILENT_BELOW = 2e-3
"""RMS, full scale 1."""


def track_pitch(
    samples: Tensor, rate_hz: int, hop_samples: int, *, lowest_hz: float, highest_hz: float
) -> tuple[Tensor, Tensor]:
    """[T] -> pitch [M] in Hz, carried through unvoiced frames, and voicing [M] as 0 or 1.

    Frame i looks at the 40 ms that end with hop i.
    """
    size = rate_hz // 25
    shortest, longest = int(rate_hz / highest_hz), int(rate_hz / lowest_hz)
    frames = torch.nn.functional.pad(samples, (size - hop_samples, 0)).unfold(0, size, hop_samples)
    frames = (frames - frames.mean(-1, keepdim=True)) * torch.hann_window(size)
    spectrum = torch.fft.rfft(frames, 2 * size).abs().square()
    window = torch.fft.rfft(torch.hann_window(size), 2 * size).abs().square()
    lags = torch.fft.irfft(spectrum)[:, : longest + 2]
    lags = lags / lags[:, :1].clamp(min=1e-9)
    lags = (
        lags
        / (torch.fft.irfft(window)[: longest + 2] / window.new_tensor(1.0))
        * (torch.fft.irfft(window)[0])
    )
    scored = lags[:, shortest : longest + 1] * torch.linspace(1.0, 0.9, longest - shortest + 1)
    best = scored.argmax(-1)
    lag = best + shortest
    rows = torch.arange(len(lag))
    left, middle, right = (lags[rows, lag + step] for step in (-1, 0, 1))
    bend = (left - 2 * middle + right).clamp(max=-1e-6)
    exact = lag + (0.5 * (left - right) / bend).clamp(-0.5, 0.5)
    loud = frames.square().mean(-1).sqrt() > SILENT_BELOW
    voiced = (middle > VOICED_ABOVE) & loud
    pitch = rate_hz / exact
    if not voiced.any():
        return torch.full_like(pitch, lowest_hz * 1.5), voiced.float()
    where = torch.where(voiced, rows, -1).cummax(0).values
    where = torch.where(where < 0, rows[voiced][0], where)
    return pitch[where], voiced.float()
