from __future__ import annotations

import ast
import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers.messages import Samples
from server import client_events, wire
from server.config import SessionConfig
from server.fields import WireError
from server.items import (
    FunctionCallItem,
    FunctionOutputItem,
    MessageItem,
    Part,
    spoken_reply,
    text_reply,
    user_audio,
)
from tests.server.schema import check_event

PCM = np.array([0, 1, -1, 32767, -32768], "<i2").tobytes()
AUDIO = base64.b64encode(PCM).decode()


def samples_of(pcm: bytes) -> Samples:
    return np.frombuffer(pcm, "<i2").astype(np.float32) / np.float32(32768)


# Server events.


def a_response(**more: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "status": "in_progress",
        "status_details": None,
        "output": [],
        "conversation_id": "conv_1",
        "modality": "audio",
        "voice": "en-us",
        "max_tokens": None,
        "metadata": None,
        "usage": None,
    }
    return wire.response("resp_1", **{**given, **more})


def said(text: str, samples: int = 4800) -> MessageItem:
    item = spoken_reply("item_2")
    assert item.spoken is not None
    index = item.spoken.add_clause(text)
    item.spoken.add_audio(index, samples)
    item.spoken.end_clause(index)
    item.status = "completed"
    return item


HEARD = user_audio("item_1", PCM, "hello")
SESSION = SessionConfig(model="m", voice="en-us").to_wire("sess_1", 1_700_000_000)
DONE = a_response(
    status="cancelled",
    status_details={"type": "cancelled", "reason": "turn_detected"},
    output=[said("hi").to_wire()],
    usage=(12, 3),
    metadata={"k": "v"},
    max_tokens=7,
)
EVENTS: list[Callable[[], dict[str, Any]]] = [
    lambda: wire.error("invalid_value", "No.", param="session.voice", event_id="e"),
    lambda: wire.error("server_overloaded", "No.", kind="server_error"),
    lambda: wire.session_created(SESSION),
    lambda: wire.session_updated(SESSION),
    lambda: wire.speech_started("item_1", 20),
    lambda: wire.speech_stopped("item_1", 40),
    lambda: wire.committed("item_1", None),
    lambda: wire.committed("item_1", "item_0"),
    wire.cleared,
    lambda: wire.timeout_triggered("item_1", 20, 40),
    lambda: wire.item_added(HEARD.to_wire(), None),
    lambda: wire.item_done(HEARD.to_wire(), "item_0"),
    lambda: wire.item_added(spoken_reply("item_2").to_wire(), "item_1"),
    lambda: wire.item_done(said("hi").to_wire(), "item_1"),
    lambda: wire.item_added(FunctionCallItem("c", "f", "{}", "1").to_wire(), None),
    lambda: wire.item_added(FunctionOutputItem("o", "1", "2").to_wire(), None),
    lambda: wire.item_added(MessageItem("s", "system", [Part("input_text", "x")]).to_wire(), None),
    lambda: wire.item_retrieved(HEARD.to_wire(audio=True)),
    lambda: wire.item_deleted("item_1"),
    lambda: wire.item_truncated("item_1", 0, 700),
    lambda: wire.transcription_delta("item_1", "hel"),
    lambda: wire.transcription_completed("item_1", "hello", 1.25),
    lambda: wire.transcription_failed("item_1", "stt_error", "The stt stage failed."),
    lambda: wire.response_created(a_response()),
    lambda: wire.response_created(a_response(conversation_id=None, modality="text")),
    lambda: wire.response_done(DONE),
    lambda: wire.output_item_added("resp_1", text_reply("item_2").to_wire()),
    lambda: wire.output_item_done("resp_1", said("hi").to_wire()),
    lambda: wire.content_part_added("resp_1", "item_2", True),
    lambda: wire.content_part_added("resp_1", "item_2", False),
    lambda: wire.content_part_done("resp_1", "item_2", True, "hi"),
    lambda: wire.content_part_done("resp_1", "item_2", False, "hi"),
    lambda: wire.output_text_delta("resp_1", "item_2", "h"),
    lambda: wire.output_text_done("resp_1", "item_2", "hi"),
    lambda: wire.transcript_delta("resp_1", "item_2", "h"),
    lambda: wire.transcript_done("resp_1", "item_2", "hi"),
    lambda: wire.output_audio_done("resp_1", "item_2"),
    lambda: json.loads(wire.audio_delta("resp_1", "item_2", samples_of(PCM))),
]


