"""What a two-channel recording shows: pure functions on samples at 24 kHz.

Left is the person, right is what sounded at the listener's ear, sample for sample on one clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from handlers.messages import RATE_HZ, Samples

AUDIBLE_DBFS = -50.0
"""Peak level from which a sample counts as heard."""
BRIDGE_MS = 60.0
"""Shorter gaps do not end a sound: pitch periods, closures of stops."""
SUSTAINED_MS = 15.0
"""Shorter sounds are clicks, not speech."""
MATCH_MS = 40.0
"""Length of the pieces looked up by `playback_faults`."""
MATCH_CORRELATION = 0.98
FADE_MS = 5.0
"""A playback buffer may fade what it breaks off over so long."""


class Span(NamedTuple):
    start: int  # sample
    end: int  # sample after the last


@dataclass(frozen=True, slots=True)
class Heard:
    """A stretch of the ear's channel and the reply item that it came from."""

    item_id: str
    start: int  # sample of the recording
    end: int


@dataclass(frozen=True, slots=True)
class Stop:
    """How a reply ended after an interruption."""

    samples: int  # from onset to the last audible sample of the first run; 0: was silent already
    resumed: bool  # the interrupted reply sounded again later


@dataclass(frozen=True, slots=True)
class PlaybackFaults:
    """Audible reply audio that the listener missed or got twice."""

    lost_ms: float
    repeated_ms: float


def to_ms(samples: float) -> float:
    return samples * 1000.0 / RATE_HZ


def to_samples(ms: float) -> int:
    return round(ms * RATE_HZ / 1000.0)


def audible_spans(
    samples: Samples,
    threshold_dbfs: float = AUDIBLE_DBFS,
    bridge_ms: float = BRIDGE_MS,
    sustained_ms: float = SUSTAINED_MS,
) -> list[Span]:
    """Stretches of [T] that are heard; both ends lie on samples at or above the threshold."""
    loud = np.flatnonzero(np.abs(samples) >= 10.0 ** (threshold_dbfs / 20.0))
    if not len(loud):
        return []
    breaks = np.flatnonzero(np.diff(loud) > to_samples(bridge_ms))
    starts = loud[np.concatenate(([0], breaks + 1))]
    ends = loud[np.concatenate((breaks, [len(loud) - 1]))] + 1
    pairs = zip(starts.tolist(), ends.tolist(), strict=True)
    return [Span(a, b) for a, b in pairs if b - a >= to_samples(sustained_ms)]


def first_start(spans: Iterable[Span], begin: int, end: int) -> int | None:
    """Where the first span that starts in [begin, end) starts."""
    return min((span.start for span in spans if begin <= span.start < end), default=None)


def labelled_spans(spans: Iterable[Span], heard: Iterable[Heard], item_ids: set[str]) -> list[Span]:
    """The parts of `spans` that came from the given reply items."""
    stretches = [Span(h.start, h.end) for h in heard if h.item_id in item_ids]
    parts = []
    for span in spans:
        for stretch in stretches:
            start, end = max(span.start, stretch.start), min(span.end, stretch.end)
            if start < end:
                parts.append(Span(start, end))
    return sorted(parts)


def stop_after(reply: Sequence[Span], onset: int, pause_ms: float = 300.0) -> Stop:
    """When the reply whose audible parts are `reply` fell silent after `onset`.

    A gap longer than `pause_ms` ends the reply; sound after it is a resumption.
    """
    last, resumed = onset, False
    for span in sorted(reply):
        if span.end <= onset:
            continue
        if span.start - last > to_samples(pause_ms):
            resumed = True
            break
        last = max(last, span.end)
    return Stop(last - onset, resumed)


def playback_faults(reply: Samples, heard: Samples) -> PlaybackFaults:
    """Compare a reply's audio [A] with what was heard of it [H], pauses cut in or not.

    Each audible piece of `heard` is looked up in `reply`; pieces nobody heard are lost, pieces
    found twice are repeated. Exact to about one piece at each cut.
    """
    size = to_samples(MATCH_MS)
    cover = np.zeros(len(reply) + size, np.int32)
    played, expected = 0, 0  # the same moment in `heard` and in `reply`
    for span in audible_spans(heard, bridge_ms=MATCH_MS):
        for start in range(span.start, span.end, size):
            piece = heard[start : min(start + size, span.end)]
            if len(piece) < size // 4:
                continue
            places = (expected + start - played, expected)  # on in step, or after a pause cut in
            found = _locate(reply, piece, places)
            if found is None:  # playback may have faded it out
                piece = piece[: -to_samples(FADE_MS)]
                found = _locate(reply, piece, places)
            if found is not None:
                cover[found : found + len(piece)] += 1
                played, expected = start + len(piece), found + len(piece)
    audible = np.zeros(len(cover), bool)
    for span in audible_spans(reply, bridge_ms=MATCH_MS):
        audible[span.start : span.end] = True
    lost = _long_runs(audible & (cover == 0), size // 2)
    repeated = _long_runs(audible & (cover > 1), size // 2)
    return PlaybackFaults(to_ms(lost), to_ms(repeated))


def _long_runs(mask: np.ndarray, shortest: int) -> int:
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.astype(np.int8), [0]))))
    lengths = edges[1::2] - edges[::2]
    return int(lengths[lengths >= shortest].sum())


def _locate(reply: Samples, piece: Samples, places: Sequence[int]) -> int | None:
    """Where in `reply` the piece stands: at one of `places`, else wherever it fits best."""
    for place in places:
        if _correlation(reply[place : place + len(piece)], piece) >= MATCH_CORRELATION:
            return place
    whole, part = reply.astype(np.float64), piece.astype(np.float64)
    size = len(whole) + len(part)
    spectrum = np.fft.rfft(whole, size) * np.conj(np.fft.rfft(part, size))
    products = np.fft.irfft(spectrum, size)[: max(0, len(whole) - len(part) + 1)]
    if not len(products):
        return None
    power = np.concatenate(([0.0], np.cumsum(np.square(whole))))
    energy = float(part @ part)
    # A near-silent place may not win by rounding: it counts as half as loud as the piece.
    norms = np.sqrt(np.maximum(power[len(part) :] - power[: -len(part)], energy / 4.0) * energy)
    scores = products / norms
    best = int(np.argmax(scores))
    return best if scores[best] >= MATCH_CORRELATION else None


def _correlation(a: Samples, b: Samples) -> float:
    if len(a) != len(b):
        return 0.0
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm > 0.0 else 0.0
