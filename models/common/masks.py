"""Attention masks over frames, where a frame may be several tokens, and positions to match.

B rows, Q frames asking, T frames asked (the last Q of them ask), S tokens per frame.
`segments` number the recordings packed into a row: a frame attends within its own recording
only, and positions start again at each. Equal numbers stand side by side.
"""

from __future__ import annotations

import torch
from torch import Tensor


def positions_in_segments(segments: Tensor) -> Tensor:
    """Each frame's position in its recording. [B, T] -> [B, T]"""
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    first = torch.ones_like(segments, dtype=torch.bool)
    first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return index - torch.where(first, index, 0).cummax(dim=1).values


def frame_mask(
    queries: int,
    frames: int,
    *,
    within: Tensor,
    segments: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Which token may attend to which: True where it may.

    Earlier frames are seen whole, later ones never, and the own frame as `within` [S, S] says.
    `window` limits the view to that many frames, the own one included. `segments` is [B, T].
    Every token must see itself in `within`, so that no row of the mask is empty.

    Returns [1 or B, 1, Q * S, T * S], on the device of `within`.
    """
    device, per_frame = within.device, within.shape[0]
    asking = torch.arange(frames - queries, frames, device=device)[:, None]  # [Q, 1]
    asked = torch.arange(frames, device=device)[None, :]  # [1, T]
    earlier = asked < asking  # [Q, T]
    if window is not None:
        earlier &= asking - asked < window
    if segments is not None:
        same = segments[:, frames - queries :, None] == segments[:, None, :]  # [B, Q, T]
        earlier = earlier & same
    own = (asked == asking)[:, None, :, None] & within[None, :, None, :]  # [Q, S, T, S]
    allowed = earlier.reshape(-1, queries, 1, frames, 1) | own  # [1 or B, Q, S, T, S]
    return allowed.reshape(-1, 1, queries * per_frame, frames * per_frame)
