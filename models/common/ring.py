"""Keys and values of many sessions, one row each, in memory that is taken once.

R rows, n of them at work, T new frames each, P tokens per frame, L = T * P, N heads of keys,
E width of a head, S slots of a row. A slot holds one frame; slot 0 is nobody's: rows that stand
idle write there, so that a step runs for all rows alike and those alone move that have work.
"""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNMENT = 8
"""Slots come in multiples of this, for the sake of masked attention kernels."""


class RingCache:
    """The newest frames of each row and its first `sinks`; what is written further on goes over
    the oldest of the others."""

    def __init__(
        self,
        rows: int,
        frames: int,
        *,
        layers: int,
        heads: int,
        width: int,
        tokens_per_frame: int = 1,
        sinks: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        assert 0 <= sinks < frames
        self.frames, self.sinks, self.tokens_per_frame = frames, sinks, tokens_per_frame
        self.slots = _aligned(1 + frames)
        shape = (layers, rows, heads, self.slots * tokens_per_frame, width)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.stamps = torch.full((rows, self.slots), -1, device=device)
        """Which frame of the session stands in a slot, -1 for none. [R, S]"""

    def reset(self, row: int) -> None:
        self.stamps[row].fill_(-1)

    def move(self, source: int, target: int, frames: int) -> None:
        """Copies a row that has seen so many frames over another one."""
        end = self.slots_for(frames) * self.tokens_per_frame
        for buffer in (self.keys, self.values):
            buffer[:, target, :, :end].copy_(buffer[:, source, :, :end])
        self.stamps[target].copy_(self.stamps[source])

    def slots_for(self, frames: int) -> int:
        """How many slots, from the first, hold all of a row that has seen so many frames."""
        return min(self.slots, _aligned(1 + min(frames, self.frames)))

    def extent(self, frames: int, granule: int) -> int:
        """`slots_for`, in steps coarse enough for a graph each."""
        return min(self.slots, -(-self.slots_for(frames) // granule) * granule)

    def extents(self, granule: int) -> set[int]:
        """All that `extent` can be."""
        return {self.extent(frames, granule) for frames in range(1, self.frames + 1)}

    def at(
        self, rows: slice, positions: Tensor, slots: int, active: Tensor | None = None
    ) -> RingView:
        """Makes room for frames `positions` [n, T] of the rows, where `active` [n] says so.

        `slots`: how many slots the attention looks at, those of the new frames among them.
        """
        return RingView(self, rows, positions, slots, active)


class RingView:
    """One call of the model on some rows: a `KeyValueStore`, and the masks that go with it."""

    def __init__(
        self,
        ring: RingCache,
        rows: slice,
        positions: Tensor,
        slots: int,
        active: Tensor | None,
    ) -> None:
        self._ring, self._rows, self._slots, self._positions = ring, rows, slots, positions
        past_sinks = (positions - ring.sinks) % (ring.frames - ring.sinks) + ring.sinks
        where = 1 + torch.where(positions < ring.sinks, positions, past_sinks)  # [n, T]
        stamps = positions
        if active is not None:
            where = torch.where(active[:, None], where, 0)
            stamps = torch.where(active[:, None], positions, -1)
        ring.stamps[rows].scatter_(1, where, stamps)
        self._where = where
        per_frame = ring.tokens_per_frame
        tokens = where[:, :, None] * per_frame + torch.arange(per_frame, device=where.device)
        heads, width = ring.keys.shape[2], ring.keys.shape[4]
        self._index = tokens.flatten(1)[:, None, :, None].expand(-1, heads, -1, width)

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """[n, N, L, E] -> [n, N, slots * P, E]"""
        end = self._slots * self._ring.tokens_per_frame
        keys = self._ring.keys[layer_idx, self._rows]
        values = self._ring.values[layer_idx, self._rows]
        keys.scatter_(2, self._index, key)
        values.scatter_(2, self._index, value)
        return keys[:, :, :end], values[:, :, :end]

    def mask(self, within: Tensor, window: int | None = None) -> Tensor:
        """As `masks.frame_mask`, over slots: [n, 1, L, slots * P], True where it may be seen."""
        stamps = self._ring.stamps[self._rows, None, : self._slots]  # [n, 1, S]
        positions = self._positions[:, :, None]  # [n, T, 1]
        earlier = (stamps >= 0) & (stamps < positions)
        if window is not None:
            earlier &= positions - stamps < window
        own = self._where[:, :, None] == torch.arange(self._slots, device=stamps.device)
        own = own[:, :, None, :, None] & within[:, None, :]  # [n, T, P, S, P]
        allowed = earlier[:, :, None, :, None] | own
        return allowed.flatten(3).flatten(1, 2)[:, None]


def _aligned(slots: int) -> int:
    return -(-slots // ALIGNMENT) * ALIGNMENT
