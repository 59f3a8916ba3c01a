from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.realtime import RealtimeClientEvent
from pydantic import TypeAdapter

from server import wire
from server.config import ResponseParams
from server.fields import MAX_TEXT_CHARS, WireError
from server.items import (
    FunctionCallItem,
    FunctionOutputItem,
    ItemReference,
    MessageItem,
    Part,
)
from tests.server.schema import check_event
from tests.server.test_wire import AUDIO, PCM, samples_of

CLIENT_EVENT: TypeAdapter[RealtimeClientEvent] = TypeAdapter(RealtimeClientEvent)


def parse(**event: Any) -> wire.ClientEvent:
    return wire.parse(json.dumps(event))


def refused(data: str | bytes) -> WireError:
    with pytest.raises(WireError) as caught:
        wire.parse(data)
    return caught.value


def message(role: str, *content: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": list(content), **more}


def test_append_gives_the_samples() -> None:
    event = parse(type="input_audio_buffer.append", audio=AUDIO, event_id="mine")
    assert isinstance(event, wire.AudioAppend)
    assert event.event_id == "mine"
    assert event.audio.dtype == np.float32
    np.testing.assert_array_equal(event.audio, samples_of(PCM))


def test_a_binary_frame_means_the_same_as_append() -> None:
    event = parse(type="input_audio_buffer.append", audio=AUDIO)
    assert isinstance(event, wire.AudioAppend)
    np.testing.assert_array_equal(wire.parse_audio_frame(PCM).audio, event.audio)
    with pytest.raises(WireError) as caught:
        wire.parse_audio_frame(PCM[:-1])
    assert caught.value.code == "invalid_audio_frame"


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        ({"type": "input_audio_buffer.commit"}, wire.AudioCommit()),
        ({"type": "input_audio_buffer.clear", "event_id": "e"}, wire.AudioClear("e")),
        ({"type": "output_audio_buffer.clear"}, wire.OutputAudioClear()),
        ({"type": "response.cancel"}, wire.ResponseCancel()),
        ({"type": "response.cancel", "response_id": "resp_1"}, wire.ResponseCancel("resp_1")),
        ({"type": "response.create"}, wire.ResponseCreate(ResponseParams())),
        ({"type": "response.create", "response": {}}, wire.ResponseCreate(ResponseParams())),
        ({"type": "conversation.item.retrieve", "item_id": "a"}, wire.ItemRetrieve("a")),
        ({"type": "conversation.item.delete", "item_id": "a"}, wire.ItemDelete("a")),
        (
            {
                "type": "conversation.item.truncate",
                "item_id": "a",
                "content_index": 0,
                "audio_end_ms": 1500.0,
            },
            wire.ItemTruncate("a", 0, 1500),
        ),
        (
            {"type": "parley.playback", "item_id": "a", "played_samples": 2400},
            wire.Playback("a", 2400),
        ),
        (
            {"type": "session.update", "session": {"type": "realtime", "x": 1}},
            wire.SessionUpdate({"type": "realtime", "x": 1}),
        ),
        (
            {
                "type": "conversation.item.create",
                "item": message("user", {"type": "input_text", "text": "hello"}, id="a"),
                "previous_item_id": "root",
                "unknown": {"deep": [1]},
            },
            wire.ItemCreate(MessageItem("a", "user", [Part("input_text", "hello")]), "root"),
        ),
    ],
)
def test_events(event: dict[str, Any], expected: wire.ClientEvent) -> None:
    if not event["type"].startswith("parley."):
        CLIENT_EVENT.validate_python(event)
    assert parse(**event) == expected


def test_items_of_every_kind() -> None:
    def create(item: dict[str, Any]) -> Any:
        event = parse(type="conversation.item.create", item=item)
        assert isinstance(event, wire.ItemCreate)
        return event.item

    system = create(message("system", {"type": "input_text", "text": "be brief"}))
    assert system.text == "be brief"
    assert system.id.startswith("item_")
    spoken = create(message("user", {"type": "input_audio", "audio": AUDIO, "transcript": "hi"}))
    assert spoken.content == [Part("input_audio", "hi", PCM)]
    assert create(message("user", {"type": "input_audio", "audio": AUDIO})).text == ""
    beta = create(message("assistant", {"type": "text", "text": "hello"}))
    assert beta.content == [Part("output_text", "hello")]
    call = {"type": "function_call", "id": "c", "name": "f", "arguments": "{}", "call_id": "1"}
    assert create(call) == FunctionCallItem("c", "f", "{}", "1")
    output = {"type": "function_call_output", "id": "o", "call_id": "1", "output": "2"}
    assert create(output) == FunctionOutputItem("o", "1", "2")


