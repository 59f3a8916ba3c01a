"""One row per session of a streaming tokenizer. Imports torch: only for the stages' `setup`.

R rows, n of them in a call, D codebooks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from models.common.tokens import RowState

Streaming = Callable[[Tensor, RowState, Tensor], Tensor]
"""(input [R, …], state, active [R]) → output [R, …]: `encode` or `decode` of a tokenizer."""

FIRST_GROUP = 4
GROWTH = 4


class RowBank:
    """Rows in groups of 4, 12, 48 … with a state each; only groups with work in them run.

    A call costs as much as some eight rows do (a small codec on a CPU): so few groups, and the
    lowest rows are to be taken first.
    """

    def __init__(
        self, run: Streaming, new_state: Callable[[int], RowState], rows: int, device: str
    ) -> None:
        self._run = run
        self._device = device
        self._groups: list[tuple[int, RowState]] = []  # first row, state
        first, size = 0, FIRST_GROUP
        while first < rows:
            self._groups.append((first, new_state(min(size, rows - first))))
            first += size
            size = GROWTH * first - first

    def reset(self, row: int) -> None:
        """A new session's: back to the beginning of a signal."""
        with torch.inference_mode():
            for first, state in self._groups:
                if first <= row < first + state.rows:
                    state.reset([row - first])

    def step(self, given: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """A frame of each of these rows, on the CPU, [...] each → [...] each."""
        with torch.inference_mode():
            return self._step(given)

    def _step(self, given: Mapping[int, Tensor]) -> dict[int, Tensor]:
        out: dict[int, Tensor] = {}
        for first, state in self._groups:
            rows = [row for row in given if first <= row < first + state.rows]
            if not rows:
                continue
            example = given[rows[0]]
            batch = example.new_zeros((state.rows, *example.shape))
            active = torch.zeros(state.rows, dtype=torch.bool)
            for row in rows:
                batch[row - first] = given[row]
                active[row - first] = True
            made = self._run(batch.to(self._device), state, active.to(self._device)).cpu()
            out.update((row, made[row - first]) for row in rows)
        return out
