"""The attention of a dual-channel model, hooked into Transformers' attention interface.

Every backbone hands its rotated queries and keys to an attention function named in the
configuration. Ours add the frame's slot embeddings to both, put the keys into the cache as they
then are, and go on to the ordinary function. So no layer needs a subclass, any rotation (partial
too) and any grouping of heads is right, and a cached key carries its channel.

B rows, N heads (of queries, or of keys), L tokens, E width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import eager_attention_forward

SDPA, EAGER = "dual_sdpa", "dual_eager"
Attention = Callable[..., tuple[Tensor, Tensor | None]]


class KeyValueStore(Protocol):
    """Where a layer's keys and values go, and where all that it may see come from."""

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]: ...


class FrameCache:
    """Keys and values of the frames so far, and which recording each frame belongs to.

    It grows by each call of the model it is given to. A row can't be reset or leave alone.
    """

    def __init__(self) -> None:
        self._layers = DynamicCache()
        self.frames = 0
        self.segments: Tensor | None = None
        """[B, frames], or None while every row is one recording without padding."""

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        keys, values = self._layers.update(key, value, layer_idx)
        return keys, values

    def extend(self, rows: int, frames: int, segments: Tensor | None) -> None:
        """Counts new frames in. `segments` is [rows, frames].

        Without them each row's recording goes on; one that began without them is number 1.
        """
        if segments is not None and self.segments is None and self.frames:
            self.segments = segments.new_ones(rows, self.frames)
        if self.segments is not None:
            if segments is None:
                segments = self.segments[:, -1:].expand(rows, frames)
            segments = torch.cat((self.segments, segments), dim=1)
        self.segments = segments
        self.frames += frames


def attend(
    ordinary: Attention,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    slot_embeds: Tensor | None = None,
    store: KeyValueStore | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Query [B, N, L, E], key and value with fewer heads or as many; `slot_embeds` [L, E]."""
    if slot_embeds is not None:
        query, key = query + slot_embeds, key + slot_embeds
    if store is not None:
        key, value = store.update(key, value, module.layer_idx)
    return ordinary(module, query, key, value, attention_mask, **kwargs)


def eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The plain formula; takes the mask as booleans, as the fast one does."""
    lowest = torch.finfo(query.dtype).min
    bias = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(~attention_mask, lowest)
    output, weights = eager_attention_forward(module, query, key, value, bias, **kwargs)
    return output, weights


AttentionInterface.register(SDPA, partial(attend, sdpa_attention_forward))
AttentionInterface.register(EAGER, partial(attend, eager))
