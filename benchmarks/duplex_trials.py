"""What is tried with a full-duplex partner: spoken trials with known ends, pauses and answers.

The tasks follow Full-Duplex-Bench v1 (Lin et al. 2025). For the parrot, phrases, questions and
voices are the held-out side of `models.parrot.domain`; lengths of pauses, rooms and levels are this
module's own. An assistant gets sentences, "repeat after me" and sums, in the same voices.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import numpy as np

from benchmarks.clips import ASKING, Clip, Kind, Pause, Studio, noise, recorded_clips
from benchmarks.clips import parse as parse_marked
from benchmarks.measure import Span
from benchmarks.phrases import TURNS
from handlers.audio import Resampler
from handlers.messages import RATE_HZ, Samples
from models.parrot import domain
from models.parrot.dialogues import DialogueOptions, generate
from models.parrot.speech import agent_clip, say_parts
from models.parrot.statistics import Activity
from models.parrot.synthesis import RATE_HZ as SPEECH_RATE_HZ
from models.parrot.synthesis import Synthesizer

Task: TypeAlias = Literal[
    "pause", "turn", "question", "interruption", "backchannel", "noise", "dialogue", "recorded"
]
PAUSE_S = (0.3, 0.7)
"""Inside a turn that is not over; the bar of the takeover rate is about these."""
TAIL_S = 2.5
RISING_SHARE = 0.3
"""Of the questions that rise at their end."""
REPLY_HEARD_S = (0.25, 0.7)
"""How much of a reply is heard before it is spoken over."""
REPLY_LEFT_S = 0.5
"""How much of it is left then, at least: one that ends by itself shows nothing."""
NOISE_S = 20.0
NOISE_DBFS = (-65.0, -40.0)
FRAME_S = 0.01
"""Of voice activity."""
SUMS = tuple(question for question in domain.QUESTIONS if " plus " in question)
STORIES = ("tell me a story", "what can you do", "count from one to twenty")
"""What an assistant answers at length."""


@dataclass(frozen=True, slots=True)
class Trial:
    name: str
    task: Task
    clip: Clip
    """What the person says first."""
    answer: str = ""
    """Words of the right answer; empty where there is none to be judged."""
    over: Clip | None = None
    """Said over the reply, ..."""
    over_answer: str = ""
    after_s: float = 0.0
    """... when so much of it was heard."""
    backchannels: tuple[Span, ...] = ()
    """When the data would have the listener say something, in samples of `clip`."""
    activity: tuple[Activity, Activity] | None = None
    """Of the person and the agent in the data, [T] frames of `FRAME_S`, from the clip's start."""


@dataclass(frozen=True, slots=True)
class Counts:
    pause: int = 40
    turn: int = 40
    question: int = 25
    interruption: int = 25
    backchannel: int = 15
    noise: int = 6
    dialogue: int = 8

    def scaled(self, factor: float) -> Counts:
        """So many times as many of each, but one at least."""
        return Counts(*(max(1, round(factor * count)) for count in dataclasses.astuple(self)))


@dataclass(frozen=True, slots=True)
class Line:
    parts: tuple[str, ...]
    """With a pause between two of them."""
    answer: str = ""


class Partner(Protocol):
    """What is said to one kind of partner."""

    def pause(self, source: random.Random) -> Line: ...
    def turn(self, source: random.Random) -> Line: ...
    def question(self, source: random.Random) -> Line: ...
    def prompt(self, source: random.Random) -> Line:
        """Gets a reply long enough to be spoken over."""

    def long(self, source: random.Random) -> Line: ...
    def reply_s(self, line: Line) -> float | None:
        """How long the reply ought to be; None where it is long anyway."""


class Parrot:
    """Repeats phrases, answers the domain's questions, says "mm-hm" in long turns."""

    def pause(self, source: random.Random) -> Line:
        words = domain.draw_phrase(source, test=True).split()
        at = source.randrange(1, len(words))
        return Line((" ".join(words[:at]), " ".join(words[at:])), " ".join(words))

    def turn(self, source: random.Random) -> Line:
        phrase = domain.draw_phrase(source, test=True)
        return Line((phrase,), phrase)

    def question(self, source: random.Random) -> Line:
        question = source.choice(tuple(domain.QUESTIONS))
        return Line((question,), domain.QUESTIONS[question])

    def prompt(self, source: random.Random) -> Line:
        phrase = domain.draw_phrase(source, test=True, words=domain.LONGEST_PHRASE)
        return Line((phrase,), phrase)

    def long(self, source: random.Random) -> Line:
        words = source.choices(domain.WORDS, k=source.randint(*domain.LONG_TURN_WORDS))
        cuts = sorted(source.sample(range(2, len(words) - 1), 2))
        edges = zip((0, *cuts), (*cuts, len(words)), strict=True)
        parts = tuple(" ".join(words[a:b]) for a, b in edges)
        return Line(parts, domain.LONG_TURN_REPLY)

    def reply_s(self, line: Line) -> float | None:
        return agent_clip(line.answer).audible / SPEECH_RATE_HZ


