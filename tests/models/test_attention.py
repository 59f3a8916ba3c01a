"""Attention of heads that share keys and values: as Transformers' own, which copies them."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="needs requirements.txt")

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from models.common.attention import grouped_attention

ROWS, SLOTS, WIDTH = 3, 24, 8
Parts = tuple[Tensor, Tensor, Tensor, Tensor]


class _Layer(nn.Module):
    is_causal = True

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


def parts(groups: int, tokens: int, value_width: int = WIDTH) -> Parts:
    """Queries, keys, values, and a mask that leaves every row other slots to see."""
    chosen = torch.Generator().manual_seed(groups * 10 + tokens)
    query = torch.randn(ROWS, 2 * groups, tokens, WIDTH, generator=chosen)
    key = torch.randn(ROWS, 2, SLOTS, WIDTH, generator=chosen)
    value = torch.randn(ROWS, 2, SLOTS, value_width, generator=chosen)
    last = torch.tensor([4, 11, 20])[:, None] - tokens + 1 + torch.arange(tokens)
    seen = last[:, :, None] >= torch.arange(SLOTS)
    bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return query, key, value, bias[:, None]


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("value_width", [WIDTH, 5])
def test_equal_to_that_of_copied_keys(groups: int, tokens: int, value_width: int) -> None:
    given = parts(groups, tokens, value_width)
    ours, _ = grouped_attention(_Layer(groups), *given, scaling=0.3)
    theirs, _ = sdpa_attention_forward(_Layer(groups), *given, scaling=0.3)
    assert ours.shape == (ROWS, tokens, 2 * groups, value_width)
    torch.testing.assert_close(ours, theirs)


def test_a_mask_of_booleans_says_the_same() -> None:
    query, key, value, bias = parts(2, 4)
    of_bias, _ = grouped_attention(_Layer(2), query, key, value, bias)
    of_booleans, _ = grouped_attention(_Layer(2), query, key, value, bias == 0)
    torch.testing.assert_close(of_bias, of_booleans)


def test_a_bias_of_each_head_is_heeded() -> None:
    given = parts(2, 4)
    bias = torch.randn(ROWS, 4, 4, SLOTS, generator=torch.Generator().manual_seed(0))
    ours, _ = grouped_attention(_Layer(2), *given, position_bias=bias)
    theirs, _ = sdpa_attention_forward(_Layer(2), *given, position_bias=bias)
    torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(ours, grouped_attention(_Layer(2), *given)[0])
