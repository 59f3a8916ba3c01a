"""A duplex session on a virtual clock: what of the model's channel reaches the client, and when."""

from __future__ import annotations

import base64
import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from handlers.audio import to_pcm16
from handlers.base import Overloaded
from handlers.messages import RATE_HZ, AudioIn, Failed, Join, Message, Skipped, Uttered
from server.duplex import DuplexSession
from server.hub import Hub
from server.metrics import Metrics
from server.options import ServerOptions
from server.session import Outbox, Session
from server.stretches import MAX_BEHIND_S, StretchSettings
from server.turns import TurnSettings
from tests.fakes import RecordingOutbox, ScriptedStages, VirtualClock, deliver, tone
from tests.server.schema import check_event, check_session
from tests.server.stage import fake_config

FRAME_S = 0.04
FRAME = round(FRAME_S * RATE_HZ)
END_FRAMES = 15  # silence that ends a response


@dataclass
class Attention:
    """Where the model would be: keeps what it is given."""

    stages: ScriptedStages
    given: list[Message] = field(default_factory=list)
    full: bool = False

    def hear(self, message: Any) -> None:
        self.stages.hear(message)

    def attend(self, message: Message) -> None:
        if self.full:
            raise Overloaded("full")
        self.given.append(message)


@dataclass
class Brain:
    attention: Attention

    def refusal(self, sessions: int) -> tuple[str, str] | None:
        return None

    def session(self, hub: Hub, outbox: Outbox) -> Session:
        return DuplexSession(hub, outbox, self.attention, StretchSettings())


class Stage:
    """One client and the model, frame by frame in virtual time."""

    def __init__(self, transcribed: bool = False, full: bool = False, **options: Any) -> None:
        self.clock = VirtualClock()
        self.stages = ScriptedStages(self.clock)
        self.attention = Attention(self.stages, full=full)
        self.metrics = Metrics()
        config = fake_config()
        detection = config.server_vad
        quiet = dataclasses.replace(detection, create_response=False, interrupt_response=False)
        config = dataclasses.replace(
            config,
            voice="parrot",
            turn_detection=quiet,
            server_vad=quiet,
            transcription={"model": "fake"} if transcribed else None,
        )
        brain = Brain(self.attention)
        self.hub = Hub(
            ServerOptions(**options),
            TurnSettings(),
            config,
            self.stages,
            self.metrics,
            self.clock,
            brain,
        )
        self.out = RecordingOutbox()
        self.session = brain.session(self.hub, self.out)
        self.hub.enter(self.session)
        self.session.start()
        self.number = 0
        self.heard = 0

    def send(self, kind: str, **fields: Any) -> None:
        self.session.receive_text(json.dumps({"type": kind, **fields}))

    def model(self, frames: int, level_db: float = -20.0) -> None:
        """The model's next frames; below -50 dB it is silent."""
        for _ in range(frames):
            samples = tone(FRAME_S)
            deliver(Uttered(self.session.ticket, self.number, self.heard, samples, level_db))
            self.number += 1
            self.clock.advance(FRAME_S)

    def quiet(self, frames: int) -> None:
        self.model(frames, -90.0)

    def person(self, seconds: float, voiced: bool = True) -> None:
        for _ in range(round(seconds / 0.02)):
            samples = tone(0.02) if voiced else np.zeros(480, np.float32)
            self.session.receive_audio(to_pcm16(samples))
            self.clock.advance(0.02)

    def take(self) -> list[str]:
        types = self.out.types
        self.out.events.clear()
        return types

    def errors(self) -> list[tuple[str, str | None]]:
        return [(e["error"]["code"], e["error"]["param"]) for e in self.out.of("error")]

    @property
    def audio_samples(self) -> int:
        return sum(len(samples) for _, _, samples in self.out.audio)


OPENING = [
    "response.created",
    "response.output_item.added",
    "conversation.item.added",
    "response.content_part.added",
]
CLOSING = [
    "response.output_audio.done",
    "response.output_audio_transcript.done",
    "response.content_part.done",
    "response.output_item.done",
    "conversation.item.done",
    "response.done",
]


def test_the_model_is_joined_once_and_nothing_is_sent_while_it_is_silent() -> None:
    stage = Stage()
    assert stage.take() == ["session.created"]
    assert stage.attention.given == [Join(stage.session.ticket)]
    stage.quiet(1000)
    assert stage.take() == []
    assert stage.out.audio == []


