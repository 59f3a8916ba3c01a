"""What all sessions of one server share, who is admitted, and how the server winds down."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from handlers.messages import Ask, AudioIn, Finish, Listen, Retain, Say
from server.config import SessionConfig
from server.metrics import Metrics
from server.options import ServerOptions
from server.turns import TurnSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from server.session import Outbox, Session


class Timer(Protocol):
    def cancel(self) -> None: ...


class Clock(Protocol):
    """The event loop's clock, or a virtual one."""

    def time(self) -> float: ...
    def call_at(self, when: float, callback: Callable[[], None]) -> Timer: ...


class Stages(Protocol):
    """The pipeline, or a scripted one. See `handlers.pipeline.Pipeline`."""

    @property
    def voices(self) -> tuple[str, ...]: ...
    @property
    def voice_languages(self) -> Mapping[str, str]: ...
    def hear(self, message: AudioIn | Retain | Listen | Finish) -> None: ...
    def ask(self, message: Ask) -> None: ...
    def say(self, message: Say) -> None: ...


class Brain(Protocol):
    """What answers behind the wire: whom it can take, and what a connection becomes with it."""

    def refusal(self, sessions: int) -> tuple[str, str] | None:
        """Why it takes nobody beside so many, as (code, message)."""

    def session(self, hub: Hub, outbox: Outbox) -> Session: ...


class Hub:
    def __init__(
        self,
        options: ServerOptions,
        turns: TurnSettings,
        default_config: SessionConfig,
        pipeline: Stages,
        metrics: Metrics,
        clock: Clock,
        brain: Brain,
    ) -> None:
        self.options = options
        self.turns = turns
        self.default_config = default_config
        self.pipeline = pipeline
        self.metrics = metrics
        self.clock = clock
        self.brain = brain
        self.sessions: set[Session] = set()
        self.draining = False
        self._empty = asyncio.Event()

    def refusal(self) -> tuple[str, str] | None:
        """Why one more session is not admitted now, as (code, message)."""
        if self.draining:
            return "server_shutting_down", "The server is shutting down."
        limit = self.options.max_sessions
        if len(self.sessions) >= limit:
            return "session_limit_reached", f"All {limit} sessions are taken; try again later."
        return self.brain.refusal(len(self.sessions))

    def enter(self, session: Session) -> None:
        self.sessions.add(session)
        self.metrics.sessions.set(len(self.sessions))

    def leave(self, session: Session) -> None:
        self.sessions.discard(session)
        self.metrics.sessions.set(len(self.sessions))
        if not self.sessions:
            self._empty.set()

    async def drain(self) -> None:
        """Refuse new sessions, let running replies be heard to their end (bounded), close all."""
        self.draining = True
        for session in list(self.sessions):
            session.drain()
        if self.sessions:
            self._empty.clear()
            try:
                async with asyncio.timeout(self.options.drain_s):
                    await self._empty.wait()
            except TimeoutError:
                for session in list(self.sessions):
                    session.close(1001, "server_shutting_down")
