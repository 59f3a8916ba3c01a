"""The person's audio on its way to the tick: late, early, missing, drifting; and resampled."""

import numpy as np
import pytest

from handlers.duplex.resample import FrameResampler
from handlers.duplex.stream import StreamSettings, UserStream
from handlers.messages import RATE_HZ, Samples

FRAME = 960
SETTINGS = StreamSettings(FRAME, jitter_samples=480, max_late_samples=4 * FRAME)


def steps(count: int, first: int = 1) -> Samples:
    """Audible frames that can be told apart: all samples of frame n are (first + n) / 1000."""
    values = np.repeat(np.arange(first, first + count) / 1000, FRAME)
    return values.astype(np.float32)


def number(frame: Samples | None) -> int:
    """Which frame of `steps` it begins with; 0 is silence."""
    return 0 if frame is None else round(float(frame[0]) * 1000)


class TestUserStream:
    def test_a_steady_client_is_heard_whole_and_in_order(self) -> None:
        stream = UserStream(SETTINGS)
        audio = steps(50)
        heard = []
        for at in range(0, len(audio), 480):  # blocks of 20 ms, two a tick
            stream.push(audio[at : at + 480])
            if at % FRAME == 480:
                heard.append(number(stream.take()))
        assert heard == [0, *range(1, 50)]  # one frame waits: the jitter that is allowed for
        assert stream.passed_over == 0
        assert stream.position == 49 * FRAME

    def test_what_comes_late_waits_and_what_comes_too_late_is_passed_over(self) -> None:
        stream = UserStream(SETTINGS)
        stream.push(steps(3))
        assert [number(stream.take()) for _ in range(3)] == [1, 2, 3]
        assert [number(stream.take()) for _ in range(25)] == [0] * 25  # a stall of a second
        stream.push(steps(25, first=4))
        after = [number(stream.take()) for _ in range(3)]
        assert stream.passed_over == 20 * FRAME
        assert after == [24, 25, 26]

    def test_a_short_stall_loses_nothing(self) -> None:
        stream = UserStream(SETTINGS)
        stream.push(steps(3))
        heard = [number(stream.take()) for _ in range(6)]
        stream.push(steps(3, first=4))
        heard += [number(stream.take()) for _ in range(3)]
        assert heard == [1, 2, 3, 0, 0, 0, 4, 5, 6]
        assert stream.passed_over == 0

    def test_the_delay_that_a_stall_left_is_made_up_for_in_silence(self) -> None:
        stream = UserStream(SETTINGS)
        stream.push(steps(3))
        for _ in range(6):
            stream.take()
        stream.push(steps(3, first=4))  # from now on three frames wait
        for count in range(100):
            stream.push(np.zeros(FRAME, np.float32) if count >= 60 else steps(1, first=7))
            stream.take()
        assert stream.waiting <= 2 * FRAME
        assert stream.passed_over == 0

    def test_a_client_faster_than_real_time_is_heard_at_its_pace(self) -> None:
        stream = UserStream(SETTINGS)
        stream.push(steps(100))
        assert [number(stream.take()) for _ in range(100)] == list(range(1, 101))
        assert stream.passed_over == 0

    def test_who_sends_only_speech_loses_none_after_a_pause(self) -> None:
        stream = UserStream(SETTINGS)
        for burst in range(3):
            heard = []
            for n in range(1, 6):
                stream.push(steps(1, first=n))
                heard.append(number(stream.take()))
            heard += [number(stream.take()) for _ in range(30)]
            assert [n for n in heard if n] == [1, 2, 3, 4, 5], burst
        assert stream.passed_over == 0

    def test_after_a_long_absence_a_burst_is_not_late(self) -> None:
        stream = UserStream(SETTINGS)
        stream.push(steps(2))
        for _ in range(260):  # more than ten seconds
            stream.take()
        stream.push(steps(50))
        assert [number(stream.take()) for _ in range(50)] == list(range(1, 51))

    @pytest.mark.parametrize("block_ms", [10, 60, 100, 200])
    def test_blocks_of_any_length_are_heard_whole(self, block_ms: int) -> None:
        stream = UserStream(SETTINGS)
        audio = steps(200)
        block = block_ms * RATE_HZ // 1000
        heard, sent = [], 0
        for tick in range(220):
            while sent + block <= (tick + 1) * FRAME and sent < len(audio):
                stream.push(audio[sent : sent + block])
                sent += block
            taken = stream.take()
            heard += [] if taken is None else [taken]
        np.testing.assert_array_equal(np.concatenate(heard)[: len(audio)], audio[:sent])
        assert stream.passed_over == 0

    def test_the_end_of_what_was_sent_is_heard_though_it_is_no_whole_frame(self) -> None:
        stream = UserStream(SETTINGS)
        stream.push(steps(2)[: FRAME + 700])
        assert number(stream.take()) == 1
        assert [number(stream.take()) for _ in range(5)] == [0] * 5  # more may still come
        tail = stream.take()
        assert tail is not None
        assert number(tail) == 2
        assert not tail[700:].any()

    def test_half_an_hour_of_a_fast_clock_does_not_pile_up(self) -> None:
        """A sound card 100 ppm fast: 180 ms in half an hour."""
        stream = UserStream(SETTINGS)
        sent = 0.0
        for tick in range(30 * 60 * 25):
            sent += FRAME * (1 + 100e-6)
            silent = tick % 100 < 20
            count = int(sent) - stream.received
            stream.push(np.full(count, 0.0 if silent else 0.3, np.float32))
            stream.take()
        assert stream.waiting <= 3 * FRAME
        assert stream.passed_over == 0


