"""The course of one conversation: turns become items, items become replies, replies are heard.

Carries out what the turn machine decides. Runs on the event loop; never waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from handlers.base import Overloaded
from handlers.messages import (
    RATE_HZ,
    Ask,
    ChatMessage,
    Failed,
    Finish,
    Listen,
    Message,
    Retain,
    Samples,
    Say,
    Speech,
    Spoken,
    TextDelta,
    TextDone,
    Transcript,
)
from handlers.ticket import Ticket
from server import turns, wire
from server.conversation import Conversation
from server.hub import Hub
from server.intake import Intake
from server.items import MessageItem, user_audio
from server.playout import PlayoutSettings
from server.reply import Reply, ReplySettings
from server.transcript import StablePrefix
from server.turns import Turns

MAX_OUT_OF_BAND = 4
"""Out-of-band responses of one session at a time."""


class Outlet(Protocol):
    """Where events for the client go: bounded, never blocking."""

    def send(self, event: dict[str, Any]) -> None: ...
    def send_audio(
        self, response_id: str, item_id: str, start_sample: int, samples: Samples
    ) -> None: ...


@dataclass(slots=True)
class Utterance:
    """What the person is saying, or has said while its text is awaited."""

    ticket: Ticket
    item_id: str
    start_sample: int
    stable: StablePrefix
    revision: int = 0
    failed: Failed | None = None


class Dialogue:
    def __init__(
        self,
        hub: Hub,
        out: Outlet,
        ticket: Ticket,
        intake: Intake,
        conversation: Conversation,
        machine: Turns,
    ) -> None:
        self.machine = machine
        self.transcribe = True  # whether the client wants transcription events
        self.reply_settings = ReplySettings()
        self.instructions = ""
        self.spoke = False  # the assistant has been heard: its voice stays
        self._hub = hub
        self._out = out
        self._ticket = ticket
        self._intake = intake
        self._conversation = conversation
        self._utterance: Utterance | None = None
        self._awaited: dict[Ticket, Utterance] = {}  # committed, text still to come
        self._current: Reply | None = None  # released; until heard to its end
        self._prepared: Reply | None = None  # made in silence while a turn may be ending
        self._next: list[Reply] = []  # may be heard once the current one is over
        self._unasked: list[tuple[Reply, str]] = []  # wait for the text of what was committed
        self._replies: dict[Ticket, Reply] = {}
        self._turn_end_sample = 0  # last voiced sample of the turn being answered
        self._turn_end_s: float | None = None

    @property
    def idle(self) -> bool:
        """Nothing is being said or prepared by Parley."""
        return not self._replies and self._current is None

    # From the stages.

    def voice(self, end_sample: int, probability: float, now_s: float) -> None:
        self._apply(self.machine.voice(end_sample, probability, now_s), now_s)

    def receive(self, message: Message, now_s: float) -> None:
        match message:
            case Transcript():
                self._transcript(message, now_s)
            case TextDelta(ticket, text):
                self._replies[ticket].text(text)
            case TextDone(ticket, reason, input_tokens, output_tokens):
                reply = self._replies[ticket]
                reply.text_done(reason == "length", input_tokens, output_tokens)
            case Speech(ticket):
                self._replies[ticket].speech(message)
            case Spoken(ticket, index):
                self._replies[ticket].clause_spoken(index)
            case Failed():
                self._failed(message, now_s)
            case _:
                raise AssertionError(f"a session gets no {type(message).__name__}")

    def _transcript(self, message: Transcript, now_s: float) -> None:
        awaited = self._awaited.get(message.ticket)
        if awaited is not None:
            if message.revision == awaited.revision:
                self._text_of_committed(awaited, message.text)
            return
        u = self._utterance
        if u is None or message.ticket is not u.ticket:
            return
        if message.revision is None and self.transcribe:
            delta = u.stable.push(message.text)
            if delta:
                self._out.send(wire.transcription_delta(u.item_id, delta))
        actions = self.machine.transcript(
            message.text, message.revision, message.end_probability, message.prosody, now_s
        )
        self._apply(actions, now_s)

    def _failed(self, failure: Failed, now_s: float) -> None:
        reply = self._replies.get(failure.ticket)
        if reply is not None:
            reply.fail(failure)
            return
        awaited = self._awaited.get(failure.ticket)
        if awaited is not None:
            awaited.failed = failure
            self._text_of_committed(awaited, None)
        elif self._utterance is not None and failure.ticket is self._utterance.ticket:
            self._utterance.failed = failure
            self._error(failure.code, failure.message)
            self._apply(self.machine.transcription_failed(now_s), now_s)
        else:
            self._error(failure.code, failure.message)

    # What the turn machine decides.

    def _apply(self, actions: list[turns.Action], now_s: float) -> None:
        for action in actions:
            match action:
                case turns.Open(start_sample):
                    self._open(start_sample, now_s)
                case turns.FinishText(revision):
                    self._finish_text(revision, now_s)
                case turns.Speculate(text):
                    self._prepared = self._prepare(text)
                case turns.Withdraw():
                    self._withdraw()
                case turns.EndTurn(end_sample, text, respond):
                    self._end_turn(end_sample, text, respond, now_s)
                case turns.Drop(end_sample):
                    self._drop(end_sample, now_s)
                    if self.machine.settings.automatic:
                        self._out.send(wire.cleared())
                case turns.Pause():
                    if self._current is not None:
                        self._current.pause(now_s)
                case turns.Resume():
                    self._hub.metrics.interruptions.labels("false").inc()
                    if self._current is not None:
                        self._current.resume(now_s)
                case turns.Interrupt():
                    self._hub.metrics.interruptions.labels("true").inc()
                    self.stop_reply("turn_detected", now_s)

    def _open(self, start_sample: int, now_s: float) -> None:
        u = Utterance(
            self._ticket.child("utterance"), wire.new_id("item"), start_sample, StablePrefix()
        )
        self._utterance = u
        if self.machine.settings.automatic:
            self._intake.keep_from(start_sample)
        if self.machine.settings.automatic:
            self._out.send(wire.speech_started(u.item_id, _ms(start_sample)))
        self._hear(Listen(self._ticket, u.ticket, start_sample), u.ticket, now_s)

    def _finish_text(self, revision: int, now_s: float) -> None:
        u = self._utterance
        if u is None or u.failed is not None:
            return
        u.revision = revision
        self._hear(Finish(self._ticket, u.ticket, revision), u.ticket, now_s)

    def _hear(self, message: Listen | Finish | Retain, utterance: Ticket, now_s: float) -> None:
        try:
            self._hub.pipeline.hear(message)
        except Overloaded:
            failure = Failed(utterance, "vad", "server_overloaded", "The server is overloaded.")
            self._failed(failure, now_s)

    def _withdraw(self) -> None:
        if self._prepared is not None:
            self._hub.metrics.withdrawn.inc()
            self._forget(self._prepared)
            self._prepared = None

    def _end_turn(self, end_sample: int, text: str | None, respond: bool, now_s: float) -> None:
        u = self._take_utterance()
        self._hub.metrics.turns.labels("failed" if text is None else "ended").inc()
        silence = end_sample - self.machine.last_voiced
        self._hub.metrics.hold.observe(max(0.0, silence) / RATE_HZ)
        self._turn_end_s = now_s - silence / RATE_HZ
        self._out.send(wire.speech_stopped(u.item_id, _ms(end_sample)))
        item = self._commit(u, end_sample, text, now_s)
        if text is None:
            self._transcription_failed(u)
        elif self.transcribe:
            seconds = (end_sample - u.start_sample) / RATE_HZ
            self._out.send(wire.transcription_completed(item.id, text, seconds))
        u.ticket.cancel()
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            if respond:
                self._queue(prepared)
            else:
                self._forget(prepared)

    def _drop(self, end_sample: int, now_s: float) -> None:
        u = self._take_utterance()
        u.ticket.cancel()
        self._hub.metrics.turns.labels("dropped").inc()
        self.begin_buffer(end_sample, now_s)
        if self.machine.settings.automatic:
            self._out.send(wire.speech_stopped(u.item_id, _ms(end_sample)))

    def _take_utterance(self) -> Utterance:
        u, self._utterance = self._utterance, None
        assert u is not None, "the turn machine closes only what it opened"
        return u

    def begin_buffer(self, start_sample: int, now_s: float) -> None:
        """The input audio buffer starts here: push-to-talk keeps all of it."""
        self._intake.uncommitted = start_sample
        keep = None if self.machine.settings.automatic else start_sample
        self._intake.keep_from(keep)
        self._hear(Retain(self._ticket, keep), self._ticket, now_s)

    def _commit(self, u: Utterance, end_sample: int, text: str | None, now_s: float) -> MessageItem:
        """The utterance becomes a user item."""
        automatic = self.machine.settings.automatic
        start_sample = u.start_sample if automatic else self._intake.uncommitted
        audio = self._intake.audio(start_sample, end_sample)
        self.begin_buffer(end_sample, now_s)
        item = user_audio(u.item_id, audio, text)
        previous = self._conversation.add(item)
        self._out.send(wire.committed(item.id, previous))
        self._out.send(wire.item_added(item.to_wire(), previous))
        self._out.send(wire.item_done(item.to_wire(), previous))
        return item

    # What the client decides.

    def commit(self, now_s: float) -> None:
        """The input audio buffer becomes a user item now; its text follows."""
        end_sample = self._intake.received
        start_sample = self._intake.uncommitted
        actions = self.machine.commit(start_sample)
        self._apply(actions, now_s)
        u = self._take_utterance()
        self._commit(u, end_sample, None, now_s)
        if u.failed is not None:
            self._transcription_failed(u)
            u.ticket.cancel()
        else:
            self._awaited[u.ticket] = u

    def clear(self, now_s: float) -> None:
        """The input audio buffer is discarded."""
        actions = self.machine.clear()
        self._apply(actions, now_s)
        if not (actions and self.machine.settings.automatic):  # else the drop has said it
            self._out.send(wire.cleared())
        self.begin_buffer(self._intake.received, now_s)

    def stop_reply(
        self, reason: Literal["turn_detected", "client_cancelled"], now_s: float
    ) -> None:
        """End the reply that is under way, keeping what was heard of it."""
        reply, self._current = self._current, None
        self.machine.reply(False)
        if reply is not None:
            reply.cancel(reason, now_s)
            self._replies.pop(reply.ticket, None)
        for waiting in self._next:
            self._forget(waiting)
        self._next.clear()

    @property
    def active(self) -> Reply | None:
        """The response in progress that belongs to the conversation."""
        if self._current is not None and self._current.active:
            return self._current
        return self._next[0] if self._next else None

    @property
    def current(self) -> Reply | None:
        return self._current

    def respond(
        self,
        messages: tuple[ChatMessage, ...] | None,
        settings: ReplySettings,
        now_s: float,
        instructions: str,
    ) -> None:
        """A `response.create`: `messages` None means the conversation as it stands."""
        if settings.conversation_id is None:
            out_of_band = [r for r in self._replies.values() if _out_of_band(r)]
            if len(out_of_band) >= MAX_OUT_OF_BAND:
                raise wire.WireError(
                    "too_many_responses",
                    f"{MAX_OUT_OF_BAND} out-of-band responses are in progress.",
                )
        self._turn_end_s = None
        reply = self._new_reply(messages or (), settings)
        if messages is None and self._awaited:
            self._unasked.append((reply, instructions))
        else:
            if messages is None:
                reply.messages = self._conversation.history(instructions)
            self._ask(reply)
        if settings.conversation_id is None:
            reply.release()
        else:
            self._queue(reply)

    def cancel_out_of_band(self, response_id: str, now_s: float) -> bool:
        for reply in list(self._replies.values()):
            if reply.id == response_id and _out_of_band(reply):
                reply.cancel("client_cancelled", now_s)
                del self._replies[reply.ticket]
                return True
        return False

    # Replies.

    def _prepare(self, text: str) -> Reply:
        """Begin a reply to a turn that may be over; nobody hears of it yet."""
        messages = self._conversation.history(self.instructions, extra=text)
        reply = self._new_reply(messages, self.reply_settings)
        self._ask(reply)
        return reply

    def _new_reply(self, messages: tuple[ChatMessage, ...], settings: ReplySettings) -> Reply:
        playout = PlayoutSettings(lead_s=self._hub.options.output_lead_ms / 1000)
        reply = Reply(self, self._ticket.child("reply"), messages, settings, playout)
        self._replies[reply.ticket] = reply
        return reply

    def _ask(self, reply: Reply) -> None:
        try:
            self._hub.pipeline.ask(Ask(reply.ticket, reply.messages, reply.settings.max_tokens))
        except Overloaded:
            self._overloaded(reply, "lm")

    def _overloaded(self, reply: Reply, stage: str) -> None:
        failure = Failed(reply.ticket, stage, "server_overloaded", "The server is overloaded.")
        reply.fail(failure)

    def _queue(self, reply: Reply) -> None:
        """Let it be heard, after what is being heard."""
        if self._current is not None:
            self._next.append(reply)
            return
        self._current = reply
        self.machine.reply(True)
        reply.release()

    def _forget(self, reply: Reply) -> None:
        reply.ticket.cancel()
        self._replies.pop(reply.ticket, None)

    def _text_of_committed(self, u: Utterance, text: str | None) -> None:
        del self._awaited[u.ticket]
        u.ticket.cancel()
        if text is None:
            self._transcription_failed(u)
        else:
            self._conversation.set_transcript(u.item_id, text)
            if self.transcribe:
                seconds = (self._intake.uncommitted - u.start_sample) / RATE_HZ
                self._out.send(wire.transcription_completed(u.item_id, text, seconds))
        if not self._awaited:
            unasked, self._unasked = self._unasked, []
            for reply, instructions in unasked:
                if reply.ticket.live:
                    reply.messages = self._conversation.history(instructions)
                    self._ask(reply)

    def _transcription_failed(self, u: Utterance) -> None:
        failure = u.failed
        code = failure.code if failure else "transcription_timeout"
        message = failure.message if failure else "The transcription took too long."
        self._out.send(wire.transcription_failed(u.item_id, code, message))

    def _error(self, code: str, message: str) -> None:
        self._out.send(wire.error(code, message, kind="server_error"))

    # Time.

    def tick(self, now_s: float) -> None:
        if self._intake.caught_up:
            self._apply(self.machine.tick(now_s), now_s)

    def settle(self, now_s: float) -> float | None:
        """Move everything on as far as it goes now. Returns when to come back."""
        while True:
            deadlines = [self.machine.deadline_s]
            for reply in list(self._replies.values()):
                reply.advance(now_s)
                if reply is self._current and reply.first_sent_s is not None:
                    self._first_audio(reply)
                if reply.over(now_s):
                    self._over(reply)
                else:
                    deadlines.append(reply.deadline_s(now_s))
            if self._current is not None or not self._next:
                return min((d for d in deadlines if d is not None), default=None)
            self._queue(self._next.pop(0))

    def _first_audio(self, reply: Reply) -> None:
        self.spoke = True
        if self._turn_end_s is not None and reply.first_sent_s is not None:
            self._hub.metrics.endpoint_to_audio.observe(reply.first_sent_s - self._turn_end_s)
            self._turn_end_s = None

    def _over(self, reply: Reply) -> None:
        self._forget(reply)
        if reply is self._current:
            self._current = None
            self.machine.reply(False)

    # For replies (see `server.reply.Host`).

    def send(self, event: dict[str, Any]) -> None:
        self._out.send(event)

    def send_audio(self, reply: Reply, start_sample: int, samples: Samples) -> None:
        self._out.send_audio(reply.id, reply.item.id, start_sample, samples)

    def say(self, reply: Reply, message: Say) -> None:
        try:
            self._hub.pipeline.say(message)
        except Overloaded:
            self._overloaded(reply, "tts")

    def add_reply_item(self, reply: Reply) -> str | None:
        if reply.settings.conversation_id is None:
            return None
        return self._conversation.add(reply.item)


def _ms(samples: int) -> int:
    return samples // wire.SAMPLES_PER_MS


def _out_of_band(reply: Reply) -> bool:
    return reply.settings.conversation_id is None
