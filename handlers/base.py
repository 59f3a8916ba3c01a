"""A pipeline stage: one thread, one bounded inbox, shared by all sessions."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from handlers.messages import Failed, Message
from handlers.ticket import Ticket

log = logging.getLogger(__name__)

S = TypeVar("S")
Emit = Callable[[Message], None]


class Overloaded(Exception):
    """A stage's inbox is full; the message was not taken."""


class CannotServe(Exception):
    """The server cannot be started as asked; `str()` of it is one line that says what is wrong."""


REQUIREMENTS = {"vllm": "requirements-vllm.txt"}
"""package → the file that brings it; all others come with requirements.txt."""


class StageError(Exception):
    """A failure with a name for the client. `str()` of it must hold nothing the user said."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Observer(Protocol):
    """Where the base class reports its measurements, in seconds."""

    def waited(self, stage: str, seconds: float) -> None: ...
    def served(self, stage: str, seconds: float, batch: int) -> None: ...
    def first_output(self, stage: str, seconds: float) -> None: ...
    def failed(self, stage: str) -> None: ...


class _Unobserved:
    def waited(self, stage: str, seconds: float) -> None: ...
    def served(self, stage: str, seconds: float, batch: int) -> None: ...
    def first_output(self, stage: str, seconds: float) -> None: ...
    def failed(self, stage: str) -> None: ...


class Handler(Generic[S]):
    """Gathers what waits, drops the dead, processes the batch, emits.

    A stage overrides `setup`, `handle` (one message) or `process` (a batch), and, if it keeps
    something per ticket, `open` and `close`. A stage with long-running rows sets `self.busy`;
    `process` is then called again, with an empty batch if nothing new waits, until it clears it.
    A stage with a clock sets `self.due_s` (of `time.monotonic()`): `process` is then called at that
    time and not before, with whatever waits, until it sets another time or None.

    An exception in `handle` becomes a `Failed` for that message's ticket; one in `process` for
    every ticket of the batch. Either way the thread goes on.
    """

    stage: ClassVar[str] = "stage"
    requests: ClassVar[tuple[type, ...]] = ()
    """Messages that start the clock for the time to first output, once a ticket."""

    def __init__(
        self,
        emit: Emit,
        *,
        inbox_limit: int = 4096,
        min_interval_s: float = 0.0,
        observer: Observer | None = None,
    ) -> None:
        self._emit = emit
        self._limit = inbox_limit
        self._min_interval_s = min_interval_s
        self._observer: Observer = observer or _Unobserved()
        self._inbox: deque[tuple[float, Message]] = deque()
        self._departed: deque[Ticket] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._states: dict[Ticket, S] = {}
        self._asked: dict[Ticket, float | None] = {}  # None: its first output is out
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()
        self._broken: BaseException | None = None
        self.busy = False
        self.due_s: float | None = None

    # What a stage overrides.

    def setup(self) -> None:
        """Load what the stage needs. Runs once, on the stage's thread."""

    def teardown(self) -> None:
        """Release it. Runs on the stage's thread after the last batch."""

    def open(self, ticket: Ticket) -> S:
        """New state for a ticket seen for the first time (see `state`)."""
        raise NotImplementedError(f"{type(self).__name__} keeps no state")

    def close(self, ticket: Ticket, state: S) -> None:
        """The ticket died: give back what its state holds."""

    def process(self, batch: Sequence[Message]) -> Iterable[Message]:
        for message in batch:
            if not message.ticket.live:
                continue
            try:
                yield from self.handle(message)
            except Exception as error:
                yield self._failure(message.ticket, error)

    def handle(self, message: Message) -> Iterable[Message]:
        raise NotImplementedError(f"{type(self).__name__} does not handle {type(message)}")

    # What the rest of the server uses.

    def put(self, message: Message) -> None:
        """Hand over a message from any thread. Raises `Overloaded` when the inbox is full."""
        with self._wake:
            if len(self._inbox) >= self._limit:
                raise Overloaded(f"{self.stage} has {self._limit} messages waiting")
            self._inbox.append((time.monotonic(), message))
            self._wake_up()

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name=self.stage, daemon=True)
        self._thread.start()

    def wait_ready(self, timeout_s: float) -> None:
        """Block until `setup` is done. Raises what it raised, or `CannotServe`."""
        if not self._ready.wait(timeout_s):
            raise CannotServe(f"{self.stage} was not ready after {timeout_s:.0f} s")
        if self._broken is not None:
            raise self._broken

    def stop(self, timeout_s: float = 5.0) -> None:
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if not self._ready.is_set():  # still loading: whoever waits for that need wait no more
            self._broken = CannotServe(f"{self.stage} was stopped while it loaded")
            self._ready.set()
        if self._thread is not None:
            self._thread.join(timeout_s)

    # For subclasses.

    def state(self, ticket: Ticket) -> S:
        """The ticket's state, opened on first use and closed when the ticket dies."""
        found = self._states.get(ticket)
        if found is None:
            found = self._states[ticket] = self.open(ticket)
            ticket.on_cancel(partial(self._depart, ticket))
        return found

    def emit(self, message: Message) -> None:
        """Send a result on, unless its ticket has died meanwhile."""
        if not message.ticket.live:
            return
        asked = self._asked.get(message.ticket)
        if asked is not None:
            self._asked[message.ticket] = None
            if not message.ticket.live:  # it died just now, and its hook may have run before
                self._forget_clock(message.ticket)
            self._observer.first_output(self.stage, time.monotonic() - asked)
        self._emit(message)

    def _forget_clock(self, ticket: Ticket) -> None:
        self._asked.pop(ticket, None)

    # The thread.

    def _depart(self, ticket: Ticket) -> None:
        with self._wake:
            self._departed.append(ticket)
            self._wake_up()

    def _wake_up(self) -> None:
        if self.due_s is None:  # else nothing is served before
            self._wake.notify()

    def _failure(self, ticket: Ticket, error: Exception) -> Failed:
        return failure(self.stage, ticket, error, self._observer)

    def _take(self) -> list[tuple[float, Message]] | None:
        """Everything that waits; None when the stage is to stop."""
        with self._wake:
            while not (self._stopping or self._is_time()):
                early_s = None if self.due_s is None else self.due_s - time.monotonic()
                self._wake.wait(early_s)
            if self._stopping:
                return None
            taken = list(self._inbox)
            self._inbox.clear()
            return taken

    def _is_time(self) -> bool:
        if self.due_s is not None:
            return time.monotonic() >= self.due_s
        return bool(self._inbox or self._departed or self.busy)

    def _run(self) -> None:
        try:
            self.setup()
        except BaseException as error:
            self._broken = error
            self._ready.set()
            return
        self._ready.set()
        started = 0.0
        while True:
            pause = started + self._min_interval_s - time.monotonic()
            if pause > 0:
                time.sleep(pause)
            taken = self._take()
            if taken is None:
                break
            started = time.monotonic()
            batch = self._live(taken, started)
            if batch or self.busy or self.due_s is not None:
                self._serve(batch)
                self._observer.served(self.stage, time.monotonic() - started, len(batch))
            self._bury()
        for ticket, state in list(self._states.items()):
            self.close(ticket, state)
        self.teardown()

    def _live(self, taken: list[tuple[float, Message]], now: float) -> list[Message]:
        batch: list[Message] = []
        for put_at, message in taken:
            if not message.ticket.live:
                continue
            self._observer.waited(self.stage, now - put_at)
            if isinstance(message, self.requests) and message.ticket not in self._asked:
                self._asked[message.ticket] = put_at
                message.ticket.on_cancel(partial(self._forget_clock, message.ticket))
            batch.append(message)
        return batch

    def _serve(self, batch: list[Message]) -> None:
        try:
            for message in self.process(batch):
                self.emit(message)
        except Exception as error:
            for ticket in {message.ticket for message in batch}:
                self.emit(self._failure(ticket, error))

    def _bury(self) -> None:
        while self._departed:
            ticket = self._departed.popleft()
            state = self._states.pop(ticket, None)
            if state is not None:
                self.close(ticket, state)


