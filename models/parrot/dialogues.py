"""Synthetic dialogues between a person and the agent, on two channels, with the truth about them.

The person says phrases to be repeated, asks questions, talks at length, interrupts, is silent in a
noisy room; the agent does what it ought to do, in time. A dialogue is a function of its seed.
`python -m models.parrot.dialogues` writes them to disk. T samples at `RATE_HZ`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from models.common.errors import ConfigError
from models.common.settings import load_yaml, read
from models.parrot import domain
from models.parrot.labels import FIRST_WORD, NOT_SPEAKING, PAUSING, UNKNOWN
from models.parrot.rooms import EVENTS, Range, Room, RoomOptions, draw_room, heard_in, sound
from models.parrot.speech import PERSON_RMS, Audio, Clip, agent_clip, say_parts
from models.parrot.synthesis import RATE_HZ, Speaker, Synthesizer

Kind = Literal["phrase", "question", "long", "noise"]

LABELS = FIRST_WORD + len(domain.SAYABLE)

HESITATION_S = 0.04
BREATH_SAMPLES = RATE_HZ // 10
"""At least so long is a voice silent between two of its turns."""
OWN_VOICE_WPM = (145, 175)


@dataclass(frozen=True, slots=True)
class DialogueOptions:
    """Shares are probabilities, of kinds of turns relative weights; ranges are drawn uniformly.

    The defaults give about the mean lengths of pauses, gaps and overlaps in Fisher's telephone
    calls (Nguyen et al. 2022, "dGSLM", table 2, per minute: 7.0 pauses of 5.5 s in all, 7.5 gaps of
    4.4 s, 6.5 overlaps of 3.6 s); turns of a few words are too short for their numbers.
    `configs/dialogues/tiny.yaml` is for an agent that answers at once.
    """

    length_s: Range = (22.0, 36.0)
    """After which no further turn begins."""
    phrase_share: float = 0.55
    question_share: float = 0.2
    long_share: float = 0.25
    noise_share: float = 0.0
    pause_share: float = 0.1
    """Of the places between the words of a phrase."""
    question_pause_share: float = 0.1
    pause_s: Range = (0.2, 1.37)
    long_pause_s: Range = (0.3, 1.27)
    """Between the parts of a long turn."""
    cut_share: float = 1 / 3
    """Of the turns with pauses: those that break off at them, without a tone of more to come."""
    question_rise_share: float = 0.3
    own_voice_share: float = 0.0
    """Of the dialogues in which the person has the agent's voice: what is easiest to repeat shows
    a model soonest that it is to be repeated. Not on the test side."""
    voice_height: Range = (1.0, 1.0)
    """Of the person's voice, `Speaker.height`, where it isn't the agent's: of few voices a model
    learns those voices. Not on the test side."""
    response_gap_s: Range = (-1.2, 1.17)
    """From the person's last audible sample to the agent's first one; below 0 they overlap."""
    hesitation: float = 0.0
    """Probability that the reply comes another `HESITATION_S` later, and so on. A model that learns
    from replies which always come at once learns, too, that a turn which wasn't answered at once is
    not over; from these it learns at any moment how likely it is that the turn is over."""
    late_share: float = 0.0
    """Of the replies that come later: what lets a model answer that missed its moment."""
    late_gap_s: Range = (0.3, 1.2)
    grid_s: float = 0.0
    """The agent begins at the next multiple of this: of a frame, its tokens are then always the
    same. 0: anywhere."""
    turn_gap_s: Range = (-1.2, 1.17)
    """From the agent's end to the person's next turn."""
    long_silence_share: float = 0.0
    long_silence_s: Range = (2.5, 5.0)
    interruption_share: float = 0.2
    """Of the replies long enough to be spoken over."""
    stop_s: Range = (0.2, 0.9)
    """From an interruption's onset to the end of the agent's voice."""
    stop_hesitation: float = 0.0
    """As `hesitation`, of that."""
    listener_share: float = 0.1
    """Of the replies not interrupted: those with a sound of the person that isn't meant to."""
    backchannel_share: float = 0.7
    """Of the pauses in a long turn that are late enough in it."""
    backchannel_after_s: float = 2.0
    backchannel_delay_s: Range = (0.2, 0.3)
    sounds_per_minute: float = 1.0
    """Coughs, knocks and the like anywhere in a dialogue."""
    sound_db: Range = (-15.0, 3.0)
    """Relative to the person's speech."""
    room: RoomOptions = field(default_factory=RoomOptions)

    def __post_init__(self) -> None:
        for name in ("hesitation", "stop_hesitation", "interruption_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} has to be below 1: a dialogue would have no end")


