"""Keys and values of many conversations: memory taken once, one row each.

R rows, n of them in a span, T new tokens each, N heads of keys, E width of a head, S slots.
The token at position p stands in slot p. What stands in a slot beyond a token's own is never
seen by it, so that whatever is there, of an earlier conversation or of a row that ran idly in a
span, needs no clearing: it is written over before it can be seen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from models.common.errors import ArchitectureError

ALIGNMENT = 8
"""Slots come in multiples of this, for the sake of masked attention kernels."""
FULL, SLIDING = "full_attention", "sliding_attention"


class _Place:
    """Where the tokens of the call under way belong."""

    rows: slice
    where: Tensor  # [n, T]
    end: int  # slots to look at


class _RowLayer(CacheLayerMixin):
    is_compileable = True

    def __init__(self, place: _Place, rows: int, slots: int) -> None:
        super().__init__()
        self._place, self._rows, self._slots = place, rows, slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def room(states: Tensor) -> Tensor:
            made = states.new_zeros(self._rows, states.shape[1], self._slots, states.shape[3])
            torch._dynamo.mark_static_address(made)
            return made

        self.keys, self.values = room(key_states), room(value_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """[n, N, T, E] -> [n, N, end, E]"""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        place, index = self._place, self._place.where[:, None, :, None]
        assert self.keys is not None
        assert self.values is not None
        keys, values = self.keys[place.rows], self.values[place.rows]
        keys.scatter_(2, index.expand_as(key_states), key_states)
        values.scatter_(2, index.expand_as(value_states), value_states)
        return keys[:, :, : place.end], values[:, :, : place.end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._place.end, 0

    def get_seq_length(self) -> int:
        return self._place.end

    def get_max_length(self) -> int:
        return self._slots


class RowCache(Cache):
    """What `model` keeps of `rows` conversations of up to `tokens` each.

    Raises `ArchitectureError` for a model whose state is more than keys and values, so that it
    could not be cut back.
    """

    def __init__(self, model: PreTrainedModel, rows: int, tokens: int) -> None:
        config = model.config.get_text_config()
        self._kinds = attention_kinds(config)
        self._window: int | None = getattr(config, "sliding_window", None)
        self._dtype, self._tokens = model.dtype, tokens
        self.slots = aligned(tokens + 1)  # the last one is for what is past the end
        self._place = _Place()
        layers: list[Any] = [
            _RowLayer(self._place, rows, self.slots) for _ in range(config.num_hidden_layers)
        ]
        super().__init__(layers=layers)

    def at(self, rows: slice, positions: Tensor, end: int) -> dict[str, Any]:
        """The inputs of a call on these rows whose new tokens stand at `positions` [n, T].

        `end`: how many slots it looks at, those of the new tokens among them.
        """
        where = positions.clamp(max=self._tokens)
        self._place.rows, self._place.where, self._place.end = rows, where, end
        distance = where[:, :, None] - torch.arange(end, device=where.device)  # [n, T, end]
        masks: dict[str, Tensor] = {}
        for kind in set(self._kinds):
            seen = distance >= 0
            if kind == SLIDING:
                seen &= distance < self._window
            bias = torch.zeros(seen.shape, dtype=self._dtype, device=seen.device)
            masks[kind] = bias.masked_fill_(~seen, torch.finfo(self._dtype).min)[:, None]
        mask = masks if len(masks) > 1 else masks.popitem()[1]
        return {
            "position_ids": positions.clamp(max=self._tokens - 1),
            "attention_mask": mask,
            "past_key_values": self,
            "use_cache": True,
        }

    def copy(self, source: int, target: int, tokens: int) -> None:
        """The first so many tokens of a row into another one."""
        for layer in self.layers:
            for buffer in (layer.keys, layer.values):
                assert buffer is not None
                buffer[target, :, :tokens].copy_(buffer[source, :, :tokens])


def attention_kinds(config: PreTrainedConfig) -> list[str]:
    """Of each layer: `FULL` or `SLIDING`. Raises `ArchitectureError` for any other."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        other = getattr(config, "attention_chunk_size", None) is not None
        kinds = ["chunked_attention"] if other else [SLIDING if window else FULL]
    known = {FULL, SLIDING} if window else {FULL}
    if not set(kinds) <= known or getattr(config, "num_kv_shared_layers", None):
        raise ArchitectureError(
            f"{config.model_type}: need plain or sliding attention in every layer, "
            f"found {', '.join(sorted(set(kinds)))}"
        )
    return list(kinds)


def aligned(slots: int) -> int:
    return -(-slots // ALIGNMENT) * ALIGNMENT
