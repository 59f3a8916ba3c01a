"""The one place that wires: which stages there are, how they are built and who feeds whom.

session ──AudioIn, Listen, Finish──▶ ear (VAD) ──Heard, Conclude──▶ STT
session ──Ask──▶ LM        session ──Say──▶ TTS
every stage ──results──▶ event loop ──▶ the ticket's session
"""

from __future__ import annotations

import asyncio
import importlib
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from handlers.base import Handler, Observer
from handlers.messages import Ask, AudioIn, Finish, Listen, Message, Retain, Say

STAGES: dict[str, dict[str, str]] = {
    "vad": {"silero": "handlers.vad.silero:SileroEar"},
    "stt": {"pocketsphinx": "handlers.stt.pocketsphinx:PocketSphinxSTT"},
    "lm": {"builtin": "handlers.lm.builtin:BuiltinLM"},
    "tts": {"espeak": "handlers.tts.espeak:EspeakTTS"},
}
"""stage → backend name → `module:class`. The module is imported only to build that backend
or to list its options; it must be light to import and load its libraries in `setup`."""


def backend(stage: str, name: str) -> type[Handler[Any]]:
    """The handler class of a backend. Its `Options` attribute is its options dataclass."""
    module, _, attribute = STAGES[stage][name].partition(":")
    found: type[Handler[Any]] = getattr(importlib.import_module(module), attribute)
    return found


class Outlet:
    """From any handler thread to the event loop, woken once for all that has gathered."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[Message] = deque()
        self._lock = threading.Lock()
        self._scheduled = False

    def __call__(self, message: Message) -> None:
        with self._lock:
            self._waiting.append(message)
            if self._scheduled:
                return
            self._scheduled = True
        try:
            self._loop.call_soon_threadsafe(self._drain)
        except RuntimeError:  # the loop has closed: the server is gone
            self._waiting.clear()

    def _drain(self) -> None:
        with self._lock:
            messages = list(self._waiting)
            self._waiting.clear()
            self._scheduled = False
        for message in messages:
            if message.ticket.live:
                message.ticket.sink.receive(message)


@dataclass(frozen=True)
class PipelineOptions:
    """Which backend serves each stage, and that backend's own `Options`."""

    backends: Mapping[str, str] = field(
        default_factory=lambda: {
            "vad": "silero",
            "stt": "pocketsphinx",
            "lm": "builtin",
            "tts": "espeak",
        }
    )
    options: Mapping[str, Any] = field(default_factory=dict)


class Pipeline:
    """The stages of the cascade, started once and shared by all sessions.

    `hear`, `ask` and `say` raise `handlers.base.Overloaded` when that stage cannot take more.
    """

    def __init__(
        self,
        choice: PipelineOptions,
        loop: asyncio.AbstractEventLoop,
        observer: Observer | None = None,
    ) -> None:
        emit = Outlet(loop)

        def build(stage: str, **links: Any) -> Handler[Any]:
            cls: Any = backend(stage, choice.backends[stage])
            options = choice.options.get(stage) or cls.Options()
            handler: Handler[Any] = cls(options, emit=emit, observer=observer, **links)
            return handler

        self.stt = build("stt")
        self.ear = build("vad", forward=self.stt.put)
        self.lm = build("lm")
        self.tts = build("tts")
        self._stages = (self.stt, self.ear, self.lm, self.tts)

    def start(self, timeout_s: float = 120.0) -> None:
        """Start all stages at once and wait until each has loaded. Raises what any raised."""
        for stage in self._stages:
            stage.start()
        for stage in self._stages:
            stage.wait_ready(timeout_s)

    def stop(self) -> None:
        for stage in self._stages:
            stage.stop()

    def hear(self, message: AudioIn | Retain | Listen | Finish) -> None:
        self.ear.put(message)

    def ask(self, message: Ask) -> None:
        self.lm.put(message)

    def say(self, message: Say) -> None:
        self.tts.put(message)

    @property
    def voices(self) -> tuple[str, ...]:
        """Names that `Say.voice` may hold."""
        names: tuple[str, ...] = getattr(self.tts, "voices", ())
        return names
