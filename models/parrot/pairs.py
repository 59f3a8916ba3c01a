"""Training pairs for the codec: anybody's speech, and the agent saying the same at the same times.

The agent's rendering of the same text is stretched, phoneme by phoneme, onto the times of the
other voice; eSpeak tells both. T samples, M mel frames of 10 ms.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.common.mel import LogMel
from models.common.pitch import track_pitch
from models.parrot import domain
from models.parrot.speech import spelled
from models.parrot.synthesis import RATE_HZ, Speaker, Synthesizer, Utterance

HOP_SAMPLES = RATE_HZ // 100
SILENT = "_"
"""What eSpeak's names of silences begin with."""
LOWEST_HZ, HIGHEST_HZ = 150.0, 400.0
"""Of the agent's pitch."""
TONE_HOPS = (8, 20)
"""So many before and after the end of a stretch of speech carry the tone by which it ended."""
NO_TONE, GOES_ON, ENDS = range(3)


@dataclass(frozen=True, slots=True)
class Pair:
    speech: NDArray[np.float32]  # [T], somebody's
    mel: NDArray[np.float16]  # [M, bands], the agent's, on somebody's times
    pitch_hz: NDArray[np.float16]  # [M]
    voiced: NDArray[np.float16]  # [M]
    phonemes: NDArray[np.uint8]  # [M]
    tones: NDArray[np.uint8]  # [M]


