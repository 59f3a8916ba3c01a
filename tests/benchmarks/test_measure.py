"""The measuring functions on synthetic recordings whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.measure import (
    Heard,
    PlaybackFaults,
    Span,
    audible_spans,
    first_start,
    labelled_spans,
    playback_faults,
    stop_after,
    to_ms,
    to_samples,
)
from handlers.messages import RATE_HZ, Samples


def silence(ms: float) -> Samples:
    return np.zeros(to_samples(ms), np.float32)


def tone(ms: float, level_dbfs: float = -12.0, hz: float = 220.0) -> Samples:
    time_s = np.arange(to_samples(ms)) / RATE_HZ
    peak = 10.0 ** (level_dbfs / 20.0)
    return np.asarray(peak * np.cos(2 * np.pi * hz * time_s), np.float32)


def speech(ms: float, seed: int = 0) -> Samples:
    """Noise shaped like syllables: no two pieces of it are alike."""
    rng = np.random.default_rng(seed)
    time_s = np.arange(to_samples(ms)) / RATE_HZ
    envelope = 0.6 + 0.4 * np.sin(2 * np.pi * 4.0 * time_s)
    return np.asarray(0.1 * envelope * rng.standard_normal(len(time_s)), np.float32)


def test_spans_begin_and_end_on_the_first_and_last_audible_sample() -> None:
    recording = np.concatenate((silence(500), tone(300), silence(400), tone(100), silence(50)))
    starts = [(round(to_ms(s.start)), round(to_ms(s.end))) for s in audible_spans(recording)]
    assert starts == [(500, 800), (1200, 1300)]


def test_short_gaps_are_bridged_and_clicks_are_not_sounds() -> None:
    click = np.full(24, 0.5, np.float32)
    recording = np.concatenate(
        (click, silence(200), tone(100), silence(40), tone(100), silence(200), click)
    )
    [span] = audible_spans(recording)
    assert round(to_ms(span.start)) == 201
    assert round(to_ms(span.end - span.start)) == 240


def test_what_is_below_the_threshold_is_silence() -> None:
    assert audible_spans(tone(500, level_dbfs=-51.0)) == []
    assert len(audible_spans(tone(500, level_dbfs=-49.0))) == 1
    assert audible_spans(silence(100)) == []


def test_first_start_looks_only_into_its_window() -> None:
    spans = [Span(100, 200), Span(300, 400), Span(500, 600)]
    assert first_start(spans, 150, 1000) == 300
    assert first_start(spans, 300, 500) == 300
    assert first_start(spans, 401, 500) is None


def test_spans_are_told_apart_by_the_item_they_came_from() -> None:
    spans = [Span(0, 100), Span(200, 300)]
    heard = [Heard("old", 0, 250), Heard("new", 250, 400)]
    assert labelled_spans(spans, heard, {"old"}) == [Span(0, 100), Span(200, 250)]
    assert labelled_spans(spans, heard, {"new"}) == [Span(250, 300)]


@pytest.mark.parametrize("after_ms", [0, 37, 180])
def test_a_reply_that_stops_after_the_onset(after_ms: float) -> None:
    recording = np.concatenate((tone(1000 + after_ms), silence(2000)))
    stop = stop_after(audible_spans(recording), to_samples(1000))
    assert to_ms(stop.samples) == pytest.approx(after_ms, abs=3.0)
    assert not stop.resumed


def test_a_reply_that_goes_on_through_its_own_pauses_has_not_stopped() -> None:
    recording = np.concatenate((tone(1000), silence(150), tone(500), silence(1000)))
    stop = stop_after(audible_spans(recording), to_samples(900))
    assert to_ms(stop.samples) == pytest.approx(750, abs=3.0)


def test_a_reply_that_comes_back_has_resumed() -> None:
    recording = np.concatenate((tone(1000), silence(800), tone(500)))
    stop = stop_after(audible_spans(recording), to_samples(900))
    assert to_ms(stop.samples) == pytest.approx(100, abs=3.0)
    assert stop.resumed


def test_a_reply_that_was_silent_at_the_onset_and_stays_so() -> None:
    stop = stop_after(audible_spans(np.concatenate((tone(500), silence(900)))), to_samples(800))
    assert stop.samples == 0
    assert not stop.resumed


def test_a_reply_played_whole_has_no_faults() -> None:
    reply = speech(2000)
    heard = np.concatenate((silence(333), reply, silence(200)))
    faults = playback_faults(reply, heard)
    assert (faults.lost_ms, faults.repeated_ms) == (0.0, 0.0)


def test_a_reply_with_pauses_of_its_own_has_no_faults() -> None:
    parts = [speech(500, 1), silence(300), 0.02 * speech(400, 2), silence(500), speech(600, 3)]
    reply = np.concatenate(parts)
    heard = np.concatenate((silence(50), reply))
    assert playback_faults(reply, heard) == PlaybackFaults(0.0, 0.0)


def test_a_pause_cut_into_a_reply_is_no_fault() -> None:
    reply, cut = speech(2000), to_samples(777)
    heard = np.concatenate((silence(100), reply[:cut], silence(600), reply[cut:]))
    faults = playback_faults(reply, heard)
    assert faults.lost_ms + faults.repeated_ms <= 40.0


def test_a_lost_stretch_is_found() -> None:
    reply = speech(2000)
    heard = np.concatenate((reply[: to_samples(700)], silence(300), reply[to_samples(1000) :]))
    faults = playback_faults(reply, heard)
    assert faults.lost_ms == pytest.approx(300, abs=40)
    assert faults.repeated_ms <= 40


def test_a_repeated_stretch_is_found() -> None:
    reply = speech(2000)
    heard = np.concatenate((reply[: to_samples(1000)], silence(300), reply[to_samples(700) :]))
    faults = playback_faults(reply, heard)
    assert faults.repeated_ms == pytest.approx(300, abs=40)
    assert faults.lost_ms <= 40


def test_a_reply_nobody_heard_is_lost() -> None:
    assert playback_faults(speech(1000), silence(1000)).lost_ms == pytest.approx(1000, abs=40)
