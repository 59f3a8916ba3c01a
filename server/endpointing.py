"""How long to wait after the last voiced sample before a reply may be heard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from handlers.messages import Prosody


@dataclass(frozen=True, slots=True)
class Cues:
    text: str
    end_probability: float | None
    prosody: Prosody | None
    voiced_ms: float


class EndpointPolicy(Protocol):
    def hold_ms(self, cues: Cues) -> float: ...


@dataclass(frozen=True, slots=True)
class TextPolicySettings:
    finished_ms: float = 300.0
    unsure_ms: float = 700.0
    unfinished_ms: float = 1500.0


class TextPolicy:
    def __init__(self, settings: TextPolicySettings | None = None) -> None:
        self.settings = settings or TextPolicySettings()

    def hold_ms(self, cues: Cues) -> float:
        return self.settings.finished_ms