def test_where_it_is_audible_there_is_a_response() -> None:
    stage = Stage()
    stage.take()
    stage.quiet(10)
    stage.model(5)
    assert stage.take() == OPENING
    stage.quiet(END_FRAMES - 1)
    assert stage.take() == []
    stage.model(2)  # a pause inside
    stage.quiet(END_FRAMES)
    assert stage.take() == CLOSING
    starts = [start for _, start, _ in stage.out.audio]
    assert starts == [FRAME * n for n in range(5 + END_FRAMES - 1 + 2 + END_FRAMES)]
    assert len({item for item, _, _ in stage.out.audio}) == 1
    stage.quiet(100)
    stage.model(1)
    assert stage.take() == OPENING
    assert stage.out.audio[-1][1] == 0
    assert len({item for item, _, _ in stage.out.audio}) == 2


def test_every_event_is_the_protocols_own() -> None:
    stage = Stage()
    stage.model(3)
    stage.quiet(END_FRAMES)
    for event in stage.out.events:
        check_event(event)
    check_session(stage.out.of("session.created")[0]["session"])
    done = stage.out.of("response.done")[0]["response"]
    assert done["status"] == "completed"
    assert done["output"][0]["content"] == [{"type": "output_audio", "transcript": ""}]
    assert done["audio"]["output"]["voice"] == "parrot"


def test_a_person_over_it_takes_nothing_from_its_voice() -> None:
    stage = Stage(transcribed=True)
    detection = stage.out.of("session.created")[0]["session"]["audio"]["input"]["turn_detection"]
    assert detection["create_response"] is False
    assert detection["interrupt_response"] is False
    for _ in range(50):
        stage.person(0.04)
        stage.model(1)
    for _ in range(50):
        stage.person(0.04, voiced=False)
        stage.model(1)
    assert stage.audio_samples == 100 * FRAME
    types = stage.out.types
    for kind in ("speech_started", "speech_stopped", "committed"):
        assert types.count(f"input_audio_buffer.{kind}") == 1
    completed = stage.out.of("conversation.item.input_audio_transcription.completed")
    assert completed[0]["transcript"].startswith("what time is it")
    assert types.count("response.created") == 1
    assert "response.done" not in types
    assert stage.stages.asked == []


def test_without_recognition_there_are_speech_events_and_no_text() -> None:
    stage = Stage()
    stage.person(1.0)
    stage.person(2.0, voiced=False)
    kinds = [kind for kind in stage.take() if kind.startswith("input_audio_buffer")]
    assert kinds == [
        f"input_audio_buffer.{k}" for k in ("speech_started", "speech_stopped", "committed")
    ]
    stage.send("session.update", session={"audio": {"input": {"transcription": {"model": "x"}}}})
    updated = stage.out.of("session.updated")[0]["session"]
    assert updated["audio"]["input"]["transcription"] is None


def test_all_audio_reaches_the_model_as_it_came() -> None:
    stage = Stage()
    stage.person(0.1)
    stage.send("input_audio_buffer.append", audio=base64.b64encode(to_pcm16(tone(0.5))).decode())
    given = [m for m in stage.attention.given if isinstance(m, AudioIn)]
    assert [m.start_sample for m in given] == [0, 480, 960, 1440, 1920, 2400]
    assert sum(len(m.samples) for m in given) == round(0.6 * RATE_HZ)


def test_audio_far_ahead_of_the_model_is_refused_by_name_and_taken_again_later() -> None:
    stage = Stage(max_backlog_s=2.0)
    for _ in range(60):
        stage.person(0.04)
    assert stage.errors() == [("input_audio_buffer_overflow", "audio")]
    last = stage.attention.given[-1]
    assert isinstance(last, AudioIn)
    stage.heard = last.start_sample
    stage.quiet(1)
    count = len(stage.attention.given)
    stage.person(0.1)
    assert len(stage.attention.given) > count


def test_skipped_audio_is_told_once_a_second() -> None:
    stage = Stage()
    for _ in range(50):
        deliver(Skipped(stage.session.ticket, 100, "late"))
        stage.clock.advance(0.04)
    assert stage.errors() == [("input_audio_late", None)] * 2
    deliver(Skipped(stage.session.ticket, 100, "overload"))
    stage.clock.advance(1.0)
    deliver(Skipped(stage.session.ticket, 100, "overload"))
    assert stage.errors()[-1] == ("server_overloaded", None)


