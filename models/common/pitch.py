"""Pitch by autocorrelation: as features for a model, and of clean speech as training targets.

R rows, M frames, B lags.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.common.causal import History

VOICED_ABOVE = 0.5
"""Normalised autocorrelation of a voiced frame."""
SILENT_BELOW = 2e-3
"""RMS, full scale 1."""


class PitchMotion(nn.Module):
    """How a voice rises and falls, whatever its pitch, and how periodic it is.

    [R, M * hop] -> [R, M, X]. Autocorrelation at lags spaced evenly in pitch, of the 40 ms that
    end with hop i, is compared with that of some hops before at every shift between the two. A
    network that is given log-mel frames, or the autocorrelation itself, did not learn from
    thousands of examples to tell a final fall from a rise; from these it does.
    """

    window: Tensor
    correlate: Tensor

    def __init__(
        self,
        rate_hz: int,
        hop_samples: int,
        *,
        lowest_hz: float = 60.0,
        highest_hz: float = 400.0,
        lags: int = 48,
        shifts: int = 8,
        hops_before: tuple[int, ...] = (4, 8, 12),
    ) -> None:
        super().__init__()
        self.hop_samples, self.size = hop_samples, rate_hz // 25
        self.shifts, self.hops_before = shifts, hops_before
        self.features = 1 + len(hops_before) * (2 * shifts + 1)
        hz = highest_hz * (lowest_hz / highest_hz) ** torch.linspace(0, 1, lags)
        window = torch.hann_window(self.size)
        own = _own_correlation(window)
        at = torch.cat((torch.zeros(1).long(), (rate_hz / hz).round().long()))  # [1 + B]
        # Long enough for the longest lag not to wrap around.
        self.fft = 2 * (-(-(self.size + int(at.max())) // 128) * 64)
        cosines = torch.cos(2 * torch.pi / self.fft * torch.arange(self.fft // 2 + 1)[:, None] * at)
        cosines[1:-1] *= 2  # an inverse transform, at these lags only
        self.register_buffer("window", window, persistent=False)
        correlate = cosines / self.fft * (own[0] / own[at])
        # Of squared real and imaginary parts in turn: to add them up first takes twice as long.
        self.register_buffer("correlate", correlate.repeat_interleave(2, 0), persistent=False)

    def forward(self, samples: Tensor, history: History | None = None) -> Tensor:
        before, longest = self.size - self.hop_samples, max(self.hops_before)
        if history is None:
            padded = nn.functional.pad(samples, (before, 0))
        else:
            padded = torch.cat((history.past(self, "samples", samples, before), samples), dim=-1)
            history.remember(self, "samples", padded[:, -before:])
        frames = padded.unfold(-1, self.size, self.hop_samples) * self.window  # [R, M, size]
        spectrum = torch.view_as_real(torch.fft.rfft(frames, self.fft)).flatten(-2)
        correlation = spectrum.square() @ self.correlate  # [R, M, 1 + B]
        energy = correlation[..., :1] + 1e-5  # of a window at -80 dB full scale, about
        voice = (correlation[..., 1:] / energy).clamp(min=0)  # [R, M, B]
        voice = voice / (voice.norm(dim=-1, keepdim=True) + 0.1)
        if history is None:
            past = nn.functional.pad(voice, (0, 0, longest, 0))
        else:
            past = torch.cat((history.past(self, "v", voice, longest, voice.shape[-1]), voice), 1)
            history.remember(self, "v", past[:, -longest:])
        shifted = nn.functional.pad(voice, (self.shifts, self.shifts))
        # Contiguous, since windows that share their memory are multiplied one after another.
        shifted = shifted.unfold(-1, voice.shape[-1], 1).contiguous()  # [R, M, 2 shifts + 1, B]
        starts = [longest - hops for hops in self.hops_before]
        earlier = [past[:, start : start + voice.shape[1]] for start in starts]
        moved = torch.stack(earlier, -2) @ shifted.mT  # [R, M, before, 2 shifts + 1]
        return torch.cat((voice.amax(-1, keepdim=True), moved.flatten(-2)), dim=-1)


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
    own = _own_correlation(torch.hann_window(size))
    lags = torch.fft.irfft(spectrum)[:, : longest + 2]
    lags = lags / lags[:, :1].clamp(min=1e-9) / own[: longest + 2] * own[0]
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


def _own_correlation(window: Tensor) -> Tensor:
    """What a window alone makes of every lag. [N] -> [2 N]"""
    return torch.fft.irfft(torch.fft.rfft(window, 2 * len(window)).abs().square())
