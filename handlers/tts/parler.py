"""Parler-TTS as the TTS stage: a voice by its description, many clauses spoken at once."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from handlers.audio import Resampler
from handlers.base import Emit, Handler, Observer, StageError
from handlers.messages import RATE_HZ, Message, Samples, Say, Speech, Spoken
from handlers.options import option
from handlers.ticket import Ticket

if TYPE_CHECKING:
    from models.parler.engine import ParlerEngine, Piece

log = logging.getLogger(__name__)

NAMED_VOICES = (
    "Laura,Gary,Jon,Lea,Karen,Rick,Brenda,David,Eileen,Jordan,Mike,Yann,Joy,James,Eric,Lauren,Rose,"
    "Will,Jason,Aaron,Naomie,Alisa,Patrick,Jerry,Tina,Jenna,Bill,Tom,Carol,Barbara,Rebecca,Anna,"
    "Bruce,Emily"
)
"""Whom the released v1 models know by name, and so sound alike from clause to clause."""
DESCRIPTION = (
    "{voice} speaks {pace} and slightly expressively, very close up, in a very clear recording "
    "without background noise."
)
PACES = {0.7: "very slowly", 0.9: "slightly slowly", 1.1: "at a moderate pace", 1.3: "quite fast"}
PACE_MAX = "very fast"
MAX_CLAUSE_STEPS = 1720
"""20 s at 86 frames a second; a clause is of 200 characters at most, about 12 s."""
FADE_S = 0.005
READABLE = 0.5
"""A text of which a greater share of tokens is unknown is in a script that the model can't read."""


@dataclass(frozen=True)
class ParlerOptions:
    model_name: str = option(
        "parler-tts/parler-tts-mini-v1", "a name on the hub, or a folder", "tts_model_name"
    )
    tokenizer_name: str = option(
        "",
        "tokenizer of the description, where the text has another (the text encoder's own name)",
        "tts_description_tokenizer",
    )
    device: str = option("cpu", "cpu, cuda, cuda:1, mps", "tts_device")
    torch_dtype: str = option("float32", "float32, bfloat16 or float16", "tts_torch_dtype")
    compile_mode: str = option(
        "",
        "torch.compile mode of the decoder's layers; on a CPU none is faster: weights are packed",
        "tts_compile_mode",
    )
    description: str = option(
        DESCRIPTION, "how the voice sounds; {voice} and {pace} are filled in", "description"
    )
    voice: str = option("Laura", "voice", "tts_voice")
    voices: str = option(
        NAMED_VOICES, "voices that a client may choose (comma-separated)", "tts_voices"
    )
    play_steps_s: float = option(0.5, "sound is sent every so much of it (s)", "play_steps_s")
    rows: int = option(8, "clauses spoken at once", "tts_rows")
    min_new_tokens: int | None = option(
        None, "least steps of a clause, 86 a second", "tts_gen_min_new_tokens"
    )
    max_new_tokens: int = option(
        MAX_CLAUSE_STEPS, "most steps of a clause, 86 a second", "tts_gen_max_new_tokens"
    )
    do_sample: bool | None = option(
        None, "draw codes rather than take the likeliest", "tts_gen_do_sample"
    )
    temperature: float | None = option(None, "of the draws", "tts_gen_temperature")
    top_k: int | None = option(None, "draw from so many of the likeliest", "tts_gen_top_k")
    top_p: float | None = option(
        None, "draw from the likeliest of this probability together", "tts_gen_top_p"
    )
    seed: int = option(0, "of the draws", "tts_gen_seed")


@dataclass(slots=True, eq=False)
class _Reply:
    """One ticket's clauses, spoken one after another."""

    ticket: Ticket
    clauses: deque[Say] = field(default_factory=deque)
    resampler: Resampler | None = None  # of the clause in a row; None: none is