@pytest.mark.parametrize("build", EVENTS)
def test_server_events_are_what_the_protocol_says(build: Callable[[], dict[str, Any]]) -> None:
    event = build()
    check_event(event)
    json.dumps(event, allow_nan=False)


PROMISED = """
error session.created session.updated
input_audio_buffer.speech_started input_audio_buffer.speech_stopped input_audio_buffer.committed
input_audio_buffer.cleared input_audio_buffer.timeout_triggered
conversation.item.added conversation.item.done conversation.item.retrieved
conversation.item.deleted conversation.item.truncated
conversation.item.input_audio_transcription.delta
conversation.item.input_audio_transcription.completed
conversation.item.input_audio_transcription.failed
response.created response.done response.output_item.added response.output_item.done
response.content_part.added response.content_part.done
response.output_text.delta response.output_text.done
response.output_audio_transcript.delta response.output_audio_transcript.done
response.output_audio.delta response.output_audio.done
"""


def test_all_that_is_promised_is_checked() -> None:
    assert {build()["type"] for build in EVENTS} == set(PROMISED.split())


def test_event_ids_differ() -> None:
    assert wire.cleared()["event_id"] != wire.cleared()["event_id"]


def test_audio_delta_carries_the_samples() -> None:
    event = json.loads(wire.audio_delta("resp_1", "item_2", samples_of(PCM)))
    assert base64.b64decode(event["delta"]) == PCM


# Audio frames.


def test_audio_frame_layout() -> None:
    frame = wire.encode_audio_frame("item_7", 0x01020304, samples_of(PCM))
    assert frame == b"\x01\x06item_7\x04\x03\x02\x01" + PCM


@settings(max_examples=30, deadline=None)
@given(
    st.text("abcdefghijklmnopqrstuvwxyz_0123456789", min_size=1, max_size=64),
    st.integers(0, 2**32 - 1),
    st.binary(max_size=64).map(lambda data: data[: len(data) // 2 * 2]),
)
def test_audio_frames_go_round(item_id: str, start_sample: int, pcm: bytes) -> None:
    frame = wire.encode_audio_frame(item_id, start_sample, samples_of(pcm))
    assert frame.endswith(pcm)
    got_id, got_start, samples = wire.decode_audio_frame(frame)
    assert (got_id, got_start) == (item_id, start_sample)
    np.testing.assert_array_equal(samples, samples_of(pcm))


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=40) | st.binary(max_size=40).map(lambda data: b"\x01" + data))
def test_any_bytes_as_an_audio_frame(data: bytes) -> None:
    try:
        item_id, start_sample, samples = wire.decode_audio_frame(data)
    except WireError:
        return
    assert wire.encode_audio_frame(item_id, start_sample, samples) == data


def test_the_protocol_page_names_every_client_event_and_error_code() -> None:
    root = Path(wire.__file__).parent.parent
    page = (root / "docs" / "protocol.md").read_text()
    codes = set()
    for source in (root / "server").glob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            match node:
                case ast.Call(
                    func=ast.Name("WireError") | ast.Attribute(attr="WireError" | "error"),
                    args=[ast.Constant(str(code)), _, *_],
                ) if " " not in code:
                    codes.add(code)
    assert "unsupported_format" in codes
    assert {code for code in codes if f"`{code}`" not in page} == set()
    events = (kind for kind in client_events.READERS if f"`{kind}`" not in page)
    assert list(events) == []
