"""What the trials show: pure functions from recordings to outcomes, and from these to figures.

A sound is a stretch in which the partner is audible, its gaps shorter than `MAX_GAP_MS`. One
shorter than a second in which the judge hears "mm-hm" is a backchannel; any other that begins while
the person has the turn is a takeover, however soon it is broken off. Beside that stands the rule of
Full-Duplex-Bench v1: a second or longer, or more than three words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from benchmarks.duplex_judge import Understood, says
from benchmarks.duplex_scenes import ANSWER_S, Run
from benchmarks.duplex_trials import FRAME_S, Task
from benchmarks.measure import Span, audible_spans, stop_after, to_ms, to_samples
from handlers.messages import RATE_HZ, Samples
from models.parrot import domain
from models.parrot.statistics import TurnTaking, turn_taking, voice_activity

MAX_GAP_MS = 200.0
"""A silence inside an inter-pausal unit is no longer than this."""
SHORTEST_MS = 50.0
BACKCHANNEL_BELOW_S = 1.0
TURN_FROM_S = 1.0  # Full-Duplex-Bench v1
TURN_ABOVE_WORDS = 3
IN_FLIGHT_MS = 200.0
"""What begins so soon after a pause was begun in it: the person was not yet to be heard."""
STILL_SOUNDING_MS = 100.0
WINDOW_S = 0.2
"""Of the timing of backchannels."""
ATTENDED_SHARE = 0.5
"""Of the words of an interruption's answer that make it answered."""

Hear = Callable[[Samples], str]


