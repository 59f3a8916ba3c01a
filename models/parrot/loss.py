"""The published objective: p(Sa, Sb) = prod_t p(a_t | s_<t) p(b_t | s_<t).

B rows, T frames, C = 2 channels, D codebooks, K ids per slot.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""A label that doesn't count, after the convention of `torch.nn.functional.cross_entropy`."""


def next_frame_targets(labels: Tensor, segments: Tensor | None = None) -> Tensor:
    """What each frame has to predict: the labels of the frame after it. [B, T, C, D], same out

    Excluded (`IGNORE`): whatever the labels exclude, what follows the last frame, the first
    frame of each recording and all padding, where `segments` [B, T] (0 = padding) says so.
    """
    targets = torch.full_like(labels, IGNORE)
    targets[:, :-1] = labels[:, 1:]
    if segments is not None:
        follows = torch.zeros_like(segments, dtype=torch.bool)  # [B, T]
        follows[:, :-1] = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
        targets = targets.masked_fill(~follows[:, :, None, None], IGNORE)
    return targets


def channel_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of each channel over its counted targets, in nats; 0 where none counts.

    [B, T, C, D, K], [B, T, C, D] -> [C], float32
    """
    losses = F.cross_entropy(
        logits.float().flatten(0, 3), targets.flatten(), ignore_index=IGNORE, reduction="none"
    ).view_as(targets)  # [B * T * C * D] -> [B, T, C, D]
    counted = (targets != IGNORE).sum((0, 1, 3))  # [C]
    return losses.sum((0, 1, 3)) / counted.clamp(min=1)
