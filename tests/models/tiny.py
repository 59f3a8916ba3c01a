"""Small random dual-channel models, and what the tests compare."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from models.parrot.backbones import BACKBONES, DualLlama
from models.parrot.modeling import DualChannelModel

torch.set_num_threads(1)

CODES = 11
EXACT = {"rtol": 0.0, "atol": 2e-5}
"""fp32, sums of other order."""

SHAPES = [
    {"join": join, "num_codebooks": depth}
    for join, depth in itertools.product(("pair", "sum"), (1, 3))
]
EVERY = list(itertools.product(BACKBONES, SHAPES))
EVERY_ID = [f"{b.__name__}-{s['join']}-{s['num_codebooks']}" for b, s in EVERY]
LLAMAS = [(DualLlama, shape) for shape in SHAPES]


def settings(**changes: Any) -> dict[str, Any]:
    """Two layers, four heads on two key heads; weights large enough that everything matters."""
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        **changes,
    }


def model(
    backbone: type[DualChannelModel] = DualLlama, attention: str = "sdpa", **changes: Any
) -> DualChannelModel:
    """In evaluation mode, the same weights for the same shapes."""
    torch.manual_seed(5)
    config = backbone.config_class(**settings(codebook_size=CODES, **changes))
    config._attn_implementation = attention
    made: DualChannelModel = backbone(config).eval()
    return made


def codes(of: DualChannelModel, rows: int = 2, frames: int = 6, seed: int = 0) -> Tensor:
    """Random frames. [B, T, C, D]"""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, frames, 2, of.config.num_codebooks)
    return torch.randint(0, of.config.slot_size, shape, generator=generator)


def logits(of: DualChannelModel, frames: Tensor, **inputs: Any) -> Tensor:
    """[B, T, C, D] -> [B, T, C, D, K]"""
    with torch.no_grad():
        out: Tensor = of(frames.flatten(1), **inputs).logits
    return out


def other(frames: Tensor, where: tuple[Any, ...], of: DualChannelModel) -> Tensor:
    """The frames with other codes at that place."""
    changed = frames.clone()
    changed[where] = (changed[where] + 1) % of.config.slot_size
    return changed
