"""Attention under a mask where several heads share their keys and values."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """A function for Transformers' attention interface, whose own copies the keys for each head of
    a group that shares them. Here the group's queries stand one after another instead.

    R rows, N heads of queries, G of keys, L tokens, S keys, E width. Query [R, N, L, E], key and
    value [R, G, S, E], mask [R, 1, L, S] -> [R, L, N, E]
    """
    if position_bias is not None:  # of each head another one
        biased: tuple[Tensor, None] = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            position_bias=position_bias,
            **kwargs,
        )
        return biased
    rows, heads, tokens, width = query.shape
    groups = heads // key.shape[1]
    alike = groups == 1 or tokens == 1
    mask = attention_mask if alike else attention_mask.repeat(1, 1, groups, 1)
    output = scaled_dot_product_attention(
        query.reshape(rows, key.shape[1], groups * tokens, width),
        key,
        value,
        attn_mask=mask,
        scale=scaling,
    )
    return output.reshape(rows, heads, tokens, -1).transpose(1, 2), None
