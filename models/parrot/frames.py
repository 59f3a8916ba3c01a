"""From two channels to frames and back.

T frames, C = 2 channels, D codebooks, S = C * D slots of a frame, K ids per slot. Codes are
numbers in 0..K-1; frames are [..., T, C, D]; flattened to [..., T * S] they are the published
interleaving a1 b1 a2 b2 ... that the models take as `input_ids`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.common.errors import FrameLengthError, VocabularyError
from models.parrot.config import CHANNELS, DualChannelConfig


def interleave(a: Tensor, b: Tensor, config: DualChannelConfig) -> Tensor:
    """Two channels' codes, [..., T, D] each -> [..., T * S].

    Raises `FrameLengthError` where the channels differ in length, `VocabularyError` where they
    have another number of codebooks than the model, or an id that it doesn't know.
    """
    if a.shape[:-1] != b.shape[:-1]:
        raise FrameLengthError(
            f"the channels have unequal lengths: {tuple(a.shape[:-1])} and {tuple(b.shape[:-1])}"
        )
    for name, channel in (("first", a), ("second", b)):
        if channel.shape[-1] != config.num_codebooks:
            raise VocabularyError(
                f"the {name} channel has {channel.shape[-1]} codebooks, "
                f"the model {config.num_codebooks}"
            )
        if channel.numel() and not 0 <= int(channel.min()) <= int(channel.max()) < config.slot_size:
            raise VocabularyError(
                f"the {name} channel has ids from {int(channel.min())} to {int(channel.max())}; "
                f"the model knows 0 to {config.slot_size - 1}"
            )
    return torch.stack((a, b), dim=-2).flatten(-3)  # [..., T, C, D] -> [..., T * S]


def to_frames(input_ids: Tensor, num_codebooks: int) -> Tensor:
    """[..., T * S] -> [..., T, C, D]. Raises `FrameLengthError` at a broken frame."""
    slots = CHANNELS * num_codebooks
    if input_ids.shape[-1] % slots:
        raise FrameLengthError(
            f"{input_ids.shape[-1]} tokens are no whole number of frames of {CHANNELS} channels "
            f"x {num_codebooks} codebooks"
        )
    return input_ids.unflatten(-1, (-1, CHANNELS, num_codebooks))


def delay(frames: Tensor, delays: Sequence[int], fill: int) -> Tensor:
    """Shifts codebook d by delays[d] frames, so that it is predicted knowing the earlier ones.

    [..., T, C, D] -> [..., T + max(delays), C, D]; the gaps at both ends hold `fill` (the
    configuration's `start_id`, or -100 for labels).
    """
    length = frames.shape[-3]
    delayed = frames.new_full((*frames.shape[:-3], length + max(delays), *frames.shape[-2:]), fill)
    for d, shift in enumerate(delays):
        delayed[..., shift : shift + length, :, d] = frames[..., d]
    return delayed


def undelay(delayed: Tensor, delays: Sequence[int]) -> Tensor:
    """What `delay` was given. [..., T + max(delays), C, D] -> [..., T, C, D]"""
    length = delayed.shape[-3] - max(delays)
    if length < 0:
        raise FrameLengthError(f"{delayed.shape[-3]} frames are too few for delays {list(delays)}")
    return torch.stack(
        [delayed[..., shift : shift + length, :, d] for d, shift in enumerate(delays)], dim=-1
    )


def pack(frames: Tensor, config: DualChannelConfig) -> Tensor:
    """One id per frame, the first slot its highest digit. [..., C, D] -> [...], int64

    Raises `PackedIdOverflowError`.
    """
    weights = _digit_weights(config, frames.device)
    return (frames.flatten(-2).long() * weights).sum(-1)


def unpack(ids: Tensor, config: DualChannelConfig) -> Tensor:
    """What `pack` was given. [...] -> [..., C, D]"""
    digits = ids[..., None] // _digit_weights(config, ids.device) % config.slot_size  # [..., S]
    return digits.unflatten(-1, (CHANNELS, config.num_codebooks))


def _digit_weights(config: DualChannelConfig, device: torch.device) -> Tensor:
    """[S]"""
    assert config.packed_ids  # raises where they overflow
    powers = [config.slot_size**i for i in reversed(range(config.slots))]
    return torch.tensor(powers, device=device)
