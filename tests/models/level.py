"""A tokenizer without weights."""

from __future__ import annotations

import torch
from torch import Tensor

from models.common.tokens import RowState, TokenizerBase

RATE_HZ = 16000


class LevelTokenizer(TokenizerBase):
    """A code is how loud a frame is; the state makes it a frame late."""

    name = "level"
    sample_rate_hz = RATE_HZ
    frame_samples = 640
    num_codebooks = 1
    codebook_size = 64
    encode_latency_frames = 1
    decode_latency_frames = 0

    def encode(
        self, samples: Tensor, state: RowState | None = None, active: Tensor | None = None
    ) -> Tensor:
        self.check_samples(samples, state)
        power = samples.unflatten(1, (-1, self.frame_samples)).square().mean(-1)  # [R, F]
        levels = (10 * torch.log10(power + 1e-6) + 60).round().clamp(0, 63)
        if state is not None:
            levels = state.extend("late", levels[:, None], 1, active)[:, 0, :-1]
        return levels.long()[..., None]

    def decode(
        self, codes: Tensor, state: RowState | None = None, active: Tensor | None = None
    ) -> Tensor:
        self.check_codes(codes, state)
        return codes[..., 0].repeat_interleave(self.frame_samples, 1) / 64