@dataclass(frozen=True, slots=True)
class Sound:
    start: int
    end: int
    words: str  # as the judge hears them, if it is short

    @property
    def seconds(self) -> float:
        return (self.end - self.start) / RATE_HZ

    @property
    def backchannel(self) -> bool:
        return self.seconds < BACKCHANNEL_BELOW_S and self.words == domain.BACKCHANNEL

    @property
    def takes_turn(self) -> bool:
        """By the rule of Full-Duplex-Bench v1."""
        return self.seconds >= TURN_FROM_S or len(self.words.split()) > TURN_ABOVE_WORDS


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one trial. What does not apply to its task, or could not be tested, is None."""

    name: str
    task: Task
    kind: str  # of the clip: how it pauses
    settled: bool  # False: the partner talked without end before it; counted against it
    sounds_before_end: int = 0  # of any kind, while the person had the turn
    takeover: bool | None = None  # ... one that is no backchannel
    takeover_v1: bool | None = None
    latency_ms: float | None = None  # last voiced sample → reply; negative: the reply began before
    answered: bool | None = None
    understood: Understood | None = None
    right: bool | None = None
    heard: str = ""
    stop_ms: float | None = None
    resumed: bool | None = None
    backchannels: int | None = None
    divergence: float | None = None
    false_replies: int | None = None
    seconds: float = 0.0  # listened to
    live: TurnTaking | None = None
    truth: TurnTaking | None = None


@dataclass(slots=True)
class Scorer:
    """Scores runs one by one. `hear` is asked about short sounds, and about answers."""

    hear: Hear
    audible_dbfs: float
    _known: dict[int, tuple[Samples, list[Sound]]] = field(default_factory=dict)

    def outcome(self, run: Run) -> Outcome | None:
        """None for a trial that was not held to its end."""
        if run.trace is None or not run.end:
            return None
        right, sounds = self._sounds(run)
        match run.trial.task:
            case "pause" | "turn" | "question" | "recorded":
                return self._turn(run, right, sounds)
            case "interruption":
                return self._interruption(run, right, sounds)
            case "backchannel":
                return self._long(run, sounds)
            case "noise":
                return self._noise(run, sounds)
            case "dialogue":
                return self._dialogue(run, right)

    def _sounds(self, run: Run) -> tuple[Samples, list[Sound]]:
        """The ear's channel, and the sounds that begin within the run."""
        assert run.trace is not None
        if id(run.trace) not in self._known:
            right = run.trace.recording()[1]
            sounds = sounds_in(right, self.hear, self.audible_dbfs)
            self._known = {id(run.trace): (right, sounds)}  # runs come session by session
        right, sounds = self._known[id(run.trace)]
        return right, [sound for sound in sounds if run.begin <= sound.start < run.end]

    def _answer(
        self, wanted: str, reply: Sound | None, right: Samples, sounds: Sequence[Sound]
    ) -> str:
        """All that is heard from the reply on, if anything is to be said there."""
        if reply is None or not wanted:
            return ""
        return words_from(reply, right, sounds, self.hear)

    def _turn(self, run: Run, right: Samples, sounds: Sequence[Sound]) -> Outcome:
        [said] = run.said
        trial = run.trial
        pauses = said.clip.inner_pauses
        limit = said.last_voiced
        if pauses:
            limit = said.start_sample + pauses[-1].end_sample + to_samples(IN_FLIGHT_MS)
        early = [sound for sound in sounds if said.onset <= sound.start < limit]
        if trial.task == "pause" or (trial.task == "recorded" and pauses):
            fresh = [sound for sound in sounds if sound.start >= limit]
        else:
            fresh = [sound for sound in sounds if sound.start >= said.onset]
            early = [sound for sound in early if sound.start < said.last_voiced]
        reply = first_reply(fresh, said.last_voiced)
        latency = None if reply is None else to_ms(reply.start - said.last_voiced)
        heard = self._answer(trial.answer, reply, right, sounds)
        return Outcome(
            trial.name,
            trial.task,
            said.clip.kind,
            run.settled,
            sounds_before_end=len(early),
            takeover=any(not sound.backchannel for sound in early),
            takeover_v1=any(sound.takes_turn for sound in early),
            latency_ms=latency,
            answered=reply is not None,
            understood=Understood.of(trial.answer, heard) if trial.answer else None,
            right=says(trial.answer, heard) if trial.task == "question" else None,
            heard=heard,
        )

    def _interruption(self, run: Run, right: Samples, sounds: Sequence[Sound]) -> Outcome:
        trial, kind = run.trial, run.said[-1].clip.kind
        if len(run.said) < 2:
            return Outcome(trial.name, trial.task, kind, run.settled)
        said = run.said[1]
        near = said.onset - to_samples(STILL_SOUNDING_MS)
        old = [sound for sound in sounds if sound.start < said.onset and sound.end > near]
        if not old:  # it ended by itself a moment before
            return Outcome(trial.name, trial.task, kind, run.settled)
        parts = audible_spans(right[: run.end], self.audible_dbfs)
        reply = [part for part in parts if old[0].start <= part.start < said.last_voiced]
        stop = stop_after(reply, said.onset)
        answer = first_reply([s for s in sounds if s.start >= said.last_voiced], said.last_voiced)
        heard = self._answer(trial.over_answer, answer, right, sounds)
        understood = Understood.of(trial.over_answer, heard) if trial.over_answer else None
        attended = answer is not None
        if understood is not None:
            attended = understood.right >= ATTENDED_SHARE * understood.words
        return Outcome(
            trial.name,
            trial.task,
            kind,
            run.settled,
            latency_ms=None if answer is None else to_ms(answer.start - said.last_voiced),
            answered=answer is not None,
            understood=understood,
            right=attended,
            heard=heard,
            stop_ms=to_ms(stop.samples),
            resumed=stop.resumed,
        )

    def _long(self, run: Run, sounds: Sequence[Sound]) -> Outcome:
        [said] = run.said
        early = [sound for sound in sounds if said.onset <= sound.start < said.last_voiced]
        short = [sound for sound in early if sound.backchannel]
        reply = first_reply([s for s in sounds if s.start >= said.onset], said.last_voiced)
        return Outcome(
            run.trial.name,
            run.trial.task,
            said.clip.kind,
            run.settled,
            sounds_before_end=len(early),
            takeover=len(short) < len(early),
            takeover_v1=any(sound.takes_turn for sound in early),
            latency_ms=None if reply is None else to_ms(reply.start - said.last_voiced),
            answered=reply is not None,
            backchannels=len(short),
            divergence=timing(
                short, run.trial.backchannels, said.start_sample, len(said.clip.samples)
            ),
            seconds=(said.last_voiced - said.onset) / RATE_HZ,
        )

    def _noise(self, run: Run, sounds: Sequence[Sound]) -> Outcome:
        [said] = run.said
        return Outcome(
            run.trial.name,
            run.trial.task,
            said.clip.kind,
            run.settled,
            false_replies=len(sounds),
            seconds=(run.end - run.begin) / RATE_HZ,
        )

    def _dialogue(self, run: Run, right: Samples) -> Outcome:
        [said] = run.said
        assert run.trial.activity is not None
        person, agent = run.trial.activity
        heard = right[said.start_sample : said.start_sample + len(said.clip.samples)]
        live = voice_activity(heard, round(FRAME_S * RATE_HZ))
        frames = min(len(person), len(live))
        return Outcome(
            run.trial.name,
            run.trial.task,
            said.clip.kind,
            run.settled,
            seconds=frames * FRAME_S,
            live=turn_taking(person[:frames], live[:frames], FRAME_S),
            truth=turn_taking(person[:frames], agent[:frames], FRAME_S),
        )


