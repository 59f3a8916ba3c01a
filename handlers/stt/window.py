"""An utterance as a recogniser that takes whole audio gets to hear it, and what it may be trusted.

Pure: no model, no thread, no clock.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

import numpy as np

from handlers.lm.numbers import in_words
from handlers.messages import EAR_RATE_HZ, Samples

WINDOW_SAMPLES = 24 * EAR_RATE_HZ
"""Heard again and again as it grows; Whisper takes 30 s. What is longer is cut at a pause."""
EARLIEST_CUT = 0.5
TAIL_SAMPLES = EAR_RATE_HZ
"""A cut falls into the second half of the window, but not into its last second."""
PAUSE_SAMPLES = EAR_RATE_HZ // 10
STEP_SAMPLES = EAR_RATE_HZ // 100

SILENCE = 10 ** (-60 / 20)
"""RMS of the loudest 30 ms below which there is nothing to recognise: full scale less 60 dB."""
FRAME_SAMPLES = 3 * EAR_RATE_HZ // 100
SHORTEST_SAMPLES = EAR_RATE_HZ // 10
NO_SPEECH = 0.6
UNLIKELY = -1.0
"""Whisper's own rule: nothing was said if its no-speech probability is above the one and the mean
log probability of the text's tokens below the other (Radford et al. 2022, section 4.5)."""
REPETITIVE = 2.4
"""Compression ratio above which the same rule takes a text for one that goes in circles."""
PHRASE_WORDS = 12
REPEATS = 3


@dataclass(slots=True, eq=False)
class Section:
    """A stretch of an utterance. Its samples go when it is closed and has its text."""

    samples: Samples  # [T] at EAR_RATE_HZ
    text: str | None = None


class Window:
    """The sections of an utterance: closed ones, and the last that grows."""

    def __init__(self, limit_samples: int = WINDOW_SAMPLES) -> None:
        self._limit = limit_samples
        self._closed: list[Section] = []
        self._pieces: list[Samples] = []
        self._length = 0
        self._last = Section(np.zeros(0, np.float32), "")  # what was heard of the growing one
        self._recognised = 0  # samples of the utterance before its last hypothesis

        self.heard = 0  # samples of the utterance

    def push(self, samples: Samples) -> None:
        self._pieces.append(samples)
        self._length += len(samples)
        self.heard += len(samples)
        while self._length >= self._limit:
            audio = self._joined()
            at = quietest(audio[: self._limit])
            self._closed.append(Section(audio[:at].copy()))
            self._pieces, self._length = [audio[at:].copy()], len(audio) - at
            self._last = Section(np.zeros(0, np.float32))

    @property
    def fresh(self) -> int:
        """Samples that came after the last hypothesis for the whole."""
        return self.heard - self._recognised

    def unheard(self) -> list[Section]:
        """The sections that need a text, so that `text` is that of everything up to now."""
        if len(self._last.samples) != self._length:
            self._last = Section(self._joined())
        return [section for section in (*self._closed, self._last) if section.text is None]

    def settle(self) -> str | None:
        """The text of everything up to now, if all of `unheard` have theirs."""
        for section in self._closed:
            if section.text is not None:
                section.samples = np.zeros(0, np.float32)
        texts = [section.text for section in (*self._closed, self._last)]
        if None in texts or len(self._last.samples) != self._length:
            return None
        self._recognised = self.heard
        return " ".join(text for text in texts if text)

    @property
    def kept_samples(self) -> int:
        return self._length + sum(len(section.samples) for section in self._closed)

    def _joined(self) -> Samples:
        if len(self._pieces) > 1:
            self._pieces = [np.concatenate(self._pieces)]
        return self._pieces[0] if self._pieces else np.zeros(0, np.float32)


def quietest(audio: Samples) -> int:
    """The middle of the quietest 100 ms where `audio` [T] may be cut."""
    first = round(len(audio) * EARLIEST_CUT)
    part = np.square(audio[first : max(first + PAUSE_SAMPLES, len(audio) - TAIL_SAMPLES)])
    sums = np.concatenate([[0.0], np.cumsum(part, dtype=np.float64)])
    power = sums[PAUSE_SAMPLES::STEP_SAMPLES] - sums[:-PAUSE_SAMPLES:STEP_SAMPLES]
    return first + int(np.argmin(power)) * STEP_SAMPLES + PAUSE_SAMPLES // 2


def is_silent(audio: Samples) -> bool:
    """Whether [T] holds nothing to recognise."""
    if len(audio) < SHORTEST_SAMPLES:
        return True
    frames = audio[: len(audio) // FRAME_SAMPLES * FRAME_SAMPLES].reshape(-1, FRAME_SAMPLES)
    return bool(np.sqrt(np.square(frames).mean(axis=1).max()) < SILENCE)


def unspoken(no_speech: float, mean_log_probability: float) -> bool:
    """Whether Whisper made up a text for audio without speech."""
    return no_speech > NO_SPEECH and mean_log_probability < UNLIKELY


def without_loops(text: str) -> str:
    """A text that goes in circles, with each circle once, or nothing of it; others as they are."""
    if not _repetitive(text):
        return text.strip()
    words, kept = text.split(), list[str]()
    while words:
        size, times = _circle(words)
        kept += words[:size]
        words = words[size * times :]
    cleared = " ".join(kept)
    return "" if _repetitive(cleared) else cleared


def _repetitive(text: str) -> bool:
    data = text.encode()
    return len(data) > REPETITIVE * len(zlib.compress(data))


def _circle(words: list[str]) -> tuple[int, int]:
    """(words, times) of the shortest phrase at the beginning that comes REPEATS times or more."""
    for size in range(1, min(PHRASE_WORDS, len(words) // REPEATS) + 1):
        times = 1
        while words[times * size : (times + 1) * size] == words[:size]:
            times += 1
        if times >= REPEATS:
            return size, times
    return 1, 1


def spoken(text: str) -> str:
    """The words as they are said: lower case, no punctuation, English numbers in words."""
    words = re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower().replace("’", "'"))
    return " ".join(map(_said, words))


def _said(digits: str) -> str:
    if not (digits.isascii() and digits.isdecimal()):
        return digits
    if len(digits) <= 3 and not digits.startswith("0"):
        return in_words(int(digits)).replace("-", " ")
    return " ".join(in_words(int(digit)) for digit in digits)
