"""The figures of the endpointing benchmark, on made-up moments; the clips are not played here."""

from __future__ import annotations

import pytest

from benchmarks.endpointing import Moment, area, fit, table, words_wrong
from server.endpointing import Cues


def moment(complete: float, pause_s: float | None, text: str = "so", ms: float = 900.0) -> Moment:
    return Moment("clip", Cues(text, 0.1, None, ms, complete), None, pause_s)


def test_the_area_is_the_chance_that_an_end_has_the_higher_value() -> None:
    ends = [moment(0.9, None), moment(0.4, None)]
    pauses = [moment(0.4, 0.3), moment(0.1, 0.5)]
    assert area([*ends, *pauses], lambda cues: cues.complete or 0.0) == pytest.approx(3.5 / 4)


def test_of_whole_turns_the_words_that_are_wrong() -> None:
    said = Cues("what time is it", None, None, 900.0)
    whole = Moment("clip", Cues("what dime is", None, None, 900.0), said, None)
    half = Moment("clip", Cues("hut", None, None, 400.0), said, 0.4)
    unknown = Moment("clip", Cues("hut", None, None, 400.0), None, None)
    assert words_wrong([whole, half, unknown]) == 2 / 4


def test_a_line_counts_the_pauses_that_outlast_their_hold() -> None:
    moments = [moment(1.0, None), moment(0.0, None), moment(1.0, 0.5), moment(0.0, 0.5)]
    line = table("made up", moments, lambda cues: 300.0 if cues.complete else 700.0)
    ends, fast, middle, late, median, pauses, cut = line.removeprefix("made up").split()
    assert (ends, fast, middle, late, median) == ("2", "50%", "100%", "0.0%", "500")
    assert (pauses, cut) == ("2", "50.0%")


def test_the_fit_finds_that_longer_turns_are_over() -> None:
    ends = [moment(0.0, None, ms=2000.0 + i) for i in range(20)]
    pauses = [moment(0.0, 0.4, ms=500.0 + i) for i in range(20)]
    _, weights = fit([*ends, *pauses])
    assert weights.length > 0.5
    assert weights.end == pytest.approx(0.0, abs=0.1)
