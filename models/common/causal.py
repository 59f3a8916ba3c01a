"""Causal layers that give the same output for a signal in pieces as for the whole of it.

R rows, N channels, T steps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.common.halves import Product, product
from models.common.tokens import RowState


class History(RowState):
    """Streaming state for one call after another: `active` are the rows the call belongs to."""

    def __init__(self, rows: int) -> None:
        super().__init__(rows)
        self.active: Tensor | None = None  # [R] bool; None: all
        self._products: dict[nn.Module, Product] = {}
        self._room: dict[tuple[nn.Module, tuple[int, ...]], Tensor] = {}

    def past(self, layer: nn.Module, name: str, like: Tensor, *shape: int) -> Tensor:
        """What `remember` was last given there, or zeros. [R, *shape]"""
        return self.kept((layer, name), shape, like)

    def remember(self, layer: nn.Module, name: str, value: Tensor) -> None:
        self.keep((layer, name), value.detach(), self.active)

    def product(self, conv: nn.Conv1d) -> Product:
        """Of [..., kernel * N] with its weights as they are at the first call."""
        if conv not in self._products:
            weight = conv.weight.detach().transpose(1, 2).flatten(1).contiguous()
            self._products[conv] = product(weight, conv.bias)
        return self._products[conv]

    def room(self, layer: nn.Module, like: Tensor, *shape: int) -> Tensor:
        """[R, *shape] for whatever the layer makes: the same memory at each call of that shape,
        since to take megabytes anew each time costs more than what is done in them."""
        place = (layer, shape)
        if place not in self._room:
            self._room[place] = like.new_empty((self.capacity, *shape))
        return self._room[place][: self.rows]


class CausalConv(nn.Conv1d):
    """[R, N, T] -> [R, N', T / stride]; sees this step and those before it.

    A convolution of a few steps takes several times as long as the product that it amounts to,
    which with a history stands in its place.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, dilation: int = 1, stride: int = 1
    ) -> None:
        super().__init__(inputs, outputs, kernel, dilation=dilation, stride=stride)
        self.reach = (kernel - 1) * dilation - (stride - 1)

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        if history is None:
            return super().forward(nn.functional.pad(x, (self.reach, 0)))
        return self._stream(x.mT, history).mT

    def _stream(self, x: Tensor, history: History) -> Tensor:
        """[R, T, N] -> [R, T / stride, N']"""
        steps = x.shape[1]
        if self.reach:
            x = torch.cat((history.past(self, "x", x, self.reach, x.shape[2]), x), dim=1)
            history.remember(self, "x", x[:, -self.reach :])
        taps = x
        if self.kernel_size[0] > 1:
            begins = range(0, self.kernel_size[0] * self.dilation[0], self.dilation[0])
            pieces = [x[:, at : at + steps : self.stride[0]] for at in begins]
            taps = torch.cat(pieces, dim=-1)  # [R, T / stride, kernel * N]
        return history.product(self)(taps)


class Residual(nn.Module):
    """Two causal convolutions around a skip. [R, N, T] -> [R, N, T]"""

    def __init__(self, width: int, dilation: int = 1) -> None:
        super().__init__()
        self.wide = CausalConv(width, width, 3, dilation)
        self.point = CausalConv(width, width, 1)

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        y = self.wide(nn.functional.gelu(x), history)
        return x + self.point(nn.functional.gelu(y), history)