def test_a_failure_of_the_model_ends_the_session_by_name() -> None:
    stage = Stage()
    deliver(Failed(stage.session.ticket, "duplex_lm", "duplex_lm_error", "It failed."))
    assert stage.errors() == [("duplex_lm_error", None)]
    assert stage.out.closed == (1011, "duplex_lm_error")
    assert not stage.session.ticket.live


def test_no_row_after_all_is_the_refusal_of_a_full_server() -> None:
    stage = Stage()
    deliver(Failed(stage.session.ticket, "duplex_encoder", "session_limit_reached", "Full."))
    assert stage.out.closed == (1013, "session_limit_reached")


def test_a_failure_of_the_ear_leaves_the_conversation_alone() -> None:
    stage = Stage()
    deliver(Failed(stage.session.ticket, "vad", "vad_error", "It failed."))
    assert stage.errors() == [("vad_error", None)]
    stage.model(1)
    assert stage.audio_samples == FRAME


class TestClientEvents:
    def test_a_response_cannot_be_asked_for(self) -> None:
        stage = Stage()
        stage.send("response.create")
        assert stage.errors() == [("unsupported_by_model", "type")]
        stage.model(1)
        stage.send("response.create")
        assert len(stage.errors()) == 2
        assert stage.out.closed is None

    @pytest.mark.parametrize("event", ["response.cancel", "output_audio_buffer.clear"])
    def test_cancel_mutes_this_stretch_and_no_later_one(self, event: str) -> None:
        stage = Stage()
        stage.model(5)
        stage.take()
        stage.send(event)
        assert stage.take() == CLOSING
        stage.model(10)
        stage.quiet(END_FRAMES - 1)
        stage.model(3)
        assert stage.audio_samples == 5 * FRAME
        stage.quiet(END_FRAMES)
        assert stage.take() == []
        stage.model(2)
        assert stage.take() == OPENING
        assert stage.audio_samples == 7 * FRAME

    def test_the_cancelled_response_says_so(self) -> None:
        stage = Stage()
        stage.model(5)
        response_id = stage.out.of("response.created")[0]["response"]["id"]
        stage.send("response.cancel", response_id="resp_other")
        assert stage.errors() == [("response_cancel_not_active", None)]
        stage.send("response.cancel", response_id=response_id)
        done = stage.out.of("response.done")[0]["response"]
        assert (done["id"], done["status"]) == (response_id, "cancelled")
        assert done["status_details"] == {"type": "cancelled", "reason": "client_cancelled"}
        stage.send("response.cancel")
        assert len(stage.errors()) == 2
        stage.send("output_audio_buffer.clear")
        assert len(stage.errors()) == 2

    def test_truncating_what_is_being_said_ends_it(self) -> None:
        stage = Stage()
        stage.model(5)
        item = stage.out.audio[0][0]
        stage.send("conversation.item.truncate", item_id=item, content_index=0, audio_end_ms=201)
        assert stage.errors() == [("invalid_value", "audio_end_ms")]
        stage.take()
        stage.send("conversation.item.truncate", item_id=item, content_index=0, audio_end_ms=100)
        assert stage.take() == [*CLOSING, "conversation.item.truncated"]

    def test_deleting_what_is_being_said_ends_it(self) -> None:
        stage = Stage()
        stage.model(5)
        item = stage.out.audio[0][0]
        stage.take()
        stage.send("conversation.item.delete", item_id=item)
        assert stage.take() == [*CLOSING, "conversation.item.deleted"]

    @pytest.mark.parametrize(
        ("session", "param"),
        [
            ({"output_modalities": ["text"]}, "session.output_modalities"),
            (
                {"audio": {"input": {"turn_detection": None}}},
                "session.audio.input.turn_detection",
            ),
        ],
    )
    def test_what_it_cannot_do_is_refused_by_name(
        self, session: dict[str, Any], param: str
    ) -> None:
        stage = Stage()
        stage.send("session.update", session={"instructions": "Be brief.", **session})
        assert stage.errors() == [("unsupported_by_model", param)]
        stage.send("session.update", session={})
        assert stage.out.of("session.updated")[0]["session"]["instructions"] == ""

    def test_what_makes_no_difference_is_reported_as_it_is(self) -> None:
        stage = Stage()
        detection = {"type": "semantic_vad", "create_response": True, "interrupt_response": True}
        output = {"voice": "marin", "speed": 1.2}
        audio = {"output": output, "input": {"turn_detection": detection}}
        stage.send("session.update", session={"instructions": "Sing.", "audio": audio})
        session = stage.out.of("session.updated")[0]["session"]
        check_session(session)
        assert session["instructions"] == "Sing."
        assert session["audio"]["output"]["voice"] == "parrot"
        assert session["audio"]["output"]["speed"] == 1.0
        detection = session["audio"]["input"]["turn_detection"]
        assert detection["create_response"] is detection["interrupt_response"] is False
        assert stage.errors() == []

    def test_items_are_kept_for_the_client(self) -> None:
        stage = Stage()
        item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]}
        stage.send("conversation.item.create", item=item)
        assert stage.out.types[-1] == "conversation.item.done"
        assert stage.errors() == []

    def test_committing_makes_an_item_of_what_the_model_has_heard_already(self) -> None:
        stage = Stage()
        stage.person(1.0)
        given = len(stage.attention.given)
        stage.take()
        stage.send("input_audio_buffer.commit")
        assert stage.take()[0] == "input_audio_buffer.committed"
        stage.send("input_audio_buffer.clear")
        assert stage.take() == ["input_audio_buffer.cleared"]
        assert len(stage.attention.given) == given


