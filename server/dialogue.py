"""The course of one conversation: turns become items, items become replies, replies are heard.

Carries out what the turn machine decides. Runs on the event loop; never waits.
"""

from __future__ import annotations

from dataclasses import dataclass

from handlers.base import Overloaded
from handlers.messages import (
    RATE_HZ,
    ChatMessage,
    Completeness,
    Failed,
    Finish,
    Listen,
    Message,
    Retain,
    Transcript,
    Voice,
)
from handlers.ticket import Ticket
from server import turns, wire
from server.conversation import Conversation
from server.endpointing import EndpointPolicy, LevelGate
from server.hub import Hub
from server.intake import Intake
from server.items import MessageItem, user_audio
from server.reply import ReplySettings
from server.speaker import Outlet, Speaker, overloaded
from server.transcript import StablePrefix
from server.turns import Turns, TurnSettings

DULL_BELOW_DB = -12.0
"""Tilt of a window that holds no more than a hum."""


@dataclass(slots=True)
class Utterance:
    """What the person is saying, or has said while its text is awaited."""

    ticket: Ticket
    item_id: str
    start_sample: int
    stable: StablePrefix
    announced: bool
    """The client was told that speech has begun: it is not where the client commits by hand."""
    revision: int = 0
    failed: Failed | None = None
    deadline_s: float | None = None  # once committed: when its text counts as failed


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
        self.language: str | None = None  # what it says is spoken
        self.speaker = Speaker(hub, out, ticket, conversation, machine.reply)
        self._hub = hub
        self._out = out
        self._ticket = ticket
        self._intake = intake
        self._conversation = conversation
        self._gate = LevelGate()
        self._utterance: Utterance | None = None
        self._awaited: dict[Ticket, Utterance] = {}  # committed, text still to come

    def configure(self, settings: TurnSettings, policy: EndpointPolicy, now_s: float) -> None:
        changed = settings.automatic != self.machine.settings.automatic
        self._apply(self.machine.configure(settings, policy), now_s)
        if changed:
            self.begin_buffer(self._intake.uncommitted, now_s)

    # From the stages.

    def voice(self, message: Voice, now_s: float) -> None:
        actions = self.machine.voice(
            message.end_sample,
            message.probability,
            now_s,
            audible=self._gate(message.probability, message.level_db) > 0.0,
            dull=message.tilt_db < DULL_BELOW_DB,
        )
        self._apply(actions, now_s)

    def receive(self, message: Message, now_s: float) -> None:
        if isinstance(message, Transcript):
            self._transcript(message, now_s)
        elif isinstance(message, Completeness):
            if self._utterance is not None and message.ticket is self._utterance.ticket:
                actions = self.machine.completeness(message.probability, message.revision, now_s)
                self._apply(actions, now_s)
        elif not self.speaker.receive(message) and isinstance(message, Failed):
            self._failed(message, now_s)

    def _transcript(self, message: Transcript, now_s: float) -> None:
        awaited = self._awaited.get(message.ticket)
        if awaited is not None:
            if message.revision == awaited.revision:
                self._text_of_committed(awaited, message.text)
            return
        u = self._utterance
        if u is None or message.ticket is not u.ticket:
            return
        if message.revision is None and message.text and self.transcribe:
            delta = u.stable.push(message.text)
            if delta:
                self._out.send(wire.transcription_delta(u.item_id, delta))
        actions = self.machine.transcript(
            message.text,
            message.revision,
            message.end_probability,
            message.prosody,
            now_s,
            message.heard,
        )
        self._apply(actions, now_s)

    def _failed(self, failure: Failed, now_s: float) -> None:
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
                    self.speaker.prepare(text)
                case turns.Withdraw():
                    self.speaker.withdraw()
                case turns.EndTurn(end_sample, text, respond):
                    self._end_turn(end_sample, text, respond, now_s)
                case turns.Drop(end_sample):
                    self._drop(end_sample, now_s)
                    if self.machine.settings.automatic:
                        self._out.send(wire.cleared())
                case turns.Pause():
                    self.speaker.pause(now_s)
                case turns.Resume():
                    self._hub.metrics.interruptions.labels("false").inc()
                    self.speaker.resume(now_s)
                case turns.Interrupt():
                    self._hub.metrics.interruptions.labels("true").inc()
                    self.speaker.stop("turn_detected", now_s)

    def _open(self, start_sample: int, now_s: float) -> None:
        automatic = self.machine.settings.automatic
        ticket, item_id = self._ticket.child("utterance"), wire.new_id("item")
        u = Utterance(ticket, item_id, start_sample, StablePrefix(), announced=automatic)
        self._utterance = u
        if automatic:
            self._intake.keep_from(start_sample)
            self._out.send(wire.speech_started(u.item_id, _ms(start_sample)))
        listen = Listen(self._ticket, u.ticket, start_sample, self.language)
        self._hear(listen, u.ticket, now_s)

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
            self._failed(overloaded(utterance, "vad"), now_s)

    def _end_turn(self, end_sample: int, text: str | None, respond: bool, now_s: float) -> None:
        u = self._take_utterance()
        self._hub.metrics.turns.labels("failed" if text is None else "ended").inc()
        silence = end_sample - self.machine.last_voiced
        self._hub.metrics.hold.observe(max(0.0, silence) / RATE_HZ)
        self.speaker.turn_end_s = now_s - silence / RATE_HZ
        self._out.send(wire.speech_stopped(u.item_id, _ms(end_sample)))
        item = self._commit(u, end_sample, text, now_s)
        if text is None:
            self._transcription_failed(u)
        elif self.transcribe:
            seconds = (end_sample - u.start_sample) / RATE_HZ
            self._out.send(wire.transcription_completed(item.id, text, seconds))
        u.ticket.cancel()
        if respond:
            self.speaker.release()
        else:
            self.speaker.withdraw()

    def _drop(self, end_sample: int, now_s: float) -> None:
        u = self._take_utterance()
        u.ticket.cancel()
        self._hub.metrics.turns.labels("dropped").inc()
        self.begin_buffer(end_sample, now_s)
        if u.announced:
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
            u.deadline_s = now_s + self.machine.settings.text_wait_ms / 1000
            self._awaited[u.ticket] = u

    def clear(self, now_s: float) -> None:
        """The input audio buffer is discarded."""
        actions = self.machine.clear()
        self._apply(actions, now_s)
        if not (actions and self.machine.settings.automatic):  # else the drop has said it
            self._out.send(wire.cleared())
        self.begin_buffer(self._intake.received, now_s)

    def respond(
        self, messages: tuple[ChatMessage, ...] | None, settings: ReplySettings, instructions: str
    ) -> None:
        """A `response.create`; see `Speaker.respond`."""
        self.speaker.respond(messages, settings, instructions, text_awaited=bool(self._awaited))

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
            self.speaker.texts_known()

    def _transcription_failed(self, u: Utterance) -> None:
        failure = u.failed
        code = failure.code if failure else "transcription_timeout"
        message = failure.message if failure else "The transcription took too long."
        self._out.send(wire.transcription_failed(u.item_id, code, message))

    def _error(self, code: str, message: str) -> None:
        self._out.send(wire.error(code, message, kind="server_error"))

    # Time.

    def tick(self, now_s: float) -> None:
        for u in list(self._awaited.values()):
            if u.deadline_s is not None and now_s >= u.deadline_s:
                self._text_of_committed(u, None)
        if self._intake.caught_up:
            self._apply(self.machine.tick(now_s), now_s)

    def settle(self, now_s: float) -> float | None:
        """Move everything on as far as it goes now. Returns when to come back."""
        waits = [u.deadline_s for u in self._awaited.values()]
        deadlines = (self.speaker.settle(now_s), self.machine.deadline_s, *waits)
        return min((d for d in deadlines if d is not None), default=None)


def _ms(samples: int) -> int:
    return samples // wire.SAMPLES_PER_MS
