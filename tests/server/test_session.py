"""Whole sessions on a virtual clock: real session, turn machine, replies; scripted stages."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from handlers.audio import to_pcm16
from handlers.messages import RATE_HZ, Failed, Listen
from tests.fakes import deliver, tone
from tests.server.stage import Stage


def collapsed(types: list[str]) -> list[str]:
    """Runs of the same type counted once."""
    return [t for i, t in enumerate(types) if i == 0 or types[i - 1] != t]


TURN = [
    "input_audio_buffer.speech_started",
    "conversation.item.input_audio_transcription.delta",
    "input_audio_buffer.speech_stopped",
    "input_audio_buffer.committed",
    "conversation.item.added",
    "conversation.item.done",
    "conversation.item.input_audio_transcription.completed",
    "response.created",
    "response.output_item.added",
    "conversation.item.added",
    "response.content_part.added",
    "response.output_audio_transcript.delta",
    "response.output_audio.done",
    "response.output_audio_transcript.done",
    "response.content_part.done",
    "response.output_item.done",
    "conversation.item.done",
    "response.done",
]


def test_one_turn_gives_the_documented_sequence() -> None:
    stage = Stage()
    assert stage.take() == ["session.created"]
    stage.silence(0.5)
    stage.speech(1.0)
    stage.silence(3.0)
    types = collapsed(stage.take())
    assert types == TURN
    assert stage.history == [("user", "what time is it")]


def test_the_language_that_the_client_names_goes_along_with_its_speech() -> None:
    stage = Stage()
    stage.speech(1.0)
    stage.silence(3.0)
    audio = {"input": {"transcription": {"language": "de"}}}
    stage.send("session.update", session={"type": "realtime", "audio": audio})
    stage.speech(1.0)
    stage.silence(3.0)
    found = [message for message in stage.stages.heard if isinstance(message, Listen)]
    assert [listen.language for listen in found] == [None, "de"]


def test_audio_is_whole_in_order_and_paced() -> None:
    stage = Stage()
    stage.speech(1.0)
    stage.silence(1.0)
    sent_s = sum(len(samples) for _, _, samples in stage.out.audio) / RATE_HZ
    assert sent_s < 1.2
    stage.silence(3.0)
    starts = [start for _, start, _ in stage.out.audio]
    lengths = [len(samples) for _, _, samples in stage.out.audio]
    assert starts == list(np.cumsum([0, *lengths[:-1]]))
    text = "You said what time is it."
    assert sum(lengths) == round(stage.stages.char_s * RATE_HZ * len(text))


def test_the_reply_is_prepared_before_it_may_be_heard() -> None:
    stage = Stage()
    stage.speech(1.0)
    stage.silence(0.24)
    assert stage.stages.said
    assert "response.created" not in stage.out.types
    assert stage.out.audio == []


def test_a_withdrawn_reply_leaves_no_trace() -> None:
    stage = Stage()
    stage.stages.words = "i want to go home now".split()
    stage.speech(0.75)
    stage.silence(0.24)
    stage.speech(0.75)
    stage.silence(4.0)
    assert len(stage.out.of("response.created")) == 1
    assert len(stage.stages.asked) == 2
    assert stage.history == [("user", "i want to go home now")]
    dead = stage.stages.asked[0].ticket
    assert not dead.live


class TestInterruption:
    def stage(self) -> Stage:
        stage = Stage()
        stage.stages.char_s = 0.1
        stage.speech(1.0)
        stage.silence(1.3)
        assert stage.out.audio
        stage.stages.words = "stop that now please thanks".split()
        stage.take()
        return stage

    def test_words_cut_the_reply_to_what_was_heard(self) -> None:
        stage = self.stage()
        stage.speech(1.0)
        types = stage.take()
        assert types[0] == "input_audio_buffer.speech_started"
        assert "response.done" in types
        sent = len(stage.out.audio)
        stage.silence(0.2)
        assert len(stage.out.audio) == sent
        stage.silence(0.3)
        roles = [role for role, _ in stage.history]
        assert roles == ["user", "assistant", "user"]
        heard = stage.history[1][1]
        assert heard
        assert "You said what time is it.".startswith(heard)
        assert heard != "You said what time is it."

    def test_the_cancelled_response_says_why(self) -> None:
        stage = self.stage()
        stage.speech(1.0)
        (done,) = stage.out.of("response.done")
        assert done["response"]["status"] == "cancelled"
        assert done["response"]["status_details"]["reason"] == "turn_detected"
        assert done["response"]["output"][0]["status"] == "incomplete"

    def test_a_cough_loses_and_doubles_nothing(self) -> None:
        stage = self.stage()
        stage.stages.words = []
        stage.speech(0.16)
        stage.silence(5.0)
        types = stage.take()
        assert types[:3] == [
            "input_audio_buffer.speech_started",
            "input_audio_buffer.speech_stopped",
            "input_audio_buffer.cleared",
        ]
        assert types[-1] == "response.done"
        audio = stage.out.audio
        end = 0
        jumps = []
        for _, start, samples in audio:
            if start != end:
                jumps.append((end, start))
            end = start + len(samples)
        ((sent, resumed),) = jumps
        assert 0 < sent - resumed <= 0.2 * RATE_HZ  # the listener's buffer was flushed
        assert end == round(0.1 * RATE_HZ * len("You said what time is it."))

    def test_a_cough_at_the_very_end_loses_nothing(self) -> None:
        stage = self.stage()
        stage.stages.words = []
        total = round(0.1 * RATE_HZ * len("You said what time is it."))
        while "response.done" not in stage.out.types:
            stage.silence(0.02)
        stage.speech(0.1)  # the last 200 ms are sent and not heard yet
        stage.silence(3.0)
        _, start, samples = stage.out.audio[-1]
        assert start + len(samples) == total
        assert sum(at == start for _, at, _ in stage.out.audio) == 2  # flushed, so sent again
        assert stage.clock.pending == 1  # the session's own expiry

    def test_a_playback_report_decides_what_was_heard(self) -> None:
        stage = self.stage()
        item_id = stage.out.audio[0][0]
        stage.send("parley.playback", item_id=item_id, played_samples=0)
        stage.speech(0.2)
        stage.send("parley.playback", item_id=item_id, played_samples=100)
        stage.speech(0.8)
        stage.silence(0.5)
        assert [role for role, _ in stage.history] == ["user", "user"]

    def test_a_clients_truncate_ends_the_reply(self) -> None:
        stage = self.stage()
        stage.stages.words = []
        item_id = stage.out.audio[0][0]
        stage.speech(0.16)
        stage.send("conversation.item.truncate", item_id=item_id, content_index=0, audio_end_ms=200)
        types = stage.take()
        assert types[-2:] == ["response.done", "conversation.item.truncated"]
        sent = len(stage.out.audio)
        stage.silence(2.0)
        assert len(stage.out.audio) == sent

    def test_response_cancel(self) -> None:
        stage = self.stage()
        stage.send("response.cancel")
        (done,) = stage.out.of("response.done")
        assert done["response"]["status_details"]["reason"] == "client_cancelled"
        stage.send("response.cancel", event_id="e7")
        error = stage.out.of("error")[-1]["error"]
        assert error["code"] == "response_cancel_not_active"
        assert error["event_id"] == "e7"


class TestPushToTalk:
    def stage(self) -> Stage:
        stage = Stage()
        update = {"type": "realtime", "audio": {"input": {"turn_detection": None}}}
        stage.send("session.update", session=update)
        stage.take()
        return stage

    def test_commit_then_response(self) -> None:
        stage = self.stage()
        stage.speech(1.0)
        stage.silence(2.0)
        assert set(stage.take()) == {"conversation.item.input_audio_transcription.delta"}
        stage.send("input_audio_buffer.commit")
        stage.send("response.create")
        stage.clock.advance(3.0)
        types = stage.take()
        assert types[:5] == [
            "input_audio_buffer.committed",
            "conversation.item.added",
            "conversation.item.done",
            "response.created",
            "conversation.item.input_audio_transcription.completed",
        ]
        assert types[-1] == "response.done"
        assert stage.history == [("user", "what time is it")]

    def test_commit_of_nothing_is_refused(self) -> None:
        stage = self.stage()
        stage.send("input_audio_buffer.commit", event_id="x")
        error = stage.out.of("error")[0]["error"]
        assert error["code"] == "input_audio_buffer_commit_empty"
        assert error["event_id"] == "x"

    def test_a_text_that_never_comes_is_told_and_does_not_block_the_response(self) -> None:
        stage = self.stage()
        stage.stages.stt_delay_s = None
        stage.speech(1.0)
        stage.send("input_audio_buffer.commit")
        stage.send("response.create")
        stage.clock.advance(10.0)
        assert "conversation.item.input_audio_transcription.failed" in stage.out.types
        assert stage.out.types[-1] == "response.done"

    def test_clear_discards(self) -> None:
        stage = self.stage()
        stage.speech(0.5)
        stage.send("input_audio_buffer.clear")
        assert stage.take()[-1] == "input_audio_buffer.cleared"
        stage.send("input_audio_buffer.commit")
        assert stage.out.of("error")[0]["error"]["code"] == "input_audio_buffer_commit_empty"

    @pytest.mark.parametrize("by_hand", [True, False])
    def test_speech_stops_where_it_was_said_to_start_though_the_detection_changes_in_it(
        self, by_hand: bool
    ) -> None:
        stage = self.stage() if by_hand else Stage()
        stage.speech(1.0)
        detection = {"type": "server_vad"} if by_hand else None
        update = {"type": "realtime", "audio": {"input": {"turn_detection": detection}}}
        stage.send("session.update", session=update)
        told = [len(stage.out.of(f"input_audio_buffer.speech_{e}")) for e in ("started", "stopped")]
        assert told == ([0, 0] if by_hand else [1, 1])


class TestText:
    def test_a_text_conversation(self) -> None:
        stage = Stage()
        stage.send("session.update", session={"type": "realtime", "output_modalities": ["text"]})
        item = {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "hello"}],
        }
        stage.send("conversation.item.create", item=item)
        stage.send("response.create")
        stage.clock.advance(1.0)
        types = stage.take()
        assert types[1:] == [
            "session.updated",
            "conversation.item.added",
            "conversation.item.done",
            "response.created",
            "response.output_item.added",
            "conversation.item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "conversation.item.done",
            "response.done",
        ]

    def test_out_of_band_leaves_the_conversation_alone(self) -> None:
        stage = Stage()
        item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "q"}]}
        stage.send(
            "response.create",
            response={"conversation": "none", "output_modalities": ["text"], "input": [item]},
        )
        stage.send("response.create")
        stage.clock.advance(3.0)
        assert len(stage.out.of("response.done")) == 2
        assert stage.stages.asked[0].messages[-1].content == "q"
        assert stage.stages.asked[1].messages == ()

    def test_a_second_response_is_refused_while_one_is_active(self) -> None:
        stage = Stage()
        stage.send("response.create")
        stage.send("response.create", event_id="second")
        error = stage.out.of("error")[0]["error"]
        assert error["code"] == "conversation_already_has_active_response"
        assert error["event_id"] == "second"


class TestFailures:
    @pytest.mark.parametrize("kind", ["lm", "tts"])
    def test_a_failed_stage_fails_the_response_and_no_more(self, kind: str) -> None:
        stage = Stage()
        if kind == "lm":
            stage.stages.lm_delay_s = None
        else:
            stage.stages.tts_delay_s = None
        stage.speech(1.0)
        stage.silence(0.5)
        ticket = stage.stages.asked[-1].ticket
        deliver(Failed(ticket, kind, f"{kind}_error", "It failed."))
        stage.silence(0.1)
        assert stage.out.of("error")[0]["error"]["code"] == f"{kind}_error"
        assert stage.out.of("response.done")[0]["response"]["status"] == "failed"
        stage.stages.lm_delay_s = stage.stages.tts_delay_s = 0.02
        stage.take()
        stage.speech(1.0)
        stage.silence(3.0)
        assert stage.out.of("response.done")[0]["response"]["status"] == "completed"

    def test_a_failure_of_a_withdrawn_reply_is_not_heard_of(self) -> None:
        stage = Stage()
        stage.stages.lm_delay_s = None
        stage.speech(1.0)
        stage.silence(0.2)
        deliver(Failed(stage.stages.asked[-1].ticket, "lm", "lm_error", "It failed."))
        stage.speech(0.5)
        assert stage.out.of("error") == []

    def test_a_failed_transcription_is_told_and_the_item_kept(self) -> None:
        stage = Stage()
        stage.stages.stt_delay_s = None
        stage.speech(1.0)
        utterance = next(iter(stage.stages._utterances.values()))
        deliver(Failed(utterance, "stt", "stt_busy", "All decoders are busy."))
        stage.silence(1.0)
        types = stage.take()
        assert "conversation.item.input_audio_transcription.failed" in types
        assert "conversation.item.done" in types
        assert "response.created" not in types

    def test_too_much_audio_is_refused_by_name_once(self) -> None:
        stage = Stage(max_backlog_s=1.0)
        second = base64.b64encode(to_pcm16(tone(0.9))).decode()
        stage.stages.hear = lambda message: None  # type: ignore[method-assign]
        for _ in range(3):
            stage.send("input_audio_buffer.append", audio=second)
        (error,) = stage.out.of("error")
        assert error["error"]["code"] == "input_audio_buffer_overflow"


class TestLife:
    def test_stop_cancels_everything_and_leaves_no_timer(self) -> None:
        stage = Stage()
        stage.speech(1.0)
        stage.silence(0.7)
        ticket = stage.stages.asked[-1].ticket
        stage.session.stop()
        assert not ticket.live
        stage.clock.advance(1.0)  # what the stages still had under way
        assert stage.clock.pending == 0

    def test_a_session_expires_by_name(self) -> None:
        stage = Stage(max_session_s=5.0)
        stage.clock.advance(5.1)
        assert stage.out.of("error")[0]["error"]["code"] == "session_expired"
        assert stage.out.closed == (1001, "session_expired")

    def test_drain_lets_the_reply_be_heard(self) -> None:
        stage = Stage()
        stage.speech(1.0)
        stage.silence(0.6)
        stage.session.drain()
        assert stage.out.closed is None
        stage.clock.advance(5.0)
        assert "response.done" in stage.out.types
        assert stage.out.closed == (1001, "server_shutting_down")

    def test_drain_closes_an_idle_session_at_once(self) -> None:
        stage = Stage()
        stage.session.drain()
        assert stage.out.closed == (1001, "server_shutting_down")

    def test_audio_at_a_hundred_times_real_time_is_understood(self) -> None:
        stage = Stage()
        audio = np.concatenate([tone(1.0), np.zeros(2 * RATE_HZ, np.float32)])
        stage.session.receive_audio(to_pcm16(audio))
        stage.clock.advance(3.0)
        assert stage.history == [("user", "what time is it")]
        assert "response.done" in stage.out.types