class PairMaker:
    """Draws pairs; `names` lists the phonemes met so far, silence first."""

    def __init__(self, seed: int, synthesizer: Synthesizer, bands: int, *, test: bool) -> None:
        self.names: list[str] = [SILENT]
        self.dropped = 0  # the two voices pronounced differently
        self._source = random.Random(seed)
        self._synthesizer = synthesizer
        self._log_mel = LogMel(RATE_HZ, HOP_SAMPLES, 400, bands)
        self._test = test

    def draw(self) -> Pair:
        source = self._source
        while True:
            text = self._text()
            speaker = domain.draw_speaker(source, test=self._test)
            language = speaker.voice.partition("+")[0]
            agent = replace(domain.AGENT, voice=f"{language}+{domain.AGENT.voice.split('+')[1]}")
            if source.random() < 0.15:
                speaker = agent = domain.AGENT
            words = text.split()
            cut = source.randint(1, len(words) - 1) if len(words) > 1 else 0
            if source.random() < 0.6:
                cut = 0
            parts = [(" ".join(words[:cut]), GOES_ON)] if cut else []
            parts.append((" ".join(words[cut:]), ENDS if source.random() < 0.7 else GOES_ON))
            made = [self._part(part, tone, speaker, agent) for part, tone in parts]
            whole = [pair for pair in made if pair is not None]
            if len(whole) == len(made):
                return whole[0] if len(whole) == 1 else self._joined(whole[0], whole[1])
            self.dropped += 1

    def _text(self) -> str:
        roll = self._source.random()
        if roll < 0.7:
            return domain.draw_phrase(self._source, test=self._test)
        if roll < 0.85:
            return self._source.choice(list(domain.QUESTIONS))
        if roll < 0.95:
            return self._source.choice([*domain.QUESTIONS.values(), domain.LONG_TURN_REPLY])
        return domain.BACKCHANNEL

    def _part(self, text: str, tone: int, speaker: Speaker, agent: Speaker) -> Pair | None:
        """What goes on rises towards more or, every third time, is broken off in a sentence."""
        broken = tone == GOES_ON and self._source.random() < 1 / 3
        mark = "," if tone == GOES_ON and not broken else "."
        whole = f"{spelled(text)} {self._source.choice(domain.WORDS)}" if broken else spelled(text)
        said = self._synthesizer.say(speaker, whole + mark)
        wanted = self._synthesizer.say(agent, whole + mark)
        names, starts = _spoken(said)
        agent_names, agent_starts = _spoken(wanted)
        if names != agent_names or not names:
            return None
        # The speech ends with the last phoneme, or where the word begins that is left out.
        count = (said.words[-1] if broken else starts[-1]) // HOP_SAMPLES
        speech = said.samples[: count * HOP_SAMPLES]
        ends = (np.arange(count) + 1.0) * HOP_SAMPLES
        place = np.interp(ends, starts, agent_starts) / HOP_SAMPLES - 1  # in the agent's hops
        target = torch.from_numpy(
            wanted.samples[: len(wanted.samples) // HOP_SAMPLES * HOP_SAMPLES]
        )
        mel = self._log_mel(target[None])[0].numpy()  # [M', bands]
        pitch, voiced = agent_pitch(target)
        tones = np.full(count, NO_TONE, np.uint8)
        tones[-TONE_HOPS[0] :] = tone
        numbers = np.array([self._number(name) for name in names], np.uint8)
        at = np.searchsorted(starts, ends - HOP_SAMPLES / 2, side="right") - 1
        return Pair(
            speech,
            _read(mel, place).astype(np.float16),
            _read(pitch.numpy()[:, None], place)[:, 0].astype(np.float16),
            _read(voiced.numpy()[:, None], place)[:, 0].astype(np.float16),
            numbers[np.clip(at, 0, len(numbers) - 1)],
            tones,
        )

    def _number(self, name: str) -> int:
        if name not in self.names:
            self.names.append(name)
        return self.names.index(name)

    def _joined(self, first: Pair, second: Pair) -> Pair:
        hops = int(self._source.uniform(0.15, 0.8) * 100)
        bands = first.mel.shape[1]
        gap = Pair(
            np.zeros(hops * HOP_SAMPLES, np.float32),
            np.full((hops, bands), np.log(1e-5), np.float16),
            np.full(hops, first.pitch_hz[-1]),
            np.zeros(hops, np.float16),
            np.zeros(hops, np.uint8),
            np.where(np.arange(hops) < TONE_HOPS[1], GOES_ON, NO_TONE).astype(np.uint8),
        )
        pieces = (first, gap, second)
        return Pair(
            np.concatenate([p.speech for p in pieces]),
            np.concatenate([p.mel for p in pieces]),
            np.concatenate([p.pitch_hz for p in pieces]),
            np.concatenate([p.voiced for p in pieces]),
            np.concatenate([p.phonemes for p in pieces]),
            np.concatenate([p.tones for p in pieces]),
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """B rows of F frames; `speech` is as a microphone hears it, the rest is wanted of the agent."""

    speech: Tensor  # [B, T]
    mel: Tensor  # [B, M, bands]
    pitch_hz: Tensor  # [B, M]
    voiced: Tensor  # [B, M]
    phonemes: Tensor  # [B, M]
    tones: Tensor  # [B, M]


def stacked(pairs: Sequence[tuple[Pair, NDArray[np.float32], int]], hops: int) -> Batch:
    """Pairs as (pair, its heard audio [hops * HOP_SAMPLES], where it begins in hops)."""
    bands = pairs[0][0].mel.shape[1]
    count = len(pairs)
    mel = np.full((count, hops, bands), np.log(1e-5), np.float32)
    pitch = np.full((count, hops), 200.0, np.float32)
    voiced = np.zeros((count, hops), np.float32)
    phonemes, tones = np.zeros((2, count, hops), np.int64)
    for row, (pair, _, start) in enumerate(pairs):
        length = min(len(pair.tones), hops - start)
        span = slice(start, start + length)
        mel[row, span] = pair.mel[:length]
        pitch[row, span] = pair.pitch_hz[:length]
        voiced[row, span] = pair.voiced[:length]
        phonemes[row, span] = pair.phonemes[:length]
        tones[row, span] = pair.tones[:length]
        if length == len(pair.tones):
            tones[row, span.stop : span.stop + TONE_HOPS[1]] = pair.tones[-1]
    heard = np.stack([audio for _, audio, _ in pairs])
    return Batch(*map(torch.from_numpy, (heard, mel, pitch, voiced, phonemes, tones)))


def agent_pitch(samples: Tensor) -> tuple[Tensor, Tensor]:
    """The agent's speech [T] -> pitch (Hz) and voicing, [M] each."""
    return track_pitch(samples, RATE_HZ, HOP_SAMPLES, lowest_hz=LOWEST_HZ, highest_hz=HIGHEST_HZ)


def _spoken(utterance: Utterance) -> tuple[list[str], list[int]]:
    """The phonemes without the silences, and where each starts and the last one ends."""
    names, starts = [], []
    end = len(utterance.samples)
    for name, start in utterance.phonemes:
        if name.startswith(SILENT) or not name:
            end = start
            break
        names.append(name)
        starts.append(start)
    return names, [*starts, end]


def _read(table: NDArray[np.float32], place: NDArray[np.float64]) -> NDArray[np.float32]:
    """Rows of `table` [M', X] at fractional places [M], between rows in proportion."""
    place = np.clip(place, 0, len(table) - 1.001)
    below = place.astype(int)
    share = (place - below)[:, None]
    return np.asarray(table[below] * (1 - share) + table[below + 1] * share, np.float32)