class ParlerTTS(Handler[_Reply]):
    """Replies share the model's rows; one that finds none waits its turn for its next clause.

    `Say.voice` is one of `voices`, another fails as `unknown_voice`; `Say.speed` chooses words for
    the pace. Text that the tokenizer does not know fails as `unreadable_text`, one that is too long
    as `text_too_long`. No word marks: the session estimates words in proportion.
    """

    stage: ClassVar[str] = "tts"
    requests: ClassVar[tuple[type, ...]] = (Say,)
    Options: ClassVar[type[ParlerOptions]] = ParlerOptions

    def __init__(
        self, options: ParlerOptions, *, emit: Emit, observer: Observer | None = None
    ) -> None:
        super().__init__(emit, observer=observer)
        self.options = o = options
        others = (
            [name.strip() for name in o.voices.split(",")] if "{voice}" in o.description else []
        )
        self.voices: tuple[str, ...] = tuple(dict.fromkeys((o.voice, *filter(None, others))))
        self._waiting: deque[_Reply] = deque()

    def setup(self) -> None:
        from transformers import AutoTokenizer

        from models.common.errors import ModelError

        o = self.options
        try:
            self._engine, encoder = _engine(o)
            self._prompts = AutoTokenizer.from_pretrained(o.model_name)
            self._descriptions = self._prompts
            if o.tokenizer_name or encoder:
                self._descriptions = AutoTokenizer.from_pretrained(o.tokenizer_name or encoder)
        except (OSError, ModelError) as error:
            raise StageError("tts_model", f"--tts_model_name {o.model_name}: {error}") from error

    def open(self, ticket: Ticket) -> _Reply:
        return _Reply(ticket)

    def close(self, ticket: Ticket, state: _Reply) -> None:
        self._engine.close(state)
        state.clauses.clear()
        state.resampler = None

    def process(self, batch: Sequence[Message]) -> Iterable[Message]:
        for message in batch:
            assert isinstance(message, Say)
            reply = self.state(message.ticket)
            reply.clauses.append(message)
            if len(reply.clauses) == 1:
                self._waiting.append(reply)
        self._fill_rows()
        try:
            pieces = self._engine.step()
        except Exception as error:
            self._fail_rows(error)
            pieces = []
        for piece in pieces:
            yield from self._pass(piece)
        self.busy = self._engine.at_work or bool(self._waiting)

    def _fill_rows(self) -> None:
        while self._waiting and self._engine.free_rows:
            reply = self._waiting.popleft()
            if not reply.ticket.live:
                continue
            try:
                self._begin(reply, reply.clauses[0])
            except Exception as error:
                reply.clauses.clear()
                self.emit(self._failure(reply.ticket, error))

    def _fail_rows(self, error: Exception) -> None:
        """None of the clauses that are being spoken can go on; those to come may."""
        from models.common.device import is_out_of_memory

        if is_out_of_memory(error):
            error = StageError("tts_out_of_memory", "There is no memory left to speak with.")
        for reply in self._engine.sessions:
            self._engine.close(reply)
            reply.clauses.clear()
            reply.resampler = None
            self.emit(self._failure(reply.ticket, error))

    def _begin(self, reply: _Reply, say: Say) -> None:
        """Raises `StageError`."""
        from models.parler.engine import TooLong

        if not any(char.isalnum() for char in say.text):
            self.emit(Spoken(say.ticket, say.index))
            self._next(reply)
            return
        prompt = self._prompts(say.text).input_ids
        unknown = prompt.count(self._prompts.unk_token_id)
        if unknown > READABLE * len(prompt):
            raise StageError("unreadable_text", "The voice cannot read this script.")
        description = self._descriptions(self._description(say)).input_ids
        try:
            self._engine.open(reply, description, prompt, seed=self.options.seed + say.index)
        except TooLong as error:
            raise StageError("text_too_long", "The text is too long for the voice.") from error
        reply.resampler = Resampler(self._engine.rate_hz, RATE_HZ, "HQ")

    def _pass(self, piece: Piece) -> Iterator[Message]:
        reply = piece.session
        assert isinstance(reply, _Reply)
        if not reply.ticket.live:
            return
        assert reply.resampler is not None
        say = reply.clauses[0]
        samples = piece.samples.numpy().astype(np.float32)
        if piece.last:
            samples = _faded(samples, round(FADE_S * self._engine.rate_hz))
        samples = reply.resampler.push(samples, piece.last)
        if len(samples):
            yield Speech(say.ticket, say.index, samples)
        if piece.last:
            reply.resampler = None
            yield Spoken(say.ticket, say.index)
            self._next(reply)

    def _next(self, reply: _Reply) -> None:
        reply.clauses.popleft()
        if reply.clauses:
            self._waiting.append(reply)

    def _description(self, say: Say) -> str:
        """Raises StageError `unknown_voice`."""
        voice = say.voice or self.options.voice
        if voice not in self.voices:
            known = ", ".join(self.voices)
            raise StageError("unknown_voice", f"There is no such voice. These are: {known}.")
        pace = next((words for most, words in PACES.items() if say.speed <= most), PACE_MAX)
        return self.options.description.replace("{voice}", voice).replace("{pace}", pace)


def _faded(samples: Samples, over: int) -> Samples:
    """A clause that was broken off at the greatest length ends without a click."""
    over = min(over, len(samples))
    gain = np.ones(len(samples), np.float32)
    gain[len(samples) - over :] = np.linspace(1, 0, over, dtype=np.float32)
    return samples * gain


def _engine(o: ParlerOptions) -> tuple[ParlerEngine, str | None]:
    """And the name of the description's tokenizer, if that is another than the text's.

    Raises `ModelError`, `OSError`.
    """
    from models.common.errors import ConfigError
    from models.parler.engine import fitting
    from models.parler.loading import load

    model, generation = load(o.model_name, dtype=o.torch_dtype, device=o.device)
    generation = generation.changed(
        max_length=o.max_new_tokens + 1,
        min_new_tokens=o.min_new_tokens,
        do_sample=o.do_sample,
        temperature=o.temperature,
        top_k=o.top_k,
        top_p=o.top_p,
    )
    codec, text = model.config.codec, model.config.text_encoder
    play_steps = round(o.play_steps_s * codec.sampling_rate / codec.hop_length)
    if play_steps < 1:
        raise ConfigError(f"--play_steps_s {o.play_steps_s} is less than a step")
    engine = fitting(model, generation, o.rows, play_steps=play_steps, compile_mode=o.compile_mode)
    if engine.rows < o.rows:
        log.warning("memory for %d rows of --tts_rows %d", engine.rows, o.rows)
    other = model.config.vocab_size != text.vocab_size
    return engine, getattr(text, "_name_or_path", None) if other else None
