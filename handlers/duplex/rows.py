"""One row per session of a streaming tokenizer. Imports torch: only for the stages' `setup`.

R rows, n of them in a call, D codebooks.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping

import torch
from torch import Tensor

from models.common.device import row_counts
from models.common.tokens import RowState
from models.common.traced import SETTLING_CALLS, TracedStep, can_trace

Streaming = Callable[[Tensor, RowState, Tensor | None], Tensor]
"""(input [R, …], state, active [R]) → output [R, …]: `encode` or `decode` of a tokenizer."""


class RowBank:
    """A tokenizer's state with a row for each of up to `rows` who are there, side by side. A call
    runs those that it is given something for, which are brought to the front, and no others; or,
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
        self._bring_forward(given)
        rows = self._present[: len(given)]
        made = self._call(torch.stack([given[row] for row in rows]))
        return dict(zip(rows, made, strict=True))

    def _bring_forward(self, given: Container[int]) -> None:
        wanted = [row in given for row in self._present]
        front = sum(wanted)
        away = [place for place in range(front) if not wanted[place]]
        back = [place for place in range(front, len(wanted)) if wanted[place]]
        for first, second in zip(away, back, strict=True):
            self._state.swap(first, second)
            rows = self._present
            rows[first], rows[second] = rows[second], rows[first]

    def _call(self, batch: Tensor) -> Tensor:
        count = len(batch)
        if self._steps:
            size = next(rows for rows in self._steps if rows >= count)
            more = batch.new_zeros((size - count, *batch.shape[1:]))
            return self._steps[size](torch.cat((batch, more)), torch.arange(size) < count)[:count]
        self._state.rows = count
        with torch.no_grad():
            return self._run(batch.to(self._device), self._state, None).cpu()
