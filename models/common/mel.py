"""Log-mel frames without look-ahead: frame i ends where hop i ends. R rows, M frames."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank

from models.common.causal import History

FLOOR = 1e-5
"""Added to mel magnitudes (full scale 1), so that digital silence is log(1e-5) = -11.5."""


class LogMel(nn.Module):
    """[R, M * hop] samples -> [R, M, bands], natural logarithm of magnitudes."""

    window: Tensor
    bank: Tensor

    def __init__(self, rate_hz: int, hop_samples: int, window_samples: int, bands: int) -> None:
        super().__init__()
        self.hop_samples, self.window_samples = hop_samples, window_samples
        self.fft = 1 << (window_samples - 1).bit_length()
        bank = mel_filter_bank(
            num_frequency_bins=self.fft // 2 + 1,
            num_mel_filters=bands,
            min_frequency=0.0,
            max_frequency=rate_hz / 2,
            sampling_rate=rate_hz,
            norm=None,
            mel_scale="htk",
        )
        bank = bank / np.maximum(bank.sum(0), 1.0)  # the mean magnitude under a band
        window = torch.hann_window(window_samples)
        self.register_buffer("window", window / window.sum() * 2, persistent=False)
        self.register_buffer("bank", torch.from_numpy(bank.astype(np.float32)), persistent=False)

    def forward(self, samples: Tensor, history: History | None = None) -> Tensor:
        before = self.window_samples - self.hop_samples
        if history is None:
            padded = nn.functional.pad(samples, (before, 0))
        else:
            padded = torch.cat((history.past(self, "samples", samples, before), samples), dim=-1)
            history.remember(self, "samples", padded[:, -before:])
        frames = padded.unfold(-1, self.window_samples, self.hop_samples)  # [R, M, window]
        spectrum = torch.fft.rfft(frames * self.window, self.fft).abs()  # [R, M, fft / 2 + 1]
        return torch.log(spectrum @ self.bank + FLOOR)
