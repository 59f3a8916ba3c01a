"""Turn-taking in numbers, after dGSLM (Nguyen et al. 2022, section 5.3), as NTPP reports it.

From two channels' voice activity:
- an inter-pausal unit (IPU) is speech of one channel between silences longer than 200 ms; shorter
  silences belong to it;
- a pause is silence of both channels before the same speaker goes on, a gap the same before the
  other one speaks; silence before the first and after the last unit is neither;
- an overlap is a stretch in which both channels are within a unit.

T frames of voice activity, each `frame_s` long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import NDArray

Activity = NDArray[np.bool_]
Spans = NDArray[np.int64]
"""[N, 2], first frame and the one behind the last, in order."""

MAX_INNER_SILENCE_S = 0.2
"""A silence inside an IPU is at most this long."""
SPEECH_BELOW_LOUD_DB = 35.0
"""How far below the loudest frames a frame still counts as speech."""
QUIETEST_SPEECH_DBFS = -55.0


@dataclass(frozen=True, slots=True)
class Rate:
    """Per minute of conversation."""

    count: float
    seconds: float


@dataclass(frozen=True, slots=True)
class TurnTaking:
    ipu: Rate
    pause: Rate
    gap: Rate
    overlap: Rate


@dataclass(frozen=True, slots=True)
class TurnSpans:
    """Where what happens, in frames."""

    ipus: tuple[Spans, Spans]
    pauses: Spans
    gaps: Spans
    overlaps: Spans


def turn_spans(first: Activity, second: Activity, frame_s: float) -> TurnSpans:
    """Voice activity [T] and [T] -> where the units, pauses, gaps and overlaps are.

    A silence that both enter, or both leave, in the same frame is a pause if anybody who spoke
    before it speaks after it. Raises ValueError where the channels have unequal lengths.
    """
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"voice activity of unequal shapes: {first.shape} and {second.shape}")
    ipus = (units(first, frame_s), units(second, frame_s))
    one, other = (_filled(spans, len(first)) for spans in ipus)
    silences = _runs(~(one | other))
    silences = silences[(silences[:, 0] > 0) & (silences[:, 1] < len(first))]
    before, after = silences[:, 0] - 1, silences[:, 1]
    goes_on = (one[before] & one[after]) | (other[before] & other[after])  # [N]
    return TurnSpans(ipus, silences[goes_on], silences[~goes_on], _runs(one & other))


def turn_taking(first: Activity, second: Activity, frame_s: float) -> TurnTaking:
    """Voice activity [T] and [T] -> counts and seconds per minute; IPUs of both channels summed.

    Raises ValueError where the channels have unequal lengths or no frame at all.
    """
    if not len(first):
        raise ValueError("no frames to count in")
    spans = turn_spans(first, second, frame_s)
    minutes = len(first) * frame_s / 60
    return TurnTaking(
        *(
            Rate(len(found) / minutes, float((found[:, 1] - found[:, 0]).sum()) * frame_s / minutes)
            for found in (np.concatenate(spans.ipus), spans.pauses, spans.gaps, spans.overlaps)
        )
    )


def mean_of(conversations: Sequence[TurnTaking]) -> TurnTaking:
    """The mean of several conversations, each counted once."""
    return _aggregate(np.mean([_table(c) for c in conversations], axis=0))


def mean_difference(generated: Sequence[TurnTaking], truth: Sequence[TurnTaking]) -> TurnTaking:
    """Mean |generated - truth| over pairs of conversations, as in the published tables."""
    pairs = zip(generated, truth, strict=True)
    return _aggregate(np.mean([np.abs(_table(g) - _table(t)) for g, t in pairs], axis=0))


def units(active: Activity, frame_s: float) -> Spans:
    """The IPUs of one channel [T] -> [N, 2]."""
    runs = _runs(active)
    silence_s = (runs[1:, 0] - runs[:-1, 1]) * frame_s
    apart = silence_s > MAX_INNER_SILENCE_S + 1e-9
    first = np.concatenate(([True], apart)) if len(runs) else np.zeros(0, bool)
    last = np.concatenate((apart, [True])) if len(runs) else np.zeros(0, bool)
    return np.stack((runs[first, 0], runs[last, 1]), axis=1)


def voice_activity(samples: NDArray[np.float32], frame_samples: int) -> Activity:
    """Which frames of clean speech [F * frame_samples] are loud enough to be speech. [F]

    A level gate for decoded or synthetic audio; in noise, ask a real voice activity detector.
    """
    count = len(samples) // frame_samples
    frames = samples[: count * frame_samples].reshape(count, frame_samples)
    power = np.square(frames, dtype=np.float64).mean(axis=1)
    level_dbfs = 10 * np.log10(power + 1e-12)  # [F]
    loud_dbfs = np.quantile(level_dbfs, 0.98) if count else 0.0
    speech: Activity = level_dbfs > max(QUIETEST_SPEECH_DBFS, loud_dbfs - SPEECH_BELOW_LOUD_DB)
    return speech


def _runs(active: Activity) -> Spans:
    """Where it is true without a break. [T] -> [N, 2]"""
    edges = np.diff(np.concatenate(([False], active, [False])).astype(np.int8))
    return np.stack((np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)), axis=1)


def _filled(spans: Spans, frames: int) -> Activity:
    """What `_runs` was given. [N, 2] -> [T]"""
    edges = np.zeros(frames + 1, np.int64)
    edges[spans[:, 0]] = 1
    edges[spans[:, 1]] -= 1
    return edges[:frames].cumsum() > 0


def _table(stats: TurnTaking) -> NDArray[np.float64]:
    """[4, 2]"""
    return np.array(astuple(stats))


def _aggregate(table: NDArray[np.float64]) -> TurnTaking:
    """[4, 2]"""
    return TurnTaking(*(Rate(float(row[0]), float(row[1])) for row in table))
