"""Parley's side of a conversation: which reply is being made, waits, is heard or is over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

from handlers.base import Overloaded
from handlers.messages import (
    UNINTELLIGIBLE,
    Ask,
    ChatMessage,
    Failed,
    Message,
    Samples,
    Say,
    Speech,
    Spoken,
    TextDelta,
    TextDone,
    ToolCall,
)
from handlers.ticket import Ticket
from server.conversation import Conversation
from server.hub import Hub
from server.items import Item
from server.playout import PlayoutSettings
from server.reply import Reply, ReplySettings
from server.wire import WireError

MAX_OUT_OF_BAND = 4
"""Out-of-band responses of one session at a time."""


class Outlet(Protocol):
    """Where events for the client go: bounded, never blocking."""

    def send(self, event: dict[str, Any]) -> None: ...
    def send_audio(
        self, response_id: str, item_id: str, start_sample: int, samples: Samples
    ) -> None: ...


class Speaker:
    """At most one reply of the conversation is heard at a time; others wait or are silent.

    `on_floor(True)` is called when a reply may be heard, `on_floor(False)` when it was heard to
    its end or is over.
    """

    def __init__(
        self,
        hub: Hub,
        out: Outlet,
        ticket: Ticket,
        conversation: Conversation,
        on_floor: Callable[[bool], None],
    ) -> None:
        self.settings = ReplySettings()
        self.instructions = ""
        self.spoke = False  # has been heard: the voice stays
        self.turn_end_s: float | None = None  # the last voiced sample of what is being answered
        self._hub = hub
        self._out = out
        self._ticket = ticket
        self._conversation = conversation
        self._on_floor = on_floor
        self._current: Reply | None = None  # released; until heard to its end
        self._prepared: Reply | None = None  # made in silence while a turn may be ending
        self._next: list[Reply] = []  # may be heard once the current one is over
        self._unasked: list[tuple[Reply, str]] = []  # wait for the text of what was committed
        self._replies: dict[Ticket, Reply] = {}

    @property
    def idle(self) -> bool:
        return not self._replies

    @property
    def current(self) -> Reply | None:
        return self._current

    @property
    def active(self) -> Reply | None:
        """The response in progress that belongs to the conversation."""
        if self._current is not None and self._current.active:
            return self._current
        return self._next[0] if self._next else None

    @property
    def obstacle(self) -> Reply | None:
        """The response that must end before another may be asked for.

        One that has called functions is none: the next, which knows their results, is made while
        it is still heard.
        """
        current = self._current
        if current is not None and current.active and current.awaits_tools and not self._next:
            return None
        return self.active

    # From the stages.

    def receive(self, message: Message) -> bool:
        """Take what was made for a reply. False: it is for no reply."""
        reply = self._replies.get(message.ticket)
        if reply is None:
            return False
        match message:
            case TextDelta(_, text):
                reply.text(text)
            case ToolCall(_, use):
                reply.call(use)
            case TextDone(_, reason, input_tokens, output_tokens):
                reply.text_done(reason == "length", input_tokens, output_tokens)
            case Speech():
                reply.speech(message)
            case Spoken(_, index):
                reply.clause_spoken(index)
            case Failed():
                reply.fail(message)
        return True

    # A turn is ending, has ended, goes on.

    def prepare(self, text: str) -> None:
        """Begin a reply to a turn that may be over; nobody hears of it yet."""
        messages = self._conversation.history(self.instructions, extra=text or UNINTELLIGIBLE)
        self._prepared = self._new(messages, self.settings)
        self._ask(self._prepared)

    def withdraw(self) -> None:
        """What was prepared never was."""
        if self._prepared is not None:
            self._hub.metrics.withdrawn.inc()
            self._forget(self._prepared)
            self._prepared = None

    def release(self) -> None:
        """What was prepared may be heard."""
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            self._queue(prepared)

    # Somebody speaks over it.

    def pause(self, now_s: float) -> None:
        if self._current is not None:
            self._current.pause(now_s)

    def resume(self, now_s: float) -> None:
        if self._current is not None:
            self._current.resume(now_s)

    def stop(self, reason: Literal["turn_detected", "client_cancelled"], now_s: float) -> None:
        """End the reply that is under way, keeping what was heard of it, and those behind it."""
        reply, self._current = self._current, None
        self._on_floor(False)
        if reply is not None:
            reply.cancel(reason, now_s)
            self._replies.pop(reply.ticket, None)
        for waiting in self._next:
            waiting.release()  # the client waits for it
            waiting.cancel(reason, now_s)
            self._replies.pop(waiting.ticket, None)
        self._next.clear()

    # On the client's request.

    def respond(
        self,
        messages: tuple[ChatMessage, ...] | None,
        settings: ReplySettings,
        instructions: str,
        text_awaited: bool,
    ) -> None:
        """`messages` None means the conversation as it stands, once no text is awaited.

        Raises `WireError` (`too_many_responses`).
        """
        if settings.conversation_id is None:
            out_of_band = [r for r in self._replies.values() if _out_of_band(r)]
            if len(out_of_band) >= MAX_OUT_OF_BAND:
                raise WireError(
                    "too_many_responses",
                    f"{MAX_OUT_OF_BAND} out-of-band responses are in progress.",
                )
        self.turn_end_s = None
        reply = self._new(messages or (), settings)
        if messages is None and text_awaited:
            self._unasked.append((reply, instructions))
        else:
            if messages is None:
                reply.messages = self._conversation.history(instructions)
            self._ask(reply)
        if settings.conversation_id is None:
            reply.release()
        else:
            self._queue(reply)

    def texts_known(self) -> None:
        """Everything committed has its text: ask what waited for it."""
        unasked, self._unasked = self._unasked, []
        for reply, instructions in unasked:
            if reply.ticket.live:
                reply.messages = self._conversation.history(instructions)
                self._ask(reply)

    def cancel_out_of_band(self, response_id: str, now_s: float) -> bool:
        """False: there is no such response."""
        for reply in list(self._replies.values()):
            if reply.id == response_id and _out_of_band(reply):
                reply.cancel("client_cancelled", now_s)
                del self._replies[reply.ticket]
                return True
        return False

    # Replies.

    def _new(self, messages: tuple[ChatMessage, ...], settings: ReplySettings) -> Reply:
        playout = PlayoutSettings(lead_s=self._hub.options.output_lead_ms / 1000)
        reply = Reply(self, self._ticket.child("reply"), messages, settings, playout)
        self._replies[reply.ticket] = reply
        return reply

    def _ask(self, reply: Reply) -> None:
        try:
            s = reply.settings
            self._hub.pipeline.ask(
                Ask(reply.ticket, reply.messages, s.max_tokens, s.tools, s.tool_choice)
            )
        except Overloaded:
            reply.fail(overloaded(reply.ticket, "lm"))

    def _queue(self, reply: Reply) -> None:
        """Let it be heard, after what is being heard."""
        if self._current is not None:
            self._next.append(reply)
            return
        self._current = reply
        self._on_floor(True)
        reply.release()

    def _forget(self, reply: Reply) -> None:
        reply.ticket.cancel()
        self._replies.pop(reply.ticket, None)

    # Time.

    def settle(self, now_s: float) -> float | None:
        """Move every reply on as far as it goes now. Returns when to come back."""
        while True:
            deadlines = []
            for reply in list(self._replies.values()):
                reply.advance(now_s)
                if reply is self._current and reply.first_sent_s is not None:
                    self._first_audio(reply.first_sent_s)
                if reply.over(now_s):
                    self._over(reply)
                else:
                    deadlines.append(reply.deadline_s(now_s))
            if self._current is not None or not self._next:
                return min((d for d in deadlines if d is not None), default=None)
            self._queue(self._next.pop(0))

    def _first_audio(self, first_sent_s: float) -> None:
        self.spoke = True
        if self.turn_end_s is not None:
            self._hub.metrics.endpoint_to_audio.observe(first_sent_s - self.turn_end_s)
            self.turn_end_s = None

    def _over(self, reply: Reply) -> None:
        self._forget(reply)
        if reply is self._current:
            self._current = None
            self._on_floor(False)

    # For replies (see `server.reply.Host`).

    def send(self, event: dict[str, Any]) -> None:
        self._out.send(event)

    def send_audio(self, reply: Reply, start_sample: int, samples: Samples) -> None:
        self._out.send_audio(reply.id, reply.item.id, start_sample, samples)

    def say(self, reply: Reply, message: Say) -> None:
        try:
            self._hub.pipeline.say(message)
        except Overloaded:
            reply.fail(overloaded(reply.ticket, "tts"))

    def add_reply_item(self, reply: Reply, item: Item) -> str | None:
        if reply.settings.conversation_id is None:
            return None
        return self._conversation.add(item)


def overloaded(ticket: Ticket, stage: str) -> Failed:
    return Failed(ticket, stage, "server_overloaded", "The server is overloaded.")


def _out_of_band(reply: Reply) -> bool:
    return reply.settings.conversation_id is None
