"""Products with weights of half precision and sums in single, on a CPU.

For a product of few rows torch's usual library lays the weight out anew each time, which takes
longer than the product does, and reads twice the bytes. FBGEMM's has it laid out once, in half
precision: of a checkpoint whose weights are rounded to that, the result is the same, in a fifth to
a half of the time. `python -m models.common.halves FOLDER` rounds those of a checkpoint.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.common.packed import replace_linear

Product = Callable[[Tensor], Tensor]


class HalfLinear(nn.Module):
    """As `nn.Linear`, of a weight [N', N] that is one of half precision. It can't be read."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self._bias = None if bias is None else bias.detach()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # once each, that it is to go some day; torch is pinned
            self._weight = torch.fbgemm_pack_gemm_matrix_fp16(weight.detach())
            self(torch.zeros(1, weight.shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.fbgemm_linear_fp16_weight_fp32_activation(x, self._weight, self._bias)
        return out


def is_half(weight: Tensor) -> bool:
    """Whether nothing of it is lost in half precision."""
    return bool((weight.half().float() == weight).all())


def can_halve(weight: Tensor) -> bool:
    """Whether there is such a product here, and it is the same one."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return False
    known = hasattr(torch, "fbgemm_linear_fp16_weight_fp32_activation")
    return known and "fbgemm" in torch.backends.quantized.supported_engines and is_half(weight)


def product(weight: Tensor, bias: Tensor | None = None) -> Product:
    """x [..., N] -> x @ weight.T + bias, [..., N']"""
    if can_halve(weight):
        return HalfLinear(weight, bias)
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    return lambda x: nn.functional.linear(x, weight, bias)


def halve(module: nn.Module) -> None:
    """All linear layers within that can be. They cannot be moved, changed or saved after that."""
    replace_linear(
        module,
        lambda linear: HalfLinear(linear.weight, linear.bias) if can_halve(linear.weight) else None,
    )


def round_files(folder: Path) -> dict[str, float]:
    """Rounds the matrices of every safetensors file there, which stay in single precision.

    {file: the greatest change, relative to the greatest number of its matrix}
    """
    changes = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        weights, worst = load_file(path), 0.0
        for name, weight in weights.items():
            if weight.dtype == torch.float32 and weight.dim() > 1:
                weights[name] = weight.half().float()
                change = (weights[name] - weight).abs().max() / weight.abs().max().clamp(min=1e-30)
                worst = max(worst, float(change))
        save_file(weights, path, metadata)
        changes[path.name] = worst
    return changes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Rounds a checkpoint's weights to half precision.")
    parser.add_argument("folder", type=Path)
    for name, change in round_files(parser.parse_args().folder).items():
        print(f"{name}: changed by {change:.1e} at most")
