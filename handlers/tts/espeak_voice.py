"""eSpeak NG's voice: a text in, trimmed 24 kHz audio with word marks out, as it is made."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from handlers.audio import PCM16_SCALE, Resampler
from handlers.messages import RATE_HZ, Samples, WordMark
from handlers.tts import espeak_worker as worker

Emit = Callable[[Samples, tuple[WordMark, ...]], bool]
"""Takes [T] at RATE_HZ and the marks that end in it; False asks for no more."""

WPM_MIN, WPM_MAX = 80, 450  # eSpeak itself clamps to 80, and garbles above 450
GAP_WPM = 165  # the rate that the gaps below belong to
GAP_END_S, GAP_PAUSE_S, GAP_NONE_S = 0.28, 0.15, 0.05
"""Silence after a clause that ends with a full stop, with a comma, with no mark."""
AUDIBLE = 64 / PCM16_SCALE  # -54 dB full scale
FIRST_CHUNK_S, CHUNK_S = 0.05, 0.24
"""The first chunk is small so that it comes early, the rest larger so that they are few."""
PIECE_CHARS = 300
"""A longer text is spoken in pieces of this size, between which others may have their turn."""
PATIENCE_S = 5.0
"""For the next ~60 ms of audio, which takes well under 1 ms to make."""

Pcm = npt.NDArray[np.int16]
Words = list[tuple[int, int]]
"""(character, sample) at which each word starts, from the start of the piece."""


@dataclass(frozen=True, slots=True)
class Manner:
    voice: str  # a result of `EspeakVoice.find`
    wpm: int = GAP_WPM
    pitch: int = 50
    volume: int = 100


class SynthesizerError(Exception):
    """eSpeak crashed, hung or could not be started. The next text gets a new one."""


class EspeakVoice:
    """eSpeak in a process of its own, one text at a time. Not thread-safe; to be closed.

    Raises SynthesizerError if the process does not start.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", worker.__file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # eSpeak's grumbling
            )
        ours.settimeout(PATIENCE_S)
        self._socket, self._frames = ours, ours.makefile("rb")
        try:
            (length,) = worker.LENGTH.unpack(self._read(worker.LENGTH.size))
            hello = json.loads(self._read(length))
        except (OSError, EOFError) as error:
            self.close()
            raise SynthesizerError("eSpeak NG did not start; is espeakng-loader there?") from error
        self.rate_hz: int = hello["rate_hz"]
        self.languages: tuple[str, ...] = tuple(hello["languages"])
        self.variants: tuple[str, ...] = tuple(hello["variants"])

    def close(self) -> None:
        if self._process is not None:
            self._frames.close()
            self._socket.close()
            self._process.kill()
            self._process.wait()
            self._process = None

    def find(self, name: str) -> str | None:
        """eSpeak's own spelling of a `language` or `language+variant`; None if it has none."""
        language, plus, variant = name.lower().partition("+")
        languages = [known for known in self.languages if known.lower() == language]
        variants = [f"+{known}" for known in self.variants if known.lower() == variant]
        if not languages or (plus and not variants):
            return None
        return languages[0] + (variants[0] if plus else "")

    def stream(
        self, text: str, manner: Manner, emit: Emit, live: Callable[[], bool]
    ) -> Iterator[None]:
        """Speak `text` into `emit`, yielding between pieces. Stops mid-word when not `live`.

        All chunks of the text together begin with its first audible sample and end with a gap
        that fits its last mark. Marks count characters of `text` as it was given.
        Raises SynthesizerError.
        """
        plain = _UNSPEAKABLE.sub(" ", text)
        if not any(unicodedata.category(char)[0] in "LNS" for char in plain):
            return
        gap_s = _gap_s(plain) * GAP_WPM / max(manner.wpm, WPM_MIN)
        chunks = _Chunks(plain, self.rate_hz, gap_s, emit)
        for begin, end in _pieces(plain):
            if begin:
                yield
            chunks.begin_piece(begin)
            if not self._synthesize(plain[begin:end], manner, chunks.push, live):
                return
        chunks.finish()

    def _synthesize(
        self,
        text: str,
        manner: Manner,
        push: Callable[[Pcm, Words], bool],
        live: Callable[[], bool],
    ) -> bool:
        """Speak into `push`; False if it was stopped. After an error the process is gone."""
        if self._process is None:
            self._start()
        wanted = asdict(manner) | {"wpm": min(max(manner.wpm, WPM_MIN), WPM_MAX), "text": text}
        data = json.dumps(wanted).encode()
        going = True
        try:
            self._socket.sendall(worker.LENGTH.pack(len(data)) + data)
            while (frame := self._read_frame()) is not None:
                if going and not (live() and push(*frame)):
                    going = False
                    self._socket.sendall(worker.LENGTH.pack(0))
        except (OSError, EOFError) as error:
            self.close()
            raise SynthesizerError("eSpeak crashed or hung") from error
        except BaseException:
            self.close()
            raise
        return going

    def _read_frame(self) -> tuple[Pcm, Words] | None:
        kind, words, size = worker.FRAME.unpack(self._read(worker.FRAME.size))
        if kind == worker.END:
            return None
        starts = list(worker.WORD.iter_unpack(self._read(words * worker.WORD.size)))
        return np.frombuffer(self._read(size), "<i2"), starts

    def _read(self, size: int) -> bytes:
        data = self._frames.read(size)
        if len(data) < size:
            raise EOFError
        return data

    def speak(self, text: str, manner: Manner) -> Samples:
        """The whole audio of `text` at once, [T] at RATE_HZ; the same code as `stream`."""
        parts = [np.zeros(0, np.float32)]

        def keep(samples: Samples, marks: tuple[WordMark, ...]) -> bool:
            parts.append(samples)
            return True

        for _ in self.stream(text, manner, keep, live=lambda: True):
            pass
        return np.concatenate(parts)


