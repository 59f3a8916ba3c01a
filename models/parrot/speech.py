"""Spoken turns in parts, with the times of what can be heard, from `Synthesizer`.

eSpeak pads with silence and its state makes a text sound different after another one; here times
are those of the sound, and the agent's clips are always the same.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from models.parrot import domain
from models.parrot.synthesis import RATE_HZ, Speaker, Synthesizer, Utterance

Audio = NDArray[np.float32]

FADE_SAMPLES = RATE_HZ * 5 // 1000
"""At each edge, outside the audible part, so that a cut doesn't click."""
AUDIBLE_BELOW_PEAK = 0.01
PERSON_RMS = 0.05
"""Of a person's speech before any gain, -26 dBFS."""


@dataclass(frozen=True, slots=True)
class Clip:
    samples: Audio  # [T]
    first: int  # the first audible sample
    end: int  # the one behind the last audible sample
    words: tuple[tuple[str, int], ...] = ()
    """Each with the sample at which it starts; none where eSpeak ran words into one."""

    @property
    def audible(self) -> int:
        return self.end - self.first


def trimmed(samples: Audio, words: Iterable[tuple[str, int]] = ()) -> Clip:
    """[T] without its silent ends, the edges faded. Raises ValueError where all is silence."""
    samples = _faded(samples)  # what is cut from a sentence may begin with the end of a word
    level = np.abs(samples)
    heard = np.flatnonzero(level > AUDIBLE_BELOW_PEAK * level.max(initial=0))
    if not len(heard):
        raise ValueError("nothing to hear in it")
    first, end = int(heard[0]), int(heard[-1]) + 1
    before, behind = min(first, FADE_SAMPLES), min(len(samples) - end, FADE_SAMPLES)
    cut = _faded(samples[first - before : end + behind])
    moved = tuple((word, start - first + before) for word, start in words)
    return Clip(cut, before, len(cut) - behind, moved)


def _said(synthesizer: Synthesizer, speaker: Speaker, text: str, mark: str) -> Clip:
    utterance = synthesizer.say(speaker, spelled(text) + mark)
    return trimmed(utterance.samples, _timed(text, utterance))


def _timed(text: str, utterance: Utterance) -> tuple[tuple[str, int], ...]:
    words = text.split()
    if len(utterance.words) != len(words):
        return ()
    return tuple(zip(words, utterance.words, strict=True))


def _faded(samples: Audio) -> Audio:
    ramp = np.linspace(0, 1, FADE_SAMPLES, dtype=np.float32)[: len(samples)]
    faded = samples.copy()
    faded[: len(ramp)] *= ramp
    faded[len(faded) - len(ramp) :] *= ramp[::-1]
    return faded


@lru_cache(maxsize=512)
def agent_clip(text: str) -> Clip:
    """What the agent's voice makes of a text: the same whenever and wherever it is said."""
    with Synthesizer() as synthesizer:
        return _said(synthesizer, domain.AGENT, text, ".")


def spelled(text: str) -> str:
    return domain.SPELLINGS.get(text, text)


def say_parts(
    synthesizer: Synthesizer,
    speaker: Speaker,
    parts: Sequence[str],
    source: random.Random,
    *,
    cut_share: float,
    ending: str = ".",
) -> tuple[Clip, ...]:
    """A turn that is to have pauses between its parts; only the last part sounds finished.

    The others rise towards more, or, in `cut_share` of the turns, break off within one sentence.
    """
    clips: tuple[Clip, ...] = ()
    if len(parts) > 1 and source.random() < cut_share:
        clips = _broken_off(synthesizer, speaker, parts, ending)
    if not clips:
        marks = [*"," * (len(parts) - 1), ending]
        clips = tuple(
            _said(synthesizer, speaker, part, mark) for part, mark in zip(parts, marks, strict=True)
        )
    heard = np.concatenate([clip.samples[clip.first : clip.end] for clip in clips])
    gain = PERSON_RMS / np.sqrt(np.square(heard).mean())
    return tuple(replace(clip, samples=clip.samples * gain) for clip in clips)


def _broken_off(
    synthesizer: Synthesizer, speaker: Speaker, parts: Sequence[str], ending: str
) -> tuple[Clip, ...]:
    """One sentence taken apart between words; nothing where eSpeak runs words into one."""
    text = " ".join(parts)
    utterance = synthesizer.say(speaker, text + ending)
    words = _timed(text, utterance)
    if not words:
        return ()
    edges = np.cumsum([0, *(len(part.split()) for part in parts)])
    starts = [start for _, start in words] + [len(utterance.samples)]
    return tuple(
        trimmed(
            utterance.samples[starts[a] : starts[b]],
            [(word, start - starts[a]) for word, start in words[a:b]],
        )
        for a, b in pairwise(edges)
    )
