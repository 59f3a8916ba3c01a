"""The endpoint policy on cues as the recogniser and the prosody tracker give them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.messages import Prosody
from server.endpointing import Cues, LevelGate, TextPolicy, TextPolicySettings, hangs

FALLING = Prosody(
    pitch_end_st=-3.0,
    pitch_above_low_st=0.0,
    pitch_slope_st_s=-14.0,
    pitch_fall_st=4.5,
    fade_ms=80.0,
)
SUSTAINED = Prosody(
    pitch_end_st=2.0,
    pitch_above_low_st=4.0,
    pitch_slope_st_s=8.0,
    pitch_fall_st=-1.0,
    fade_ms=20.0,
)
POLICY = TextPolicy()
SETTINGS = TextPolicySettings()


def hold_ms(
    text: str, end: float | None, voiced_ms: float, prosody: Prosody | None = None
) -> float:
    return POLICY.hold_ms(Cues(text, end, prosody, voiced_ms))


# Probabilities are those of the recogniser's own language model.
@pytest.mark.parametrize(
    ("text", "end", "voiced_ms"),
    [
        ("set a timer for twenty five minutes", 0.21, 1900.0),
        ("could you play some quiet music", 0.18, 1700.0),
        ("i would like to book a table for four on friday evening", 0.25, 2900.0),
        ("please remind me to call my sister tomorrow morning", 0.34, 2600.0),
        ("yes", 0.22, 350.0),
        ("thank you", 0.32, 500.0),
        ("what time is it", 0.11, 800.0),
    ],
)
def test_finished_turns_are_answered_soon(text: str, end: float, voiced_ms: float) -> None:
    assert hold_ms(text, end, voiced_ms) == SETTINGS.finished_ms


@pytest.mark.parametrize(
    ("text", "end", "voiced_ms"),
    [
        ("my order number is", 0.042, 1100.0),
        ("i would like to", 0.011, 700.0),
        ("i would like to book a", 0.005, 1000.0),
        ("set a timer for", 0.019, 900.0),
        ("i forgot to", 0.005, 700.0),
        ("let me think", 0.095, 700.0),
        ("we went to the beach and", 0.02, 1200.0),
    ],
)
def test_plainly_unfinished_turns_are_waited_for(text: str, end: float, voiced_ms: float) -> None:
    assert hold_ms(text, end, voiced_ms) == SETTINGS.unfinished_ms


@pytest.mark.parametrize(
    "cues",
    [
        Cues("", None, FALLING, 900.0),
        Cues("", 0.3, None, 900.0),
        Cues("how are you", None, FALLING, 3000.0),
        Cues("wie spät ist es", 0.3, FALLING, 3000.0),
        Cues("какой сегодня день", None, None, 3000.0),
    ],
)
def test_without_evidence_a_pause_is_an_unsure_one(cues: Cues) -> None:
    assert POLICY.hold_ms(cues) == SETTINGS.unsure_ms


def test_a_short_fragment_is_unsure() -> None:
    assert hold_ms("the music", 0.12, 500.0) == SETTINGS.unsure_ms


def test_dictated_numbers_may_go_on() -> None:
    assert hold_ms("my phone number is zero seven seven", 0.2, 2400.0) == SETTINGS.unsure_ms
    assert hold_ms("what is seventeen times twenty three", 0.2, 2400.0) == SETTINGS.finished_ms


def test_the_voice_decides_a_close_case() -> None:
    close = ("tell me a story about a dragon", 0.12, 1500.0)
    assert hold_ms(*close, FALLING) == SETTINGS.finished_ms
    assert hold_ms(*close, SUSTAINED) == SETTINGS.unsure_ms


def test_no_voice_makes_a_hanging_turn_finished() -> None:
    # Only the wait is shorter if it falls: the last word may have been misheard.
    hanging = ("we went to the beach and", 0.02, 4000.0)
    assert hold_ms(*hanging, FALLING) == SETTINGS.unsure_ms
    assert hold_ms("my order number is", 0.042, 1100.0, SUSTAINED) == SETTINGS.unfinished_ms


@pytest.mark.parametrize(
    "text",
    ["yes it is", "of course i can", "where are you from", "what is it for", "here they are"],
)
def test_some_function_words_may_end_a_turn(text: str) -> None:
    assert not hangs(text.split())


@pytest.mark.parametrize("text", ["the answer is", "wait for", "a loaf of", "um", "let me see"])
def test_others_may_not(text: str) -> None:
    assert hangs(text.split())


def test_a_turn_model_that_is_sure_counts_more_than_the_voice() -> None:
    finished = Cues("set a timer for twenty five minutes", 0.21, FALLING, 1900.0)
    assert POLICY.hold_ms(finished) == SETTINGS.finished_ms
    assert POLICY.hold_ms(dataclasses.replace(finished, complete=0.5)) == SETTINGS.finished_ms
    assert POLICY.hold_ms(dataclasses.replace(finished, complete=0.05)) == SETTINGS.unsure_ms
    unsure = Cues("open", 0.01, None, 400.0)
    assert POLICY.hold_ms(unsure) == SETTINGS.unsure_ms
    assert POLICY.hold_ms(dataclasses.replace(unsure, complete=0.5)) == SETTINGS.unsure_ms
    assert POLICY.hold_ms(dataclasses.replace(unsure, complete=0.95)) == SETTINGS.finished_ms


def test_a_turn_model_does_not_count_more_than_plain_words() -> None:
    hanging = Cues("my order number is", 0.042, SUSTAINED, 1100.0, complete=0.98)
    assert POLICY.hold_ms(hanging) == SETTINGS.unfinished_ms
    number = Cues("my number is zero seven seven", 0.2, FALLING, 2400.0, complete=0.98)
    assert POLICY.hold_ms(number) == SETTINGS.unsure_ms
    assert POLICY.hold_ms(Cues("yes", 0.22, None, 350.0, complete=0.02)) == SETTINGS.finished_ms


@pytest.mark.parametrize("text", ["", "¿qué hora es?", "what time is it"])
def test_a_turn_model_decides_where_there_is_no_other_evidence(text: str) -> None:
    cues = Cues(text, None, None, 900.0)
    assert POLICY.hold_ms(dataclasses.replace(cues, complete=0.95)) == SETTINGS.finished_ms
    assert POLICY.hold_ms(dataclasses.replace(cues, complete=0.5)) == SETTINGS.unsure_ms


def test_a_longer_wait_for_finished_turns_lengthens_the_others() -> None:
    patient = TextPolicy(TextPolicySettings(finished_ms=1000.0))
    assert patient.hold_ms(Cues("thank you", 0.32, None, 500.0)) == 1000.0
    assert patient.hold_ms(Cues("", None, None, 500.0)) == 1000.0
    assert patient.hold_ms(Cues("i would like to", 0.01, None, 700.0)) == 1500.0
    eager = TextPolicy(TextPolicySettings(finished_ms=100.0))
    assert eager.hold_ms(Cues("thank you", 0.32, None, 500.0)) == 100.0


number = st.floats(allow_nan=False, allow_infinity=False, width=32)
prosodies = st.none() | st.builds(Prosody, number, number, number, number, number)


chance = st.none() | st.floats(0.0, 1.0)


@given(st.text(), chance, prosodies, st.floats(0.0, 1e6), chance)
def test_every_hold_is_within_the_settings(
    text: str,
    end: float | None,
    prosody: Prosody | None,
    voiced_ms: float,
    complete: float | None,
) -> None:
    hold = POLICY.hold_ms(Cues(text, end, prosody, voiced_ms, complete))
    assert SETTINGS.finished_ms <= hold <= SETTINGS.unfinished_ms


@given(st.floats(0.0, 1.0), st.floats(0.0, 1.0), prosodies, st.floats(0.0, 5000.0))
def test_a_likelier_end_is_never_waited_for_longer(
    one: float, other: float, prosody: Prosody | None, voiced_ms: float
) -> None:
    cues = Cues("play the concert again", min(one, other), prosody, voiced_ms)
    likelier = dataclasses.replace(cues, end_probability=max(one, other))
    assert POLICY.hold_ms(likelier) <= POLICY.hold_ms(cues)


# The level gate.

SPEECH_DB, ROOM_DB = -25.0, -60.0


def gated(windows: list[tuple[float, float]]) -> list[float]:
    gate = LevelGate()
    return [gate(probability, level_db) for probability, level_db in windows]


def test_the_gate_ends_speech_where_its_sound_ends() -> None:
    room, speech = [(0.02, ROOM_DB)] * 10, [(0.95, SPEECH_DB)] * 20
    lag = [(0.9, ROOM_DB), (0.7, ROOM_DB), (0.4, ROOM_DB)]
    assert gated(room + speech + lag) == [0.02] * 10 + [0.95] * 20 + [0.0] * 3


def test_the_gate_lets_soft_sounds_of_a_word_pass() -> None:
    assert gated([(0.02, ROOM_DB)] * 5 + [(0.9, SPEECH_DB), (0.8, SPEECH_DB - 25.0)])[-1] == 0.8


def test_the_gate_lets_speech_pass_in_a_loud_room() -> None:
    # 6 dB above the room, which is more than the gate believes of it.
    assert gated([(0.02, -31.0)] * 50 + [(0.9, SPEECH_DB)] * 5)[-5:] == [0.9] * 5


def test_a_soft_speaker_is_heard_after_a_loud_one() -> None:
    soft = gated([(0.9, -10.0)] + [(0.05, -70.0)] * 250 + [(0.9, -50.0)])
    assert soft[-1] == 0.9
    assert gated([(0.9, -10.0), (0.05, -70.0), (0.9, -50.0)])[-1] == 0.0


@given(st.lists(st.tuples(st.floats(0.0, 1.0), st.floats(-120.0, 0.0))))
def test_the_gate_only_takes_away(windows: list[tuple[float, float]]) -> None:
    passed = gated(windows)
    assert all(p in (0.0, probability) for p, (probability, _) in zip(passed, windows, strict=True))
    assert np.all(np.isfinite(passed))
