"""The stage of the duplex brain: on every tick of its clock, encoder, LM and decoder in turn."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

from handlers.base import Emit, Handler
from handlers.duplex.decoder import DuplexDecoder
from handlers.duplex.encoder import DuplexEncoder, is_overloaded
from handlers.duplex.lm import DuplexModel
from handlers.duplex.options import DuplexObserver, ParrotOptions
from handlers.duplex.parts import Parts
from handlers.duplex.stage import Ticking
from handlers.messages import Message

log = logging.getLogger(__name__)


class DuplexChain(Handler[None]):
    """One thread: a tick is over before the next one begins, and each step's memory is still warm
    for it. On three threads, a step a tick behind the other, they contend for the interpreter's
    lock and for the cores: ticks of 16 sessions on two cores took a third longer.
    """

    stage: ClassVar[str] = "duplex"

    def __init__(
        self,
        options: ParrotOptions,
        parts: Parts,
        *,
        emit: Emit,
        observer: DuplexObserver,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(emit, observer=observer)
        self._threads, self._parts = options.threads, parts
        self._duplex, self._clock = observer, clock
        self.decoder = DuplexDecoder(options, parts, observer)
        self.lm = DuplexModel(options, parts, observer)
        self.encoder = DuplexEncoder(options, parts, observer)

    @property
    def overloaded(self) -> bool:
        return is_overloaded(self.encoder.skipped_s, self._clock())

    def setup(self) -> None:
        import torch

        torch.set_num_threads(self._threads)
        for step in (self.decoder, self.lm, self.encoder):
            log.info("loading %s", step.stage)
            step.load()

    def teardown(self) -> None:
        self._parts.stop()

    def process(self, batch: Sequence[Message]) -> Iterable[Message]:
        began_s = self._clock()
        yield from self.encoder.hear(batch, began_s)
        if self.encoder.is_due(began_s):
            yield from self._tick(began_s)
        self.due_s = self.encoder.due_s

    def _tick(self, began_s: float) -> Iterable[Message]:
        tick = yield from self._timed(self.encoder.stage, self.encoder.run(began_s))
        tick = yield from self._timed(self.lm.stage, self.lm.run(tick))
        yield from self._timed(self.decoder.stage, self.decoder.run(tick))
        self._duplex.tick_done(self._clock() - began_s)

    def _timed(self, stage: str, step: Ticking) -> Ticking:
        began_s = self._clock()
        tick = yield from step
        self._duplex.served(stage, self._clock() - began_s, len(tick.frames))
        return tick
