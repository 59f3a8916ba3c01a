"""One row per session of a streaming tokenizer. Imports torch: only for the stages' `setup`.

R rows, n of them in a call, D codebooks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from models.common.device import row_counts
from models.common.tokens import RowState
from models.common.traced import SETTLING_CALLS, TracedStep, can_trace

Streaming = Callable[[Tensor, RowState, Tensor | None], Tensor]
"""(input [R, …], state, active [R]) → output [R, …]: `encode` or `decode` of a tokenizer."""


class RowBank:
    """A tokenizer's state with a row for each of up to `rows` who are there, side by side from the
    first on: when one leaves, the last one moves into its place. A call runs no other rows, or,
    `traced`, as many as the next power of two."""

    def __init__(
        self,
        run: Streaming,
        new_state: Callable[[int], RowState],
        rows: int,
        device: str,
        *,
        traced: bool = False,
    ) -> None:
        self._run = run
        self._device = device
        self._state = new_state(rows)
        self._present: list[int] = []
        self._traced = traced and can_trace(device)
        self._steps: dict[int, TracedStep] = {}

    def warm_up(self, one: Tensor) -> None:
        """First calls are slow ones: makes them, with a row's input. Before anybody is there."""
        self.open(0)
        self.step({0: one})
        self.close(0)
        if self._traced:
            rows = self._state.capacity
            nothing = torch.zeros_like(one).expand(rows, *one.shape).clone()
            nobody = torch.zeros(rows, dtype=torch.bool)
            for count in row_counts(rows):
                self._steps[count] = self._trace(nothing[:count], nobody[:count])

    def _trace(self, batch: Tensor, active: Tensor) -> TracedStep:
        state = self._state
        state.rows = len(batch)
        step = TracedStep(
            lambda batch, active: self._run(batch, state, active), [state.tensors], batch, active
        )
        for _ in range(SETTLING_CALLS):
            step(batch, active)
        return step

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
        count = len(self._present)
        if self._steps:
            count = next(rows for rows in self._steps if rows >= count)
        nothing = torch.zeros_like(next(iter(given.values())))
        frames = [given.get(row, nothing) for row in self._present]
        batch = torch.stack(frames + [nothing] * (count - len(frames)))
        made = self._call(batch, [row in given for row in self._present])
        found = zip(self._present, made, strict=False)
        return {row: one for row, one in found if row in given}

    def _call(self, batch: Tensor, given: Sequence[bool]) -> Tensor:
        if self._steps:
            active = torch.zeros(len(batch), dtype=torch.bool)
            active[: len(given)] = torch.tensor(given)
            return self._steps[len(batch)](batch, active)
        some = None if all(given) else torch.tensor(given, device=self._device)
        self._state.rows = len(batch)
        with torch.no_grad():
            return self._run(batch.to(self._device), self._state, some).cpu()
