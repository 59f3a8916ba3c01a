"""One row per session of a streaming tokenizer. Imports torch: only for the stages' `setup`.

R rows, n of them in a call, D codebooks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from models.common.tokens import RowState

Streaming = Callable[[Tensor, RowState, Tensor | None], Tensor]
"""(input [R, …], state, active [R]) → output [R, …]: `encode` or `decode` of a tokenizer."""


class RowBank:
    """A tokenizer's state with a row for each of up to `rows` who are there, side by side from the
    first on: when one leaves, the last one moves into its place. A call runs no other rows."""

    def __init__(
        self, run: Streaming, new_state: Callable[[int], RowState], rows: int, device: str
    ) -> None:
        self._run = run
        self._device = device
        self._state = new_state(rows)
        self._present: list[int] = []

    def open(self, row: int) -> None:
        """A new one: at the beginning of a signal."""
        self._state.reset([len(self._present)])
        self._present.append(row)

    def close(self, row: int) -> None:
        place, last = self._present.index(row), len(self._present) - 1
        self._state.move(last, place)
        self._present[place] = self._present[last]
        self._present.pop()

    def step(self, given: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """A frame of some who are there, on the CPU, [...] each → [...] each."""
        nothing = torch.zeros_like(next(iter(given.values())))
        batch = torch.stack([given.get(row, nothing) for row in self._present])
        active = None
        if len(given) < len(self._present):
            active = torch.tensor([row in given for row in self._present], device=self._device)
        self._state.rows = len(self._present)
        with torch.inference_mode():
            made = self._run(batch.to(self._device), self._state, active).cpu()
        found = zip(self._present, made, strict=True)
        return {row: one for row, one in found if row in given}
