"""Conversations with a fake server on a virtual clock: the figures must be its known delays."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.listener import Conversation
from benchmarks.measure import to_ms
from benchmarks.scenes import Scene, interruption, one_after_another, turn
from benchmarks.score import Scores
from tests.benchmarks.fakes import FakeServer, clip, run

TOLERANCE_MS = 20.0
PLAYOUT_MS = 20.0
"""The fake answers at a frame's end; the ear hears it at the next quantum or the one after."""


def scored(server: FakeServer, *scenes: Scene, frame_ms: float = 10.0) -> Scores:
    talk = Conversation(one_after_another(scenes), frame_ms=frame_ms)
    run(talk, server)
    scores = Scores()
    scores.add(talk.trace)
    return scores


@pytest.mark.parametrize("answer_ms", [120.0, 300.0, 900.0])
def test_latency_is_the_servers_delay(answer_ms: float) -> None:
    server = FakeServer(answer_ms=answer_ms)
    scores = scored(server, turn(clip(800), 0.5), turn(clip(400), 0.5), turn(clip(1500), 0.5))
    assert len(scores.turns) == 3
    for score in scores.turns:
        assert score.latency_ms == pytest.approx(answer_ms + PLAYOUT_MS, abs=TOLERANCE_MS)
        assert score.cut_in_ms is None
        assert not score.missed
        assert score.stages_ms["endpoint"] <= score.stages_ms["audible"]


def test_a_reply_inside_a_pause_is_a_cut_in() -> None:
    server = FakeServer(answer_ms=250.0)
    scores = scored(server, turn(clip(700, 400, 700), 0.5), turn(clip(700, 150, 700), 0.5))
    first, second = scores.turns
    assert first.cut_in_ms == pytest.approx(700 + 250 + PLAYOUT_MS, abs=TOLERANCE_MS)
    assert not first.missed
    assert first.pause_ms == pytest.approx(400)
    assert second.cut_in_ms is None
    assert second.latency_ms == pytest.approx(250 + PLAYOUT_MS, abs=TOLERANCE_MS)


def test_a_turn_without_a_reply_is_missed_and_the_next_one_counts() -> None:
    scores = scored(FakeServer(mute_turns=(0,)), turn(clip(500), 0.5), turn(clip(500), 0.5))
    assert [score.missed for score in scores.turns] == [True, False]
    assert scores.turns[0].latency_ms is None
    assert len(scores.latencies_ms()) == 1


@pytest.mark.parametrize("stop_ms", [60.0, 150.0])
def test_barge_in_is_the_time_until_silence(stop_ms: float) -> None:
    server = FakeServer(stop_ms=stop_ms, keep_ms=200.0)
    scores = scored(server, interruption(clip(500), clip(900), "barge_in", 0.7, 0.5))
    [barge_in] = scores.barge_ins
    assert barge_in.tested
    assert not barge_in.resumed
    assert barge_in.stop_ms == pytest.approx(stop_ms + 10, abs=TOLERANCE_MS)
    assert [score.after for score in scores.turns] == ["prompt", "barge_in"]
    assert scores.turns[1].latency_ms == pytest.approx(300 + PLAYOUT_MS, abs=TOLERANCE_MS)
    assert scores.turns[1].cut_in_ms is None


def test_a_server_that_does_not_yield_is_seen_to_talk_on() -> None:
    server = FakeServer(deaf=True, reply_ms=3000.0)
    scores = scored(server, interruption(clip(500), clip(600), "barge_in", 0.7, 0.5))
    [barge_in] = scores.barge_ins
    assert barge_in.stop_ms > 1000.0  # the person had to press "stop"


def test_a_noise_after_which_the_reply_goes_on_whole() -> None:
    server = FakeServer(stop_ms=60.0)
    scores = scored(server, interruption(clip(500), clip(120), "noise", 0.8, 0.5))
    [noise] = scores.noises
    assert noise.tested
    assert noise.completed
    assert 300.0 <= noise.pause_ms <= 500.0
    assert noise.faults.lost_ms + noise.faults.repeated_ms <= 40.0


def test_a_reply_that_resumes_too_late_has_lost_something() -> None:
    server = FakeServer(stop_ms=60.0, skip_ms=200.0)
    scores = scored(server, interruption(clip(500), clip(120), "noise", 0.8, 0.5))
    [noise] = scores.noises
    assert noise.faults.lost_ms == pytest.approx(200, abs=40)


def test_a_noise_that_ends_the_reply_is_seen() -> None:
    server = FakeServer(stop_ms=60.0, keep_ms=100.0)
    scores = scored(server, interruption(clip(500), clip(120), "noise", 0.8, 0.5))
    [noise] = scores.noises
    assert not noise.completed


def test_an_interruption_after_the_end_of_the_reply_is_not_tested() -> None:
    server = FakeServer(reply_ms=400.0)
    scores = scored(server, interruption(clip(500), clip(600), "barge_in", 1.5, 0.5))
    [barge_in] = scores.barge_ins
    assert not barge_in.tested
    assert scores.stops_ms() == []


def test_both_channels_lie_on_one_clock() -> None:
    talk = Conversation(turn(clip(500), 0.5), frame_ms=20.0)
    run(talk, FakeServer())
    recording = talk.trace.recording()
    [said] = talk.trace.said
    assert recording.shape == (2, talk.sample)
    loud = np.flatnonzero(np.abs(recording[0]) > 0.05)
    assert to_ms(abs(loud[0] - said.onset)) < 1.0
    assert to_ms(abs(loud[-1] - said.last_voiced)) < 1.0
    assert to_ms(talk.trace.heard[0].start - said.last_voiced) == pytest.approx(330, abs=20)