@dataclass(frozen=True, slots=True)
class Span:
    """Samples, from the first audible one to the one behind the last."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Reply:
    text: str
    span: Span
    cut: bool
    """The person spoke over it and it stopped."""
    listener: Span | None
    """The person's sound over it that didn't stop it."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Of the person; `noise` is a stretch in which nobody speaks."""

    kind: Kind
    text: str
    span: Span
    pauses: tuple[Span, ...]
    backchannels: tuple[Span, ...]
    """The agent's."""
    reply: Reply | None


@dataclass(frozen=True, slots=True)
class Word:
    text: str
    """Empty for a stretch of speech whose words have no times."""
    span: Span


@dataclass(frozen=True, slots=True)
class Truth:
    seed: int
    test: bool
    length: int
    speaker: Speaker
    room: Room
    turns: tuple[Turn, ...]
    sounds: tuple[Span, ...]
    words: tuple[tuple[Word, ...], tuple[Word, ...]]
    """Of the person and of the agent."""

    def labels(self, frame_samples: float, frames: int) -> NDArray[np.int16]:
        """What each of the two says in the middle of each frame. [frames, C = 2]"""
        labels = np.full((self.length, 2), NOT_SPEAKING, np.int16)
        for turn in self.turns:
            for pause in turn.pauses:
                labels[pause.start : pause.end, 0] = PAUSING
        for channel, words in enumerate(self.words):
            for word in words:
                label = FIRST_WORD + domain.SAYABLE.index(word.text) if word.text else UNKNOWN
                labels[word.span.start : word.span.end, channel] = label
        middles = ((np.arange(frames) + 0.5) * frame_samples).astype(int)
        of_frames: NDArray[np.int16] = labels[np.minimum(middles, self.length - 1)]
        return of_frames

    def activity(self, frame_samples: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """In which frames the person and the agent speak. [T // frame_samples] each"""
        person, agent = np.zeros((2, self.length), bool)
        for turn in self.turns:
            if turn.kind != "noise":
                person[turn.span.start : turn.span.end] = True
            for pause in turn.pauses:
                person[pause.start : pause.end] = False
            for span in turn.backchannels:
                agent[span.start : span.end] = True
            if turn.reply:
                agent[turn.reply.span.start : turn.reply.span.end] = True
                if turn.reply.listener:
                    person[turn.reply.listener.start : turn.reply.listener.end] = True
        middles = slice(frame_samples // 2, None, frame_samples)
        frames = self.length // frame_samples
        return person[middles][:frames], agent[middles][:frames]


@dataclass(frozen=True, slots=True)
class Dialogue:
    person: Audio  # [T], as the microphone hears it
    agent: Audio  # [T], clean
    truth: Truth


def load_options(path: Path) -> DialogueOptions:
    """From YAML; what it doesn't name keeps its default. Raises ConfigError."""
    options: DialogueOptions = read(DialogueOptions, load_yaml(path), "")
    _check(options)
    return options


def generate(seed: int, options: DialogueOptions, *, test: bool) -> Dialogue:
    """A dialogue of the training or the test side: its phrases, its voices.

    Equal seeds give equal samples, whatever was generated before.
    """
    source = random.Random(f"{seed} {'test' if test else 'train'}")
    with Synthesizer() as synthesizer:
        return _Scene(source, options, synthesizer, test=test).play(seed)


class _Scene:
    """Plays one dialogue from its beginning to its end."""

    def __init__(
        self,
        source: random.Random,
        options: DialogueOptions,
        synthesizer: Synthesizer,
        *,
        test: bool,
    ) -> None:
        self._source, self._options, self._synthesizer = source, options, synthesizer
        self._test = test
        self._speaker = domain.draw_speaker(source, test=test)
        if not test and source.random() < options.own_voice_share:
            self._speaker = replace(domain.AGENT, speed_wpm=source.randint(*OWN_VOICE_WPM))
        elif not test:
            height = source.uniform(*options.voice_height)
            self._speaker = replace(self._speaker, height=height)
        self._sound_source = np.random.default_rng(source.getrandbits(128))
        self._person, self._agent = _Channel(), _Channel()
        self._turns: list[Turn] = []
        self._agent_end = 0
        self._next = 0  # where the person's next turn begins
        self._interrupting = False  # and whether that is in the middle of a reply

    def play(self, seed: int) -> Dialogue:
        options = self._options
        self._next = self._draw((0.3, 2.5))
        last = self._draw(options.length_s)
        while self._next < last or self._interrupting:
            self._turn(self._draw_kind())
        length = max(self._person.end, self._agent.end, self._next) + self._draw((0.2, 0.6))
        sounds = self._sprinkle(length)
        person, agent = self._person.mixed(length), self._agent.mixed(length)
        words = (tuple(self._person.words), tuple(self._agent.words))
        room = draw_room(options.room, self._source)
        return Dialogue(
            heard_in(room, person, agent, PERSON_RMS, self._sound_source),
            agent,
            Truth(seed, self._test, length, self._speaker, room, tuple(self._turns), sounds, words),
        )

    def _draw(self, seconds: Range) -> int:
        return round(self._source.uniform(*seconds) * RATE_HZ)

    def _draw_kind(self) -> Kind:
        options = self._options
        kinds: tuple[Kind, ...] = ("phrase", "question", "long", "noise")
        weights = [options.phrase_share, options.question_share, options.long_share]
        weights.append(0.0 if self._interrupting else options.noise_share)
        return self._source.choices(kinds, weights)[0]

    def _turn(self, kind: Kind) -> None:
        if kind == "noise":
            self._turns.append(self._noise())
            self._next += max(BREATH_SAMPLES, self._turn_gap())
            return
        parts, ending, answer = self._script(kind)
        clips = say_parts(
            self._synthesizer,
            self._speaker,
            parts,
            self._source,
            cut_share=self._options.cut_share,
            ending=ending,
        )
        spans = self._speak(kind, clips)
        pauses = tuple(Span(a.end, b.start) for a, b in pairwise(spans))
        backchannels = self._backchannels(parts, spans) if kind == "long" else ()
        reply = self._reply(answer, spans[-1].end)
        whole = Span(spans[0].start, spans[-1].end)
        self._turns.append(Turn(kind, " ".join(parts), whole, pauses, backchannels, reply))

    def _script(self, kind: Kind) -> tuple[list[str], str, str]:
        """Parts to be said, the last one's punctuation, the agent's answer."""
        source, options = self._source, self._options
        if kind == "phrase":
            text = domain.draw_phrase(source, test=self._test)
            return self._split(text, options.pause_share), ".", text
        if kind == "question":
            text = source.choice(tuple(domain.QUESTIONS))
            rises = text.startswith(("what", "how", "who"))
            ending = "?" if rises and source.random() < options.question_rise_share else "."
            return self._split(text, options.question_pause_share), ending, domain.QUESTIONS[text]
        words = source.choices(domain.WORDS, k=source.randint(*domain.LONG_TURN_WORDS))
        cuts = sorted(source.sample(range(1, len(words)), source.randint(2, 3)))
        edges = zip([0, *cuts], [*cuts, len(words)], strict=True)
        return [" ".join(words[a:b]) for a, b in edges], ".", domain.LONG_TURN_REPLY

    def _split(self, text: str, pause_share: float) -> list[str]:
        """Into the parts between pauses."""
        first, *others = text.split()
        parts = [first]
        for word in others:
            if self._source.random() < pause_share:
                parts.append(word)
            else:
                parts[-1] += f" {word}"
        return parts

    def _speak(self, kind: Kind, clips: tuple[Clip, ...]) -> list[Span]:
        """The clips with pauses between them, from where the next turn is to begin."""
        pause_s = self._options.long_pause_s if kind == "long" else self._options.pause_s
        spans: list[Span] = []
        for clip in clips:
            spans.append(self._person.place(clip, self._next))
            self._next = spans[-1].end + self._draw(pause_s)
        return spans

    def _backchannels(self, parts: list[str], spans: list[Span]) -> tuple[Span, ...]:
        """Once there are more words than a phrase to be repeated could have."""
        options = self._options
        words, spoken, found = 0, 0, []
        for part, span in zip(parts[:-1], spans, strict=False):
            words, spoken = words + len(part.split()), spoken + span.end - span.start
            late = words > domain.LONGEST_PHRASE
            late &= spoken >= options.backchannel_after_s * RATE_HZ
            if late and self._source.random() < options.backchannel_share:
                start = self._on_grid(span.end + self._draw(options.backchannel_delay_s))
                clip = agent_clip(domain.BACKCHANNEL)
                if start > self._agent_end:
                    found.append(self._agent.place(clip, start))
                    self._agent_end = found[-1].end
        return tuple(found)

    def _reply(self, text: str, turn_end: int) -> Reply:
        """Also decides when the person speaks next, and whether over this."""
        options, clip = self._options, agent_clip(text)
        late = self._source.random() < options.late_share
        start = turn_end + self._draw(options.late_gap_s if late else options.response_gap_s)
        start += self._hesitate(options.hesitation)
        start = self._on_grid(max(start, self._agent_end + BREATH_SAMPLES))
        free = turn_end + BREATH_SAMPLES  # when the person can speak again
        stop = self._draw(options.stop_s) + self._hesitate(options.stop_hesitation)
        earliest = max(free, start + RATE_HZ * 15 // 100)
        latest = start + clip.audible - stop - RATE_HZ // 20
        interrupted = self._source.random() < options.interruption_share
        self._interrupting = interrupted and earliest < latest
        if self._interrupting:
            self._next = self._source.randint(earliest, latest)
            self._agent_end = self._next + stop
            clip = _faded_out(clip, clip.first + self._agent_end - start)
            return Reply(text, self._agent.place(clip, start), True, None)
        span = self._agent.place(clip, start)
        self._agent_end = span.end
        listener = None
        if free <= start and self._source.random() < options.listener_share:
            listener = self._listener(span)
            free = listener.end + BREATH_SAMPLES
        free = max(free, start + BREATH_SAMPLES)
        self._next = max(free, span.end + self._turn_gap())
        return Reply(text, span, False, listener)

    def _hesitate(self, probability: float) -> int:
        steps = 0
        while probability and self._source.random() < probability:
            steps += 1
        return round(steps * HESITATION_S * RATE_HZ)

    def _on_grid(self, sample: int) -> int:
        grid = round(self._options.grid_s * RATE_HZ)
        return -(-sample // grid) * grid if grid else sample

    def _listener(self, reply: Span) -> Span:
        parts = [self._source.choice(domain.LISTENER_SOUNDS)]
        clips = say_parts(self._synthesizer, self._speaker, parts, self._source, cut_share=0)
        quarter = (reply.end - reply.start) // 4
        start = self._source.randint(reply.start + quarter, reply.end - quarter)
        return self._person.place(clips[0], start)

    def _turn_gap(self) -> int:
        options = self._options
        long = self._source.random() < options.long_silence_share
        return self._draw(options.long_silence_s if long else options.turn_gap_s)

    def _noise(self) -> Turn:
        """A stretch with one to three sounds in it; moves `_next` to its end."""
        start, kinds = self._next, self._source.choices(tuple(EVENTS), k=self._source.randint(1, 3))
        for kind in kinds:
            self._next += self._draw((0.2, 1.0))
            self._next = self._sound(kind, self._next).end
        return Turn("noise", ", ".join(kinds), Span(start, self._next), (), (), None)

    def _sprinkle(self, length: int) -> tuple[Span, ...]:
        mean = self._options.sounds_per_minute * length / RATE_HZ / 60
        spans = []
        for _ in range(self._sound_source.poisson(mean)):
            start = self._source.randrange(length)
            spans.append(self._sound(self._source.choice(tuple(EVENTS)), start))
        return tuple(sorted(spans, key=lambda span: span.start))

    def _sound(self, kind: str, start: int) -> Span:
        rms = PERSON_RMS * 10 ** (self._source.uniform(*self._options.sound_db) / 20)
        samples = sound(kind, rms, self._sound_source)
        self._person.add(samples, start)
        return Span(start, start + len(samples))


class _Channel:
    """What one of the two is heard with, and the words in it."""

    def __init__(self) -> None:
        self._parts: list[tuple[int, Audio]] = []
        self.words: list[Word] = []

    @property
    def end(self) -> int:
        return max((start + len(samples) for start, samples in self._parts), default=0)

    def add(self, samples: Audio, start: int) -> None:
        self._parts.append((start, samples))

    def place(self, clip: Clip, start: int) -> Span:
        """So that it is heard from `start` on."""
        begin, end = start - clip.first, start + clip.audible
        self.add(clip.samples, begin)
        words = clip.words or (("", clip.first),)
        ends = [*(begin + at for _, at in words[1:]), end]
        for (text, at), behind in zip(words, ends, strict=True):
            self.words.append(Word(text, Span(max(begin + at, start), behind)))
        return Span(start, end)

    def mixed(self, length: int) -> Audio:
        mix = np.zeros(length, np.float32)
        for start, samples in self._parts:
            mix[start : start + len(samples)] += samples[: max(0, length - start)]
        return mix


def _faded_out(clip: Clip, end: int) -> Clip:
    """Over in sample `end`, the 20 ms before it fading."""
    samples = clip.samples[:end].copy()
    fade = min(end, RATE_HZ // 50)
    samples[-fade:] *= np.linspace(1, 0, fade, dtype=np.float32)
    return Clip(samples, clip.first, end, tuple(word for word in clip.words if word[1] < end))


def _check(options: DialogueOptions | RoomOptions) -> None:
    """Raises ConfigError at a value that can't be."""
    for option in fields(options):
        match getattr(options, option.name):
            case RoomOptions() as room:
                _check(room)
            case (low, high) if low > high:
                raise ConfigError(f"{option.name}=[{low}, {high}]: has to be [lowest, highest]")
            case float(value) if value < 0:
                raise ConfigError(f"{option.name}={value}: has to be a number of 0 or more")


if __name__ == "__main__":
    from models.parrot.dialogue_files import main

    main()
