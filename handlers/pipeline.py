"""The one place that wires: which stages there are, how they are built and who feeds whom.

session ──AudioIn, Listen, Finish──▶ ear (VAD) ──Heard, Conclude──▶ STT, turn model
session ──Ask──▶ LM        session ──Say──▶ TTS
every stage ──results──▶ event loop ──▶ the ticket's session

The duplex brain has the ear and STT beside it, and in a process of its own
session ──Join, AudioIn──▶ chain (encoder, LM, decoder) ──Uttered──▶ session
"""

from __future__ import annotations

import asyncio
import importlib
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from handlers.base import Handler, Observer, Overloaded, named, start_all
from handlers.duplex.chain import DuplexChain
from handlers.duplex.options import DuplexObserver, ParrotOptions
from handlers.duplex.parts import Parts, check
from handlers.duplex.process import DuplexProcess
from handlers.messages import Ask, AudioIn, Finish, Join, Listen, Message, Retain, Say

LOAD_TIMEOUT_S = 1800.0
"""Downloads of several gigabytes included."""

STAGES: dict[str, dict[str, str]] = {
    "vad": {"silero": "handlers.vad.silero:SileroEar"},
    "stt": {
        "pocketsphinx": "handlers.stt.pocketsphinx:PocketSphinxSTT",
        "moonshine": "handlers.stt.moonshine:MoonshineSTT",
        "faster-whisper": "handlers.stt.faster_whisper:FasterWhisperSTT",
        "whisper": "handlers.stt.whisper:WhisperSTT",
        "openai": "handlers.stt.openai:OpenAISTT",
        "none": "handlers.stt.none:NoSTT",
    },
    "turn": {
        "none": "handlers.turn.none:NoTurnModel",
        "smart_turn": "handlers.turn.smart_turn:SmartTurn",
    },
    "lm": {
        "builtin": "handlers.lm.builtin:BuiltinLM",
        "openai": "handlers.lm.openai:OpenAILM",
        "transformers": "handlers.lm.transformers:TransformersLM",
        "vllm": "handlers.lm.vllm:VllmLM",
    },
    "tts": {
        "espeak": "handlers.tts.espeak:EspeakTTS",
        "openai": "handlers.tts.openai:OpenAITTS",
        "vits": "handlers.tts.vits:VitsTTS",
        "parler": "handlers.tts.parler:ParlerTTS",
    },
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
            "turn": "none",
            "lm": "builtin",
            "tts": "espeak",
        }
    )
    options: Mapping[str, Any] = field(default_factory=dict)
    brain: str = "cascade"


class _Stages:
    """Stages that start and stop together, an ear among them."""

    ear: Handler[Any]
    _all: tuple[Handler[Any], ...]

    def start(self, timeout_s: float = LOAD_TIMEOUT_S) -> None:
        """See `handlers.base.start_all`."""
        start_all(self._all, timeout_s)

    def stop(self) -> None:
        for stage in self._all:
            stage.stop()

    def hear(self, message: AudioIn | Retain | Listen | Finish) -> None:
        self.ear.put(message)


def _builder(choice: PipelineOptions, emit: Outlet, observer: Observer | None) -> Any:
    def build(stage: str, **links: Any) -> Handler[Any]:
        cls: Any = backend(stage, choice.backends[stage])
        options = choice.options.get(stage) or cls.Options()
        with named(stage):
            handler: Handler[Any] = cls(options, emit=emit, observer=observer, **links)
        return handler

    return build


class Pipeline(_Stages):
    """The stages of the cascade, started once and shared by all sessions.

    `hear`, `ask` and `say` raise `handlers.base.Overloaded` when that stage cannot take more.
    """

    def __init__(
        self,
        choice: PipelineOptions,
        loop: asyncio.AbstractEventLoop,
        observer: Observer | None = None,
    ) -> None:
        build = _builder(choice, Outlet(loop), observer)
        self.stt = build("stt")
        self._turn = () if choice.backends.get("turn", "none") == "none" else (build("turn"),)
        self._observer = observer
        self.ear = build("vad", forward=self._listen)
        self.lm = build("lm")
        self.tts = build("tts")
        self._all = (self.stt, *self._turn, self.ear, self.lm, self.tts)

    def _listen(self, message: Message) -> None:
        self.stt.put(message)
        for turn in self._turn:
            try:
                turn.put(message)
            except Overloaded:  # a cue the less; STT has it
                if self._observer is not None:
                    self._observer.failed(turn.stage)

    def ask(self, message: Ask) -> None:
        self.lm.put(message)

    def say(self, message: Say) -> None:
        self.tts.put(message)

    @property
    def voices(self) -> tuple[str, ...]:
        """Names that `Say.voice` may hold."""
        names: tuple[str, ...] = getattr(self.tts, "voices", ())
        return names

    @property
    def voice_languages(self) -> Mapping[str, str]:
        """Of `voices`, those whose language is known."""
        languages: Mapping[str, str] = getattr(self.tts, "languages", {})
        return languages


EAR_GATHER_S = 0.032
"""A window of the VAD. Where the ear only tells the client what it hears, one call is for all."""


class DuplexPipeline(_Stages):
    """The stages of the duplex brain, and an ear and STT beside it for what the client is told.

    `hear` and `attend` raise `handlers.base.Overloaded` when that stage cannot take more. With
    `parts` its stages are in this process, over these. Raises `CannotServe`.
    """

    voices = ("parrot",)
    voice_languages: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        choice: PipelineOptions,
        loop: asyncio.AbstractEventLoop,
        observer: DuplexObserver,
        parts: Parts | None = None,
    ) -> None:
        emit = Outlet(loop)
        options: ParrotOptions = choice.options["parrot"]
        build = _builder(choice, emit, observer)
        self.stt = build("stt")
        words = choice.backends["stt"] != "none"  # without them no pause is judged by the voice
        self.ear = build("vad", forward=self.stt.put, prosody=words, least_gather_s=EAR_GATHER_S)
        links: dict[str, Any] = {"emit": emit, "observer": observer}
        self._duplex: DuplexChain | DuplexProcess
        if parts is None:
            check(options)
            self._duplex = DuplexProcess(options, **links)
        else:
            self._duplex = DuplexChain(options, parts, **links)
        self._all = (self.stt, self.ear, self._duplex)

    def attend(self, message: Join | AudioIn) -> None:
        self._duplex.put(message)

    @property
    def overloaded(self) -> bool:
        """Ticks had to be skipped a moment ago."""
        return self._duplex.overloaded
