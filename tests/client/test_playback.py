from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from client.playback import FADE_SAMPLES, MS, PlaybackBuffer, PlaybackOptions, Progress
from handlers.messages import Samples
from tests.client.fakes import tone

BLOCK = 20 * MS
AT_ONCE = PlaybackOptions(start_ms=0, min_start_ms=0)


def pull_all(buffer: PlaybackBuffer, n_samples: int, block: int = BLOCK) -> Samples:
    return np.concatenate([buffer.pull(block) for _ in range(n_samples // block)])


def ramp(n_samples: int) -> Samples:
    """[T] where every sample tells its own position."""
    return np.arange(1, n_samples + 1, dtype=np.float32) / np.float32(2**20)


def test_plays_what_was_pushed_and_counts_it() -> None:
    buffer = PlaybackBuffer(AT_ONCE)
    audio = ramp(100 * MS)
    buffer.push("a", 0, audio[:1000])
    buffer.push("a", 1000, audio[1000:])
    out = np.concatenate([buffer.pull(700), buffer.pull(1), buffer.pull(799)])
    np.testing.assert_array_equal(out, audio[:1500])
    assert buffer.take_progress() == [Progress("a", 1500)]
    assert buffer.take_progress() == []
    assert buffer.depth_samples == 900


def test_nothing_to_play_is_silence() -> None:
    buffer = PlaybackBuffer()
    assert not buffer.pull(BLOCK).any()
    assert buffer.flush() is None
    assert buffer.take_progress() == []


def test_long_first_chunk_plays_at_once_and_a_short_one_waits_a_bounded_time() -> None:
    long = PlaybackBuffer()
    long.push("a", 0, ramp(40 * MS))
    assert long.pull(BLOCK)[0] == ramp(1)[0]

    short = PlaybackBuffer()
    short.push("a", 0, ramp(5 * MS))
    assert not short.pull(BLOCK).any()
    assert not short.pull(BLOCK).any()
    assert short.pull(BLOCK).any()


def test_complete_short_reply_does_not_wait() -> None:
    buffer = PlaybackBuffer()
    buffer.push("a", 0, ramp(5 * MS))
    buffer.end("a")
    assert buffer.pull(BLOCK).any()


def test_silence_after_the_last_sample_is_reached_without_a_click() -> None:
    buffer = PlaybackBuffer(AT_ONCE)
    buffer.push("a", 0, np.full(BLOCK, 0.8, np.float32))
    buffer.pull(BLOCK)
    out = buffer.pull(BLOCK)
    assert np.abs(np.diff(np.concatenate([[0.8], out]))).max() < 0.02
    assert not out[FADE_SAMPLES:].any()


def test_flush_is_immediate_and_tells_the_exact_position() -> None:
    buffer = PlaybackBuffer(AT_ONCE)
    buffer.push("a", 0, tone(500 * MS))
    pull_all(buffer, 100 * MS)
    assert buffer.flush() == Progress("a", 100 * MS)
    out = buffer.pull(BLOCK)
    assert not out[FADE_SAMPLES:].any()
    assert buffer.flush() is None
    assert buffer.take_progress() == []


def test_audio_sent_again_after_a_flush_goes_on_at_its_own_position() -> None:
    buffer = PlaybackBuffer()
    buffer.push("a", 0, ramp(500 * MS))
    pull_all(buffer, 100 * MS)
    buffer.flush()
    pull_all(buffer, 300 * MS)
    buffer.push("a", 2400, ramp(500 * MS)[2400:])
    out = buffer.pull(BLOCK)
    np.testing.assert_array_equal(out[FADE_SAMPLES:], ramp(2400 + BLOCK)[2400 + FADE_SAMPLES :])
    assert buffer.lag_samples == 0
    assert buffer.flush() == Progress("a", 2400 + BLOCK)


def test_flush_before_anything_was_played_says_zero() -> None:
    buffer = PlaybackBuffer()
    buffer.push("a", 0, ramp(10))
    assert buffer.flush() == Progress("a", 0)


def test_flush_keeps_the_end_of_the_item_before() -> None:
    buffer = PlaybackBuffer(AT_ONCE)
    buffer.push("a", 0, ramp(BLOCK))
    buffer.push("b", 0, ramp(10 * BLOCK))
    pull_all(buffer, 2 * BLOCK)
    assert buffer.flush() == Progress("b", BLOCK)
    assert buffer.take_progress() == [Progress("a", BLOCK)]


def test_flush_after_the_reply_has_ended_interrupts_nothing() -> None:
    buffer = PlaybackBuffer(AT_ONCE)
    buffer.push("a", 0, ramp(BLOCK))
    buffer.end("a")
    buffer.pull(BLOCK)
    assert buffer.flush() is None


def test_a_lot_of_audio_at_once_is_all_played_unchanged() -> None:
    buffer = PlaybackBuffer()
    speech = np.concatenate([tone(200 * MS), np.zeros(400 * MS, np.float32), tone(200 * MS)])
    buffer.push("a", 0, np.tile(speech, 10))
    np.testing.assert_array_equal(pull_all(buffer, 8000 * MS), np.tile(speech, 10))


def test_underrun_deepens_the_buffer_and_clean_items_make_it_shallow_again() -> None:
    buffer = PlaybackBuffer()
    first = buffer.start_depth_samples
    buffer.push("a", 0, tone(40 * MS))
    pull_all(buffer, 100 * MS)  # 60 ms too long
    buffer.push("a", 40 * MS, tone(BLOCK))
    assert buffer.start_depth_samples == first + 60 * MS
    assert not buffer.pull(BLOCK)[FADE_SAMPLES:].any()  # waits for depth
    for n in range(1, 9):
        buffer.push("a", 40 * MS + n * BLOCK, tone(BLOCK))
    assert buffer.pull(BLOCK).any()
    pull_all(buffer, 400 * MS)
    depths = []
    for item in "bcdefg":
        buffer.push(item, 0, tone(200 * MS))
        buffer.end(item)
        pull_all(buffer, 300 * MS)
        depths.append(buffer.start_depth_samples // MS)
    assert depths == [100, 50, 25, 20, 20, 20]


def test_the_depth_is_bounded() -> None:
    buffer = PlaybackBuffer()
    buffer.push("a", 0, tone(40 * MS))
    pull_all(buffer, 5000 * MS)
    buffer.push("a", 40 * MS, tone(40 * MS))
    assert buffer.start_depth_samples == PlaybackOptions().max_start_ms * MS


def test_the_end_of_a_reply_is_no_underrun() -> None:
    for tell_end in (True, False):
        buffer = PlaybackBuffer()
        first = buffer.start_depth_samples
        buffer.push("a", 0, tone(40 * MS))
        if tell_end:
            buffer.end("a")
        pull_all(buffer, 1000 * MS)
        buffer.push("b", 0, tone(40 * MS))
        assert buffer.start_depth_samples == first
        assert buffer.pull(BLOCK).any()
        assert buffer.lag_samples == 0


def stalled(buffer: PlaybackBuffer, speech: Samples, stall_ms: int) -> Samples:
    """Play `speech` from a server 200 ms ahead whose network stalls once, at 400 ms."""
    sent, out = 0, []
    for tick in range(len(speech) // BLOCK + 100):
        now = tick * BLOCK
        due = min(len(speech), now + 200 * MS)
        if not 400 * MS <= now < (400 + stall_ms) * MS and due > sent:
            buffer.push("a", sent, speech[sent:due])
            sent = due
        out.append(buffer.pull(BLOCK))
    return np.concatenate(out)


def test_lag_from_an_underrun_is_paid_back_in_pauses_and_no_speech_is_lost() -> None:
    pause = np.zeros(400 * MS, np.float32)
    speech = np.concatenate([tone(600 * MS), pause, tone(600 * MS), pause, tone(600 * MS)])
    buffer = PlaybackBuffer()
    out = stalled(buffer, speech, stall_ms=800)
    assert buffer.take_progress() == [Progress("a", len(speech))]
    assert buffer.lag_samples <= 200 * MS  # what the lead keeps is not paid back
    loud = np.flatnonzero(np.abs(out) > 0.01)
    assert loud[-1] < len(speech) + 220 * MS  # it would be 600 ms late
    sounding = np.convolve(np.abs(out) > 0.01, np.ones(5 * MS), "same") > 0
    assert abs(int(sounding.sum()) - 1800 * MS) < 40 * MS  # all of the three tones
    edges = np.flatnonzero(np.diff(sounding.astype(int)))
    pauses = (edges[2::2] - edges[1:-1:2]) // MS
    assert pauses[1:].min() >= PlaybackOptions().pause_ms


def test_without_pauses_nothing_is_cut() -> None:
    speech = tone(2000 * MS)
    buffer = PlaybackBuffer()
    out = stalled(buffer, speech, stall_ms=600)
    first = out[: 560 * MS]
    np.testing.assert_array_equal(first, speech[: 560 * MS])
    heard = np.abs(out) > 0.001
    assert abs(int(heard.sum()) - int((np.abs(speech) > 0.001).sum())) < 10 * MS
    assert buffer.lag_samples > 0


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("push"), st.sampled_from("ab"), st.integers(0, 3000)),
            st.tuples(st.just("pull"), st.just(""), st.integers(1, 2000)),
            st.tuples(st.just("flush"), st.just(""), st.just(0)),
            st.tuples(st.just("end"), st.sampled_from("ab"), st.just(0)),
        ),
        max_size=40,
    )
)
@settings(max_examples=100, deadline=None)
def test_any_order_of_calls(steps: list[tuple[str, str, int]]) -> None:
    """Never more played than pushed, never anything but pushed samples, never after a flush."""
    buffer = PlaybackBuffer(replace(PlaybackOptions(), lead_ms=0))
    pushed = {"a": 0, "b": 0}
    for step, item, count in steps:
        if step == "push":
            buffer.push(item, pushed[item], np.ones(count, np.float32))
            pushed[item] += count
        elif step == "end":
            buffer.end(item)
        elif step == "flush":
            buffer.flush()
            assert buffer.depth_samples == 0
            assert not buffer.pull(100)[FADE_SAMPLES:].any()
        else:
            before = buffer.depth_samples
            out = buffer.pull(count)
            assert out.shape == (count,)
            assert out.min() >= 0
            assert out.max() <= 1
            assert buffer.depth_samples == before or np.count_nonzero(out)
        for progress in buffer.take_progress():
            assert 0 < progress.played_samples <= pushed[progress.item_id]


def test_pushing_while_the_callback_pulls_loses_nothing() -> None:
    buffer = PlaybackBuffer(AT_ONCE)
    audio = ramp(200 * BLOCK)
    positions = [0]
    started = threading.Barrier(2)

    def play() -> None:
        started.wait()
        while positions[-1] < len(audio):
            buffer.pull(97)
            positions.extend(progress.played_samples for progress in buffer.take_progress())

    player = threading.Thread(target=play, daemon=True)
    player.start()
    started.wait()
    for start in range(0, len(audio), BLOCK):
        buffer.push("a", start, audio[start : start + BLOCK])
    player.join(10)
    assert positions[-1] == len(audio)
    assert max(np.diff(positions)) <= 97
