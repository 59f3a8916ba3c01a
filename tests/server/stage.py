"""One client of one server in virtual time: the real session, scripted stages."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from handlers.audio import to_pcm16
from handlers.messages import RATE_HZ
from server.brains import Cascade
from server.config import ServerVad, SessionConfig
from server.hub import Hub
from server.metrics import Metrics
from server.options import ServerOptions
from server.session import Session
from server.turns import TurnSettings
from tests.fakes import RecordingOutbox, ScriptedStages, VirtualClock, tone

FRAME_S = 0.02


def fake_config() -> SessionConfig:
    vad = ServerVad(silence_duration_ms=320)
    return SessionConfig(
        model="parley",
        voice="alloy",
        turn_detection=vad,
        server_vad=vad,
        transcription={"model": "fake"},
    )


class Stage:
    """One client of one server, driven in virtual time."""

    def __init__(self, **options: Any) -> None:
        self.clock = VirtualClock()
        self.stages = ScriptedStages(self.clock)
        self.metrics = Metrics()
        self.hub = Hub(
            ServerOptions(**options),
            TurnSettings(),
            fake_config(),
            self.stages,
            self.metrics,
            self.clock,
            Cascade(),
        )
        self.out = RecordingOutbox()
        self.session = Session(self.hub, self.out)
        self.hub.enter(self.session)
        self.session.start()

    def send(self, kind: str, **fields: Any) -> None:
        self.session.receive_text(json.dumps({"type": kind, **fields}))

    def hear(self, seconds: float, voiced: bool) -> None:
        for _ in range(round(seconds / FRAME_S)):
            samples = tone(FRAME_S) if voiced else np.zeros(round(FRAME_S * RATE_HZ), np.float32)
            self.session.receive_audio(to_pcm16(samples))
            self.clock.advance(FRAME_S)

    def speech(self, seconds: float) -> None:
        self.hear(seconds, True)

    def silence(self, seconds: float) -> None:
        self.hear(seconds, False)

    def take(self) -> list[str]:
        """Types of the events since the last call."""
        types = self.out.types
        self.out.events.clear()
        return types

    @property
    def history(self) -> list[tuple[str, str]]:
        """What the LM was last asked."""
        return [(m.role, m.content) for m in self.stages.asked[-1].messages]
