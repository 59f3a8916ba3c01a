"""Speech recognisers that take whole audio, made to stream, for all sessions at once.

Every utterance is heard again as it grows. All that waits is one batch: final texts first, and
only then partial ones. Nothing queues up: what is heard is chosen when the model is free. Where it
is slow, partial texts come more rarely: behind one, twice as much audio must come as it took time,
so that the model is free two thirds of the time when a final text is asked for.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from handlers.base import Emit, Handler, Observer, StageError
from handlers.messages import EAR_RATE_HZ, Conclude, Heard, Message, Samples, Transcript
from handlers.options import option
from handlers.stt.decoding import end_probability
from handlers.stt.window import (
    WINDOW_SAMPLES,
    Section,
    Window,
    is_silent,
    spoken,
    without_loops,
)
from handlers.ticket import Ticket
from models.common.errors import first_line

log = logging.getLogger(__name__)

BACKLOG_SAMPLES = 130 * EAR_RATE_HZ
"""Kept per utterance; more than the longest turn, so only a recogniser that hangs gets here."""
OUT_OF_MEMORY = StageError("stt_out_of_memory", "There is too little memory to recognise this.")
OVERLOADED = StageError("stt_overloaded", "Speech recognition has fallen too far behind.")


END_MARKS = {"?": 2.0, ",": 0.5}
"""How much likelier a sentence ends where its text does so with that mark, for models that write
marks by what they have heard. Over 23 draws of 33 turns (eSpeak's, heard by Moonshine) the endpoint
policy told ends from pauses with an area under the curve of 0.888 instead of 0.884, and cut into
1.2 turns of 33 instead of 1.4. A full stop says nothing: half of all pauses get one too."""

REST = 2.0
SPARE_TOKENS = 16
TOKENS_PER_S = 30
"""No speech has more: English has about five, scripts that are spelled in bytes under twenty."""


@dataclass(frozen=True)
class StreamingOptions:
    model_name: str = option("", "a model on the hub, or a folder", "stt_model_name")
    language: str = option("", "language spoken, e.g. de (empty: detected)", "stt_language")
    partial_s: float = option(0.5, "new audio between partial texts (s)", "stt_partial_s")
    max_batch: int = option(16, "utterances recognised at a time", "stt_max_batch")
    gen: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={"help": "passed to the model's generate", "prefix": "--stt_gen_"},
    )


@dataclass(frozen=True, slots=True)
class Row:
    """What one row of a batch is to recognise."""

    samples: Samples  # [T] at EAR_RATE_HZ
    language: str | None  # ISO 639; None: to be detected
    draft: tuple[int, ...] = ()  # the `tokens` of the last text of less of this audio


@dataclass(frozen=True, slots=True)
class Hypothesis:
    text: str
    language: str | None  # ISO 639, where it is known
    tokens: tuple[int, ...] = ()  # a draft for the next text, where the model can use one


Abandoned = Callable[[], list[bool]]
"""Of which rows nobody wants to know any more; may be asked at every step."""


@dataclass(slots=True, eq=False)
class _Utterance:
    ticket: Ticket
    language: str | None
    window: Window
    draft: tuple[int, ...] = ()
    heard_in: str | None = None  # the language of the last hypothesis
    request: Conclude | None = None  # not yet answered
    partial: str = ""


@dataclass(slots=True, eq=False)
class _Job:
    utterance: _Utterance
    section: Section


class StreamingSTT(Handler[_Utterance]):
    """A subclass loads its model in `load` and recognises a batch in `recognise`.

    `Transcript.heard` is the text as turn-taking wants it, without case, punctuation or digits; its
    end probability is that of PocketSphinx's language model, for English, and `END_MARKS`.
    A row that fails, alone, fails its utterance as `stt_error`, `stt_out_of_memory` or by its own
    `StageError`. Batches that were too large for the memory are not made again.
    """

    stage: ClassVar[str] = "stt"
    requests: ClassVar[tuple[type, ...]] = (Conclude,)
    window_samples: ClassVar[int] = WINDOW_SAMPLES
    """Of so much or less the model makes a text at a time."""

    def __init__(
        self, options: StreamingOptions, *, emit: Emit, observer: Observer | None = None
    ) -> None:
        super().__init__(emit, observer=observer)
        self._language = language_code(options.language)
        self._partial_samples = round(options.partial_s * EAR_RATE_HZ)
        self._next_partial = self._partial_samples
        self._max_batch = options.max_batch
        self._at_work: dict[_Utterance, None] = {}  # in the order in which they came
        self._urgent = threading.Event()  # a final text has been asked for
        self.at_partial = False  # what is recognised now gives way to that
        self._clock = time.monotonic

    # What a recogniser overrides.

    def load(self) -> None:
        """Raises `StageError` with a message for whoever starts the server."""
        raise NotImplementedError

    def recognise(self, rows: Sequence[Row], abandoned: Abandoned) -> list[Hypothesis]:
        """Texts in the order of `rows`; those of abandoned ones may be cut short."""
        raise NotImplementedError

    def check_language(self, language: str) -> None:
        """Raises `StageError` where the model does not know it."""

    # The stage.

    def setup(self) -> None:
        import pocketsphinx

        self.load()
        if self._language is not None:
            self.check_language(self._language)
        self._logmath = pocketsphinx.LogMath()
        path = pocketsphinx.get_model_path("en-us/en-us.lm.bin")
        self._lm = pocketsphinx.NGramModel(pocketsphinx.Config(), self._logmath, path)

    def put(self, message: Message) -> None:
        if isinstance(message, Conclude):
            self._urgent.set()
        super().put(message)

    def open(self, ticket: Ticket) -> _Utterance:
        utterance = _Utterance(ticket, self._language, Window(self.window_samples))
        self._at_work[utterance] = None
        return utterance

    def close(self, ticket: Ticket, state: _Utterance) -> None:
        self._at_work.pop(state, None)

    def process(self, batch: Sequence[Message]) -> Iterable[Message]:
        self._urgent.clear()
        for message in batch:
            try:
                self._take_in(message)
            except Exception as error:
                self._fail(self.state(message.ticket), error)
        final = any(u.request for u in self._at_work if u.ticket.live)
        jobs = self._jobs(final)
        if jobs:
            began_s, self.at_partial = self._clock(), not final
            self._carry_out(jobs, final)
            if not final:
                took_s = self._clock() - began_s
                self._next_partial = max(self._partial_samples, round(REST * took_s * EAR_RATE_HZ))
        for utterance in list(self._at_work):
            self._tell(utterance)
        self.busy = any(self._wants(u, final) for u in self._at_work for final in (True, False))
        return ()

    def _take_in(self, message: Message) -> None:
        utterance = self.state(message.ticket)
        if utterance not in self._at_work:
            return  # it has failed before
        match message:
            case Heard(_, samples, language):
                if language is not None and (code := language_code(language)):
                    if code != utterance.language:
                        self.check_language(code)
                    utterance.language = code
                utterance.window.push(samples)
                if utterance.window.kept_samples > BACKLOG_SAMPLES:
                    raise OVERLOADED
            case Conclude():
                utterance.request = message

    # What is heard next.

    def _wants(self, utterance: _Utterance, final: bool) -> bool:
        if not utterance.ticket.live:
            return False
        if final:
            return utterance.request is not None
        return self._partial_samples > 0 and utterance.window.fresh >= self._next_partial

    def _jobs(self, final: bool) -> list[_Job]:
        jobs: list[_Job] = []
        for utterance in self._at_work:
            if self._wants(utterance, final):
                for section in utterance.window.unheard():
                    if is_silent(section.samples):
                        section.text = ""
                    elif len(jobs) < self._max_batch:
                        jobs.append(_Job(utterance, section))
        return jobs

    def _carry_out(self, jobs: list[_Job], final: bool) -> None:
        """Give the sections their texts. Where a batch fails, its halves are tried."""

        def abandoned() -> list[bool]:
            superseded = not final and self._urgent.is_set()
            return [superseded or not job.utterance.ticket.live for job in jobs]

        try:
            found = self.recognise([_row(job) for job in jobs], abandoned)
        except Exception as error:
            no_memory = _is_out_of_memory(error)
            if len(jobs) == 1:
                self._fail(jobs[0].utterance, OUT_OF_MEMORY if no_memory else error)
                return
            log.warning("stt: a batch of %d failed (%s)", len(jobs), type(error).__name__)
            half = len(jobs) // 2
            if no_memory:
                self._max_batch = half
            self._carry_out(jobs[:half], final)
            self._carry_out(jobs[half:], final)
            return
        for job, cut_short, hypothesis in zip(jobs, abandoned(), found, strict=True):
            if not cut_short:
                job.section.text = without_loops(hypothesis.text)
                job.utterance.heard_in = hypothesis.language
                job.utterance.draft = hypothesis.tokens

    def _tell(self, utterance: _Utterance) -> None:
        """Emit what is new."""
        window, request = utterance.window, utterance.request
        if request is None and not window.fresh:
            return
        text = window.settle()
        if text is None or not utterance.ticket.live:
            return
        words = spoken(text)
        if request is not None:
            utterance.request = None
            end = self.end_probability(text, utterance.heard_in)
            self.emit(
                Transcript(utterance.ticket, text, request.revision, end, request.prosody, words)
            )
        elif text != utterance.partial:
            utterance.partial = text
            self.emit(Transcript(utterance.ticket, text, heard=words))

    def end_probability(self, text: str, language: str | None) -> float | None:
        """P(the sentence ends with this text); None where nothing is known of the language."""
        if language != "en":
            return None
        found = end_probability(self._lm, self._logmath, spoken(text).split())
        return None if math.isnan(found) else found * END_MARKS.get(text[-1:], 1.0)

    def _fail(self, utterance: _Utterance, error: Exception) -> None:
        self._at_work.pop(utterance, None)
        self.emit(self._failure(utterance.ticket, error))


def most_tokens(row: Row) -> int:
    """What can be said in its time. A model that goes in circles is stopped there."""
    return SPARE_TOKENS + math.ceil(TOKENS_PER_S * len(row.samples) / EAR_RATE_HZ)


def unusable(message: str, cause: Exception | None = None) -> StageError:
    """For whoever starts the server."""
    if cause is not None:
        message = f"{message}: {first_line(cause)}"
    return StageError("stt_model_unusable", message)


def unknown_language(language: str, known: Collection[str]) -> StageError:
    message = f"The speech recogniser does not know the language {language[:16]!r}"
    only = "" if known else "; it knows English only"
    return StageError("stt_language_unknown", f"{message}{only}.")


def _is_out_of_memory(error: Exception) -> bool:
    """What torch, CTranslate2 and the system say."""
    told = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in told or "allocate memory" in told


def _row(job: _Job) -> Row:
    return Row(job.section.samples, job.utterance.language, job.utterance.draft)


def language_code(name: str) -> str | None:
    """`en` of "en-US"; None of nothing."""
    return name.strip().lower().replace("_", "-").partition("-")[0] or None
