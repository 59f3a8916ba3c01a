"""VITS checkpoints (MMS-TTS in a thousand languages) as the TTS stage."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from handlers.audio import Resampler
from handlers.base import Emit, Handler, Observer, StageError
from handlers.messages import RATE_HZ, Message, Say, Speech, Spoken, WordMark
from handlers.options import option, wrong_compile_mode
from handlers.ticket import Ticket
from handlers.tts.vits_text import Reader, unusable
from models.common.errors import first_line, listed

if TYPE_CHECKING:
    from models.vits.synthesis import Clause, Latents

FIRST_CHUNK_S, CHUNK_S, GROWTH = 0.25, 1.5, 2
"""Each chunk is up to twice as long as the one before: the first comes early, and the frames that
the decoder sees for the sake of their neighbours are soon a small part."""
SPEED_MIN, SPEED_MAX = 0.25, 1.5  # the Realtime protocol's range
WARM_UP_FRAMES = 8


@dataclass(frozen=True)
class VitsOptions:
    model_name: str = option(
        "facebook/mms-tts-eng", "a model on the hub, or a folder", "tts_model_name"
    )
    device: str = option("auto", "cpu, cuda or mps", "tts_device")
    torch_dtype: str = option(
        "auto", "the decoder's: float32, float16 or bfloat16", "tts_torch_dtype"
    )
    compile_mode: str = option(
        "", "torch.compile mode: default, reduce-overhead or max-autotune", "tts_compile_mode"
    )
    voice: str = option("", "voice (empty: the checkpoint's first)", "tts_voice")
    speed: float = option(1.0, "speaking rate, times the checkpoint's own", "tts_speed")
    seed: int = option(0, "of the noise: equal seeds speak a clause equally", "tts_seed")
    max_batch: int = option(16, "clauses made at a time", "tts_max_batch")


@dataclass(slots=True)
class _Row:
    """A clause, and how far it has been sounded."""

    say: Say
    resampler: Resampler
    chunk: int  # frames that come next
    marks: deque[tuple[int, int]] = field(default_factory=deque)
    """(characters of the text, tokens) until the end of each word."""
    latents: Latents | None = None
    sounded: int = 0  # frames
    samples: int = 0  # at RATE_HZ, given out


Rows = deque[_Row]


class VitsTTS(Handler[Rows]):
    """Clauses in, chunks of 24 kHz audio out; the same for equal text, voice, speed and seed.

    The clauses that wait get their latents in one batch. Their sound is made in chunks, that reply
    first which has the least of its clause; chunks of equal length are one batch, except on a CPU,
    where that takes longer than one after the other. A chunk is decoded with all frames that have a
    part in it, so that the joins are where the whole clause would have them, to rounding.

    Fails as `unreadable_text` (a script that the voice doesn't know; text without letters or digits
    gives `Spoken` alone), `unknown_voice`, `out_of_memory`. `setup` raises StageError
    `tts_model_unusable`.
    """

    stage: ClassVar[str] = "tts"
    requests: ClassVar[tuple[type, ...]] = (Say,)
    Options: ClassVar[type[VitsOptions]] = VitsOptions

    def __init__(
        self, options: VitsOptions, *, emit: Emit, observer: Observer | None = None
    ) -> None:
        super().__init__(emit, observer=observer)
        self.options = options
        self.voices: tuple[str, ...] = ()
        self.languages: Mapping[str, str] = {}
        self._waiting: dict[Ticket, Rows] = {}

    # Loading.

    def setup(self) -> None:
        import torch

        from models.common.device import chosen_device

        o = self.options
        if wrong := wrong_compile_mode("tts_compile_mode", o.compile_mode):
            raise unusable(f"{wrong}.")
        self._reader = Reader(o.model_name)
        self._load(torch, chosen_device(o.device))
        language = self._reader.language
        count = self._model.speakers
        names = [f"speaker-{i}" for i in range(count)] if count > 1 else [language or "default"]
        self._speakers = {name: i for i, name in enumerate(names)}
        first = o.voice or names[0]
        if first not in self._speakers:
            raise unusable(f"--tts_voice is {first}; there are: {listed(names)}.")
        self.voices = tuple(dict.fromkeys((first, *names)))
        self.languages = dict.fromkeys(names, language) if language else {}
        try:
            self._warm_up()
        except Exception as error:
            raise unusable(f"{o.model_name} does not run: {first_line(error)}") from error

    def _load(self, torch: Any, device: str) -> None:
        from models.vits.synthesis import Clause, Vits

        o = self.options
        dtype = torch.float32
        if o.torch_dtype != "auto":
            dtype = getattr(torch, o.torch_dtype, None)
            if dtype not in (torch.float32, torch.float16, torch.bfloat16):
                found = f"--tts_torch_dtype is {o.torch_dtype}"
                raise unusable(f"{found}; it can be float32, float16 or bfloat16.")
        try:
            self._model = Vits.load(o.model_name, device, dtype)
        except Exception as error:
            reason = first_line(error)
            raise unusable(f"--tts_model_name {o.model_name} cannot be loaded: {reason}") from error
        if self._reader.size > (known := self._model.model.config.vocab_size):
            found = f"{self._reader.size} tokens for a vocabulary of {known}"
            raise unusable(f"{o.model_name} does not fit its tokenizer: {found}")
        self._out_of_memory: type[Exception] = torch.OutOfMemoryError
        self._clause = Clause
        self._together = 1 if device == "cpu" else o.max_batch
        frame_s = self._model.hop_samples / self._model.rate_hz
        self._first_frames = max(round(FIRST_CHUNK_S / frame_s), 1)
        self._chunk_frames = max(round(CHUNK_S / frame_s), 1)
        if o.compile_mode:
            self._model.compile(o.compile_mode)

    def _warm_up(self) -> None:
        """Everything once, and what is compiled with every length that clauses usually have."""
        (latents,) = self._model.plan([self._clause([0] * WARM_UP_FRAMES, seed=self.options.seed)])
        self._model.sound([(latents, 0, min(latents.length, WARM_UP_FRAMES))])
        if not self.options.compile_mode:
            return
        context = self._model.context_frames
        frames = latents.frames[:, :1].expand(-1, self._chunk_frames + 2 * context).contiguous()
        long = type(latents)(frames, (frames.shape[1],), 0)
        begin, chunk = 0, self._first_frames
        for _ in range(8):
            end = min(begin + chunk, long.length)
            window = (long, *self._window(long, begin, end, chunk))
            for rows in {1, min(2, self._together)}:  # one is a case of its own
                self._model.sound([window] * rows)
            begin, chunk = min(end, context), self._next(chunk)

    def _window(self, latents: Latents, begin: int, end: int, chunk: int) -> tuple[int, int]:
        """Compiled, a clause's last chunk takes as many frames as any: no new length."""
        least = 0
        if self.options.compile_mode:
            context = self._model.context_frames
            least = chunk + context + min(begin, context)
        return self._model.window(latents, begin, end, least)

    def _next(self, chunk: int) -> int:
        return min(chunk * GROWTH, self._chunk_frames)

    # Serving.

    def open(self, ticket: Ticket) -> Rows:
        rows = self._waiting[ticket] = deque()
        return rows

    def close(self, ticket: Ticket, state: Rows) -> None:
        state.clear()
        self._waiting.pop(ticket, None)

    def process(self, batch: Sequence[Message]) -> Iterable[Message]:
        for message in batch:
            assert isinstance(message, Say)
            resampler = Resampler(self._model.rate_hz, RATE_HZ)
            self.state(message.ticket).append(_Row(message, resampler, self._first_frames))
        begun = [row for row in self._heads() if row.latents is None][: self.options.max_batch]
        self._plan([(row, clause) for row in begun if (clause := self._begin(row))])
        ready = [row for row in self._heads() if row.latents is not None]
        if ready:
            self._sound(ready)
        self.busy = bool(self._heads())
        return ()

    def _heads(self) -> list[_Row]:
        """The clause of each reply whose turn it is."""
        return [rows[0] for ticket, rows in self._waiting.items() if rows and ticket.live]

    def _begin(self, row: _Row) -> Clause | None:
        """What the model is to speak; None: nothing, and that has been answered."""
        try:
            speaker = self._speaker(row.say.voice)
            tokens, marks = self._reader.read(row.say.text)
        except Exception as error:
            self._fail(row, error)
            return None
        if not tokens:
            self._done(row)
            return None
        row.marks.extend(marks)
        speed = self.options.speed * min(max(row.say.speed, SPEED_MIN), SPEED_MAX)
        return self._clause(tokens, speaker, speed, self.options.seed)

    def _speaker(self, voice: str | None) -> int:
        found = self._speakers.get(voice or self.voices[0])
        if found is None:
            message = f"There is no such voice. Those that there are: {listed(self.voices)}."
            raise StageError("unknown_voice", message)
        return found

    def _plan(self, rows: list[tuple[_Row, Clause]]) -> None:
        """Latents for all; where that fails, for each alone, so that it fails for its own only."""
        if not rows:
            return
        try:
            planned = self._model.plan([clause for _, clause in rows])
        except Exception as error:
            if len(rows) == 1:
                self._fail(rows[0][0], error)
                return
            for one in rows:
                self._plan([one])
            return
        for (row, _), latents in zip(rows, planned, strict=True):
            row.latents = latents

    def _sound(self, ready: list[_Row]) -> None:
        """The next chunk of the clause that has least, and with it others that fit."""
        ready.sort(key=lambda row: row.sounded)
        windows = [self._ahead(row) for row in ready]
        length = windows[0][2] - windows[0][1]
        chosen = [i for i, (_, first, last) in enumerate(windows) if last - first == length]
        self._sound_rows([(ready[i], windows[i]) for i in chosen[: self._together]])

    def _sound_rows(self, rows: list[tuple[_Row, tuple[Latents, int, int]]]) -> None:
        try:
            sound = self._model.sound([window for _, window in rows]).cpu().numpy()
        except Exception as error:
            if len(rows) == 1:
                self._fail(rows[0][0], error)
                return
            for one in rows:
                self._sound_rows([one])
            return
        hop = self._model.hop_samples
        for (row, (latents, first, _)), samples in zip(rows, sound, strict=True):
            end = min(row.sounded + row.chunk, latents.length)
            piece = samples[(row.sounded - first) * hop : (end - first) * hop]
            row.sounded, row.chunk = end, self._next(row.chunk)
            self._give(row, latents, row.resampler.push(piece, end == latents.length))

    def _ahead(self, row: _Row) -> tuple[Latents, int, int]:
        assert row.latents is not None
        end = min(row.sounded + row.chunk, row.latents.length)
        return (row.latents, *self._window(row.latents, row.sounded, end, row.chunk))

    def _give(self, row: _Row, latents: Latents, samples: Any) -> None:
        last = row.sounded == latents.length
        row.samples += len(samples)
        samples_per_frame = self._model.hop_samples * RATE_HZ / self._model.rate_hz
        marks = []
        while row.marks:
            char_end, tokens = row.marks[0]
            end_sample = round(latents.ends[tokens - 1] * samples_per_frame)
            if end_sample > row.samples and not last:
                break
            row.marks.popleft()
            marks.append(WordMark(char_end, min(end_sample, row.samples)))
        if len(samples) or marks:
            self.emit(Speech(row.say.ticket, row.say.index, samples, tuple(marks)))
        if last:
            self._done(row)

    def _done(self, row: _Row) -> None:
        self._waiting[row.say.ticket].popleft()
        self.emit(Spoken(row.say.ticket, row.say.index))

    def _fail(self, row: _Row, error: Exception) -> None:
        """The clause and those behind it are not spoken."""
        if isinstance(error, self._out_of_memory):
            error = StageError("out_of_memory", "There is not enough memory to speak this.")
        self._waiting[row.say.ticket].clear()
        self.emit(self._failure(row.say.ticket, error))
