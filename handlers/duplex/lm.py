"""The second step of a tick: what the model says to what it hears, frame by frame."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from handlers.duplex.stage import DuplexStage, Frame, Tick, Ticking


class DuplexModel(DuplexStage):
    """One step of the engine for all sessions of a tick. Whoever joins or leaves is told first."""

    stage: ClassVar[str] = "duplex_lm"

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._opened = 0

    def load(self) -> None:
        import torch

        self._engine = engine = self.parts.engine()
        engine.open(self)  # the first step is a slow one
        engine.step({self: torch.zeros(self.parts.tokenizer().num_codebooks, dtype=torch.long)})
        engine.close(self)

    def run(self, tick: Tick) -> Ticking:
        frames: tuple[Frame, ...] = ()
        try:
            frames = self._step(tick)
        except Exception as error:
            yield from self.failed([frame.ticket for frame in tick.frames], error)
        return dataclasses.replace(tick, frames=frames)

    def _step(self, tick: Tick) -> tuple[Frame, ...]:
        for ticket in tick.left:
            self._engine.close(ticket)
        for ticket, _ in tick.joined:
            self._engine.open(ticket, seed=self.options.seed + self._opened)
            self._opened += 1
        said = self._engine.step({frame.ticket: frame.codes for frame in tick.frames})
        return tuple(dataclasses.replace(frame, codes=said[frame.ticket]) for frame in tick.frames)
