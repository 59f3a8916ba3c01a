"""From the trace of a conversation to its figures: latency, cut-ins, interruptions.

Sounds are found in the recording; the server's events only say which reply a sound belongs to
and how the time before it was spent.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.listener import Said, Trace
from benchmarks.measure import (
    PlaybackFaults,
    Span,
    Stop,
    audible_spans,
    first_start,
    labelled_spans,
    playback_faults,
    stop_after,
    to_ms,
    to_samples,
)

STILL_SOUNDING_MS = 300.0
"""A reply silent for longer than this at the onset had ended: nothing was interrupted."""
NOISE_REACH_MS = 500.0
"""A silence of the reply that begins later after a noise has nothing to do with it."""
CROSSED = "response_cancel_not_active"
"""The person's "stop" crossed the end of the reply on the way: no fault of anybody's."""
STAGES = {
    "endpoint": "input_audio_buffer.speech_stopped",
    "transcript": "conversation.item.input_audio_transcription.completed",
    "response": "response.created",
    "audio arrives": "audio",
}
"""Moments on the way to an audible reply, and the event that marks each."""


@dataclass(frozen=True, slots=True)
class TurnScore:
    clip: str
    kind: str  # of the clip: how it pauses
    after: str  # what kind of utterance it was: turn, prompt, barge_in
    pause_ms: float  # longest pause inside
    latency_ms: float | None  # None: cut in, or missed
    cut_in_ms: float | None  # from onset to where the reply cut in
    missed: bool
    stages_ms: dict[str, float] = field(default_factory=dict)  # from the last voiced sample


@dataclass(frozen=True, slots=True)
class BargeInScore:
    clip: str
    tested: bool  # a reply was sounding at the onset
    stop_ms: float
    resumed: bool  # the old reply came back


@dataclass(frozen=True, slots=True)
class NoiseScore:
    clip: str
    tested: bool
    completed: bool  # the server finished that response
    pause_ms: float  # longest silence of the reply around it
    faults: PlaybackFaults


@dataclass(slots=True)
class Scores:
    turns: list[TurnScore] = field(default_factory=list)
    barge_ins: list[BargeInScore] = field(default_factory=list)
    noises: list[NoiseScore] = field(default_factory=list)
    lateness_ms: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def add(self, trace: Trace) -> None:
        """Score everything that was said in one conversation."""
        if not trace.said:
            return
        right = trace.recording()[1]
        spans = audible_spans(right)
        ends = [said.onset for said in trace.said[1:]] + [len(right)]
        for said, end in zip(trace.said, ends, strict=True):
            if said.kind == "noise":
                self.noises.append(_noise(trace, said, spans, end))
                continue
            if said.kind == "barge_in":
                self.barge_ins.append(_barge_in(trace, said, spans, end))
            self.turns.append(_turn(trace, said, spans, end))
        self.lateness_ms.extend(late * 1000.0 for late in trace.lateness_s)
        codes = (str(h.event["error"].get("code")) for h in trace.named("error"))
        self.errors.extend(code for code in codes if code != CROSSED)

    def latencies_ms(self, after: Sequence[str] = ("turn",)) -> list[float]:
        chosen = (t.latency_ms for t in self.turns if t.after in after)
        return [latency for latency in chosen if latency is not None]

    def stage_ms(self, stage: str) -> list[float]:
        turns = (t.stages_ms for t in self.turns if t.after == "turn")
        return [stages[stage] for stages in turns if stage in stages]

    def stops_ms(self) -> list[float]:
        return [score.stop_ms for score in self.barge_ins if score.tested]


def _turn(trace: Trace, said: Said, spans: Sequence[Span], end: int) -> TurnScore:
    # What still sounds of an interrupted reply is its stop time, not a cut-in.
    old = _items_at(trace, said.onset) if said.kind == "barge_in" else set()
    fresh = _without(trace, spans, old)
    cut_in = first_start(fresh, said.onset, said.last_voiced)
    answer = first_start(fresh, said.last_voiced, end)
    latency = None if answer is None else to_ms(answer - said.last_voiced)
    return TurnScore(
        clip=said.clip.name,
        kind=said.clip.kind,
        after=said.kind,
        pause_ms=max((p.duration_s * 1000.0 for p in said.clip.inner_pauses), default=0.0),
        latency_ms=latency,
        cut_in_ms=None if cut_in is None else to_ms(cut_in - said.onset),
        missed=answer is None and cut_in is None,
        stages_ms={} if answer is None else _stages(trace, said, answer),
    )


def _stages(trace: Trace, said: Said, answer: int) -> dict[str, float]:
    """When each stage's last mark before the answer came."""
    stages = {}
    for stage, name in STAGES.items():
        before = [h.sample for h in trace.named(name) if said.onset <= h.sample <= answer]
        if before:
            stages[stage] = to_ms(before[-1] - said.last_voiced)
    stages["audible"] = to_ms(answer - said.last_voiced)
    return stages


def _barge_in(trace: Trace, said: Said, spans: Sequence[Span], end: int) -> BargeInScore:
    old = _items_at(trace, said.onset)
    stop = Stop(0, False)
    if old:
        reply = labelled_spans(spans, trace.heard, old)
        stop = stop_after([span for span in reply if span.start < end], said.onset)
    return BargeInScore(said.clip.name, bool(old), to_ms(stop.samples), stop.resumed)


def _noise(trace: Trace, said: Said, spans: Sequence[Span], end: int) -> NoiseScore:
    items = _items_at(trace, said.onset)
    if not items:
        return NoiseScore(said.clip.name, False, False, 0.0, PlaybackFaults(0.0, 0.0))
    [item_id] = items
    reply = labelled_spans(spans, trace.heard, items)
    right = trace.recording()[1]
    heard = right[reply[0].start : min(end, reply[-1].end)]
    near = said.last_voiced + to_samples(NOISE_REACH_MS)
    pairs = itertools.pairwise(reply)
    gaps = [b.start - a.end for a, b in pairs if b.start > said.onset and a.end < near]
    status = trace.response_status(item_id)
    return NoiseScore(
        clip=said.clip.name,
        tested=True,
        completed=status == "completed",
        pause_ms=to_ms(max(gaps, default=0)),
        faults=playback_faults(trace.reply_audio(item_id), heard),
    )


def _items_at(trace: Trace, sample: int) -> set[str]:
    """The reply item that sounded last before `sample`, if it had not long ended."""
    near = sample - to_samples(STILL_SOUNDING_MS)
    recent = [h for h in trace.heard if h.start < sample and h.end > near]
    return {recent[-1].item_id} if recent else set()


def _without(trace: Trace, spans: Sequence[Span], items: set[str]) -> list[Span]:
    if not items:
        return list(spans)
    others = {h.item_id for h in trace.heard} - items
    return labelled_spans(spans, trace.heard, others)
