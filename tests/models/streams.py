"""Streaming a signal through a tokenizer, and by how much what comes out is late."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from models.common.tokens import RowState


class Step(Protocol):
    def __call__(self, x: Tensor, state: RowState | None, /) -> Any: ...


def streamed(step: Step, x: Tensor, at_once: int, state: RowState) -> Tensor:
    """[R, N, ...] in pieces of `at_once` along the second dimension."""
    return torch.cat([step(piece, state) for piece in x.split(at_once, dim=1)], dim=1)


def measured_latency(late: Tensor, whole: Tensor, tolerance: float) -> int:
    """By how many frames [R, F, ...] is `late` the same signal as `whole`? Only one fits."""
    frames = whole.shape[1]
    fits = [
        shift
        for shift in range(frames - 1)
        if bool(((late[:, shift:] - whole[:, : frames - shift]).abs() <= tolerance).all())
    ]
    assert len(fits) == 1, f"{len(fits)} delays fit"
    return fits[0]
