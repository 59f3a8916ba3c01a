"""The one staleness scheme: a ticket is live, then dead, and never alive again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from handlers.messages import Message


class Sink(Protocol):
    """Where results for a ticket go: the session. Called on the event loop only."""

    def receive(self, message: Message) -> None: ...


class Ticket:
    """Permission to work for one connection, one utterance or one reply.

    Barge-in, withdrawn speculation, client cancel, disconnect and plain completion are all
    `cancel()`. It is checked before work, between tokens or chunks, before emission and at
    the socket. Thread-safe.
    """

    __slots__ = ("_detach", "_hooks", "_live", "_lock", "name", "sink")

    def __init__(self, sink: Sink, name: str = "", parent: Ticket | None = None) -> None:
        self.sink = sink
        self.name = name
        self._live = True
        self._lock = threading.Lock()
        self._hooks: dict[object, Callable[[], None]] = {}
        self._detach: Callable[[], None] = parent.on_cancel(self.cancel) if parent else _nothing

    @property
    def live(self) -> bool:
        return self._live

    def child(self, name: str = "") -> Ticket:
        """A ticket that dies with this one, or earlier."""
        return Ticket(self.sink, name or self.name, parent=self)

    def on_cancel(self, hook: Callable[[], None]) -> Callable[[], None]:
        """Run `hook` once, in the cancelling thread, at cancel (now, if already dead).

        A hook must not raise and must not block: it closes a read or notes a departure.
        Returns a function that takes the hook back.
        """
        key = object()
        with self._lock:
            if self._live:
                self._hooks[key] = hook
                return lambda: _drop(self._hooks, key)
        hook()
        return _nothing

    def cancel(self) -> None:
        with self._lock:
            if not self._live:
                return
            self._live = False
            hooks = list(self._hooks.values())
            self._hooks.clear()
        self._detach()
        for hook in hooks:
            hook()

    def __repr__(self) -> str:
        return f"Ticket({self.name!r}, {'live' if self._live else 'dead'})"


def _drop(hooks: dict[object, Callable[[], None]], key: object) -> None:
    hooks.pop(key, None)


def _nothing() -> None:
    return None
