"""A small vocoder for one voice: a bank of harmonics plus shaped noise, controlled by a network.

After "DDSP: Differentiable Digital Signal Processing" (Engel et al., 2020). There are no phases to
guess, so it is trained by spectra alone in minutes, runs sample by sample without look-ahead, and
a piecewise signal is the same as the whole. R rows, M frames, T = M * hop samples, E bands.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from models.common.causal import CausalConv, History, Residual

NOISE_SAMPLES = 1 << 15
"""Length of the fixed noise that is read in a circle: no state but a position."""


class HarmonicVocoder(nn.Module):
    """Frames of log-mel, pitch and voicing to samples, both at the same time.

    `lowest_hz` bounds the number of harmonics.
    """

    edges_hz: Tensor
    noise: Tensor
    fade_in: Tensor
    numbers: Tensor
    glide: Tensor
    to_bins: Tensor

    def __init__(
        self,
        rate_hz: int,
        hop_samples: int,
        mel_bands: int,
        *,
        bands: int = 64,
        width: int = 128,
        lowest_hz: float = 150.0,
    ) -> None:
        super().__init__()
        self.rate_hz, self.hop_samples, self.bands = rate_hz, hop_samples, bands
        self.harmonics = int(rate_hz / 2 / lowest_hz)
        self.lowest_hz = lowest_hz
        self.inlet = CausalConv(mel_bands + 2, width, 3)
        self.body = nn.ModuleList(Residual(width, dilation) for dilation in (1, 2, 4))
        self.outlet = CausalConv(width, 2 * bands, 1)
        top_mel = 2595 * math.log10(1 + rate_hz / 2 / 700)
        mels = torch.linspace(0, top_mel, bands)
        self.register_buffer("edges_hz", 700 * (10 ** (mels / 2595) - 1), persistent=False)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(NOISE_SAMPLES, generator=generator)
        self.register_buffer("noise", noise, persistent=False)
        ramp = torch.sin(torch.linspace(0, math.pi / 2, hop_samples + 1)[:-1]) ** 2
        self.register_buffer("fade_in", ramp, persistent=False)
        numbers = torch.arange(1.0, self.harmonics + 1)
        glide = torch.arange(1, hop_samples + 1) / hop_samples
        bins_hz = torch.linspace(0, rate_hz / 2, hop_samples + 1)
        to_bins = self._at(torch.eye(bands), bins_hz.expand(bands, -1))  # [E, hop + 1]
        self.register_buffer("numbers", numbers, persistent=False)
        self.register_buffer("glide", glide, persistent=False)
        self.register_buffer("to_bins", to_bins, persistent=False)

    def forward(
        self, mel: Tensor, pitch_hz: Tensor, voiced: Tensor, history: History | None = None
    ) -> Tensor:
        """[R, M, mel_bands], [R, M], [R, M] in 0..1 -> [R, T]"""
        pitch_hz = pitch_hz.clamp(self.lowest_hz, self.rate_hz / 4)
        inputs = torch.cat((mel, pitch_hz.log()[..., None] - 5, voiced[..., None]), dim=-1)
        x = self.inlet(inputs.mT, history)  # [R, width, M]
        for layer in self.body:
            x = layer(x, history)
        envelopes = self.outlet(nn.functional.gelu(x), history).mT.clamp(-14, 4)  # [R, M, 2 E], log
        tonal, hiss = envelopes.exp().split(self.bands, dim=-1)
        history = history or History(mel.shape[0])
        return self._tones(tonal, pitch_hz, history) + self._hiss(hiss, history)

    def _tones(self, envelope: Tensor, pitch_hz: Tensor, history: History) -> Tensor:
        """Harmonics of the pitch under the envelope [R, M, E], both gliding between frames."""
        frequency = pitch_hz[..., None] * self.numbers  # [R, M, H]
        audible = frequency < self.rate_hz / 2
        levels = self._at(envelope, frequency.clamp(max=self.rate_hz / 2)) * audible
        pitch_before = history.past(self, "pitch", pitch_hz, 1).clone()
        pitch_before = torch.where(pitch_before > 0, pitch_before, pitch_hz[:, :1])
        levels = torch.cat((history.past(self, "levels", levels, 1, self.harmonics), levels), 1)
        pitch = torch.cat((pitch_before, pitch_hz), dim=1)  # [R, 1 + M]
        history.remember(self, "levels", levels[:, -1:])
        history.remember(self, "pitch", pitch[:, -1:])
        with torch.no_grad():  # of the pitch the losses of training are others
            steps = pitch[:, :-1, None] + (pitch[:, 1:] - pitch[:, :-1])[..., None] * self.glide
            cycles = history.past(self, "cycles", steps.double(), 1)
            cycles = cycles + torch.cumsum(steps.flatten(1).double() / self.rate_hz, dim=1)
            history.remember(self, "cycles", cycles[:, -1:] % 1.0)
            angle = (cycles % 1.0).float().unflatten(1, (-1, self.hop_samples)) * (2 * math.pi)
            waves = history.room(self, angle, len(angle[0]), self.harmonics, self.hop_samples)
            torch.mul(angle[..., None, :], self.numbers[:, None], out=waves).sin_()
        ends = torch.stack((levels[:, :-1], levels[:, 1:]), dim=2)  # [R, M, 2, H]
        falling, rising = (ends @ waves).unbind(2)  # [R, M, 2, hop] -> [R, M, hop] each
        return torch.lerp(falling, rising, self.glide).flatten(1)

    def _hiss(self, envelope: Tensor, history: History) -> Tensor:
        """White noise under the envelope [R, M, E], cross-faded from frame to frame."""
        count, hop = envelope.shape[1], self.hop_samples
        at = history.past(self, "at", envelope.double(), 1).clone()  # [R, 1]
        frame = (at + torch.arange(count, device=at.device))[..., None] * hop  # [R, M, 1]
        index = (frame.long() + torch.arange(2 * hop, device=at.device)) % NOISE_SAMPLES
        history.remember(self, "at", (at + count) % (NOISE_SAMPLES * hop))
        spectrum = torch.fft.rfft(self.noise[index])  # [R, M, hop + 1]
        shaped = torch.fft.irfft(spectrum * (envelope @ self.to_bins), 2 * hop)  # [R, M, 2 hop]
        rising = shaped[..., :hop] * self.fade_in
        falling = shaped[..., hop:] * (1 - self.fade_in)
        before = torch.cat((history.past(self, "hiss", rising, 1, hop), falling), dim=1)
        history.remember(self, "hiss", before[:, -1:])
        return (rising + before[:, :-1]).flatten(1)

    def _at(self, envelope: Tensor, frequency_hz: Tensor) -> Tensor:
        """The envelope [..., E] read at frequencies [..., X], between bands in proportion."""
        mel = 2595 * torch.log10(1 + frequency_hz / 700)
        top = 2595 * math.log10(1 + self.rate_hz / 2 / 700)
        place = mel / top * (self.bands - 1)
        below = place.floor().clamp(0, self.bands - 2)
        share = place - below
        index = below.long()
        return envelope.gather(-1, index) * (1 - share) + envelope.gather(-1, index + 1) * share


def spectral_loss(made: Tensor, wanted: Tensor) -> Tensor:
    """Distance of magnitudes at three resolutions, in logarithm and relative. [R, T] each."""
    loss = made.new_zeros(())
    for size in (256, 512, 1024):
        window = torch.hann_window(size, device=made.device)
        a, b = (
            torch.stft(x, size, size // 4, window=window, return_complex=True).abs()
            for x in (made, wanted)
        )
        loss = loss + (torch.log(a + 1e-3) - torch.log(b + 1e-3)).abs().mean()
        loss = loss + (a - b).norm() / (b.norm() + 1e-3)
    return loss / 3
