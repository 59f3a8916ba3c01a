"""Outcomes of duplex trials, held on a virtual clock against a server with known delays."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from benchmarks.duplex_judge import Understood
from benchmarks.duplex_report import Share, bars, figures
from benchmarks.duplex_scenes import Run, scene
from benchmarks.duplex_score import Outcome, Scorer, divergence, windows
from benchmarks.duplex_trials import FRAME_S, Task, Trial
from benchmarks.listener import Conversation
from benchmarks.measure import AUDIBLE_DBFS, Span, to_samples
from benchmarks.scenes import one_after_another
from handlers.messages import RATE_HZ, Samples
from tests.benchmarks.fakes import FakeServer, clip, run

SHORT_MS = 400.0
"""What the judge of these tests takes for a backchannel is shorter."""
PLAYOUT_MS = 30.0


def hear(samples: Samples) -> str:
    return "mm-hm" if len(samples) < to_samples(SHORT_MS) else "red fish"


def held(*trials: Trial, server: FakeServer | None = None) -> list[Outcome]:
    runs = [Run(trial) for trial in trials]
    talk = Conversation(one_after_another([scene(each) for each in runs]))
    run(talk, server or FakeServer(reply_ms=1200.0))
    scorer = Scorer(hear, AUDIBLE_DBFS)
    outcomes = [scorer.outcome(each) for each in runs]
    assert None not in outcomes
    return [outcome for outcome in outcomes if outcome is not None]


def trial(task: Task, *parts_ms: float, **fields: Any) -> Trial:
    return Trial(task, task, clip(*parts_ms, name=task), **fields)


def test_a_turn_is_taken_up_after_the_servers_delay() -> None:
    [outcome] = held(trial("turn", 600, answer="red fish"))
    assert outcome.answered
    assert outcome.takeover is False
    assert outcome.latency_ms == pytest.approx(300.0 + PLAYOUT_MS, abs=25.0)
    assert outcome.understood == Understood(2, 2)
    assert outcome.heard == "red fish"


def test_a_turn_that_nothing_follows_is_not_taken_up() -> None:
    [outcome] = held(trial("turn", 600), server=FakeServer(mute_turns=(0,)))
    assert outcome.answered is False
    assert outcome.latency_ms is None


def test_a_backchannel_after_a_turn_is_no_reply() -> None:
    [outcome] = held(trial("turn", 600), server=FakeServer(reply_ms=SHORT_MS - 100))
    assert outcome.answered is False


def test_a_reply_that_begins_before_the_end_has_a_negative_latency() -> None:
    """A server that needs 100 ms of silence, and a breath of 120 ms inside the turn."""
    spoken = trial("turn", 600, 120, 400)
    silent = dataclasses.replace(spoken.clip, inner_pauses=())  # too short to be one
    server = FakeServer(answer_ms=50.0, reply_ms=1200.0, deaf=True)
    [outcome] = held(dataclasses.replace(spoken, clip=silent), server=server)
    assert outcome.latency_ms is not None
    assert -470.0 < outcome.latency_ms < -300.0
    assert outcome.takeover


@pytest.mark.parametrize(
    ("answer_ms", "reply_ms", "takeover", "takeover_v1", "sounds"),
    [
        (800.0, 1200.0, False, False, 0),  # waits for the end
        (200.0, 1200.0, True, True, 1),
        (200.0, 800.0, True, False, 1),  # too short for the published rule, a takeover all the same
        (200.0, SHORT_MS - 100, False, False, 1),  # "mm-hm" is allowed
    ],
)
def test_a_pause_is_kept_or_taken(
    answer_ms: float, reply_ms: float, takeover: bool, takeover_v1: bool, sounds: int
) -> None:
    server = FakeServer(answer_ms=answer_ms, reply_ms=reply_ms, deaf=True)
    [outcome] = held(trial("pause", 600, 600, 1500), server=server)
    assert (outcome.takeover, outcome.takeover_v1) == (takeover, takeover_v1)
    assert outcome.sounds_before_end == sounds


def test_an_interrupted_reply_stops_and_the_new_turn_is_answered() -> None:
    spoken = trial("interruption", 400, answer="", over=clip(700), over_answer="red fish")
    server = FakeServer(stop_ms=200.0, reply_ms=2000.0)
    [outcome] = held(dataclasses.replace(spoken, after_s=0.5), server=server)
    assert outcome.stop_ms == pytest.approx(200.0 + PLAYOUT_MS, abs=30.0)
    assert outcome.resumed is False
    assert outcome.right
    assert outcome.latency_ms == pytest.approx(300.0 + PLAYOUT_MS, abs=30.0)


def test_an_interruption_that_no_reply_was_sounding_for_is_not_tested() -> None:
    spoken = trial("interruption", 400, over=clip(700), after_s=0.5)
    [outcome] = held(spoken, server=FakeServer(mute_turns=(0,)))
    assert outcome.stop_ms is None
    [deaf] = held(spoken, server=FakeServer(deaf=True, reply_ms=2000.0))
    assert deaf.stop_ms is not None
    assert deaf.stop_ms > 400.0
    shares = figures([outcome, deaf], [], 0, 0)
    assert (shares.interruptions_untested, shares.silent_in_time) == (1, Share(0, 1))


def test_backchannels_are_counted_and_timed() -> None:
    pause = Span(to_samples(200 + 900), to_samples(200 + 900 + 600))
    truth = Span(pause.start + to_samples(250), pause.start + to_samples(500))
    spoken = trial("backchannel", 900, 600, 900, backchannels=(truth,))
    server = FakeServer(answer_ms=220.0, reply_ms=250.0, deaf=True)
    [outcome] = held(spoken, server=server)
    assert outcome.backchannels == 1
    assert outcome.takeover is False
    assert outcome.divergence is not None
    assert outcome.divergence < 0.35
    [silent] = held(spoken, server=FakeServer(mute_turns=(0, 1), answer_ms=220.0))
    assert (silent.backchannels, silent.divergence) == (0, 1.0)


def test_replies_to_noise_are_counted() -> None:
    cough = trial("noise", 100, 3000, 100)
    [outcome] = held(cough, server=FakeServer(reply_ms=500.0))
    assert outcome.false_replies == 2
    found = figures([outcome], [], 0, 0)
    assert found.noise_minutes == pytest.approx(outcome.seconds / 60)
    assert found.false_replies_per_minute == pytest.approx(2 / found.noise_minutes)


def test_a_dialogue_is_compared_with_its_truth() -> None:
    spoken = trial("dialogue", 1000, 2000, 1000)
    frames = round(len(spoken.clip.samples) / RATE_HZ / FRAME_S)
    person, agent = np.zeros((2, frames), bool)
    person[20:120] = person[320:420] = True
    agent[150:250] = True  # 300 ms after the person, until 700 ms before
    [outcome] = held(dataclasses.replace(spoken, activity=(person, agent)))
    assert outcome.live is not None
    assert outcome.truth is not None
    found = figures([outcome], [], 0, 0)
    assert found.difference is not None
    assert outcome.truth.gap.count == pytest.approx(2 * 60 / (frames * FRAME_S))
    assert found.difference.pause.count == 0
    assert found.difference.gap.count == pytest.approx(60 / (frames * FRAME_S))  # the second reply


def test_windows_count_what_touches_them() -> None:
    spans = [Span(0, to_samples(200)), Span(to_samples(399), to_samples(401))]
    assert windows(spans, to_samples(900)).tolist() == [1, 1, 1, 0, 0]


def test_the_divergence_goes_from_nothing_to_one() -> None:
    here, there, both = np.array([2.0, 0, 0]), np.array([0, 0, 5.0]), np.array([1.0, 0, 1.0])
    assert divergence(here, 3 * here) == 0.0
    assert divergence(here, there) == pytest.approx(1.0)
    assert divergence(here, both) == pytest.approx(divergence(both, here))
    # (log2(4/3) + (log2(2/3) + log2(2)) / 2) / 2, by hand
    assert divergence(here, both) == pytest.approx(0.3112781)
    assert divergence(here, np.zeros(3)) == 1.0
    assert divergence(np.zeros(3), np.zeros(3)) == 0.0


def outcome(task: Task, **fields: Any) -> Outcome:
    return Outcome(task, task, "plain", **({"settled": True} | fields))


def test_bars_hold_or_not() -> None:
    good = outcome("turn", answered=True, latency_ms=-20.0, understood=Understood(2, 2))
    late = outcome("turn", answered=True, latency_ms=700.0, understood=Understood(1, 2))
    babble = outcome("pause", takeover=False, settled=False)
    found = figures([good, good, late, babble], [Understood(2, 2)] * 3, 0, 2)
    assert found.negative_latencies == 2
    assert found.latency_ms.p50 == -20.0
    assert found.understood_share == pytest.approx(5 / 6)
    assert found.pause_takeover == Share(1, 1)  # who talks without end has taken the turn
    assert found.not_held == 2
    rows = {row["bar"]: row["holds"] for row in bars(found, "parrot")}
    assert list(rows.values()) == [False, True, True, None, False, None]


def test_recorded_speech_is_scored_by_what_is_known_of_it() -> None:
    paused, plain = trial("recorded", 600, 400, 600), trial("recorded", 600, answer="red fish")
    eager = FakeServer(answer_ms=200.0, reply_ms=1200.0, deaf=True)
    for server, cut_in in ((eager, True), (FakeServer(answer_ms=500.0), False)):
        [first] = held(paused, server=server)
        assert first.takeover is cut_in
        assert first.understood is None
    [second] = held(plain)
    found = figures([first, second], [], 0, 0)
    assert (found.recorded_cut_in, found.recorded_takeover) == (Share(0, 2), Share(2, 2))
    assert found.recorded_words_right == 1.0


def test_a_shares_interval() -> None:
    assert Share(5, 10).interval == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert Share(0, 0).interval is None
    assert str(Share(0, 0)) == "–"
