"""Outcomes of the turns of a whole dialogue, from its truth and the agent's channel alone.

Turns are judged as the trials of `benchmarks.duplex` are, where the dialogue lets them be: a turn
whose reply the person breaks off is no finished turn, and an answer's words count only where the
person leaves it `ROOM_S` more than the data's agent took. Samples are at 24 kHz.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.duplex_judge import Understood, says
from benchmarks.duplex_score import (
    ATTENDED_SHARE,
    IN_FLIGHT_MS,
    STILL_SOUNDING_MS,
    Hear,
    Outcome,
    Sound,
    first_reply,
    sounds_in,
    timing,
    words_from,
)
from benchmarks.duplex_trials import FRAME_S, PAUSE_S
from benchmarks.measure import Span, audible_spans, stop_after, to_ms, to_samples
from handlers.messages import RATE_HZ, Samples
from models.parrot import dialogues
from models.parrot.dialogues import Truth, Turn
from models.parrot.statistics import turn_taking, voice_activity
from models.parrot.synthesis import RATE_HZ as DATA_RATE_HZ

ROOM_S = 0.5


@dataclass(frozen=True, slots=True)
class _Said:
    """A turn of the person's, in samples at the wire's rate."""

    name: str
    turn: Turn
    begin: int
    end: int
    until: int  # the next turn's begin
    pauses: tuple[Span, ...]
    over: bool  # it breaks off the reply before it

    @property
    def answered(self) -> bool:
        """The person waits for the end of the reply."""
        return self.turn.reply is not None and not self.turn.reply.cut

    @property
    def heard_until(self) -> int:
        """Behind which it doesn't matter what a sound is."""
        if self.turn.kind == "noise":
            return self.begin
        return self.until if self.answered and self.turn.kind != "long" else self.end

    @property
    def answer(self) -> str:
        """What is to be judged in the reply; nothing where there isn't time for all of it."""
        reply = self.turn.reply
        if reply is None or reply.cut or self.until - _at(reply.span.end) < ROOM_S * RATE_HZ:
            return ""
        return reply.text


@dataclass(frozen=True, slots=True)
class _Ear:
    """The agent's channel [T], and what sounds in it."""

    samples: Samples
    sounds: Sequence[Sound]
    hear: Hear
    audible_dbfs: float

    def beginning(self, begin: int, end: int) -> list[Sound]:
        return [sound for sound in self.sounds if begin <= sound.start < end]


def outcomes(truth: Truth, agent: Samples, hear: Hear, audible_dbfs: float) -> list[Outcome]:
    """Of all turns and of the dialogue as a whole. `agent`: [T] as it sounds."""
    turns = _turns(truth)
    matters = [Span(said.begin, said.heard_until) for said in turns]
    ear = _Ear(agent, sounds_in(agent, hear, audible_dbfs, matters), hear, audible_dbfs)
    found: list[Outcome] = []
    for said in turns:
        if said.turn.kind == "noise":
            found.append(_noise(said, ear))
            continue
        if said.over:
            found.append(_interruption(said, ear))
        if said.turn.kind == "long":
            found.append(_long(said, ear))
            continue
        found += _pauses(said, ear)
        if said.answered and not said.over:
            found.append(_turn(said, ear))
    return [*found, _dialogue(truth, agent)]


def _at(sample: int) -> int:
    return sample * RATE_HZ // DATA_RATE_HZ


def _span(span: dialogues.Span) -> Span:
    return Span(_at(span.start), _at(span.end))


def _turns(truth: Truth) -> list[_Said]:
    begins = [_at(turn.span.start) for turn in truth.turns] + [_at(truth.length)]
    return [
        _Said(
            f"{truth.seed}-{index}",
            turn,
            begins[index],
            _at(turn.span.end),
            begins[index + 1],
            tuple(map(_span, turn.pauses)),
            over=index > 0 and (reply := truth.turns[index - 1].reply) is not None and reply.cut,
        )
        for index, turn in enumerate(truth.turns)
    ]


