"""Tickets and the handler base: what every stage relies on."""

from __future__ import annotations

import queue
from collections.abc import Iterable, Iterator

import pytest

from handlers.base import Handler, Overloaded, StageError
from handlers.messages import Ask, ChatMessage, Failed, Message, TextDelta, TextDone
from handlers.ticket import Ticket

PATIENCE_S = 10.0


class Nobody:
    def receive(self, message: Message) -> None: ...


def ticket(name: str = "") -> Ticket:
    return Ticket(Nobody(), name)


class Seen:
    """An `emit` that a test can wait on, and an observer."""

    def __init__(self) -> None:
        self.messages: queue.Queue[Message] = queue.Queue()
        self.first: list[float] = []
        self.failures: list[str] = []

    def next(self) -> Message:
        return self.messages.get(timeout=PATIENCE_S)

    def waited(self, stage: str, seconds: float) -> None: ...
    def served(self, stage: str, seconds: float, batch: int) -> None: ...
    def first_output(self, stage: str, seconds: float) -> None:
        self.first.append(seconds)

    def failed(self, stage: str) -> None:
        self.failures.append(stage)


class Echo(Handler[list[str]]):
    """Repeats the last message; 'boom' and 'named' raise; keeps what was said per ticket."""

    stage = "echo"
    requests = (Ask,)

    def __init__(self, seen: Seen, **limits: int) -> None:
        super().__init__(seen.messages.put, observer=seen, **limits)
        self.closed: queue.Queue[Ticket] = queue.Queue()

    def open(self, ticket: Ticket) -> list[str]:
        return []

    def close(self, ticket: Ticket, state: list[str]) -> None:
        self.closed.put(ticket)

    def handle(self, message: Message) -> Iterable[Message]:
        assert isinstance(message, Ask)
        text = message.messages[0] if message.messages else None
        word = text.content if text else "nothing"
        self.state(message.ticket).append(word)
        yield TextDelta(message.ticket, word)
        if word == "boom":
            raise ValueError(f"the user said {word * 2}")
        if word == "named":
            raise StageError("echo_busy", "All echoes are in use.")
        yield TextDone(message.ticket)


@pytest.fixture
def echo() -> Iterator[tuple[Echo, Seen]]:
    seen = Seen()
    handler = Echo(seen)
    handler.start()
    handler.wait_ready(PATIENCE_S)
    yield handler, seen
    handler.stop()


def ask(owner: Ticket, word: str) -> Ask:
    return Ask(owner, (ChatMessage("user", word),))


def test_a_ticket_dies_once_and_takes_its_children_along() -> None:
    parent = ticket("connection")
    child = parent.child("reply")
    calls: list[str] = []
    child.on_cancel(lambda: calls.append("child"))
    withdrawn = child.on_cancel(lambda: calls.append("withdrawn"))
    withdrawn()
    parent.cancel()
    parent.cancel()
    assert not child.live
    assert calls == ["child"]
    child.on_cancel(lambda: calls.append("late"))
    assert calls == ["child", "late"]


def test_a_dead_child_is_not_kept_by_its_parent() -> None:
    parent = ticket()
    for _ in range(1000):
        parent.child().cancel()
    assert len(parent._hooks) == 0


def test_results_come_out_in_order(echo: tuple[Echo, Seen]) -> None:
    handler, seen = echo
    owner = ticket()
    handler.put(ask(owner, "hello"))
    assert seen.next() == TextDelta(owner, "hello")
    assert seen.next() == TextDone(owner)
    assert len(seen.first) == 1


@pytest.mark.parametrize(
    ("word", "code", "told"),
    [("boom", "echo_error", "The echo stage failed."), ("named", "echo_busy", "All echoes")],
)
def test_an_exception_fails_that_ticket_and_no_other(
    echo: tuple[Echo, Seen], word: str, code: str, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    handler, seen = echo
    unlucky, other = ticket("unlucky"), ticket("other")
    handler.put(ask(unlucky, word))
    handler.put(ask(other, "hello"))
    assert seen.next() == TextDelta(unlucky, word)
    failure = seen.next()
    assert isinstance(failure, Failed)
    assert (failure.ticket, failure.code) == (unlucky, code)
    assert failure.message.startswith(told)
    assert seen.next() == TextDelta(other, "hello")
    assert seen.failures == ["echo"]
    assert "boomboom" not in caplog.text


def test_the_dead_are_dropped_before_work_and_before_emission(echo: tuple[Echo, Seen]) -> None:
    handler, seen = echo
    dead, live = ticket(), ticket()
    dead.cancel()
    handler.put(ask(dead, "never"))
    handler.put(ask(live, "hello"))
    assert seen.next() == TextDelta(live, "hello")
    live.cancel()
    handler.emit(TextDelta(live, "late"))
    owner = ticket()
    handler.put(ask(owner, "last"))
    texts = []
    while (message := seen.next()) != TextDone(owner):
        texts.append(message)
    assert TextDelta(live, "late") not in texts


def test_state_is_closed_when_its_ticket_dies(echo: tuple[Echo, Seen]) -> None:
    handler, seen = echo
    owner = ticket()
    handler.put(ask(owner, "hello"))
    seen.next()
    seen.next()
    owner.cancel()
    assert handler.closed.get(timeout=PATIENCE_S) is owner
    assert handler._states == {}
    assert handler._asked == {}


def test_a_full_inbox_says_so() -> None:
    handler = Echo(Seen(), inbox_limit=2)
    owner = ticket()
    handler.put(ask(owner, "one"))
    handler.put(ask(owner, "two"))
    with pytest.raises(Overloaded):
        handler.put(ask(owner, "three"))


def test_a_stage_that_cannot_load_says_why() -> None:
    class Broken(Echo):
        def setup(self) -> None:
            raise FileNotFoundError("no weights")

    handler = Broken(Seen())
    handler.start()
    with pytest.raises(FileNotFoundError, match="no weights"):
        handler.wait_ready(PATIENCE_S)
