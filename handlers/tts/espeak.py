"""The text-to-speech stage on eSpeak NG: clauses in, small chunks of 24 kHz audio out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from handlers.base import Emit, Handler, Observer, StageError
from handlers.messages import Message, Samples, Say, Speech, Spoken, WordMark
from handlers.options import option
from handlers.ticket import Ticket
from handlers.tts.espeak_voice import EspeakVoice, Manner, SynthesizerError

SPEED_MIN, SPEED_MAX = 0.25, 1.5  # the Realtime protocol's range

OPENAI_VARIANTS = {
    "alloy": "f2",
    "ash": "m3",
    "ballad": "edward",
    "cedar": "m6",
    "coral": "f5",
    "echo": "m1",
    "marin": "f4",
    "sage": "f3",
    "shimmer": "f1",
    "verse": "benjamin",
}
"""The voice names of stock Realtime clients, each a variant of the configured language."""

Clauses = deque[Iterator[None]]
"""A reply's clauses that wait; each iterator speaks one piece per step."""


@dataclass(frozen=True)
class EspeakOptions:
    voice: str = option("en-us+f2", "language, or language+variant, e.g. de+m3", "tts_voice")
    speed_wpm: int = option(165, "speaking rate (words per minute, 80-450)", "tts_speed_wpm")
    pitch: int = option(50, "base pitch (0-100; 50 is the voice's own)", "tts_pitch")
    volume: int = option(100, "loudness (0-200; above 100 it may clip)", "tts_volume")


class EspeakTTS(Handler[Clauses]):
    """Speaks the replies in turn, a clause of each, so that nobody waits behind a long one.

    `Say.voice` is one of `voices` or any other `language+variant` that eSpeak has; an unknown
    one fails as `unknown_voice`. `Say.speed` multiplies the rate within 0.25-1.5, but eSpeak's
    slowest is 80 words per minute. Text with nothing to speak gives `Spoken` alone.
    """

    stage: ClassVar[str] = "tts"
    requests: ClassVar[tuple[type, ...]] = (Say,)
    Options: ClassVar[type[EspeakOptions]] = EspeakOptions

    def __init__(
        self, options: EspeakOptions, *, emit: Emit, observer: Observer | None = None
    ) -> None:
        super().__init__(emit, observer=observer)
        self.options = options
        self.voices: tuple[str, ...] = tuple(OPENAI_VARIANTS)
        self.languages: dict[str, str] = {}
        self._turns: deque[Ticket] = deque()

    def setup(self) -> None:
        self._espeak = EspeakVoice()
        language = self.options.voice.partition("+")[0]
        self._named = {name: f"{language}+{v}" for name, v in OPENAI_VARIANTS.items()}
        own = self.options.voice  # the default, so it comes first, if only as the name it has
        first = () if self._resolve(None) == self._resolve("alloy") else (own,)
        ready = [f"{language}+{variant}" for variant in self._espeak.variants]
        named = (*first, *OPENAI_VARIANTS, *self._espeak.languages, *ready)
        self.voices = tuple(dict.fromkeys(named))
        self.languages = {
            name: self._named.get(name, name).partition("+")[0] for name in self.voices
        }

    def teardown(self) -> None:
        self._espeak.close()

    def open(self, ticket: Ticket) -> Clauses:
        return deque()

    def close(self, ticket: Ticket, state: Clauses) -> None:
        state.clear()

    def process(self, batch: Sequence[Message]) -> Iterable[Message]:
        for message in batch:
            assert isinstance(message, Say)
            clauses = self.state(message.ticket)
            if not clauses:
                self._turns.append(message.ticket)
            clauses.append(self._speak(message))
        if self._turns:
            self._turn(self._turns.popleft())
        self.busy = bool(self._turns)
        return ()

    def _turn(self, ticket: Ticket) -> None:
        if not ticket.live:
            return
        clauses = self.state(ticket)
        try:
            for _ in clauses[0]:
                break
            else:
                clauses.popleft()
        except SynthesizerError as error:
            clauses.clear()
            self.emit(self._failure(ticket, StageError("synthesizer_failed", str(error))))
        except Exception as error:
            clauses.clear()
            self.emit(self._failure(ticket, error))
        if clauses:
            self._turns.append(ticket)

    def _speak(self, say: Say) -> Iterator[None]:
        def emit(samples: Samples, marks: tuple[WordMark, ...]) -> bool:
            self.emit(Speech(say.ticket, say.index, samples, marks))
            return say.ticket.live

        speed = min(max(say.speed, SPEED_MIN), SPEED_MAX)
        manner = Manner(
            voice=self._resolve(say.voice),
            wpm=round(self.options.speed_wpm * speed),
            pitch=self.options.pitch,
            volume=self.options.volume,
        )
        yield from self._espeak.stream(say.text, manner, emit, lambda: say.ticket.live)
        self.emit(Spoken(say.ticket, say.index))

    def _resolve(self, voice: str | None) -> str:
        """eSpeak's name for the voice. Raises StageError `unknown_voice`."""
        name = self.options.voice if voice is None else self._named.get(voice, voice)
        found = self._espeak.find(name)
        if found is None:
            known = ", ".join([*OPENAI_VARIANTS, self.options.voice])
            raise StageError("unknown_voice", f"There is no such voice. Some that are: {known}.")
        return found
