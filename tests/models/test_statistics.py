"""Turn-taking counted by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.parrot.statistics import (
    Activity,
    Rate,
    TurnTaking,
    mean_difference,
    mean_of,
    turn_spans,
    turn_taking,
    units,
    voice_activity,
)

FRAME_S = 0.1
"""So that a silence of two frames is 200 ms, and of three is longer."""


def activity(drawn: str) -> Activity:
    return np.array([letter == "#" for letter in drawn])


def test_a_unit_holds_silences_up_to_200_ms() -> None:
    assert units(activity(".##..#...##"), FRAME_S).tolist() == [[1, 6], [9, 11]]
    assert units(activity("......"), FRAME_S).tolist() == []
    assert units(activity("####"), FRAME_S).tolist() == [[0, 4]]


def test_pauses_gaps_and_overlaps() -> None:
    #                    pause       gap     overlap  gap of one frame
    first = activity("..###....###..........####......##..")
    second = activity("...............#####...##.##.##......")[:36]
    spans = turn_spans(first, second, FRAME_S)
    assert spans.ipus[0].tolist() == [[2, 5], [9, 12], [22, 26], [32, 34]]
    assert spans.ipus[1].tolist() == [[15, 20], [23, 31]]
    assert spans.pauses.tolist() == [[5, 9]]
    assert spans.gaps.tolist() == [[12, 15], [20, 22], [31, 32]]
    assert spans.overlaps.tolist() == [[23, 26]]


def test_silence_before_and_after_everything_is_nothing() -> None:
    spans = turn_spans(activity(".....##....."), activity("............"), FRAME_S)
    assert not len(spans.pauses)
    assert not len(spans.gaps)


def test_a_silence_that_both_enter_is_a_pause_if_one_of_them_goes_on() -> None:
    both, one = activity("##....##"), activity("##......")
    assert turn_spans(both, one, FRAME_S).pauses.tolist() == [[2, 6]]


def test_rates_are_per_minute() -> None:
    first = activity("####......" * 30)  # 30 s
    second = activity("....######" * 30)
    found = turn_taking(first, second, FRAME_S)
    assert (found.ipu.count, found.ipu.seconds) == pytest.approx((120.0, 60.0))
    assert (found.pause.count, found.gap.count, found.overlap.count) == (0, 0, 0)


def test_channels_of_unequal_length_and_no_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="unequal"):
        turn_taking(activity("##"), activity("#"), FRAME_S)
    with pytest.raises(ValueError, match="no frames"):
        turn_taking(activity(""), activity(""), FRAME_S)


def naive(first: list[bool], second: list[bool]) -> tuple[int, int, int]:
    """Joint silences by who spoke last and who speaks next, and overlaps, frame by frame."""
    filled = []
    for channel in (first, second):
        whole = list(channel)
        for begin in range(len(whole)):
            for length in (1, 2):
                end = begin + length
                if begin and end < len(whole) and channel[begin - 1] and channel[end]:
                    whole[begin:end] = [True] * length
        filled.append(whole)
    states = [frozenset(c for c in (0, 1) if filled[c][t]) for t in range(len(first))]
    pauses = gaps = overlaps = 0
    for t, state in enumerate(states):
        if len(state) == 2 and (t == 0 or len(states[t - 1]) < 2):
            overlaps += 1
        if not state and t and states[t - 1]:
            after = next((s for s in states[t:] if s), None)
            if after is not None:
                pauses += bool(states[t - 1] & after)
                gaps += not states[t - 1] & after
    return pauses, gaps, overlaps


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_equal_to_a_walk_over_the_frames(frames: list[tuple[bool, bool]]) -> None:
    first, second = [f[0] for f in frames], [f[1] for f in frames]
    spans = turn_spans(np.array(first), np.array(second), FRAME_S)
    assert (len(spans.pauses), len(spans.gaps), len(spans.overlaps)) == naive(first, second)


def test_means_and_mean_differences() -> None:
    def made(value: float) -> TurnTaking:
        return TurnTaking(*(Rate(value + i, value / 2) for i in range(4)))

    assert mean_of([made(1), made(3)]) == made(2)
    difference = mean_difference([made(1), made(5)], [made(3), made(1)])
    assert difference == TurnTaking(*[Rate(3.0, 1.5)] * 4)


def test_the_level_gate_hears_speech_and_not_faint_noise() -> None:
    chance = np.random.default_rng(0)
    samples = chance.normal(0, 0.0005, 8000).astype(np.float32)
    samples[1600:3200] += np.sin(np.arange(1600) / 5).astype(np.float32) * 0.3
    assert voice_activity(samples, 800).tolist() == [False] * 2 + [True] * 2 + [False] * 6
    assert not voice_activity(samples[4000:], 800).any()
    assert not len(voice_activity(samples[:0], 800))
