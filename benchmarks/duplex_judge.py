"""An independent listener: PocketSphinx, limited to the words that a partner may say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from handlers.audio import Resampler, to_pcm16
from handlers.messages import EAR_RATE_HZ, RATE_HZ, Samples
from models.parrot import domain

BACKCHANNEL_PRONUNCIATIONS = ("M HH AH M", "AH M HH AH M", "AH M HH EH M", "AH M HH M")
WORD_INSERTION = 1e-4
"""Probability of one more word; the default hears words in the noise around a phrase."""
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
    """Raises ModuleNotFoundError without pocketsphinx, ValueError for words it cannot spell."""

    def __init__(self, words: Iterable[str]) -> None:
        import pocketsphinx

        vocabulary = sorted(set(words) - {domain.BACKCHANNEL})
        self._decoder: Any = pocketsphinx.Decoder(
            hmm=pocketsphinx.get_model_path("en-us/en-us"),
            dict=pocketsphinx.get_model_path("en-us/cmudict-en-us.dict"),
            lm=None,
            wip=WORD_INSERTION,
            loglevel="FATAL",
        )
        unknown = [word for word in vocabulary if self._decoder.lookup_word(word) is None]
        if unknown:
            raise ValueError(f"no pronunciation for {', '.join(unknown)}")
        for index, phones in enumerate(BACKCHANNEL_PRONUNCIATIONS):
            name = domain.BACKCHANNEL if not index else f"{domain.BACKCHANNEL}({index + 1})"
            self._decoder.add_word(name, phones, True)
        rule = f"{domain.BACKCHANNEL} | ({' | '.join(vocabulary)})+"
        self._decoder.add_jsgf_string("answers", f"#JSGF V1.0; grammar g; public <g> = {rule};")
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