class Assistant:
    """Answers in sentences; repeats and adds when told to. Has no ground truth of timing."""

    def pause(self, source: random.Random) -> Line:
        parts = self._sentence(source)
        at = source.randrange(1, len(parts))
        return Line((" ".join(parts[:at]), " ".join(parts[at:])))

    def turn(self, source: random.Random) -> Line:
        if source.random() < 0.5:
            return Line((" ".join(self._sentence(source)),))
        phrase = domain.draw_phrase(source, test=True)
        return Line((f"repeat after me, {phrase}",), phrase)

    def question(self, source: random.Random) -> Line:
        question = source.choice(SUMS)
        return Line((question,), domain.QUESTIONS[question])

    def prompt(self, source: random.Random) -> Line:
        return Line((source.choice(STORIES),))

    def long(self, source: random.Random) -> Line:
        sentences = [" ".join(self._sentence(source)) for _ in range(3)]
        return Line(tuple(sentences))

    def reply_s(self, line: Line) -> float | None:
        return None

    def _sentence(self, source: random.Random) -> list[str]:
        """In parts between which one may pause."""
        while True:
            words, breaks = parse_marked(source.choice(TURNS))
            edges = zip([0, *breaks], [*breaks, len(words)], strict=True)
            parts = [" ".join(words[a:b]).rstrip(",") for a, b in edges]
            if len(parts) > 1:
                return parts


PARTNERS: dict[str, type[Partner]] = {"parrot": Parrot, "assistant": Assistant}