def failure(stage: str, ticket: Ticket, error: Exception, observer: Observer) -> Failed:
    """What the ticket's owner is told of an error in a stage; it is counted and logged, too."""
    observer.failed(stage)
    if isinstance(error, StageError):
        log.warning("%s: %s (%s)", stage, error.code, ticket.name)
        return Failed(ticket, stage, error.code, str(error))
    # The traceback names code, not values: nothing the user said gets into the log.
    log.error("%s failed (%s)", stage, ticket.name, exc_info=_without_values(error))
    return Failed(ticket, stage, f"{stage}_error", f"The {stage} stage failed.")


def _without_values(error: BaseException) -> BaseException:
    """The same error with its message emptied, traceback kept: for the log."""
    bare = Exception(type(error).__name__)
    bare.__traceback__ = error.__traceback__
    return bare


@contextlib.contextmanager
def named(stage: str) -> Iterator[None]:
    """What a stage says about its options, files, packages or devices, as `CannotServe`."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "handlers", "models"):  # a fault of ours
            raise
        file = REQUIREMENTS.get(package, "requirements.txt")
        raise CannotServe(
            f"{stage}: the package {package} is missing: python -m pip install -r {file}"
        ) from error
    except (StageError, ValueError, OSError, ImportError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CannotServe(f"{stage}: {lines[0]}") from error


def start_all(stages: Sequence[Handler[Any]], timeout_s: float) -> None:
    """Start the stages; each has `timeout_s` to load.

    One after another: transformers bears neither a first import nor two loads at a time (it changes
    torch's default dtype meanwhile). Raises `CannotServe`, or what is no such case.
    """
    for stage in stages:
        log.info("loading %s", stage.stage)
        with named(stage.stage):
            stage.start()
            stage.wait_ready(timeout_s)
