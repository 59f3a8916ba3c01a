"""What the three steps of a tick have in common, and what they hand to each other."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from handlers.base import failure
from handlers.duplex.options import DuplexObserver, ParrotOptions
from handlers.duplex.parts import Parts
from handlers.messages import Message
from handlers.ticket import Ticket


@dataclass(frozen=True, slots=True)
class Frame:
    """A session's part of a tick."""

    ticket: Ticket
    number: int  # counts the session's frames, those that were skipped too
    heard_sample: int  # end of what was heard of the person, by the input clock
    codes: Any  # tensor [D]: the person's, and behind the LM the model's


@dataclass(frozen=True, slots=True)
class Tick:
    """One frame of every session that takes part."""

    joined: tuple[tuple[Ticket, int], ...]  # from this tick on, in this row
    left: tuple[Ticket, ...]  # before it; their rows may be among those of `joined`
    frames: tuple[Frame, ...]


Ticking: TypeAlias = Generator[Message, None, Tick]
"""Messages to the sessions, and what the next step is to go on with."""


class DuplexStage:
    """A step whose work is for all sessions at once, and fails for all at once."""

    stage: ClassVar[str] = "duplex"

    def __init__(
        self,
        options: ParrotOptions,
        parts: Parts,
        observer: DuplexObserver,
    ) -> None:
        self.options = options
        self.parts = parts
        self.observer = observer

    def load(self) -> None:
        """Load the step's model."""
        raise NotImplementedError

    def failed(self, tickets: Iterable[Ticket], error: Exception) -> list[Message]:
        return [failure(self.stage, ticket, error, self.observer) for ticket in tickets]
