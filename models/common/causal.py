"""Causal layers that give the same output for a signal in pieces as for the whole of it.

R rows, N channels, T steps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.common.tokens import RowState


class History(RowState):
    """Streaming state for one call after another: `active` are the rows the call belongs to."""

    def __init__(self, rows: int) -> None:
        super().__init__(rows)
        self.active: Tensor | None = None  # [R] bool; None: all

    def past(self, layer: nn.Module, name: str, like: Tensor, *shape: int) -> Tensor:
        """What `remember` was last given there, or zeros. [R, *shape]"""
        return self.kept((layer, name), shape, like)

    def remember(self, layer: nn.Module, name: str, value: Tensor) -> None:
        self.keep((layer, name), value.detach(), self.active)


class CausalConv(nn.Conv1d):
    """[R, N, T] -> [R, N', T]; sees this step and (kernel - 1) * dilation before it."""

    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, dilation=dilation)
        self.reach = (kernel - 1) * dilation

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        if history is None:
            x = nn.functional.pad(x, (self.reach, 0))
        elif self.reach:
            x = torch.cat((history.past(self, "x", x, x.shape[1], self.reach), x), dim=-1)
            history.remember(self, "x", x[..., -self.reach :])
        return super().forward(x)


class Residual(nn.Module):
    """Two causal convolutions around a skip. [R, N, T] -> [R, N, T]"""

    def __init__(self, width: int, dilation: int = 1) -> None:
        super().__init__()
        self.wide = CausalConv(width, width, 3, dilation)
        self.point = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        y = self.wide(nn.functional.gelu(x), history)
        return x + self.point(nn.functional.gelu(y))