# Text.

_UNSPEAKABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
"""Control characters, lone surrogates and non-characters; each becomes one space."""
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # kana, Han
)
_WORD = re.compile(f"[{_UNSPACED}]|[^\\s{_UNSPACED}]+")
"""A run without spaces; in scripts that are written without spaces, one character."""


def _gap_s(text: str) -> float:
    bare = text.rstrip(" \u00a0\u3000\"'”’»)]}」』")
    last = bare[-1:]
    if last and last in ".!?…。！？।؟۔":
        return GAP_END_S
    return GAP_PAUSE_S if last and last in ",;:–—-、，；：،؛" else GAP_NONE_S


def _pieces(text: str) -> Iterator[tuple[int, int]]:
    begin = 0
    while len(text) - begin > PIECE_CHARS:
        space = text.rfind(" ", begin + PIECE_CHARS // 2, begin + PIECE_CHARS)
        end = space + 1 if space > 0 else begin + PIECE_CHARS
        yield begin, end
        begin = end
    yield begin, len(text)


# Audio.


class _Chunks:
    """One text's audio on its way out: trimmed, resampled, cut into chunks, marked."""

    def __init__(self, text: str, rate_hz: int, gap_s: float, emit: Emit) -> None:
        self._text = text
        self._starts = [match.start() for match in _WORD.finditer(text)]
        self._emit = emit
        self._ratio = RATE_HZ / rate_hz
        self._resampler = Resampler(rate_hz, RATE_HZ, "HQ")
        self._gap = round(gap_s * rate_hz)
        self._target, self._target_max = round(FIRST_CHUNK_S * rate_hz), round(CHUNK_S * rate_hz)
        # Samples at the library's rate:
        self._fed = 0  # made so far
        self._trimmed = 0  # of these dropped before the first audible one
        self._waiting: list[Samples] = []  # to go with the next chunk
        self._waiting_samples = 0
        self._quiet: list[Samples] = []  # silence that may be the end
        # Where the piece and its words stand:
        self._piece_char = self._piece_sample = 0
        self._word = -1
        self._latest = 0
        self._marks: list[tuple[int, int]] = []  # where words end: character, sample made
        self._sent = 0  # samples at RATE_HZ
        self._open = True

    def begin_piece(self, char: int) -> None:
        self._piece_char, self._piece_sample = char, self._fed

    def push(self, pcm: Pcm, words: Words) -> bool:
        for char, sample in words:
            self._word_starts(self._piece_char + char, self._piece_sample + sample)
        audio = pcm.astype(np.float32) / np.float32(PCM16_SCALE)
        loud = np.flatnonzero(np.abs(audio) > AUDIBLE)
        first = self._trimmed == self._fed
        self._fed += len(audio)
        if not len(loud):
            if first:
                self._trimmed = self._fed
            else:
                self._quiet.append(audio)
            return self._open
        cut = int(loud[0]) if first else 0
        self._trimmed += cut
        end = int(loud[-1]) + 1
        self._wait(*self._quiet, audio[cut:end])
        self._quiet = [audio[end:]]
        if self._waiting_samples >= self._target:
            self._target = min(2 * self._target, self._target_max)
            self._send()
        return self._open

    def finish(self) -> None:
        if self._trimmed == self._fed:
            return  # nothing to be heard in it
        end = self._fed - sum(map(len, self._quiet))
        # A word without a sound may have begun in the silence that is cut off here.
        self._marks = [(char, min(sample, end)) for char, sample in self._marks]
        self._marks.append((len(self._text.rstrip()), end))
        tail = np.concatenate(self._quiet)[: self._gap]
        self._wait(tail, np.zeros(self._gap - len(tail), np.float32))
        self._send(last=True)

    def _wait(self, *audio: Samples) -> None:
        self._waiting.extend(audio)
        self._waiting_samples += sum(map(len, audio))

    def _send(self, last: bool = False) -> None:
        out = self._resampler.push(np.concatenate(self._waiting), last)
        self._waiting, self._waiting_samples = [], 0
        self._sent += len(out)
        marks = [WordMark(char, self._at(sample)) for char, sample in self._marks]
        due = tuple(mark for mark in marks if last or mark.end_sample <= self._sent)
        self._marks = self._marks[len(due) :]
        if len(out):
            self._open = self._emit(out, due)

    def _word_starts(self, char: int, sample: int) -> None:
        word = bisect_right(self._starts, char) - 1
        if word <= self._word:
            return  # a number or a name that is spoken as several words
        if self._word >= 0:
            char_end = len(self._text[: self._starts[word]].rstrip())
            # Where eSpeak changes languages, its word events may step back a little.
            self._latest = max(self._latest, sample)
            self._marks.append((char_end, self._latest))
        self._word = word

    def _at(self, sample: int) -> int:
        """The place in what is emitted, at RATE_HZ."""
        return round(max(sample - self._trimmed, 0) * self._ratio)
