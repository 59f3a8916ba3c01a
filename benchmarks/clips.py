"""Test clips: spoken turns with known ends and known pauses, made by eSpeak NG or recorded.

The same seed gives the same clips; another seed gives other phrases in other voices, rooms and
levels. `python -m benchmarks.clips --out DIR` writes them as WAV files with one `clips.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from benchmarks.phrases import INTERRUPTIONS, SHORT_TURNS, TURNS
from handlers.audio import Resampler, from_pcm16, to_pcm16
from handlers.messages import RATE_HZ, Samples
from models.parrot.synthesis import Speaker, Synthesizer

Kind: TypeAlias = Literal["plain", "hesitation", "phrase", "parts", "recorded", "speech", "noise"]
"""How a clip pauses: not at all, between two words of one breath, at a comma, or between two
parts that were spoken as separate sentences (so that the first one falls, the hardest case).
`speech` and `noise` are interruptions: words, and sounds that are none."""

FRAME_SAMPLES = RATE_HZ // 100
VOICED_BELOW_PEAK_DB = 40.0
VOICED_ABOVE_FLOOR_DB = 12.0
PAUSE_S = (0.25, 0.60)
SPLIT_S = 0.62
"""A recording is one turn as long as it pauses for less than this."""
LANGUAGES = ("en-us", "en-us", "en-us", "en", "en-gb-x-rp")
_VARIANTS = (
    "m1 m2 m3 m4 m5 m6 m7 m8 f1 f2 f3 f4 f5 klatt klatt2 klatt3 Andy Annie Alicia Alex Lee adam "
    "linda steph steph2 steph3 Jacky Gene Gene2 Mike Reed Denis david edward michel victor travis "
    "paul robert sandro shelby belinda benjamin ian john max quincy rob zac caleb"
)
_ASKING = "what how why when where who which is are do does did can could would have any"
VARIANTS = _VARIANTS.split()
ASKING = frozenset(_ASKING.split())


@dataclass(frozen=True, slots=True)
class Pause:
    """Silence inside a turn: `[start_sample, end_sample)` at `RATE_HZ`."""

    start_sample: int
    end_sample: int
    text_before: str = ""  # what was said until then; empty if not known

    @property
    def duration_s(self) -> float:
        return (self.end_sample - self.start_sample) / RATE_HZ


@dataclass(frozen=True, slots=True)
class Clip:
    """One turn with room noise before and after it. Positions come from the clean speech."""

    name: str
    kind: Kind
    samples: Samples  # [T] at RATE_HZ
    text: str  # what is said; empty for recordings and noises
    onset_sample: int
    last_voiced_sample: int
    inner_pauses: tuple[Pause, ...] = ()
    voice: str = ""

    def described(self) -> dict[str, object]:
        """All fields but the audio, ready for JSON."""
        fields = dataclasses.fields(self)
        row = {f.name: getattr(self, f.name) for f in fields if f.name != "samples"}
        return row | {"inner_pauses": [dataclasses.asdict(p) for p in self.inner_pauses]}


def voiced_frames(speech: Samples, floor_db: float = -np.inf) -> npt.NDArray[np.bool_]:
    """Which 10 ms frames lie within 40 dB of the loudest one and 12 dB above the room."""
    levels = levels_db(speech)
    bar_db = max(levels.max() - VOICED_BELOW_PEAK_DB, floor_db + VOICED_ABOVE_FLOOR_DB)
    voiced: npt.NDArray[np.bool_] = levels > bar_db
    return voiced


def levels_db(speech: Samples) -> Samples:
    """RMS of each 10 ms frame in dB full scale."""
    frames = speech[: len(speech) // FRAME_SAMPLES * FRAME_SAMPLES].reshape(-1, FRAME_SAMPLES)
    levels: Samples = 10 * np.log10(np.mean(np.square(frames), axis=1) + 1e-12)
    return levels


def trimmed(speech: Samples, floor_db: float = -np.inf) -> Samples:
    """Speech without the silence around it."""
    where = np.flatnonzero(voiced_frames(speech, floor_db))
    return speech[where[0] * FRAME_SAMPLES : (where[-1] + 1) * FRAME_SAMPLES]


def silent_gaps(speech: Samples, shortest_s: float, floor_db: float = -np.inf) -> list[Pause]:
    """Silences of at least `shortest_s` between the first and the last voiced frame."""
    where = np.flatnonzero(voiced_frames(speech, floor_db))
    return [
        Pause(int(a + 1) * FRAME_SAMPLES, int(b) * FRAME_SAMPLES)
        for a, b in itertools.pairwise(where)
        if (b - a - 1) * FRAME_SAMPLES >= shortest_s * RATE_HZ
    ]


def make_clips(
    seed: int,
    count: int,
    *,
    phrases: Sequence[str] = TURNS,
    variants: Sequence[str] = VARIANTS,
    tail_s: float = 2.5,
) -> list[Clip]:
    """`count` turns: 4 of 7 with a pause inside, the others without, some of these very short."""
    with Synthesizer(RATE_HZ) as synthesizer:
        studio = Studio(random.Random(seed), synthesizer, variants, tail_s)
        order = studio.shuffled(phrases)
        kinds: tuple[Kind, ...] = (
            "parts",
            "plain",
            "phrase",
            "plain",
            "parts",
            "plain",
            "hesitation",
        )
        clips = []
        for index in range(count):
            kind = kinds[index % len(kinds)]
            phrase = order[index % len(order)]
            if index % 14 == 1:
                phrase = studio.random.choice(SHORT_TURNS)
            clips.append(studio.turn(f"{kind}-{seed}-{index:03d}", kind, phrase))
        return clips


def make_interruptions(seed: int, count: int) -> list[Clip]:
    """Barge-ins (`speech`) and coughs, knocks and "mm-hm" (`noise`), by turns."""
    with Synthesizer(RATE_HZ) as synthesizer:
        studio = Studio(random.Random(seed), synthesizer, VARIANTS, tail_s=2.5)
        return [
            studio.barge_in(f"speech-{seed}-{index:03d}")
            if index % 2 == 0
            else studio.noise(f"noise-{seed}-{index:03d}", index // 2)
            for index in range(count)
        ]


def recorded_clips(folder: Path, *, tail_s: float = 2.5) -> list[Clip]:
    """The turns in a folder of 16-bit mono WAV files, cut where they pause for long."""
    clips = []
    for path in sorted(folder.glob("*.wav")):
        recording = read_wav(path)
        floor_db = float(np.quantile(levels_db(recording), 0.05))
        room = np.float32(10 ** (floor_db / 20))
        cuts = silent_gaps(recording, SPLIT_S, floor_db)
        starts = [0, *(cut.end_sample for cut in cuts)]
        ends = [*(cut.start_sample for cut in cuts), len(recording)]
        rng = np.random.default_rng(0)
        before, after = (room * noise(rng, int(s * RATE_HZ)) for s in (0.5, tail_s))
        for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
            speech = trimmed(recording[start:end], floor_db)
            pauses = silent_gaps(speech, PAUSE_S[0], floor_db)
            name = f"{path.stem}-{index:02d}"
            clips.append(placed(name, "recorded", speech, pauses, before, after))
    return clips


def read_wav(path: Path) -> Samples:
    """A 16-bit mono WAV file at `RATE_HZ`. Raises ValueError for another format."""
    with wave.open(str(path)) as file:
        if file.getnchannels() != 1 or file.getsampwidth() != 2:
            raise ValueError(f"{path.name} is not 16-bit mono")
        samples = from_pcm16(file.readframes(file.getnframes()))
        return Resampler(file.getframerate(), RATE_HZ, "HQ").push(samples, last=True)


def write_wav(path: Path, samples: Samples) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE_HZ)
        file.writeframes(to_pcm16(samples))


def noise(rng: np.random.Generator, samples: int) -> Samples:
    """Room noise of RMS 1: falls with frequency, with a little mains hum."""
    white = rng.standard_normal(samples).astype(np.float32)
    smooth = np.convolve(white, np.exp(-np.arange(48) / 8.0), mode="same")
    hum = np.sin(2 * np.pi * 100.0 / RATE_HZ * np.arange(samples))
    mixed = smooth / smooth.std() + 0.3 * hum
    return np.asarray(mixed / mixed.std(), np.float32)


def placed(
    name: str,
    kind: Kind,
    speech: Samples,
    pauses: Sequence[Pause],
    before: Samples,
    after: Samples,
    text: str = "",
    voice: str = "",
) -> Clip:
    """A clip of trimmed `speech` between two stretches of the room's noise."""
    lead = len(before)
    return Clip(
        name=name,
        kind=kind,
        samples=np.concatenate([before, speech, after]),
        text=text,
        onset_sample=lead,
        last_voiced_sample=lead + len(speech),
        inner_pauses=tuple(Pause(p.start_sample + lead, p.end_sample + lead) for p in pauses),
        voice=voice,
    )


