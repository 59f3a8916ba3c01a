"""One client's session: its events are obeyed or refused by name, its timers are kept.

Synchronous and on the event loop: nothing here waits or computes for long.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeAlias

from handlers.base import Overloaded
from handlers.messages import AudioIn, Failed, Message, Samples, Voice
from handlers.ticket import Ticket
from server import wire
from server.config import SemanticVad, ServerVad, SessionConfig
from server.conversation import Conversation
from server.dialogue import Dialogue
from server.endpointing import EndpointPolicy, TextPolicy, TextPolicySettings
from server.hub import Hub, Timer
from server.intake import BacklogFull, Intake
from server.items import chat
from server.reply import ReplySettings
from server.turns import Turns, TurnSettings
from server.wire import WireError

log = logging.getLogger(__name__)

UNFINISHED_FACTOR = {"low": 2.0, "medium": 1.0, "auto": 1.0, "high": 0.6}
"""`semantic_vad` eagerness → how much longer than usual an unfinished turn is waited for."""

StopReason: TypeAlias = Literal["turn_detected", "client_cancelled"]


class Outbox(Protocol):
    """See `server.connection.Outbox`."""

    @property
    def unsent_bytes(self) -> int: ...
    def send(self, event: dict[str, Any]) -> None: ...
    def send_audio(
        self, response_id: str, item_id: str, start_sample: int, samples: Samples
    ) -> None: ...
    def close(self, code: int, reason: str) -> None: ...


class Session:
    def __init__(self, hub: Hub, outbox: Outbox) -> None:
        self.id = wire.new_id("sess")
        self.ticket = Ticket(self, self.id)
        self._hub = hub
        self._out = outbox
        self._clock = hub.clock
        self._config = hub.default_config
        self._conversation = Conversation()
        self._intake = Intake(hub.options.max_backlog_s)
        self._dialogue = Dialogue(
            hub,
            outbox,
            self.ticket,
            self._intake,
            self._conversation,
            Turns(*turn_taking(self._config, hub)),
        )
        self._speaker = self._dialogue.speaker
        self._timer: Timer | None = None
        self._timer_s: float | None = None
        self._expiry: Timer | None = None
        self._expires_at = int(time.time() + hub.options.max_session_s)
        self._overflowing = False
        self._draining = False

    # Life.

    def start(self) -> None:
        self._apply_config()
        limit_s = self._hub.options.max_session_s
        self._expiry = self._clock.call_at(
            self._clock.time() + limit_s,
            lambda: self.expire("session_expired", f"A session lasts at most {limit_s:g} s."),
        )
        self._out.send(wire.session_created(self._config.to_wire(self.id, self._expires_at)))

    def stop(self) -> None:
        """The connection is gone: all work for it ends."""
        self.ticket.cancel()
        for timer in (self._timer, self._expiry):
            if timer is not None:
                timer.cancel()
        self._timer = self._expiry = None

    def expire(self, code: str, message: str) -> None:
        """End the session with an error that names why."""
        self._out.send(wire.error(code, message))
        self.close(1001, code)

    def close(self, code: int, reason: str) -> None:
        self._out.close(code, reason)
        self.stop()

    def drain(self) -> None:
        """Close as soon as no reply is under way."""
        self._draining = True
        self._settle()

    # From the client.

    def receive_text(self, data: str) -> None:
        try:
            event = wire.parse(data)
        except WireError as error:
            self._out.send(wire.refusal(error))
            return
        self._safely(lambda: self._obey(event), event.event_id)

    def receive_audio(self, data: bytes) -> None:
        """A binary frame."""
        self._safely(lambda: self._append(wire.parse_audio_frame(data).audio))

    def _safely(self, work: Callable[[], None], event_id: str | None = None) -> None:
        """A refused event is answered; a fault of ours ends this session and no other."""
        try:
            work()
        except WireError as error:
            self._out.send(wire.refusal(error, event_id))
        except Exception:
            log.exception("session failed")
            self._out.send(wire.error("internal_error", "The session failed.", kind="server_error"))
            self.close(1011, "internal_error")

    def _obey(self, event: wire.ClientEvent) -> None:
        try:
            self._carry_out(event)
        finally:
            self._settle()

    def _carry_out(self, event: wire.ClientEvent) -> None:
        now_s = self._clock.time()
        dialogue = self._dialogue
        match event:
            case wire.AudioAppend(audio):
                self._append(audio)
            case wire.AudioCommit():
                if self._intake.received == self._intake.uncommitted:
                    message = "The input audio buffer is empty."
                    raise WireError("input_audio_buffer_commit_empty", message)
                dialogue.commit(now_s)
            case wire.AudioClear():
                dialogue.clear(now_s)
            case wire.SessionUpdate(update):
                self._update(update)
            case wire.ItemCreate(item, previous_item_id):
                previous = self._conversation.add(item, previous_item_id)
                self._out.send(wire.item_added(item.to_wire(), previous))
                self._out.send(wire.item_done(item.to_wire(), previous))
            case wire.ItemRetrieve(item_id):
                item = self._conversation.retrieve(item_id)
                self._out.send(wire.item_retrieved(item.to_wire(audio=True)))
            case wire.ItemDelete(item_id):
                self._delete(item_id, now_s)
            case wire.ItemTruncate():
                self._truncate(event, now_s)
            case wire.ResponseCreate():
                self._respond(event, now_s)
            case wire.ResponseCancel(response_id):
                self._cancel(response_id, now_s)
            case wire.OutputAudioClear():
                self._fall_silent(now_s)
            case wire.Playback(item_id, played_samples):
                self._played(item_id, played_samples, now_s)

    def _append(self, audio: Samples) -> None:
        if self._draining:
            return
        try:
            self._take(audio)
        except BacklogFull:
            if self._overflowing:
                return  # told once per overflow
            self._overflowing = True
            limit_s = self._hub.options.max_backlog_s
            raise WireError(
                "input_audio_buffer_overflow",
                f"More than {limit_s:g} s of audio is waiting; this audio was not taken.",
                "audio",
            ) from None
        self._overflowing = False
        self._feed()

    def _take(self, audio: Samples) -> None:
        """Raises `BacklogFull`."""
        self._intake.take(audio)

    def _feed(self) -> None:
        for start_sample, samples in self._intake.feed():
            try:
                self._hub.pipeline.hear(AudioIn(self.ticket, samples, start_sample))
            except Overloaded:
                self._intake.listened = self._intake.fed
                message = "The server is overloaded; some audio was not listened to."
                self._out.send(wire.error("server_overloaded", message, kind="server_error"))

    def _update(self, update: Any) -> None:
        self._config = self._merged(update)
        self._apply_config()
        self._out.send(wire.session_updated(self._config.to_wire(self.id, self._expires_at)))

    def _merged(self, update: Any) -> SessionConfig:
        """Raises `WireError`."""
        return self._config.merged(
            update,
            known_voices=self._hub.pipeline.voices,
            voice_locked=self._speaker.spoke,
        )

    def _apply_config(self) -> None:
        dialogue, config = self._dialogue, self._config
        dialogue.configure(*turn_taking(config, self._hub), self._clock.time())
        dialogue.transcribe = config.transcription is not None
        dialogue.language = (config.transcription or {}).get("language")
        self._speaker.instructions = config.instructions
        self._speaker.settings = self._reply_settings(config)

    def _reply_settings(self, config: SessionConfig) -> ReplySettings:
        return ReplySettings(
            spoken=config.output_modality == "audio",
            voice=config.voice,
            speed=config.speed,
            max_tokens=config.max_tokens,
            conversation_id=self._conversation.id,
            tools=config.tools,
            tool_choice=config.tool_choice,
        )

    def _delete(self, item_id: str, now_s: float) -> None:
        if self._is_said(item_id):
            self._fall_silent(now_s)
        self._conversation.delete(item_id)
        self._out.send(wire.item_deleted(item_id))

    def _truncate(self, event: wire.ItemTruncate, now_s: float) -> None:
        """What the listener says it heard counts. Truncating the reply under way ends it."""
        said = self._is_said(event.item_id)
        self._conversation.truncate(event.item_id, event.content_index, event.audio_end_ms)
        if said:
            self._fall_silent(now_s, "turn_detected")
        self._out.send(wire.item_truncated(event.item_id, event.content_index, event.audio_end_ms))

    # What is being said.

    @property
    def _idle(self) -> bool:
        return self._speaker.idle

    def _is_said(self, item_id: str) -> bool:
        current = self._speaker.current
        return current is not None and current.item.id == item_id

    def _played(self, item_id: str, played_samples: int, now_s: float) -> None:
        current = self._speaker.current
        if current is not None and current.item.id == item_id:
            current.playout.report(played_samples, now_s)

    def _fall_silent(self, now_s: float, reason: StopReason = "client_cancelled") -> None:
        self._speaker.stop(reason, now_s)

    def _respond(self, event: wire.ResponseCreate, now_s: float) -> None:
        params = event.params
        in_band = params.conversation == "auto"
        active = self._speaker.obstacle
        if in_band and active is not None:
            raise WireError(
                "conversation_already_has_active_response",
                f"Response {active.id} is in progress: wait for it or cancel it.",
            )
        config = self._config.for_response(
            params,
            known_voices=self._hub.pipeline.voices,
            voice_locked=self._speaker.spoke,
        )
        messages = None
        if params.input is not None:
            messages = chat(self._conversation.resolve(params.input), config.instructions)
        settings = dataclasses.replace(self._reply_settings(config), metadata=params.metadata)
        if not in_band:
            settings = dataclasses.replace(settings, conversation_id=None)
        self._dialogue.respond(messages, settings, config.instructions)

    def _cancel(self, response_id: str | None, now_s: float) -> None:
        active = self._speaker.active
        if response_id is not None and self._speaker.cancel_out_of_band(response_id, now_s):
            return
        if active is None or response_id not in (None, active.id):
            message = "There is no such response in progress."
            raise WireError("response_cancel_not_active", message)
        self._speaker.stop("client_cancelled", now_s)

    # From the stages (see `handlers.ticket.Sink`).

    def receive(self, message: Message) -> None:
        self._safely(lambda: self._receive(message))

    def _receive(self, message: Message) -> None:
        now_s = self._clock.time()
        if isinstance(message, Voice):
            self._intake.listened = max(self._intake.listened, message.end_sample)
            self._feed()
            self._dialogue.voice(message, now_s)
        else:
            if isinstance(message, Failed) and message.ticket is self.ticket:
                self._intake.listened = self._intake.fed
            self._dialogue.receive(message, now_s)
        self._settle()

    # Time.

    def _settle(self) -> None:
        """Move on what can move, and come back when something is next due."""
        if not self.ticket.live:
            return
        due_s = self._dialogue.settle(self._clock.time())
        if self._draining and self._idle:
            self.close(1001, "server_shutting_down")
            return
        if due_s == self._timer_s:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_s = due_s
        self._timer = None if due_s is None else self._clock.call_at(due_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = self._timer_s = None
        self._safely(self._tick)

    def _tick(self) -> None:
        self._dialogue.tick(self._clock.time())
        self._settle()


def turn_taking(config: SessionConfig, hub: Hub) -> tuple[TurnSettings, EndpointPolicy]:
    """What the turn machine is to do under a session's configuration."""
    base, options = hub.turns, hub.options
    policy = TextPolicySettings(
        finished_ms=hub.default_config.server_vad.silence_duration_ms,
        unsure_ms=options.unsure_silence_ms,
        unfinished_ms=options.unfinished_silence_ms,
    )
    match config.turn_detection:
        case ServerVad() as vad:
            settings = dataclasses.replace(
                base,
                threshold=vad.threshold,
                prefix_padding_ms=vad.prefix_padding_ms,
                create_response=vad.create_response,
                interrupt_response=vad.interrupt_response,
            )
            policy = dataclasses.replace(policy, finished_ms=vad.silence_duration_ms)
        case SemanticVad() as vad:
            settings = dataclasses.replace(
                base,
                create_response=vad.create_response,
                interrupt_response=vad.interrupt_response,
            )
            factor = UNFINISHED_FACTOR[vad.eagerness]
            policy = dataclasses.replace(policy, unfinished_ms=policy.unfinished_ms * factor)
        case None:
            settings = dataclasses.replace(base, automatic=False)
    return settings, TextPolicy(policy)
