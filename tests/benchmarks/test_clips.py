"""The test clips' own claims: where speech starts, pauses and ends."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.clips import (
    PAUSE_S,
    Clip,
    filtered,
    joined,
    make_clips,
    make_interruptions,
    parse,
    recorded_clips,
    silent_gaps,
    trimmed,
    write_wav,
)
from benchmarks.phrases import TURNS
from handlers.messages import RATE_HZ, Samples


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return make_clips(seed=5, count=14, tail_s=0.5)


def tone(duration_s: float, level: float = 0.3) -> Samples:
    time = np.arange(int(duration_s * RATE_HZ)) / RATE_HZ
    return np.asarray(level * np.sin(2 * np.pi * 200.0 * time), np.float32)


def level(samples: Samples) -> float:
    return float(np.sqrt(np.mean(np.square(samples))))


def test_the_same_seed_gives_the_same_clips(clips: list[Clip]) -> None:
    again = make_clips(seed=5, count=3, tail_s=0.5)
    for one, other in zip(clips, again, strict=False):
        assert one.described() == other.described()
        assert np.array_equal(one.samples, other.samples)
    different = make_clips(seed=6, count=3, tail_s=0.5)
    assert [c.text for c in different] != [c.text for c in again]


def test_speech_is_loud_between_onset_and_end_only(clips: list[Clip]) -> None:
    for clip in clips:
        speech = level(clip.samples[clip.onset_sample : clip.last_voiced_sample])
        assert level(clip.samples[: clip.onset_sample]) < 0.2 * speech
        assert level(clip.samples[clip.last_voiced_sample + RATE_HZ // 4 :]) < 0.2 * speech
        assert len(clip.samples) == clip.last_voiced_sample + RATE_HZ // 2


def test_a_good_half_pauses_for_a_known_time(clips: list[Clip]) -> None:
    pausing = [clip for clip in clips if clip.kind != "plain"]
    assert len(pausing) == 8
    for clip in pausing:
        (pause,) = [p for p in clip.inner_pauses if p.text_before]
        assert PAUSE_S[0] - 0.03 <= pause.duration_s <= PAUSE_S[1] + 0.03
        assert clip.onset_sample < pause.start_sample < pause.end_sample < clip.last_voiced_sample
        assert clip.text.startswith(pause.text_before)
        quiet = level(clip.samples[pause.start_sample + RATE_HZ // 10 : pause.end_sample])
        assert quiet < 0.3 * level(clip.samples[clip.onset_sample : clip.last_voiced_sample])


def test_interruptions_take_turns_with_noises() -> None:
    made = make_interruptions(seed=1, count=6)
    assert [clip.kind for clip in made] == ["speech", "noise"] * 3
    assert all(bool(clip.text) is (clip.kind == "speech") for clip in made)


def test_a_recording_is_cut_at_long_pauses_only(tmp_path: Path) -> None:
    def room(duration_s: float) -> Samples:
        return tone(duration_s, 1e-3)

    parts = [room(0.3), tone(0.5), room(0.4), tone(0.7), room(1.2), tone(0.6), room(0.3)]
    write_wav(tmp_path / "two.wav", np.concatenate(parts))
    first, second = recorded_clips(tmp_path, tail_s=0.2)
    assert first.last_voiced_sample - first.onset_sample == pytest.approx(1.6 * RATE_HZ, abs=480)
    assert [p.duration_s for p in first.inner_pauses] == [pytest.approx(0.4, abs=0.02)]
    assert second.inner_pauses == ()


def test_parts_are_joined_by_exact_silence() -> None:
    speech = joined(tone(0.3), tone(0.3), 0.4)
    assert len(speech) == RATE_HZ
    (gap,) = silent_gaps(speech, 0.2)
    assert gap.duration_s == pytest.approx(0.4, abs=0.02)
    assert len(trimmed(np.pad(speech, RATE_HZ))) == pytest.approx(RATE_HZ, abs=240)


def test_every_phrase_can_pause_somewhere() -> None:
    assert len({phrase.lower() for phrase in TURNS}) == len(TURNS) >= 80
    for phrase in TURNS:
        words, breaks = parse(phrase)
        assert breaks
        assert all(0 < at < len(words) for at in breaks)
        assert not {"|", "/"} & set(words)


def test_filtering_is_convolution() -> None:
    rng = np.random.default_rng(0)
    samples = rng.standard_normal(1000).astype(np.float32)
    for taps in (1, 37):
        response = rng.standard_normal(taps)
        assert np.allclose(filtered(samples, response), np.convolve(samples, response)[:1000])