def test_response_create_in_full() -> None:
    event = parse(
        type="response.create",
        response={
            "output_modalities": ["text"],
            "instructions": "whisper",
            "audio": {"output": {"voice": "en-us", "format": {"type": "audio/pcm"}}},
            "max_output_tokens": 5,
            "conversation": "none",
            "metadata": {"k": "v"},
            "input": [
                {"type": "item_reference", "id": "item_1"},
                message("user", {"type": "input_text", "text": "x"}, id="a"),
            ],
            "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
            "tool_choice": {"type": "function", "name": "f"},
        },
    )
    assert isinstance(event, wire.ResponseCreate)
    assert event.params == ResponseParams(
        output_modality="text",
        instructions="whisper",
        voice="en-us",
        max_output_tokens=5,
        conversation="none",
        metadata={"k": "v"},
        input=(
            ItemReference("item_1"),
            MessageItem("a", "user", [Part("input_text", "x")]),
        ),
        tools=({"type": "function", "name": "f", "parameters": {"type": "object"}},),
        tool_choice={"type": "function", "name": "f"},
    )


def test_response_create_knows_the_beta_names_and_passes_over_nulls() -> None:
    event = parse(
        type="response.create",
        response={
            "modalities": ["text", "audio"],
            "voice": "en-us",
            "output_audio_format": "pcm16",
            "max_response_output_tokens": "inf",
            "temperature": 0.8,
            "instructions": None,
            "input": [],
        },
    )
    assert isinstance(event, wire.ResponseCreate)
    assert event.params == ResponseParams(
        output_modality="audio", voice="en-us", max_output_tokens="inf", input=()
    )


ITEM = '{"type":"conversation.item.create","item":'


@pytest.mark.parametrize(
    ("data", "code", "param"),
    [
        ("", "invalid_json", None),
        (b"\xff\xfe\xff", "invalid_json", None),
        ("{", "invalid_json", None),
        ('{"type":"response.cancel","x":NaN}', "invalid_json", None),
        ('{"type":"response.cancel","x":-Infinity}', "invalid_json", None),
        ("[" * 100_000, "invalid_json", None),
        ('{"a":' * 100_000, "invalid_json", None),
        (f'{{"type":"response.cancel","x":{"9" * 5000}}}', "invalid_json", None),
        ("[]", "invalid_event", None),
        ("null", "invalid_event", None),
        ("{}", "missing_required_parameter", "type"),
        ('{"type":7}', "invalid_type", "type"),
        ('{"type":"parley.nonsense"}', "invalid_event", "type"),
        ('{"type":"response.cancel","event_id":5}', "invalid_type", "event_id"),
        ('{"type":"response.cancel","event_id":"\\ud800"}', "invalid_value", "event_id"),
        ('{"type":"input_audio_buffer.append"}', "missing_required_parameter", "audio"),
        ('{"type":"input_audio_buffer.append","audio":[1]}', "invalid_type", "audio"),
        ('{"type":"input_audio_buffer.append","audio":"AAA"}', "invalid_value", "audio"),
        ('{"type":"input_audio_buffer.append","audio":"A*AAAAA=="}', "invalid_value", "audio"),
        ('{"type":"input_audio_buffer.append","audio":"ÄÄÄÄ"}', "invalid_value", "audio"),
        ('{"type":"input_audio_buffer.append","audio":"AAAA"}', "invalid_value", "audio"),
        ('{"type":"session.update"}', "missing_required_parameter", "session"),
        ('{"type":"session.update","session":"x"}', "invalid_type", "session"),
        ('{"type":"conversation.item.delete","item_id":""}', "invalid_value", "item_id"),
        ('{"type":"conversation.item.delete","item_id":"é"}', "invalid_value", "item_id"),
        (
            '{"type":"parley.playback","item_id":"a"}',
            "missing_required_parameter",
            "played_samples",
        ),
        (
            '{"type":"parley.playback","item_id":"a","played_samples":-1}',
            "invalid_value",
            "played_samples",
        ),
        (
            '{"type":"parley.playback","item_id":"a","played_samples":1e999}',
            "invalid_type",
            "played_samples",
        ),
        (
            '{"type":"parley.playback","item_id":"a","played_samples":true}',
            "invalid_type",
            "played_samples",
        ),
        (ITEM + "{}}", "missing_required_parameter", "item.type"),
        (ITEM + '{"type":"mcp_call"}}', "unsupported_item_type", "item.type"),
        (ITEM + '{"type":"message"}}', "missing_required_parameter", "item.role"),
        (ITEM + '{"type":"message","role":"robot"}}', "invalid_value", "item.role"),
        (ITEM + '{"type":"message","role":"user"}}', "missing_required_parameter", "item.content"),
        (
            ITEM + '{"type":"message","role":"user","content":[7]}}',
            "invalid_type",
            "item.content[0]",
        ),
        (
            ITEM + '{"type":"message","role":"user","content":[{"type":"input_image"}]}}',
            "unsupported_content_type",
            "item.content[0].type",
        ),
        (
            ITEM + '{"type":"message","role":"assistant","content":[{"type":"output_audio"}]}}',
            "unsupported_content_type",
            "item.content[0].type",
        ),
        (
            ITEM
            + '{"type":"message","role":"user","content":[{"type":"input_text","text":"'
            + "x" * (MAX_TEXT_CHARS + 1)
            + '"}]}}',
            "string_above_max_length",
            "item.content[0].text",
        ),
        (
            '{"type":"response.create","response":{"metadata":{"k":1}}}',
            "invalid_type",
            "response.metadata",
        ),
        (
            '{"type":"response.create","response":{"conversation":"mine"}}',
            "invalid_value",
            "response.conversation",
        ),
    ],
)
def test_what_is_wrong_is_named(data: str | bytes, code: str, param: str | None) -> None:
    error = refused(data)
    assert (error.code, error.param) == (code, param)