class TestClientThatDoesNotKeepUp:
    def test_one_that_reports_hears_nothing_old(self) -> None:
        stage = Stage()
        stage.model(10)
        item = stage.out.audio[0][0]
        stage.send("parley.playback", item_id=item, played_samples=8 * FRAME)
        sent_before = stage.audio_samples
        stage.model(100)  # four seconds in which nothing comes from it
        backlog = (stage.audio_samples - 8 * FRAME) / RATE_HZ
        assert MAX_BEHIND_S < backlog < MAX_BEHIND_S + 2 * FRAME_S
        assert stage.audio_samples > sent_before
        skipped = stage.metrics.registry.get_sample_value(
            "parley_audio_skipped_seconds_total", {"reason": "client_behind"}
        )
        assert skipped == pytest.approx(4.4 - 0.32 - backlog, abs=0.1)
        stage.send("parley.playback", item_id=item, played_samples=stage.audio_samples)
        stage.model(2)
        assert stage.out.audio[-1][1] == stage.audio_samples - FRAME  # no gap in positions

    def test_one_whose_socket_is_full_hears_nothing_old(self) -> None:
        stage = Stage()
        stage.model(5)
        stage.out.unsent_bytes = 60_000
        stage.model(20)
        assert stage.audio_samples == 5 * FRAME
        stage.out.unsent_bytes = 0
        stage.model(1)
        assert stage.audio_samples == 6 * FRAME

    def test_a_response_can_end_meanwhile(self) -> None:
        stage = Stage()
        stage.model(5)
        stage.out.unsent_bytes = 60_000
        stage.take()
        stage.quiet(END_FRAMES)
        assert stage.take() == CLOSING

    def test_one_that_played_on_in_the_silence_hears_the_next_response(self) -> None:
        stage = Stage()
        stage.model(10)
        stage.send("parley.playback", item_id=stage.out.audio[0][0], played_samples=FRAME)
        stage.quiet(END_FRAMES)
        stage.quiet(50)  # its last report was early, and no other came
        sent = stage.audio_samples
        stage.model(5)
        assert stage.audio_samples == sent + 5 * FRAME


def test_draining_waits_for_silence() -> None:
    stage = Stage()
    stage.model(5)
    stage.session.drain()
    assert stage.out.closed is None
    stage.model(5)
    stage.quiet(END_FRAMES)
    assert stage.out.closed == (1001, "server_shutting_down")
    other = Stage()
    other.session.drain()
    assert other.out.closed == (1001, "server_shutting_down")


def test_a_full_stage_is_told() -> None:
    turned_away = Stage(full=True)
    assert turned_away.out.closed == (1013, "server_overloaded")
    stage = Stage()
    stage.attention.full = True
    stage.person(0.02)
    assert stage.errors() == [("server_overloaded", None)]


def test_half_an_hour_keeps_frame_and_frame_together() -> None:
    """Both channels by the model's count: what is sent of it, and when, is what it said then."""
    stage = Stage()
    sent_at: list[float] = []
    for minute in range(30):
        stage.out.audio.clear()
        stage.out.events.clear()
        stage.quiet(1000 - END_FRAMES)
        sent_at.append(stage.clock.time())
        stage.model(500)
        stage.quiet(END_FRAMES)
        assert stage.audio_samples == (500 + END_FRAMES) * FRAME, minute
    gaps = np.diff(sent_at)
    assert gaps == pytest.approx(np.full(29, 60.0))
