"""Prosody cues on signals whose pitch and level are known."""

from __future__ import annotations

import numpy as np
import pytest

from handlers.messages import EAR_RATE_HZ, Prosody, Samples
from handlers.vad.prosody import MEMORY_FRAMES, ProsodyTracker

WINDOW = 512


def voice(*pitches_hz: float, duration_s: float = 1.0, level: float = 0.1) -> Samples:
    """A buzz of eight harmonics whose pitch moves through `pitches_hz` at even steps."""
    time = np.arange(int(duration_s * EAR_RATE_HZ)) / EAR_RATE_HZ
    points = np.linspace(0.0, duration_s, len(pitches_hz))
    pitch = np.exp(np.interp(time, points, np.log(pitches_hz)))
    phase = 2 * np.pi * np.cumsum(pitch) / EAR_RATE_HZ
    buzz = sum(np.sin(k * phase) / k for k in range(1, 9))
    return np.asarray(level * buzz, np.float32)


def silence(duration_s: float) -> Samples:
    return np.zeros(int(duration_s * EAR_RATE_HZ), np.float32)


def heard(*parts: Samples, step: int = WINDOW) -> Prosody | None:
    audio = np.concatenate(parts)
    tracker = ProsodyTracker()
    for start in range(0, len(audio), step):
        tracker.push(audio[start : start + step], 0.9)
    return tracker.describe()


def known(prosody: Prosody | None) -> Prosody:
    assert prosody is not None
    return prosody


@pytest.mark.parametrize("pitch_hz", [75.0, 120.0, 210.0, 400.0])
def test_level_pitch_is_level(pitch_hz: float) -> None:
    found = known(heard(voice(pitch_hz, pitch_hz), silence(0.1)))
    assert abs(found.pitch_end_st) < 0.3
    assert abs(found.pitch_slope_st_s) < 1.0
    assert found.pitch_fall_st < 0.3


def test_a_final_fall_is_measured_in_semitones() -> None:
    # An octave over the last of three seconds: 12 semitones per second.
    found = known(heard(voice(200.0, 200.0, 200.0, 100.0, duration_s=3.0), silence(0.1)))
    assert found.pitch_slope_st_s == pytest.approx(-12.0, abs=1.5)
    assert found.pitch_fall_st == pytest.approx(12.0 * 0.23, abs=0.8)
    assert found.pitch_end_st < -7.0
    assert found.pitch_above_low_st < 0.0


def test_a_rise_ends_above_the_median() -> None:
    found = known(heard(voice(150.0, 150.0, 150.0, 210.0, duration_s=2.0), silence(0.1)))
    assert found.pitch_slope_st_s > 5.0
    assert found.pitch_end_st > 4.0
    assert found.pitch_above_low_st > 4.0


def test_fading_and_breaking_off_differ() -> None:
    steady = voice(140.0, 140.0)
    fade = np.ones(len(steady), np.float32)
    fade[-4000:] = np.linspace(1.0, 0.12, 4000)
    broken = known(heard(steady, silence(0.1)))
    faded = known(heard(steady * fade, silence(0.1)))
    assert broken.fade_ms < 40.0
    assert faded.fade_ms > broken.fade_ms + 60.0


def test_loudness_does_not_matter() -> None:
    loud, soft = (
        known(heard(voice(180.0, 180.0, 130.0, level=level), silence(0.1)))
        for level in (0.3, 0.003)
    )
    assert loud.pitch_fall_st == pytest.approx(soft.pitch_fall_st, abs=0.1)
    assert loud.fade_ms == soft.fade_ms


def test_the_size_of_the_pushes_does_not_matter() -> None:
    audio = voice(180.0, 150.0, 130.0)
    assert heard(audio, step=WINDOW) == heard(audio, step=160) == heard(audio, step=len(audio))


def test_without_pitch_there_are_no_cues() -> None:
    hiss = np.random.default_rng(0).normal(0.0, 0.05, EAR_RATE_HZ).astype(np.float32)
    assert heard(silence(0.5)) is None
    assert heard(hiss) is None
    assert ProsodyTracker().describe() is None


def test_pitch_that_is_half_low_and_half_high_gives_no_cues() -> None:
    # With as many frames at each, the median lies between them and none is near it.
    high = voice(400.0, 400.0, duration_s=0.5)
    lows = [voice(100.0, 100.0, duration_s=0.5 + n * 0.004) for n in range(6)]
    assert None in [heard(low, silence(0.04), high) for low in lows]


def test_only_the_last_twenty_seconds_are_kept() -> None:
    minute = voice(200.0, 200.0, duration_s=60.0)
    recent = voice(120.0, 120.0, duration_s=MEMORY_FRAMES * 256 / EAR_RATE_HZ)
    assert abs(known(heard(minute, recent)).pitch_end_st) < 0.3