def test_the_event_id_comes_back_when_it_can_be_read() -> None:
    assert refused('{"event_id":"e1","type":"nonsense"}').event_id == "e1"
    assert refused('{"event_id":"e1","type":"input_audio_buffer.append"}').event_id == "e1"
    assert refused('{"event_id":"e1"').event_id is None
    unread = refused('{"event_id":"e1","type":"nonsense"}')
    assert wire.refusal(unread)["error"]["event_id"] == "e1"
    assert wire.refusal(WireError("code", "No."), "e2")["error"]["event_id"] == "e2"


def test_messages_of_errors_never_repeat_what_was_sent() -> None:
    said = "my secret words"
    for event in (
        {"type": said},
        {"type": "session.update", "session": said},
        {"type": "conversation.item.create", "item": {"type": said}},
        {"type": "conversation.item.create", "item": message("user", {"type": said})},
        {"type": "response.create", "response": {"conversation": said}},
    ):
        assert said not in refused(json.dumps(event)).message


_TEXT = st.text('ab01{}[]":,.-+eE\\u\ud800é\0 \u2028', max_size=40)
_SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), _TEXT, st.just(AUDIO))
_NAMES = st.sampled_from(
    "type session item item_id audio content content_index audio_end_ms response input role text "
    "transcript metadata tools voice output output_modalities modalities name call_id arguments "
    "event_id previous_item_id played_samples id tool_choice truncation tracing prompt".split()
)
_TYPES = st.sampled_from(
    "session.update input_audio_buffer.append input_audio_buffer.commit conversation.item.create "
    "conversation.item.retrieve conversation.item.delete conversation.item.truncate "
    "response.create response.cancel parley.playback message user function_call input_audio "
    "input_text output_text item_reference function".split()
)
_JSON = st.recursive(
    _SCALARS | _TYPES,
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(_NAMES, inside, max_size=5),
    max_leaves=12,
)


def only_an_event_or_a_wire_error(data: str | bytes) -> None:
    try:
        event = wire.parse(data)
    except WireError as error:
        check_event(wire.refusal(error))
    else:
        assert isinstance(event, wire.ClientEvent)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=60) | _TEXT)
def test_any_bytes(data: str | bytes) -> None:
    only_an_event_or_a_wire_error(data)


@settings(max_examples=40, deadline=None)
@given(_TYPES, st.dictionaries(_NAMES, _JSON, max_size=6))
def test_any_json(kind: str, fields: dict[str, Any]) -> None:
    only_an_event_or_a_wire_error(json.dumps({**fields, "type": kind}))
