"""The turn machine on a virtual clock: one VAD window is 32 ms, time is what the test says."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.messages import RATE_HZ
from server.backchannel import interrupts
from server.endpointing import Cues
from server.turns import (
    Drop,
    EndTurn,
    FinishText,
    Interrupt,
    Open,
    Pause,
    Phase,
    Resume,
    Speculate,
    Turns,
    TurnSettings,
    Withdraw,
)

WINDOW = 768


@dataclass
class FixedPolicy:
    """Holds by the turn model, else by text: 'unfinished' texts end with 'and'."""

    seen: list[Cues] = field(default_factory=list)

    def hold_ms(self, cues: Cues) -> float:
        self.seen.append(cues)
        unfinished = cues.text.endswith("and") if cues.complete is None else cues.complete < 0.5
        return 1500.0 if unfinished else 320.0


class Scene:
    """Feeds a machine and keeps what it decided."""

    def __init__(self, settings: TurnSettings | None = None) -> None:
        self.policy = FixedPolicy()
        self.machine = Turns(settings or TurnSettings(), self.policy)
        self.position = 0
        self.now_s = 0.0
        self.log: list[object] = []

    def hear(self, ms: float, voiced: bool, dull: bool = False) -> list[object]:
        """So much audio; an asked-for text does not come by itself."""
        out: list[object] = []
        for _ in range(round(ms / 32)):
            self.position += WINDOW
            self.now_s += 0.032
            probability = 0.95 if voiced else 0.02
            out += self.machine.voice(self.position, probability, self.now_s, dull=dull)
        self.log += out
        return out

    def speech(self, ms: float) -> list[object]:
        return self.hear(ms, True)

    def silence(self, ms: float) -> list[object]:
        return self.hear(ms, False)

    def text(self, text: str, partial: bool = False) -> list[object]:
        revision = None if partial else self.machine.revision
        out = self.machine.transcript(text, revision, None, None, self.now_s)
        self.log += out
        return list(out)

    def tick(self, ms: float) -> list[object]:
        self.now_s += ms / 1000
        out = self.machine.tick(self.now_s)
        self.log += out
        return list(out)


def test_a_turn_from_onset_to_release() -> None:
    scene = Scene()
    assert scene.silence(1000) == []
    onset = scene.position
    assert scene.speech(32) == []
    assert scene.speech(32) == [Open(onset - 300 * 24)]
    assert scene.speech(1000) == []
    assert scene.silence(64) == []
    assert scene.silence(32) == [FinishText(1)]
    assert scene.text("what time is it") == [Speculate("what time is it")]
    assert scene.silence(192) == []
    ended = scene.silence(32)
    assert ended == [EndTurn(scene.position, "what time is it", respond=True)]
    assert scene.position - scene.machine.last_voiced == pytest.approx(0.32 * RATE_HZ, abs=WINDOW)


def test_an_unfinished_turn_is_held_longer() -> None:
    scene = Scene()
    scene.speech(500)
    scene.silence(96)
    scene.text("call john and")
    assert scene.silence(1300) == []
    assert [type(a) for a in scene.silence(160)] == [EndTurn]


def test_speech_after_the_soft_end_withdraws_the_reply() -> None:
    scene = Scene()
    scene.speech(500)
    scene.silence(96)
    scene.text("call john and")
    assert scene.speech(32) == []
    assert scene.speech(32) == [Withdraw()]
    assert scene.speech(200) == []
    assert scene.silence(96) == [FinishText(2)]
    assert scene.text("call john and mary") == [Speculate("call john and mary")]
    assert scene.silence(224)[-1] == EndTurn(scene.position, "call john and mary", respond=True)


def test_a_click_during_the_hold_neither_withdraws_nor_ends() -> None:
    scene = Scene()
    scene.speech(500)
    scene.silence(96)
    scene.text("yes please")
    scene.silence(160)
    assert scene.speech(32) == []
    assert [type(a) for a in scene.silence(64)] == [EndTurn]


def test_a_text_that_comes_late_ends_the_turn_when_it_comes() -> None:
    scene = Scene()
    scene.speech(500)
    scene.silence(640)
    assert [type(a) for a in scene.text("hello")] == [Speculate, EndTurn]


def test_a_text_for_an_earlier_revision_is_ignored() -> None:
    scene = Scene()
    scene.speech(500)
    scene.silence(96)
    scene.speech(100)
    scene.silence(96)
    assert scene.machine.transcript("old", 1, None, None, scene.now_s) == []
    assert scene.text("new") == [Speculate("new")]


def test_better_words_that_come_later_revise_the_hold() -> None:
    scene = Scene()
    scene.speech(500)
    scene.silence(96)
    hear = scene.machine.transcript
    assert hear("Right.", 1, None, None, scene.now_s, "call john and") == [Speculate("Right.")]
    assert scene.silence(320) == []
    late = hear("Right.", 1, 0.5, None, scene.now_s, "call john")
    assert late == [EndTurn(scene.position, "Right.", respond=True)]


def test_words_for_a_noise_in_which_the_quicker_recogniser_hears_none() -> None:
    scene = Scene()
    scene.speech(160)
    scene.silence(96)
    hear = scene.machine.transcript
    assert hear("Thank you.", 1, None, None, scene.now_s, "") == []
    assert [type(a) for a in scene.silence(640)] == [Drop]
    scene = Scene()
    scene.speech(160)
    scene.silence(96)
    hear = scene.machine.transcript
    assert hear("Yes.", 1, None, None, scene.now_s, "") == []  # it has not got so far yet
    assert hear("Yes.", 1, 0.5, None, scene.now_s, "yes") == [Speculate("Yes.")]


def test_over_a_reply_the_quicker_recogniser_decides() -> None:
    scene = Scene()
    scene.machine.reply(True)
    scene.speech(300)
    hear = scene.machine.transcript
    assert hear("", None, None, None, scene.now_s, "uh") == []
    scene.silence(96)
    assert hear("Thank you.", 1, None, None, scene.now_s, "uh") == []  # of a cough
    better = hear("Thank you.", 1, 0.5, None, scene.now_s, "thank you")
    assert better == [Interrupt(), Speculate("Thank you.")]


def test_a_turn_model_revises_the_hold_when_it_answers() -> None:
    scene = Scene()
    scene.speech(500)
    scene.silence(96)
    scene.text("call john and")
    assert scene.silence(320) == []
    late = scene.machine.completeness(0.97, 1, scene.now_s)
    assert late == [EndTurn(scene.position, "call john and", respond=True)]
    scene = Scene()
    scene.speech(500)
    scene.silence(96)
    scene.text("yes please")
    assert scene.machine.completeness(0.02, 1, scene.now_s) == []
    assert scene.silence(1300) == []
    assert [type(a) for a in scene.silence(160)] == [EndTurn]


def test_a_turn_model_may_answer_before_the_text() -> None:
    scene = Scene()
    scene.speech(500)
    scene.silence(96)
    assert scene.machine.completeness(0.97, 1, scene.now_s) == []
    assert scene.silence(320) == []
    assert [type(a) for a in scene.text("call john and")] == [Speculate, EndTurn]
    assert [cues.complete for cues in scene.policy.seen] == [0.97]


def test_a_turn_model_that_answers_too_late_changes_nothing() -> None:
    scene = Scene()
    scene.speech(500)
    scene.silence(96)
    scene.text("call john and")
    scene.silence(320)
    scene.speech(32)  # the next window tells whether the speaker goes on
    assert scene.machine.completeness(0.97, 1, scene.now_s) == []
    scene.speech(64)
    assert scene.machine.completeness(0.97, 1, scene.now_s) == []
    scene.silence(96)
    assert scene.machine.completeness(0.97, 1, scene.now_s) == []
    scene.text("call john and mary and")
    assert scene.policy.seen[-1].complete is None


def test_a_turn_model_has_no_say_about_a_sound_over_a_reply() -> None:
    scene = Scene()
    scene.machine.reply(True)
    scene.speech(200)
    scene.silence(96)
    scene.text("uh huh")
    assert scene.machine.completeness(0.0, 1, scene.now_s) == []
    assert [type(a) for a in scene.silence(320)] == [Drop, Resume]


def test_noise_without_words_is_dropped() -> None:
    scene = Scene()
    scene.speech(200)
    scene.silence(96)
    assert scene.text("") == []
    assert scene.silence(224) == [Drop(scene.position)]


def test_long_speech_without_a_recognised_word_is_a_turn() -> None:
    scene = Scene()
    scene.speech(600)
    scene.silence(96)
    assert scene.text("") == [Speculate("")]
    assert scene.silence(224) == [EndTurn(scene.position, "", respond=True)]


def test_without_create_response_the_turn_ends_and_nothing_is_prepared() -> None:
    scene = Scene(TurnSettings(create_response=False))
    scene.speech(500)
    scene.silence(96)
    assert scene.text("hello there") == []
    assert scene.silence(224) == [EndTurn(scene.position, "hello there", respond=False)]


def test_a_failed_transcription_ends_the_turn_without_text() -> None:
    scene = Scene()
    scene.speech(500)
    assert scene.machine.transcription_failed(scene.now_s) == []
    scene.silence(96)
    assert scene.silence(224) == [EndTurn(scene.position, None, respond=False)]


def test_a_text_that_never_comes_counts_as_failed() -> None:
    scene = Scene()
    scene.speech(500)
    out = scene.silence(5100)
    assert out[0] == FinishText(1)
    assert [a for a in out if isinstance(a, EndTurn)] == [EndTurn(out[-1].end_sample, None, False)]  # type: ignore[attr-defined]


class TestOverAReply:
    def scene(self) -> Scene:
        scene = Scene()
        scene.silence(500)
        scene.machine.reply(True)
        return scene

    def test_speech_pauses_at_once_and_words_interrupt(self) -> None:
        scene = self.scene()
        assert [type(a) for a in scene.speech(32)] == [Pause, Open]
        scene.speech(250)
        assert scene.text("stop it", partial=True) == [Interrupt()]
        assert scene.text("stop it please", partial=True) == []

    def test_a_cough_resumes(self) -> None:
        scene = self.scene()
        scene.speech(160)
        assert scene.silence(96) == [FinishText(1)]
        assert scene.text("") == []
        assert scene.silence(256) == [Drop(scene.position), Resume()]
        assert scene.machine.phase is Phase.QUIET

    def test_a_backchannel_resumes(self) -> None:
        scene = self.scene()
        scene.speech(300)
        assert scene.text("mm hm", partial=True) == []
        scene.silence(96)
        assert scene.text("mm hm") == []
        assert scene.silence(256) == [Drop(scene.position), Resume()]

    def test_a_hum_that_was_taken_for_words_resumes(self) -> None:
        scene = self.scene()
        scene.hear(600, True, dull=True)
        assert scene.text("russo them", partial=True) == []
        scene.silence(96)
        assert scene.text("russo them") == []
        assert scene.silence(256) == [Drop(scene.position), Resume()]

    def test_a_command_is_no_hum(self) -> None:
        scene = self.scene()
        scene.hear(300, True, dull=True)
        assert scene.text("hang on", partial=True) == [Interrupt()]

    def test_a_pause_for_a_comma_does_not_resume(self) -> None:
        scene = self.scene()
        scene.speech(400)
        scene.silence(96)
        assert scene.text("") == []
        assert scene.silence(160) == []
        scene.speech(200)
        scene.silence(96)
        assert scene.text("thank you") == [Interrupt(), Speculate("thank you")]

    def test_a_short_command_interrupts_at_its_end(self) -> None:
        scene = self.scene()
        scene.speech(200)
        scene.silence(96)
        assert scene.text("stop") == [Interrupt(), Speculate("stop")]

    def test_long_speech_interrupts_whatever_the_words(self) -> None:
        scene = self.scene()
        assert Interrupt() in scene.speech(900)

    def test_nothing_is_paused_if_interrupting_is_off(self) -> None:
        scene = Scene(TurnSettings(interrupt_response=False))
        scene.machine.reply(True)
        assert [type(a) for a in scene.speech(900)] == [Open]

    def test_a_failed_transcription_resumes(self) -> None:
        scene = self.scene()
        scene.speech(160)
        scene.machine.transcription_failed(scene.now_s)
        assert scene.silence(500)[-2:] == [Drop(scene.machine._floor), Resume()]


def test_a_pause_begins_when_the_words_cease_to_be_audible() -> None:
    scene = Scene()
    scene.speech(500)
    for _ in range(3):
        scene.position += WINDOW
        out = scene.machine.voice(scene.position, 0.9, scene.now_s, audible=False)
    assert out == [FinishText(1)]


class TestMissingAudio:
    def test_silence_is_assumed_when_audio_stops(self) -> None:
        scene = Scene()
        scene.speech(500)
        assert scene.machine.deadline_s is not None
        assert scene.tick(900) == []
        assert scene.tick(250) == [FinishText(1)]
        scene.text("hello")
        assert scene.tick(100) == []
        assert [type(a) for a in scene.tick(250)] == [EndTurn]

    def test_quiet_has_no_deadline(self) -> None:
        scene = Scene()
        scene.silence(500)
        assert scene.machine.deadline_s is None


class TestPushToTalk:
    def scene(self) -> Scene:
        return Scene(TurnSettings(automatic=False))

    def test_silence_ends_nothing(self) -> None:
        scene = self.scene()
        scene.speech(500)
        assert scene.silence(3000) == []

    def test_commit_asks_for_the_text_and_hands_over(self) -> None:
        scene = self.scene()
        scene.speech(500)
        assert scene.machine.commit(0) == [FinishText(1)]
        assert scene.machine.phase is Phase.QUIET

    def test_commit_without_speech_listens_to_the_whole_buffer(self) -> None:
        scene = self.scene()
        scene.silence(500)
        assert scene.machine.commit(240) == [Open(240), FinishText(1)]


def test_commit_withdraws_what_was_prepared() -> None:
    scene = Scene()
    scene.speech(500)
    scene.silence(96)
    scene.text("hello")
    assert scene.machine.commit(0) == [Withdraw(), FinishText(2)]


def test_clear_drops_the_turn_and_its_reply() -> None:
    scene = Scene()
    scene.speech(500)
    scene.silence(96)
    scene.text("hello")
    assert scene.machine.clear() == [Withdraw(), Drop(scene.position)]
    assert scene.machine.clear() == []


def test_an_endless_turn_is_closed() -> None:
    scene = Scene(TurnSettings(max_turn_s=2.0))
    out = scene.speech(2300)
    assert FinishText(1) in out
    scene.text("and so on and")
    assert EndTurn(scene.position, "and so on and", respond=True) in scene.log


def test_an_hour_of_silence_decides_nothing() -> None:
    scene = Scene()
    assert scene.silence(3_600_000) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", False), ("mm hm", False), ("the", False), ("okay", False), ("stop", True),
     ("okay stop", True), ("wait a minute", True), ("no", True)],
)  # fmt: skip
def test_what_interrupts(text: str, expected: bool) -> None:
    assert interrupts(text) is expected


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("voice"), st.floats(0, 1), st.integers(1, 40)),
        st.tuples(st.just("text"), st.sampled_from(["", "stop", "mm", "so and"]), st.booleans()),
        st.tuples(st.just("heard"), st.sampled_from(["", "stop", "mm"]), st.booleans()),
        st.tuples(st.just("complete"), st.floats(0, 1), st.integers(0, 1)),
        st.tuples(
            st.sampled_from(["tick", "commit", "clear", "fail", "reply", "unreply", "manual"]),
            st.floats(0, 2),
            st.just(0),
        ),
    ),
    max_size=80,
)


@given(EVENTS)
def test_any_order_of_events_keeps_the_protocol_of_actions(events: list[tuple]) -> None:  # type: ignore[type-arg]
    """Open and closed alternate; a reply is prepared once and withdrawn or ended; pause pairs."""
    scene = Scene()
    opened = prepared = paused = False
    for name, value, extra in events:
        machine, actions = scene.machine, []
        match name:
            case "voice":
                for _ in range(extra):
                    scene.position += WINDOW
                    scene.now_s += 0.032
                    actions += machine.voice(scene.position, value, scene.now_s)
            case "text":
                revision = None if extra else machine.revision
                actions = machine.transcript(value, revision, None, None, scene.now_s)
            case "heard":
                text, revision = "Canned." if extra else "", machine.revision
                actions = machine.transcript(text, revision, None, None, scene.now_s, value)
            case "complete":
                actions = machine.completeness(value, machine.revision - extra, scene.now_s)
            case "tick":
                scene.now_s += value
                actions = machine.tick(scene.now_s)
            case "commit":
                actions = machine.commit(scene.position)
            case "clear":
                actions = machine.clear()
            case "fail":
                actions = machine.transcription_failed(scene.now_s)
            case "reply" | "unreply":
                machine.reply(name == "reply")
                paused = paused and name == "reply"
            case "manual":
                changed = replace(machine.settings, automatic=value < 1)
                actions = machine.configure(changed, machine.policy)
        for action in actions:
            match action:
                case Open():
                    assert not opened
                    opened = True
                case Speculate():
                    assert opened
                    assert not prepared
                    prepared = True
                case Withdraw():
                    prepared = False
                case EndTurn():
                    assert opened
                    opened = prepared = False
                case Drop():
                    assert opened
                    assert not prepared
                    opened = False
                case Pause():
                    assert not paused
                    paused = True
                case Resume() | Interrupt():
                    assert paused
                    paused = False
        if name == "commit":
            assert not prepared
            opened = False
        assert (machine.phase is not Phase.QUIET) == opened
        assert machine.deadline_s is None or opened