class Booth:
    """Makes the trials of one seed. A context, since eSpeak is one.

    Raises ModuleNotFoundError without espeakng-loader.
    """

    def __init__(self, seed: int, partner: Partner, options: DialogueOptions) -> None:
        self._source = random.Random(f"duplex {seed}")
        self._partner = partner
        self._options = options
        self._seed = seed
        self._synthesizer = Synthesizer()
        self._noises = Synthesizer(RATE_HZ)

    def __enter__(self) -> Booth:
        self._synthesizer.__enter__()
        self._noises.__enter__()
        self._studio = Studio(self._source, self._noises, ("m1",), TAIL_S)
        return self

    def __exit__(self, *exception: object) -> None:
        self._noises.__exit__(*exception)
        self._synthesizer.__exit__(*exception)

    def trials(self, counts: Counts) -> list[Trial]:
        """In an order of their own for every seed."""
        made = [
            *(self._spoken("pause", index) for index in range(counts.pause)),
            *(self._spoken("turn", index) for index in range(counts.turn)),
            *(self._spoken("question", index) for index in range(counts.question)),
            *(self._interruption(index) for index in range(counts.interruption)),
            *(self._long(index) for index in range(counts.backchannel)),
            *(self._noise(index) for index in range(counts.noise)),
            *(self._dialogue(index) for index in range(counts.dialogue)),
        ]
        self._source.shuffle(made)
        return made

    def _spoken(self, task: Literal["pause", "turn", "question"], index: int) -> Trial:
        line: Line = getattr(self._partner, task)(self._source)
        kind: Kind = "plain"
        if task == "pause":
            kind = "hesitation" if index % 3 == 2 else "phrase"
        name = f"{task}-{index:03d}"
        return Trial(name, task, self.clip(name, kind, line), line.answer)

    def _interruption(self, index: int) -> Trial:
        source, name = self._source, f"interruption-{index:03d}"
        while True:
            prompt = self._partner.prompt(source)
            reply_s = self._partner.reply_s(prompt)
            if reply_s is None or reply_s > REPLY_HEARD_S[0] + REPLY_LEFT_S:
                break
        asked = index % 3 == 2 or isinstance(self._partner, Assistant)
        line = self._partner.question(source) if asked else self._partner.turn(source)
        latest_s = REPLY_HEARD_S[1] if reply_s is None else reply_s - REPLY_LEFT_S
        after_s = source.uniform(REPLY_HEARD_S[0], min(latest_s, REPLY_HEARD_S[1]))
        first = self.clip(f"{name}-prompt", "plain", prompt)
        second = self.clip(name, "speech", line)
        return Trial(name, "interruption", first, prompt.answer, second, line.answer, after_s)

    def _long(self, index: int) -> Trial:
        name, line = f"backchannel-{index:03d}", self._partner.long(self._source)
        clip = self.clip(name, "parts", line)
        truth: list[Span] = []
        if isinstance(self._partner, Parrot):
            truth = self._expected_backchannels(line, clip)
        return Trial(name, "backchannel", clip, backchannels=tuple(truth))

    def _expected_backchannels(self, line: Line, clip: Clip) -> list[Span]:
        """In every pause late enough for the data's agent, after the mean of its delays."""
        delay_s = sum(self._options.backchannel_delay_s) / 2
        length_s = agent_clip(domain.BACKCHANNEL).audible / SPEECH_RATE_HZ
        words, silent, found = 0, 0, []
        for part, pause in zip(line.parts, clip.inner_pauses, strict=False):
            words += len(part.split())
            spoken_s = (pause.start_sample - clip.onset_sample - silent) / RATE_HZ
            silent += pause.end_sample - pause.start_sample
            if words > domain.LONGEST_PHRASE and spoken_s >= self._options.backchannel_after_s:
                start = pause.start_sample + round(delay_s * RATE_HZ)
                found.append(Span(start, start + round(length_s * RATE_HZ)))
        return found

    def _noise(self, index: int) -> Trial:
        """Room noise, with coughs and knocks in all but every third."""
        rng = np.random.default_rng(self._source.getrandbits(32))
        count = round(NOISE_S * RATE_HZ)
        floor_dbfs = self._source.uniform(*NOISE_DBFS)
        samples = noise(rng, count) * np.float32(10 ** (floor_dbfs / 20))
        for kind in () if index % 3 == 2 else (0, 1, 0):  # see `Studio.noise`
            sound = self._studio.noise("", kind).samples
            start = self._source.randrange(count - len(sound))
            samples[start : start + len(sound)] += sound
        name = f"noise-{index:03d}"
        clip = Clip(name, "noise", np.clip(samples, -1, 1).astype(np.float32), "", 0, count)
        return Trial(name, "noise", clip)

    def _dialogue(self, index: int) -> Trial:
        """The person's side of one of the data's held-out dialogues, without the agent's echo."""
        room = dataclasses.replace(self._options.room, echo_share=0.0)
        options = dataclasses.replace(self._options, room=room)
        made = generate(1_000_000 * (self._seed + 1) + index, options, test=True)
        name, samples = f"dialogue-{index:03d}", to_wire_rate(made.person)
        clip = Clip(name, "parts", samples, "", 0, len(samples))
        frame_samples = round(FRAME_S * SPEECH_RATE_HZ)
        return Trial(name, "dialogue", clip, activity=made.truth.activity(frame_samples))

    def clip(self, name: str, kind: Kind, line: Line) -> Clip:
        """`line` in a held-out voice and a room. Kind `hesitation` breaks off at its pauses, the
        others rise there; the end falls, or rises in some questions."""
        source, text = self._source, " ".join(line.parts)
        asking = text.split()[0] in ASKING
        clips = say_parts(
            self._synthesizer,
            domain.draw_speaker(source, test=True),
            line.parts,
            source,
            cut_share=1.0 if kind == "hesitation" else 0.0,
            ending="?" if asking and source.random() < RISING_SHARE else ".",
        )
        pieces, pauses, position = [], [], 0
        for index, part in enumerate(clips):
            if index:
                length = round(source.uniform(*PAUSE_S) * SPEECH_RATE_HZ)
                pauses.append((position, position + length))
                pieces.append(np.zeros(length, np.float32))
                position += length
            pieces.append(part.samples[part.first : part.end])
            position += part.audible
        speech = to_wire_rate(np.concatenate(pieces))
        clip = self._studio.in_room(name, kind, speech, text, "held out")
        scale, lead = RATE_HZ / SPEECH_RATE_HZ, clip.onset_sample
        inner = tuple(Pause(lead + round(a * scale), lead + round(b * scale)) for a, b in pauses)
        return dataclasses.replace(clip, inner_pauses=inner)


def to_wire_rate(samples: Samples) -> Samples:
    """[T] at the synthesis' rate → [T'] at `RATE_HZ`."""
    return Resampler(SPEECH_RATE_HZ, RATE_HZ, "HQ").push(samples, last=True)


def recorded_trials(folder: Path) -> list[Trial]:
    """One for each turn in a folder of 16-bit mono WAV files. Raises ValueError at another format.

    `NAME.txt` beside a file of one turn holds what is to be answered.
    """
    clips = recorded_clips(folder)
    found = []
    for clip in clips:
        stem = clip.name.rpartition("-")[0]
        text = folder / f"{stem}.txt"
        alone = sum(other.name.rpartition("-")[0] == stem for other in clips) == 1
        answer = text.read_text(encoding="utf-8").strip() if alone and text.exists() else ""
        found.append(Trial(clip.name, "recorded", clip, answer))
    return found


def in_sessions(trials: Sequence[Trial], size: int) -> list[list[Trial]]:
    """Dealt out, `size` to a session; a dialogue has one of its own."""
    alone = [[trial] for trial in trials if trial.task == "dialogue"]
    others = [trial for trial in trials if trial.task != "dialogue"]
    return alone + [others[first : first + size] for first in range(0, len(others), size)]
