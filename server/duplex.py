"""A session with the duplex model: it hears every frame and says every frame.

Nothing here decides who speaks. The ear and STT beside it tell the client what the person does;
none of that reaches the model or its voice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any, Protocol

from handlers.base import Overloaded
from handlers.messages import (
    RATE_HZ,
    AudioIn,
    Failed,
    Finish,
    Join,
    Listen,
    Message,
    Retain,
    Samples,
    Skipped,
    Uttered,
)
from server import wire
from server.config import SessionConfig
from server.hub import Hub
from server.intake import BacklogFull
from server.session import Outbox, Session, StopReason
from server.stretches import Stretches, StretchSettings
from server.wire import WireError

UNSUPPORTED = "unsupported_by_model"
OVERLOADED = ("server_overloaded", "The server is overloaded.")


class DuplexStages(Protocol):
    """See `handlers.pipeline.DuplexPipeline`."""

    def hear(self, message: AudioIn | Retain | Listen | Finish) -> None: ...
    def attend(self, message: Join | AudioIn) -> None: ...


class AnyVoice(Collection[str]):
    """Every name is accepted and makes no difference: `session.updated` says what is in force."""

    def __contains__(self, name: object) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


class DuplexSession(Session):
    def __init__(
        self, hub: Hub, outbox: Outbox, stages: DuplexStages, settings: StretchSettings
    ) -> None:
        super().__init__(hub, outbox)
        self._stages = stages
        self._stretches = Stretches(outbox, self._conversation, settings, self._not_sent)
        self._heard = 0  # end of what the model has heard, by the input clock
        self._told_s = float("-inf")  # when the client was last told of skipped audio

    def start(self) -> None:
        super().start()
        try:
            self._stages.attend(Join(self.ticket))
        except Overloaded:
            self._out.send(wire.error(*OVERLOADED, kind="server_error"))
            self.close(1013, OVERLOADED[0])

    # What the client may not ask, and what makes no difference.

    def _merged(self, update: Any) -> SessionConfig:
        config = self._config.merged(update, known_voices=AnyVoice())
        return in_force(config, self._hub.default_config)

    def _respond(self, event: wire.ResponseCreate, now_s: float) -> None:
        message = "This model decides by itself when it speaks; it cannot be asked for a response."
        raise WireError(UNSUPPORTED, message, "type")

    def _cancel(self, response_id: str | None, now_s: float) -> None:
        current = self._stretches.response_id if self._stretches.item else None
        if current is None or response_id not in (None, current):
            message = "There is no such response in progress."
            raise WireError("response_cancel_not_active", message)
        self._fall_silent(now_s)

    # What is being said (see `Session`).

    @property
    def _idle(self) -> bool:
        return self._stretches.item is None

    def _is_said(self, item_id: str) -> bool:
        item = self._stretches.item
        return item is not None and item.id == item_id

    def _played(self, item_id: str, played_samples: int, now_s: float) -> None:
        self._stretches.played(item_id, played_samples)

    def _fall_silent(self, now_s: float, reason: StopReason = "client_cancelled") -> None:
        self._stretches.cancel(reason)

    def _not_sent(self, samples: int) -> None:
        self._hub.metrics.audio_skipped("client_behind", samples)

    # To and from the model.

    def _take(self, audio: Samples) -> None:
        limit = round(self._hub.options.max_backlog_s * RATE_HZ)
        if self._intake.received + len(audio) - self._heard > limit:
            raise BacklogFull
        start_sample = self._intake.received
        super()._take(audio)
        try:
            self._stages.attend(AudioIn(self.ticket, audio, start_sample))
        except Overloaded:
            raise WireError(*OVERLOADED) from None

    def _receive(self, message: Message) -> None:
        match message:
            case Uttered():
                self._heard = message.heard_sample
                self._stretches.uttered(message)
                if self._draining:
                    self._settle()
            case Skipped():
                self._skipped(message)
            case Failed(_, stage, code, text) if stage.startswith("duplex"):
                self._out.send(wire.error(code, text, kind="server_error"))
                self.close(1013 if code == "session_limit_reached" else 1011, code)
            case _:
                super()._receive(message)

    def _skipped(self, message: Skipped) -> None:
        """Tell the client, once a second at most."""
        now_s = self._clock.time()
        if now_s < self._told_s + 1.0:
            return
        self._told_s = now_s
        if message.reason == "late":
            text = "Audio came too late and was passed over: send it in real time."
            self._out.send(wire.error("input_audio_late", text))
        else:
            text = "The server is too slow at the moment; some audio was passed over."
            self._out.send(wire.error("server_overloaded", text, kind="server_error"))


def in_force(config: SessionConfig, default: SessionConfig) -> SessionConfig:
    """What of a configuration this model can do. Raises `WireError` for what it must not ignore."""
    if config.output_modality != "audio":
        message = "This model has no text: 'output_modalities' can only be ['audio']."
        raise WireError(UNSUPPORTED, message, "session.output_modalities")
    if config.turn_detection is None:
        message = "This model hears all that is said: turn detection cannot be switched off."
        raise WireError(UNSUPPORTED, message, "session.audio.input.turn_detection")
    detection = dataclasses.replace(
        config.turn_detection, create_response=False, interrupt_response=False
    )
    transcription = config.transcription if default.transcription is not None else None
    return dataclasses.replace(
        config,
        voice=default.voice,
        speed=1.0,
        turn_detection=detection,
        transcription=transcription,
    )