def sounds_in(
    samples: Samples, hear: Hear, audible_dbfs: float, matters: Sequence[Span] | None = None
) -> list[Sound]:
    """Of the partner's channel [T]. Words only of sounds that begin where it `matters`, if given:
    to hear them takes longest."""
    spans = audible_spans(samples, audible_dbfs, MAX_GAP_MS, SHORTEST_MS)
    longest = round(BACKCHANNEL_BELOW_S * RATE_HZ)

    def short(start: int, end: int) -> bool:
        here = matters is None or any(span.start <= start < span.end for span in matters)
        return here and end - start < longest

    words = (hear(samples[a:b]) if short(a, b) else "" for a, b in spans)
    return [Sound(a, b, said) for (a, b), said in zip(spans, words, strict=True)]


def words_from(reply: Sound, samples: Samples, sounds: Sequence[Sound], hear: Hear) -> str:
    """All that is heard in [T] from the reply on."""
    later = [sound for sound in sounds if sound.start >= reply.start]
    return " ".join(sound.words or hear(samples[sound.start : sound.end]) for sound in later)


def first_reply(sounds: Sequence[Sound], last_voiced: int) -> Sound | None:
    """The first that is more than a backchannel and does not come too late."""
    limit = last_voiced + to_samples(ANSWER_S * 1000.0)
    return next((s for s in sounds if not s.backchannel and s.start < limit), None)


def timing(heard: Sequence[Sound], truth: Sequence[Span], begin: int, length: int) -> float | None:
    """Divergence of when backchannels sound in a turn that begins at sample `begin`, those of the
    truth counted from there; 1 without any; None without a truth."""
    if not truth:
        return None
    ours = windows([Span(s.start - begin, s.end - begin) for s in heard], length)
    return divergence(ours, windows(truth, length))


def windows(spans: Sequence[Span], length: int) -> NDArray[np.float64]:
    """How many spans touch each window of `WINDOW_S` in `length` samples."""
    size = round(WINDOW_S * RATE_HZ)
    counts = np.zeros(-(-length // size))
    for span in spans:
        counts[span.start // size : (span.end - 1) // size + 1] += 1
    return counts


def divergence(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Jensen-Shannon divergence of two histograms [N] to base 2: 0 where they have one shape, 1
    where nothing is in common, or one of them is empty and the other is not."""
    if not first.any() or not second.any():
        return float(bool(first.any()) != bool(second.any()))
    p, q = first / first.sum(), second / second.sum()
    middle = (p + q) / 2
    return float((_relative(p, middle) + _relative(q, middle)) / 2)


def _relative(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    there = p > 0
    return float(np.sum(p[there] * np.log2(p[there] / q[there])))
