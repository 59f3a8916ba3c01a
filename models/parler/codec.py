"""Codes to sound while they come: the codec decodes windows that overlap by all it looks at.

DAC's decoder is convolutions without memory, so a sample depends on a known number of frames to
either side. A window with so many on both sides gives the samples that the whole would give, but
for the order of float sums; nothing has to be cross-faded.

K codebooks, F frames.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DacConfig, DacModel

from models.common.errors import ConfigError

EDGE_KERNEL = 7
"""Of the first and the last convolution."""
UNIT_REACH = 3 * (1 + 3 + 9)
"""Of a block's three residual units, in its own samples: kernels of 7, dilated 1, 3 and 9."""


def reach_frames(config: DacConfig) -> int:
    """How many frames to either side a decoded frame depends on. Raises `ConfigError`."""
    reach = EDGE_KERNEL // 2
    for stride in reversed(config.upsampling_ratios):
        if stride % 2:
            raise ConfigError(f"a codec that upsamples by {stride}: odd ones lose samples")
        padding = stride // 2
        reach += UNIT_REACH
        reach = max(
            -(-(reach + 2 * stride - 1 - padding) // stride),  # before
            (reach + padding - 1) // stride + 1,  # after
        )
    return reach + EDGE_KERNEL // 2


@dataclass(slots=True)
class Window:
    """Frames to decode, and which of them are wanted."""

    codes: Tensor  # [F, K]
    begin: int
    end: int


class Unspoken:
    """The frames of one clause as they come, and how far they are decoded."""

    def __init__(self, codebooks: int, reach: int) -> None:
        self._frames = torch.zeros(0, codebooks, dtype=torch.long)
        self._reach, self._dropped, self._decoded = reach, 0, 0

    def push(self, frames: Tensor) -> None:
        """[F, K]"""
        self._frames = torch.cat((self._frames, frames))

    def window(self, last: bool) -> Window | None:
        """All that can be decoded now; `last`: no frame follows. Forgets what has been behind."""
        count = self._dropped + len(self._frames)
        end = count if last else count - self._reach
        if end <= self._decoded:
            return None
        begin, self._decoded = self._decoded, end
        made = Window(self._frames, begin - self._dropped, end - self._dropped)
        kept = max(end - self._reach, self._dropped)
        self._frames, self._dropped = self._frames[kept - self._dropped :], kept
        return made


class WindowDecoder:
    def __init__(self, codec: DacModel) -> None:
        self._codec = codec
        self.reach = reach_frames(codec.config)
        self.hop_samples: int = codec.config.hop_length
        self.rate_hz: int = codec.config.sampling_rate

    @torch.no_grad()
    def decode(self, windows: Sequence[Window]) -> list[Tensor]:
        """The wanted samples of each, [frames * hop_samples] on the CPU.

        Windows of one length go together.
        """
        alike: dict[int, list[int]] = defaultdict(list)
        for place, window in enumerate(windows):
            alike[len(window.codes)].append(place)
        decoded: list[Tensor] = [torch.empty(0)] * len(windows)
        for places in alike.values():
            codes = torch.stack([windows[place].codes.T for place in places])  # [n, K, F]
            sound = self._codec.decode(audio_codes=codes.to(self._codec.device)).audio_values.cpu()
            for place, samples in zip(places, sound, strict=True):
                window = windows[place]
                begin, end = window.begin * self.hop_samples, window.end * self.hop_samples
                decoded[place] = samples[begin:end]
        return decoded
