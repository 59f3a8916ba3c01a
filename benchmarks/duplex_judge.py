"""An independent listener: PocketSphinx, limited to the words that a partner may say."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from handlers.audio import Resampler, to_pcm16
from handlers.messages import EAR_RATE_HZ, RATE_HZ, Samples
from models.parrot import domain

BACKCHANNEL_PRONUNCIATIONS = ("M HH AH M", "AH M HH AH M", "AH M HH EH M", "AH M HH M")
DECODING = {"wip": 1e-4, "silprob": 0.3, "fillprob": 1e-6, "bestpath": False}
"""Words are dear: the default hears some in the noise around a phrase. Silence is cheap, and there
is no second search over the lattice: that finds ends of no saying, "i" for "five"."""
PADDING_SAMPLES = EAR_RATE_HZ // 2
FLOOR = 1e-3
"""RMS of noise added, -60 dB full scale: the models have never heard digital silence."""


@dataclass(frozen=True, slots=True)
class Understood:
    """Of the words of an answer, how many were heard; wrong extra words take away from it."""

    right: int
    words: int

    @classmethod
    def of(cls, answer: str, heard: str) -> Understood:
        wanted = answer.split()
        return cls(max(0, len(wanted) - word_errors(wanted, heard.split())), len(wanted))


class Judge:
    """Hears any `words` one after another, or one of the `sayings` as a whole: loose, the short
    words of these are taken for one another ("four" for "are") in the original voice, too.

    Raises ModuleNotFoundError without pocketsphinx, ValueError for words it cannot spell.
    """

    def __init__(self, words: Iterable[str], sayings: Iterable[str] = ()) -> None:
        import pocketsphinx

        loose = sorted(set(words) - {domain.BACKCHANNEL})
        whole = sorted(set(sayings) - set(loose))
        vocabulary = sorted({word for saying in (*loose, *whole) for word in saying.split()})
        self._decoder: Any = pocketsphinx.Decoder(
            hmm=pocketsphinx.get_model_path("en-us/en-us"),
            dict=pocketsphinx.get_model_path("en-us/cmudict-en-us.dict"),
            lm=None,
            loglevel="FATAL",
            **DECODING,
        )
        unknown = [word for word in vocabulary if self._decoder.lookup_word(word) is None]
        if unknown:
            raise ValueError(f"no pronunciation for {', '.join(unknown)}")
        for index, phones in enumerate(BACKCHANNEL_PRONUNCIATIONS):
            name = domain.BACKCHANNEL if not index else f"{domain.BACKCHANNEL}({index + 1})"
            self._decoder.add_word(name, phones, True)
        self.rule = " | ".join((domain.BACKCHANNEL, f"({' | '.join(loose)})+", *whole))
        grammar = f"#JSGF V1.0; grammar g; public <g> = {self.rule};"
        self.settings = f"{self.rule} {DECODING}"
        self._decoder.add_jsgf_string("answers", grammar)
        self._decoder.activate_search("answers")

    def hear(self, samples: Samples) -> str:
        """What [T] at 24 kHz says: words, the backchannel, or nothing."""
        if not len(samples):
            return ""
        audio = Resampler(RATE_HZ, EAR_RATE_HZ, "HQ").push(samples, last=True)
        padded = np.pad(audio, PADDING_SAMPLES)
        floor = np.random.default_rng(0).standard_normal(len(padded)) * FLOOR
        self._decoder.start_utt()
        self._decoder.process_raw(to_pcm16((padded + floor).astype(np.float32)), False, True)
        self._decoder.end_utt()
        found = self._decoder.hyp()
        return str(found.hypstr) if found is not None else ""


class Hearings:
    """A `hear` that knows from a file what it was asked before; it is written at the end.

    `settings`: what else the answer depends on.
    """

    def __init__(self, hear: Callable[[Samples], str], settings: str, path: Path) -> None:
        self._hear, self._settings, self._path = hear, settings.encode(), path
        self._known: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}

    def __call__(self, samples: Samples) -> str:
        key = hashlib.blake2b(samples.tobytes() + self._settings, digest_size=16).hexdigest()
        if key not in self._known:
            self._known[key] = self._hear(samples)
        return self._known[key]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self._known))


def answer_words() -> set[str]:
    """All that the parrot may say, and what a sum is answered with."""
    sayings = (
        *domain.WORDS,
        *domain.NUMBERS,
        "plus is",
        *domain.QUESTIONS.values(),
        domain.LONG_TURN_REPLY,
    )
    return {word for saying in sayings for word in saying.split()}


CLOSED_ANSWERS = frozenset((*domain.QUESTIONS.values(), domain.LONG_TURN_REPLY))
"""What the parrot says besides phrases of `domain.WORDS`."""


def says(answer: str, heard: str) -> bool:
    """Whether the words of an answer stand in what was heard, one after the other."""
    wanted, words = answer.split(), heard.split()
    return any(words[i : i + len(wanted)] == wanted for i in range(len(words) - len(wanted) + 1))


def word_errors(wanted: Sequence[str], heard: Sequence[str]) -> int:
    """Words to be changed, left out or added, at least (Levenshtein)."""
    row = list(range(len(heard) + 1))
    for i, word in enumerate(wanted, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(heard, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (word != other))
    return row[-1]