class TestResampler:
    @pytest.mark.parametrize(("from_hz", "to_hz"), [(24_000, 16_000), (16_000, 24_000)])
    def test_a_tone_keeps_its_shape_and_comes_a_millisecond_late(
        self, from_hz: int, to_hz: int
    ) -> None:
        frame = from_hz * 40 // 1000
        resampler = FrameResampler(from_hz, to_hz, frame, rows=3)
        time_s = np.arange(10 * frame) / from_hz
        tone = np.sin(2 * np.pi * 440 * time_s).astype(np.float32)
        frames = [
            resampler.push(tone[None, at : at + frame], [1])[0] for at in range(0, len(tone), frame)
        ]
        assert all(len(one) == to_hz * 40 // 1000 for one in frames)
        wanted = np.sin(2 * np.pi * 440 * (np.arange(10 * to_hz * 40 // 1000) / to_hz - 0.001))
        settled = to_hz // 100
        assert np.abs(np.concatenate(frames)[settled:] - wanted[settled:]).max() < 2e-3

    def test_rows_are_streams_of_their_own(self) -> None:
        audio = np.random.default_rng(0).standard_normal((3, 5, 960)).astype(np.float32)
        together = FrameResampler(24_000, 16_000, 960, rows=4)
        outputs = [together.push(audio[:, n], [2, 0, 3]) for n in range(5)]
        for row in range(3):
            alone = FrameResampler(24_000, 16_000, 960, rows=1)
            for n in range(5):
                np.testing.assert_array_equal(
                    alone.push(audio[row : row + 1, n], [0])[0], outputs[n][row]
                )

    def test_a_row_begins_anew(self) -> None:
        resampler = FrameResampler(24_000, 16_000, 960, rows=1)
        audio = np.random.default_rng(0).standard_normal((1, 960)).astype(np.float32)
        first = resampler.push(audio, [0])
        resampler.reset(0)
        np.testing.assert_array_equal(resampler.push(audio, [0]), first)

    def test_no_resampling_changes_nothing(self) -> None:
        audio = np.ones((1, 1920), np.float32)
        np.testing.assert_array_equal(
            FrameResampler(24_000, 24_000, 1920, 1).push(audio, [0]), audio
        )

    def test_frames_that_do_not_fit_are_refused(self) -> None:
        with pytest.raises(ValueError, match="no whole number"):
            FrameResampler(24_000, 16_000, 961, rows=1)
