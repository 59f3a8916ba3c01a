"""One response: from the question to the LM to the last sample that was heard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from handlers.clauses import ClauseSplitter, SpeakableText, speakable_text
from handlers.messages import (
    RATE_HZ,
    ChatMessage,
    Failed,
    Samples,
    Say,
    Speech,
    ToolUse,
    WordMark,
)
from handlers.ticket import Ticket
from server import wire
from server.items import FunctionCallItem, Item, MessageItem, spoken_reply, text_reply
from server.playout import Playout, PlayoutSettings

MAX_AHEAD_SAMPLES = 8 * RATE_HZ
"""Speech made and not yet heard, beyond which no further clause is given to TTS."""
MAX_CLAUSES_AT_TTS = 2
"""One is being spoken, the next is there when it ends."""

Status = Literal["completed", "cancelled", "failed", "incomplete"]


@dataclass(frozen=True, slots=True)
class ReplySettings:
    spoken: bool = True
    voice: str | None = None
    speed: float = 1.0
    max_tokens: int | None = None
    conversation_id: str | None = None  # None: out of band, not part of the conversation
    metadata: Mapping[str, Any] | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    tool_choice: Any = "auto"


class Host(Protocol):
    """What a reply needs of its session."""

    def send(self, event: dict[str, Any]) -> None: ...
    def send_audio(self, reply: Reply, start_sample: int, samples: Samples) -> None: ...
    def say(self, reply: Reply, message: Say) -> None: ...
    def add_reply_item(self, reply: Reply, item: Item) -> str | None: ...


class Reply:
    """Made in silence, heard after `release`; nothing reaches the wire before that.

    The session feeds it what the LM and TTS make and calls `advance` whenever something has
    changed or `deadline_s` has come.
    """

    def __init__(
        self,
        host: Host,
        ticket: Ticket,
        messages: tuple[ChatMessage, ...],
        settings: ReplySettings,
        playout: PlayoutSettings,
    ) -> None:
        self.id = wire.new_id("resp")
        self.ticket = ticket
        self.messages = messages
        self.settings = settings
        self.item: MessageItem = (spoken_reply if settings.spoken else text_reply)(
            wire.new_id("item")
        )
        self.playout = Playout(playout)
        self.released = False
        self.status: Status | None = None  # None: in progress
        self.first_sent_s: float | None = None
        self._host = host
        self._splitter = ClauseSplitter()
        self._clauses: list[str] = []
        self._cleaned: list[SpeakableText] = []  # the clauses given to TTS, as TTS got them
        self._said = 0  # clauses given to TTS
        self._spoken = 0  # clauses TTS has finished
        self._announced = 0  # clauses whose transcript was sent
        self._starts: list[int] = []  # first sample of each clause that has begun
        self._calls: list[FunctionCallItem] = []
        self._called = 0  # calls the client was told of
        self._pending_text = ""  # text reply: not yet sent
        self._worded = False  # there is text
        self._written = False  # the LM has finished
        self._cut_short = False  # ... because of max_tokens
        self._failure: Failed | None = None
        self._opened = False  # the item has been announced
        self._previous: str | None = None  # the item before it
        self._usage = (0, 0)

    # What the stages make.

    def text(self, delta: str) -> None:
        if not self._worded:
            delta = delta.lstrip()
            self._worded = bool(delta)
        if self.settings.spoken:
            self._add_clauses(self._splitter.push(delta))
        else:
            self.item.append_text(delta)
            self._pending_text += delta

    def call(self, use: ToolUse) -> None:
        item_id = wire.new_id("item")
        self._calls.append(FunctionCallItem(item_id, use.name, use.arguments, use.call_id))

    def text_done(self, cut_short: bool, input_tokens: int, output_tokens: int) -> None:
        if self.settings.spoken:
            self._add_clauses(self._splitter.flush())
        self._written = True
        self._cut_short = cut_short
        self._usage = (input_tokens, output_tokens)

    def speech(self, message: Speech) -> None:
        self._begin(message.index)
        assert self.item.spoken is not None
        cleaned = self._cleaned[message.index]
        marks = [
            WordMark(cleaned.raw_end(mark.char_end), mark.end_sample) for mark in message.marks
        ]
        self.item.spoken.add_audio(message.index, len(message.samples), marks)
        self.playout.push(message.samples)

    def clause_spoken(self, index: int) -> None:
        self._begin(index)
        assert self.item.spoken is not None
        self.item.spoken.end_clause(index)
        self._spoken = index + 1

    def fail(self, failure: Failed) -> None:
        """A stage gave up on it: what was made before is still heard."""
        self._failure = failure
        self._written = True
        kept = self._spoken if failure.stage == "tts" else self._said
        self._clauses = self._clauses[:kept]

    def _add_clauses(self, clauses: list[str]) -> None:
        assert self.item.spoken is not None
        for clause in clauses:
            self.item.spoken.add_clause(clause)
            self._clauses.append(clause)

    def _begin(self, index: int) -> None:
        while len(self._starts) <= index:
            self._starts.append(self.playout.total)

    # What the session decides.

    @property
    def active(self) -> bool:
        """Announced to the client and not yet done."""
        return self.released and self.status is None

    @property
    def awaits_tools(self) -> bool:
        """It has called functions, and only what it has said meanwhile is still to be heard."""
        return self._written and 0 < len(self._calls) == self._called

    def release(self) -> None:
        """From now on it may be heard."""
        self.released = True
        self._host.send(wire.response_created(self.to_wire()))

    def pause(self, now_s: float) -> None:
        self.playout.pause(now_s)

    def resume(self, now_s: float) -> None:
        self.playout.resume(now_s)

    def cancel(self, reason: Literal["turn_detected", "client_cancelled"], now_s: float) -> None:
        """Stop. Of a spoken reply only what was heard remains."""
        self.ticket.cancel()
        if self.settings.spoken:
            self.item.cut(self.playout.heard(now_s))
        if self.active:
            self._close("cancelled", {"type": "cancelled", "reason": reason})

    def over(self, now_s: float) -> bool:
        """Done, and heard to its end."""
        if self.status is None:
            return False
        return not self.ticket.live or self.playout.finished(now_s) or not self.settings.spoken

    # Moving on.

    def advance(self, now_s: float) -> None:
        """Hand clauses to TTS, send what is due, close what is complete."""
        if not self.ticket.live:
            return
        self._feed_tts(now_s)
        if self._made:
            self.playout.end()
        if not self.released:
            return
        self._announce_calls()
        if self.playout.paused:
            return
        if self._pending_text:
            self._open()
            self._host.send(wire.output_text_delta(self.id, self.item.id, self._pending_text))
            self._pending_text = ""
        for start_sample, samples in self.playout.due(now_s):
            self._open()
            self._announce(start_sample)
            self._host.send_audio(self, start_sample, samples)
            if self.first_sent_s is None:
                self.first_sent_s = now_s
        if self.status is None and self._made and self.playout.drained:
            self._announce(self.playout.total)
            self._complete()

    def deadline_s(self, now_s: float) -> float | None:
        if not self.released or not self.ticket.live:
            return None
        return self.playout.deadline_s(now_s)

    @property
    def _made(self) -> bool:
        """All text and all audio is there."""
        return self._written and (not self.settings.spoken or self._spoken >= len(self._clauses))

    def _feed_tts(self, now_s: float) -> None:
        while (
            self._said < len(self._clauses)
            and self._said - self._spoken < MAX_CLAUSES_AT_TTS
            and self.playout.ahead_samples(now_s) < MAX_AHEAD_SAMPLES
            and self._failure is None
        ):
            index, s = self._said, self.settings
            cleaned = speakable_text(self._clauses[index])
            self._cleaned.append(cleaned)
            self._said += 1
            self._host.say(self, Say(self.ticket, cleaned.text, index, s.voice, s.speed))

    # The wire.

    def _open(self) -> None:
        if self._opened:
            return
        self._opened = True
        self._previous = previous = self._host.add_reply_item(self, self.item)
        item = self.item.to_wire()
        self._host.send(wire.output_item_added(self.id, item))
        if self.settings.conversation_id is not None:
            self._host.send(wire.item_added(item, previous))
        self._host.send(wire.content_part_added(self.id, self.item.id, self.settings.spoken))

    def _announce(self, sample: int) -> None:
        """The transcript of each clause goes out with its first audio."""
        while (
            self._announced < len(self._starts)
            and self._announced < len(self._clauses)
            and self._starts[self._announced] <= sample
        ):
            clause = self._clauses[self._announced]
            self._announced += 1
            self._open()
            self._host.send(wire.transcript_delta(self.id, self.item.id, clause))

    def _announce_calls(self) -> None:
        """At once, whatever is still to be heard. The message, if there is one, comes first."""
        if not (self._worded or self._written):
            return
        while self._called < len(self._calls):
            if self._worded:
                self._open()
            item = self._calls[self._called]
            index = self._called + self._opened
            self._called += 1
            previous = self._host.add_reply_item(self, item)
            shown = item.to_wire()
            begun = shown | {"status": "in_progress", "arguments": ""}
            in_conversation = self.settings.conversation_id is not None
            self._host.send(wire.output_item_added(self.id, begun, index))
            if in_conversation:
                self._host.send(wire.item_added(begun, previous))
            for event in wire.function_call(self.id, shown, index):
                self._host.send(event)
            self._host.send(wire.output_item_done(self.id, shown, index))
            if in_conversation:
                self._host.send(wire.item_done(shown, previous))

    def _complete(self) -> None:
        if self._failure is not None:
            self.item.cut(self.playout.total)
            code, message = self._failure.code, self._failure.message
            self._host.send(wire.error(code, message, kind="server_error"))
            error = {"type": "server_error", "code": code}
            self._close("failed", {"type": "failed", "error": error})
        elif self._cut_short:
            self._close("incomplete", {"type": "incomplete", "reason": "max_output_tokens"})
        else:
            if not self._calls:
                self._open()
            self._close("completed", None)

    def _close(self, status: Status, details: dict[str, Any] | None) -> None:
        """All the `done` events, in their order, whatever the status."""
        self.status = status
        self.item.status = "completed" if status == "completed" else "incomplete"
        if self._opened:
            text = self.item.text
            if self.settings.spoken:
                self._host.send(wire.output_audio_done(self.id, self.item.id))
                self._host.send(wire.transcript_done(self.id, self.item.id, text))
            else:
                self._host.send(wire.output_text_done(self.id, self.item.id, text))
            spoken = self.settings.spoken
            self._host.send(wire.content_part_done(self.id, self.item.id, spoken, text))
            item = self.item.to_wire()
            self._host.send(wire.output_item_done(self.id, item))
            if self.settings.conversation_id is not None:
                self._host.send(wire.item_done(item, self._previous))
        self._host.send(wire.response_done(self.to_wire(details)))

    def to_wire(self, details: dict[str, Any] | None = None) -> dict[str, Any]:
        s = self.settings
        shown: list[Item] = [self.item] if self._opened else []
        shown += self._calls[: self._called]
        return wire.response(
            self.id,
            status=self.status or "in_progress",
            status_details=details,
            output=[item.to_wire() for item in shown] if self.status else [],
            conversation_id=s.conversation_id,
            modality="audio" if s.spoken else "text",
            voice=s.voice,
            max_tokens=s.max_tokens,
            metadata=s.metadata,
            usage=self._usage if self.status else None,
        )