def _pauses(said: _Said, ear: _Ear) -> list[Outcome]:
    """Of those as long as in the trials; what began since the one before counts as in the pause."""
    found, edge = [], said.begin
    shortest_ms, longest_ms = (1000 * seconds for seconds in PAUSE_S)
    for index, pause in enumerate(said.pauses):
        limit = pause.end + to_samples(IN_FLIGHT_MS)
        early = ear.beginning(edge, limit)
        edge = limit
        if shortest_ms <= to_ms(pause.end - pause.start) <= longest_ms:
            found.append(
                Outcome(
                    f"{said.name}-{index}",
                    "pause",
                    said.turn.kind,
                    True,
                    sounds_before_end=len(early),
                    takeover=any(not sound.backchannel for sound in early),
                    takeover_v1=any(sound.takes_turn for sound in early),
                )
            )
    return found


def _turn(said: _Said, ear: _Ear) -> Outcome:
    begin = said.begin
    if said.pauses:
        begin = min(said.pauses[-1].end + to_samples(IN_FLIGHT_MS), said.end)
    fresh = ear.beginning(begin, said.until)
    reply = first_reply(fresh, said.end)
    early = ear.beginning(said.begin, said.end)
    answer = said.answer
    heard = words_from(reply, ear.samples, fresh, ear.hear) if reply and answer else ""
    asked = said.turn.kind == "question" and answer
    return Outcome(
        said.name,
        "question" if asked else "turn",
        said.turn.kind,
        True,
        sounds_before_end=len(early),
        takeover=any(not sound.backchannel for sound in early),
        takeover_v1=any(sound.takes_turn for sound in early),
        latency_ms=None if reply is None else to_ms(reply.start - said.end),
        answered=reply is not None,
        understood=Understood.of(answer, heard) if answer else None,
        right=says(answer, heard) if asked else None,
        heard=heard,
        backchannels=sum(sound.backchannel for sound in early),
    )


def _interruption(said: _Said, ear: _Ear) -> Outcome:
    near = said.begin - to_samples(STILL_SOUNDING_MS)
    old = [sound for sound in ear.sounds if sound.start < said.begin and sound.end > near]
    if not old:  # it had not begun, or was over
        return Outcome(said.name, "interruption", said.turn.kind, True)
    parts = audible_spans(ear.samples[: said.until], ear.audible_dbfs)
    reply = [part for part in parts if old[0].start <= part.start < said.end]
    stop = stop_after(reply, said.begin)
    answer, heard, attended = said.answer, "", None
    if answer:
        fresh = ear.beginning(said.end, said.until)
        first = first_reply(fresh, said.end)
        heard = words_from(first, ear.samples, fresh, ear.hear) if first else ""
        understood = Understood.of(answer, heard)
        attended = understood.right >= ATTENDED_SHARE * understood.words
    return Outcome(
        said.name,
        "interruption",
        said.turn.kind,
        True,
        right=attended,
        heard=heard,
        stop_ms=to_ms(stop.samples),
        resumed=stop.resumed,
    )


def _long(said: _Said, ear: _Ear) -> Outcome:
    early = ear.beginning(said.begin, said.end)
    short = [sound for sound in early if sound.backchannel]
    expected = [_span(span) for span in said.turn.backchannels]
    from_begin = [Span(span.start - said.begin, span.end - said.begin) for span in expected]
    return Outcome(
        said.name,
        "backchannel",
        said.turn.kind,
        True,
        sounds_before_end=len(early),
        takeover=len(short) < len(early),
        takeover_v1=any(sound.takes_turn for sound in early),
        backchannels=len(short),
        divergence=timing(short, from_begin, said.begin, said.end - said.begin),
        seconds=(said.end - said.begin) / RATE_HZ,
    )


def _noise(said: _Said, ear: _Ear) -> Outcome:
    return Outcome(
        said.name,
        "noise",
        said.turn.kind,
        True,
        false_replies=len(ear.beginning(said.begin, said.until)),
        seconds=(said.until - said.begin) / RATE_HZ,
    )


def _dialogue(truth: Truth, agent: Samples) -> Outcome:
    person, expected = truth.activity(round(FRAME_S * DATA_RATE_HZ))
    live = voice_activity(agent, round(FRAME_S * RATE_HZ))
    frames = min(len(person), len(live))
    return Outcome(
        str(truth.seed),
        "dialogue",
        "",
        True,
        seconds=frames * FRAME_S,
        live=turn_taking(person[:frames], live[:frames], FRAME_S),
        truth=turn_taking(person[:frames], expected[:frames], FRAME_S),
    )
