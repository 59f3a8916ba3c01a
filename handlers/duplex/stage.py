"""What the three duplex stages have in common."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import ClassVar

from handlers.base import Emit, Handler
from handlers.duplex.options import DuplexObserver, ParrotOptions
from handlers.duplex.parts import Parts
from handlers.messages import Message
from handlers.ticket import Ticket


class DuplexStage(Handler[None]):
    """A stage whose work is for all sessions at once, and fails for all at once."""

    stage: ClassVar[str] = "duplex"

    def __init__(
        self,
        options: ParrotOptions,
        parts: Parts,
        *,
        emit: Emit,
        observer: DuplexObserver,
        forward: Callable[[Message], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(emit, observer=observer)
        self.options = options
        self.parts = parts
        self.duplex = observer
        self.forward = forward
        self.clock = clock

    def setup(self) -> None:
        import torch

        torch.set_num_threads(self.options.threads)
        self.load()

    def load(self) -> None:
        """Load the stage's model. Runs once, on the stage's thread."""
        raise NotImplementedError

    def failed(self, tickets: Iterable[Ticket], error: Exception) -> Iterable[Message]:
        return [self._failure(ticket, error) for ticket in tickets]
