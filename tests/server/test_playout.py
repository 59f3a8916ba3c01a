"""Pacing and hearing: what goes out when, and what was heard of it."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from handlers.messages import RATE_HZ
from server.playout import Playout, PlayoutSettings

LEAD_S = 0.2


def ramp(start: int, count: int) -> np.ndarray:
    return np.arange(start, start + count, dtype=np.float32)


def filled(seconds: float) -> Playout:
    playout = Playout(PlayoutSettings(lead_s=LEAD_S))
    playout.push(ramp(0, round(seconds * RATE_HZ)))
    playout.end()
    return playout


def play(playout: Playout, from_s: float, to_s: float) -> None:
    """Send whatever falls due, as a session does."""
    for tick in range(round((to_s - from_s) / 0.01) + 1):
        playout.due(from_s + tick * 0.01)


def test_sends_a_lead_at_once_and_then_in_real_time() -> None:
    playout = filled(2.0)
    first = playout.due(10.0)
    assert first[0][0] == 0
    assert playout.sent == round(LEAD_S * RATE_HZ)
    assert playout.due(10.0) == []
    play(playout, 10.0, 10.5)
    assert abs(playout.sent - (0.5 + LEAD_S) * RATE_HZ) <= 0.04 * RATE_HZ
    assert playout.heard(10.5) == RATE_HZ // 2


def test_deadline_is_when_the_next_chunk_is_due() -> None:
    playout = filled(2.0)
    playout.due(0.0)
    deadline_s = playout.deadline_s(0.0)
    assert deadline_s is not None
    assert playout.due(deadline_s - 0.005) == []
    assert len(playout.due(deadline_s)) == 1


def test_finished_when_heard_not_when_sent() -> None:
    playout = filled(0.1)
    playout.due(0.0)
    assert playout.drained
    assert not playout.finished(0.05)
    deadline_s = playout.deadline_s(0.05)
    assert deadline_s is not None
    assert playout.finished(deadline_s)


def test_an_underrun_is_not_counted_as_heard() -> None:
    playout = Playout(PlayoutSettings(lead_s=LEAD_S))
    playout.push(ramp(0, RATE_HZ // 10))
    playout.due(0.0)
    assert playout.heard(5.0) == RATE_HZ // 10
    playout.push(ramp(RATE_HZ // 10, RATE_HZ))
    playout.due(5.0)
    assert playout.heard(5.0) == RATE_HZ // 10
    assert playout.heard(5.1) == RATE_HZ // 5


def test_pause_freezes_and_resume_sends_again_from_the_heard_sample() -> None:
    playout = filled(2.0)
    play(playout, 0.0, 0.5)
    playout.pause(0.5)
    assert playout.due(9.0) == []
    assert playout.deadline_s(9.0) is None
    playout.resume(9.0)
    start, samples = playout.due(9.0)[0]
    assert start == RATE_HZ // 2
    assert samples[0] == start


def test_a_report_during_the_pause_moves_the_resume() -> None:
    playout = filled(2.0)
    play(playout, 0.0, 0.5)
    playout.pause(0.5)
    playout.report(RATE_HZ // 4, 0.6)
    assert playout.heard(3.0) == RATE_HZ // 4
    playout.resume(3.0)
    assert playout.due(3.0)[0][0] == RATE_HZ // 4


def test_a_report_beyond_what_was_sent_is_clamped() -> None:
    playout = filled(2.0)
    playout.due(0.0)
    playout.report(10**9, 0.0)
    assert playout.heard(0.0) == playout.sent


def test_a_listener_that_stopped_playing_is_not_sent_more() -> None:
    playout = filled(60.0)
    for tick in range(100):
        playout.due(tick * 0.1)
        playout.report(1000, tick * 0.1)
    assert playout.sent <= 1000 + (LEAD_S + 0.15) * RATE_HZ


def test_a_listener_that_ran_dry_gets_a_longer_lead() -> None:
    playout = filled(9.0)
    play(playout, 0.0, 1.0)
    for second in range(1, 8):
        playout.report(playout.sent, float(second))
        play(playout, float(second), second + 0.5)
    assert 0.5 * RATE_HZ < playout.sent - playout.heard(7.5) <= 0.6 * RATE_HZ


def test_a_listener_that_flushed_the_end_is_not_waited_for() -> None:
    playout = filled(0.5)
    play(playout, 0.0, 0.4)
    assert playout.drained
    for tick in range(10):
        playout.report(2400, 0.4 + tick * 0.1)
    assert playout.finished(1.4)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["push", "due", "pause", "resume", "report", "end"]),
            st.integers(0, RATE_HZ),
            st.floats(0, 0.3),
        ),
        max_size=60,
    )
)
def test_any_order_of_calls_sends_each_sample_in_order(
    calls: list[tuple[str, int, float]],
) -> None:
    playout, now_s, expected = Playout(), 0.0, 0
    for name, number, wait_s in calls:
        now_s += wait_s
        match name:
            case "push" if not playout.ended:
                playout.push(ramp(playout.total, number))
            case "due":
                for start, samples in playout.due(now_s):
                    assert start == expected
                    assert np.array_equal(samples, ramp(start, len(samples)))
                    expected += len(samples)
            case "pause":
                playout.pause(now_s)
            case "resume":
                playout.resume(now_s)
                expected = playout.sent
            case "report":
                playout.report(number, now_s)
            case "end":
                playout.end()
        assert 0 <= playout.heard(now_s) <= playout.total
        assert playout.sent <= playout.total
