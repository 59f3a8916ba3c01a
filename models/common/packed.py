"""Linear layers on a CPU with their weights laid out in the blocks that the processor reads best.

A step of a few rows reads every weight once, so that memory is its limit. On x86, torch's own
product of a plain weight reaches half of what memory gives for one row and a quarter for two (it
has another library beneath than half precision has); oneDNN's product of a packed one nearly all.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = (torch.float32, torch.bfloat16)
ROWS = 16
"""That a weight is packed for. For one row it would not be packed at all; for any more the layout
is the same, and it serves any number of them."""


class PackedLinear(nn.Module):
    """The same product as `nn.Linear`, with sums in another order. The weight can't be read."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        ops: Any = torch.ops.mkldnn
        self.out_features = linear.out_features
        self._weight = ops._reorder_linear_weight(linear.weight.detach(), ROWS)
        self._bias = None if linear.bias is None else linear.bias.detach()
        self._product = ops._linear_pointwise

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self._product(x, self._weight, self._bias, "none", [], "")
        return out


def can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.dtype not in DTYPES:
        return False
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    return bool(weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())


@torch.no_grad()
def pack(module: nn.Module) -> None:
    """All linear layers within, where there is anything to gain. They cannot be moved, changed or
    saved after that."""
    replace_linear(module, lambda linear: PackedLinear(linear) if can_pack(linear.weight) else None)


def replace_linear(module: nn.Module, other: Callable[[nn.Linear], nn.Module | None]) -> None:
    """By what `other` makes of each linear layer within; None leaves it."""
    for name, child in module.named_children():
        if type(child) is not nn.Linear:
            replace_linear(child, other)
        elif (made := other(child)) is not None:
            setattr(module, name, made)