class Studio:
    """Draws speakers, rooms and levels from one seeded source."""

    def __init__(
        self,
        source: random.Random,
        synthesizer: Synthesizer,
        variants: Sequence[str],
        tail_s: float,
    ) -> None:
        self.random = source
        self._variants = variants
        self._synthesizer = synthesizer
        self._tail_s = tail_s
        self._rng = np.random.default_rng(source.getrandbits(32))

    def shuffled(self, phrases: Sequence[str]) -> list[str]:
        return self.random.sample(list(phrases), len(phrases))

    def speaker(self) -> Speaker:
        return Speaker(
            voice=f"{self.random.choice(LANGUAGES)}+{self.random.choice(self._variants)}",
            speed_wpm=self.random.randint(140, 200),
            pitch=self.random.randint(30, 70),
            intonation=self.random.randint(40, 80),
        )

    def turn(self, name: str, kind: Kind, marked: str) -> Clip:
        """`marked` spoken in one of the ways of pausing (see `Kind`, `benchmarks.phrases`)."""
        words, breaks = parse(marked)
        commas = [b for b in breaks if words[b - 1].endswith(",")]
        text = " ".join(words)
        speaker = self.speaker()
        pause_s = self.random.uniform(*PAUSE_S)
        if kind == "plain" or not breaks:
            speech = trimmed(self._say(speaker, sentence(words)))
            return self.in_room(name, kind, speech, text, speaker.voice)
        at = self.random.choice(commas if kind == "phrase" and commas else breaks)
        before = " ".join(words[:at])
        if kind == "parts":
            first = self._say(speaker, sentence(words[:at]))
            second = self._say(speaker, sentence(words[at:]))
            speech = joined(trimmed(first), trimmed(second), pause_s)
        else:
            if kind == "phrase":
                words = [*words[: at - 1], words[at - 1].rstrip(",") + ",", *words[at:]]
            speech = self._split(speaker, words, at, pause_s)
        clip = self.in_room(name, kind, speech, text, speaker.voice)
        pauses = tuple(
            dataclasses.replace(pause, text_before=before)
            if abs(pause.duration_s - pause_s) < 2 * FRAME_SAMPLES / RATE_HZ
            else pause
            for pause in clip.inner_pauses
        )
        return dataclasses.replace(clip, inner_pauses=pauses)

    def barge_in(self, name: str) -> Clip:
        speaker = self.speaker()
        text = self.random.choice(INTERRUPTIONS)
        speech = trimmed(self._say(speaker, text))
        return self.in_room(name, "speech", speech, text, speaker.voice)

    def noise(self, name: str, index: int) -> Clip:
        """A cough, a knock or "mm-hm", in turn."""
        if index % 3 == 2:
            speaker = self.speaker()
            hum = trimmed(self._say(speaker, "[[m'mh'Vm]]"))
            return self.in_room(name, "noise", hum, "", speaker.voice)
        bursts = 2 if index % 3 == 0 else 1
        duration = RATE_HZ * (0.12 if index % 3 == 0 else 0.05)
        decay = np.exp(-np.arange(int(RATE_HZ * 0.2)) / (duration / 2))
        parts = [decay * noise(self._rng, len(decay)) for _ in range(bursts)]
        return self.in_room(name, "noise", np.concatenate(parts), "", "")

    def _say(self, speaker: Speaker, text: str) -> Samples:
        return self._synthesizer.say(speaker, text).samples

    def _split(self, speaker: Speaker, words: list[str], at: int, pause_s: float) -> Samples:
        """One breath, cut before word `at` where it is quietest, the gap set to `pause_s`."""
        said = self._synthesizer.say(speaker, sentence(words))
        speech, starts = said.samples, said.words
        if len(starts) <= at:
            return trimmed(speech)
        near = RATE_HZ * 4 // 100
        lo, hi = max(starts[at] - near, 0), starts[at] + near
        power = np.convolve(np.square(speech[lo:hi]), np.ones(FRAME_SAMPLES // 2), mode="same")
        cut = lo + int(np.argmin(power))
        return joined(trimmed(speech[:cut]), trimmed(speech[cut:]), pause_s)

    def in_room(self, name: str, kind: Kind, speech: Samples, text: str, voice: str) -> Clip:
        """Level -34 to -16 dB full scale, noise 20 to 45 dB below the speech, a little echo."""
        level = 10 ** (self.random.uniform(-34, -16) / 20)
        speech = np.float32(level / np.sqrt(np.mean(np.square(speech)))) * speech
        floor = level * 10 ** (-self.random.uniform(20, 45) / 20)
        lead, tail = (int(s * RATE_HZ) for s in (self.random.uniform(0.4, 0.8), self._tail_s))
        before, after = np.zeros(lead, np.float32), np.zeros(tail, np.float32)
        pauses = silent_gaps(speech, PAUSE_S[0] - 0.02)
        clip = placed(name, kind, speech, pauses, before, after, text, voice)
        echo = self._rng.standard_normal(RATE_HZ // 5) * np.exp(-np.arange(RATE_HZ // 5) / 700.0)
        echo *= self.random.uniform(0.0, 0.2) / np.sqrt(np.sum(np.square(echo)))
        echo[0] = 1.0
        wet = filtered(clip.samples, echo)
        mixed = np.clip(wet + floor * noise(self._rng, len(wet)), -1.0, 1.0)
        return dataclasses.replace(clip, samples=mixed.astype(np.float32))


def parse(marked: str) -> tuple[list[str], list[int]]:
    """The words of a marked phrase, and before which of them one may pause."""
    words: list[str] = []
    breaks: list[int] = []
    for token in marked.split():
        if token in ("|", "/"):
            breaks.append(len(words))
        else:
            words.append(token)
            if token.endswith(","):
                breaks.append(len(words))
    return words, breaks


def sentence(words: Sequence[str]) -> str:
    return " ".join(words).rstrip(",") + ("?" if words[0] in ASKING else ".")


def filtered(samples: Samples, response: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """[T] through a causal filter: their convolution, cut to [T]."""
    size = 1 << (len(samples) + len(response) - 2).bit_length()
    spectrum = np.fft.rfft(samples, size) * np.fft.rfft(response, size)
    return np.fft.irfft(spectrum, size)[: len(samples)]


def joined(first: Samples, second: Samples, pause_s: float) -> Samples:
    """Two trimmed parts with silence between, faded over 4 ms so that the cut does not click."""
    fade = np.linspace(0.0, 1.0, RATE_HZ * 4 // 1000, dtype=np.float32)
    first, second = first.copy(), second.copy()
    first[-len(fade) :] *= fade[::-1]
    second[: len(fade)] *= fade
    return np.concatenate([first, np.zeros(int(pause_s * RATE_HZ), np.float32), second])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=33)
    parser.add_argument("--recordings", type=Path, help="folder of 16-bit mono WAV files")
    options = parser.parse_args()
    clips = make_clips(options.seed, options.count) + make_interruptions(options.seed, 12)
    if options.recordings:
        clips += recorded_clips(options.recordings)
    options.out.mkdir(parents=True, exist_ok=True)
    for clip in clips:
        write_wav(options.out / f"{clip.name}.wav", clip.samples)
    rows = [clip.described() for clip in clips]
    (options.out / "clips.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{len(clips)} clips in {options.out}")


if __name__ == "__main__":
    main()
