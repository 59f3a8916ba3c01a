from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.config import ResponseParams, SemanticVad, ServerVad, SessionConfig
from server.fields import MAX_RAW_JSON_DEPTH, WireError
from tests.server.schema import check_session

VOICES = ("en-gb", "en-us", "marin")
BASE = SessionConfig(model="parley", voice="en-us", server_vad=ServerVad(silence_duration_ms=400))


def merged(session: dict[str, Any], config: SessionConfig = BASE, **more: Any) -> SessionConfig:
    return config.merged(session, known_voices=VOICES, **more)


def refused(session: dict[str, Any], **more: Any) -> WireError:
    with pytest.raises(WireError) as caught:
        merged(session, **more)
    return caught.value


def heard(**fields: Any) -> dict[str, Any]:
    return {"type": "realtime", "audio": {"input": fields}}


def spoken(**fields: Any) -> dict[str, Any]:
    return {"type": "realtime", "audio": {"output": fields}}


def test_the_defaults_are_reported_in_full() -> None:
    session = SessionConfig(model="parley", voice="en-us").to_wire("sess_1", 99)
    check_session(session)
    assert session["id"] == "sess_1"
    assert session["expires_at"] == 99
    assert session["output_modalities"] == ["audio"]
    assert session["audio"] == {
        "input": {
            "format": {"type": "audio/pcm", "rate": 24000},
            "transcription": None,
            "noise_reduction": None,
            "turn_detection": {
                "type": "server_vad",
                "threshold": 0.5,
                "prefix_padding_ms": 300,
                "silence_duration_ms": 300,
                "create_response": True,
                "interrupt_response": True,
                "idle_timeout_ms": None,
            },
        },
        "output": {"format": {"type": "audio/pcm", "rate": 24000}, "voice": "en-us", "speed": 1.0},
    }


def test_an_update_changes_what_it_names_and_nothing_else() -> None:
    assert merged({"type": "realtime"}) == BASE
    config = merged({"type": "realtime", "instructions": "be brief"})
    assert config == dataclasses.replace(BASE, instructions="be brief")
    config = merged(spoken(speed=1.5), config)
    assert config == dataclasses.replace(BASE, instructions="be brief", speed=1.5)


def test_clearing() -> None:
    full = merged(
        {
            "instructions": "x",
            "tools": [{"type": "function", "name": "f"}],
            "tool_choice": "required",
            "max_output_tokens": 9,
            "truncation": "disabled",
            "tracing": "auto",
            "prompt": {"id": "p"},
            "include": ["item.input_audio_transcription.logprobs"],
            "audio": {"input": {"transcription": {"model": "whisper-1"}, "turn_detection": None}},
        }
    )
    assert full.turn_detection is None
    assert full.transcription == {"model": "whisper-1"}
    names = "instructions tool_choice max_output_tokens truncation tracing prompt include".split()
    cleared = merged({**dict.fromkeys(names), "tools": []}, full)
    cleared = merged(heard(transcription=None), cleared)
    assert cleared == dataclasses.replace(BASE, turn_detection=None)
    assert merged({"instructions": ""}, full).instructions == ""


def test_null_where_there_is_no_off_leaves_it_as_it_is() -> None:
    config = merged(spoken(voice="marin", speed=1.2))
    nulls = {"voice": None, "speed": None, "format": None}
    assert merged(spoken(**nulls), config) == config
    assert merged({"audio": None, "model": None, "output_modalities": None}, config) == config


def test_turn_detection_is_merged_within_its_kind() -> None:
    config = merged(heard(turn_detection={"type": "server_vad", "threshold": 0.7}))
    config = merged(heard(turn_detection={"type": "server_vad", "create_response": False}), config)
    assert config.turn_detection == ServerVad(threshold=0.7, create_response=False)
    config = merged(heard(turn_detection={"type": "semantic_vad", "eagerness": "low"}), config)
    assert config.turn_detection == SemanticVad("low")
    config = merged(heard(turn_detection={"type": "semantic_vad"}), config)
    assert config.turn_detection == SemanticVad("low")
    config = merged(heard(turn_detection={"type": "server_vad"}), config)
    assert config.turn_detection == BASE.server_vad
    with_timeout = merged(heard(turn_detection={"idle_timeout_ms": 6000}), config)
    assert with_timeout.turn_detection == dataclasses.replace(BASE.server_vad, idle_timeout_ms=6000)
    without = merged(heard(turn_detection={"idle_timeout_ms": None}), with_timeout)
    assert without.turn_detection == BASE.server_vad


def test_beta_names_mean_the_same() -> None:
    beta = {
        "modalities": ["text", "audio"],
        "voice": "marin",
        "input_audio_format": "pcm16",
        "output_audio_format": "pcm16",
        "input_audio_transcription": {"model": "whisper-1"},
        "input_audio_noise_reduction": {"type": "near_field"},
        "turn_detection": {"type": "server_vad", "silence_duration_ms": 200},
        "max_response_output_tokens": 100,
        "speed": 1.1,
        "temperature": 0.8,
    }
    ga = {
        "type": "realtime",
        "output_modalities": ["audio"],
        "max_output_tokens": 100,
        "audio": {
            "input": {
                "format": {"type": "audio/pcm", "rate": 24000},
                "transcription": {"model": "whisper-1"},
                "noise_reduction": {"type": "near_field"},
                "turn_detection": {"type": "server_vad", "silence_duration_ms": 200},
            },
            "output": {"format": {"type": "audio/pcm"}, "voice": "marin", "speed": 1.1},
        },
    }
    assert merged(beta) == merged(ga)
    assert merged(beta).voice == "marin"
    assert merged({"modalities": ["text"]}).output_modality == "text"
    assert merged({"turn_detection": None}).turn_detection is None


def test_the_ga_name_wins_over_the_beta_one() -> None:
    assert merged({"voice": "en-gb", **spoken(voice="marin")}).voice == "marin"


def test_the_model_is_the_servers() -> None:
    assert merged({"type": "realtime", "model": "gpt-realtime", "instructions": ""}) == BASE


def test_what_was_given_is_not_touched() -> None:
    given = {"voice": "marin", "audio": {"output": {"speed": 1.5}}}
    before = json.dumps(given)
    assert merged(given).voice == "marin"
    assert json.dumps(given) == before


def test_the_voice_is_fixed_once_heard() -> None:
    error = refused(spoken(voice="marin"), voice_locked=True)
    assert (error.code, error.param) == ("cannot_update_voice", "session.audio.output.voice")
    assert merged(spoken(voice="en-us"), voice_locked=True) == BASE
    assert merged({"voice": {"id": "marin"}}).voice == "marin"


@pytest.mark.parametrize(
    ("session", "code", "param"),
    [
        ({"type": "transcription"}, "unsupported_session_type", "type"),
        ({"type": "telepathy"}, "invalid_value", "type"),
        ({"model": 5}, "invalid_type", "model"),
        ({"output_modalities": ["audio", "text"]}, "invalid_value", "output_modalities"),
        ({"output_modalities": []}, "invalid_value", "output_modalities"),
        ({"output_modalities": "text"}, "invalid_type", "output_modalities"),
        ({"instructions": 5}, "invalid_type", "instructions"),
        ({"instructions": "\ud800"}, "invalid_value", "instructions"),
        ({"max_output_tokens": 0}, "invalid_value", "max_output_tokens"),
        ({"max_output_tokens": 4097}, "invalid_value", "max_output_tokens"),
        ({"max_output_tokens": "many"}, "invalid_type", "max_output_tokens"),
        ({"audio": []}, "invalid_type", "audio"),
        ({"audio": [], "voice": "marin"}, "invalid_type", "audio"),
        (spoken(voice="nobody"), "invalid_value", "audio.output.voice"),
        (spoken(speed=1.6), "invalid_value", "audio.output.speed"),
        (spoken(speed=float("nan")), "invalid_value", "audio.output.speed"),
        (spoken(speed=True), "invalid_type", "audio.output.speed"),
        (spoken(format={"type": "audio/pcmu"}), "unsupported_format", "audio.output.format"),
        (
            heard(format={"type": "audio/pcm", "rate": 16000}),
            "unsupported_format",
            "audio.input.format",
        ),
        ({"input_audio_format": "g711_alaw"}, "unsupported_format", "audio.input.format"),
        (
            heard(noise_reduction={"type": "magic"}),
            "invalid_value",
            "audio.input.noise_reduction.type",
        ),
        (
            heard(turn_detection={"type": "server_vad", "threshold": 1.5}),
            "invalid_value",
            "audio.input.turn_detection.threshold",
        ),
        (
            heard(turn_detection={"type": "server_vad", "silence_duration_ms": 10**30}),
            "invalid_value",
            "audio.input.turn_detection.silence_duration_ms",
        ),
        (
            heard(turn_detection={"type": "server_vad", "idle_timeout_ms": 100}),
            "invalid_value",
            "audio.input.turn_detection.idle_timeout_ms",
        ),
        (
            heard(turn_detection={"type": "psychic_vad"}),
            "invalid_value",
            "audio.input.turn_detection.type",
        ),
        (heard(transcription="on"), "invalid_type", "audio.input.transcription"),
        ({"tools": [{"type": "mcp"}]}, "unsupported_tool_type", "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "missing_required_parameter", "tools[0].name"),
        ({"tool_choice": {"type": "function"}}, "missing_required_parameter", "tool_choice.name"),
        ({"truncation": {"type": "retention_ratio"}}, "missing_required_parameter", None),
        ({"include": ["everything"]}, "invalid_value", "include"),
    ],
)
def test_bad_values_are_named_and_change_nothing(
    session: dict[str, Any], code: str, param: str | None
) -> None:
    error = refused({"instructions": "not taken", **session})
    assert error.code == code
    if param is not None:
        assert error.param == f"session.{param}"


def test_stored_json_stays_bounded_and_can_be_written() -> None:
    def tool(parameters: Any) -> dict[str, Any]:
        return {"tools": [{"type": "function", "name": "f", "parameters": parameters}]}

    deep: dict[str, Any] = {}
    for _ in range(MAX_RAW_JSON_DEPTH + 1):
        deep = {"a": deep}
    for parameters in (deep, {"x": float("inf")}, {"x": "\ud800"}, {"x": "y" * 70_000}):
        assert refused(tool(parameters)).code == "invalid_value"
    assert merged(tool({"x": [1.5, None]})).tools[0]["parameters"] == {"x": [1.5, None]}


def test_one_response_may_differ() -> None:
    params = ResponseParams(
        output_modality="text", instructions="", voice="marin", max_output_tokens=3, tools=()
    )
    config = BASE.for_response(params, known_voices=VOICES)
    assert config == dataclasses.replace(
        BASE, output_modality="text", voice="marin", max_output_tokens=3
    )
    assert config.max_tokens == 3
    assert BASE.max_tokens is None
    assert BASE.for_response(ResponseParams(), known_voices=VOICES) == BASE
    with pytest.raises(WireError) as caught:
        BASE.for_response(params, known_voices=VOICES, voice_locked=True)
    assert caught.value.code == "cannot_update_voice"
    with pytest.raises(WireError) as caught:
        BASE.for_response(ResponseParams(voice="nobody"), known_voices=VOICES)
    assert caught.value.param == "response.audio.output.voice"


def _maybe(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


_ODD: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, -1, 0, 1, 0.3, 1e9, "", "auto", "inf", [], {}, ["audio"]]
)
_VAD = _ODD | _maybe(
    type=st.sampled_from(["server_vad", "semantic_vad", None]),
    threshold=_ODD,
    prefix_padding_ms=_ODD,
    silence_duration_ms=st.sampled_from([200, 500, None]),
    create_response=st.booleans(),
    interrupt_response=_ODD,
    idle_timeout_ms=st.sampled_from([None, 5000, 1]),
    eagerness=st.sampled_from(["low", "auto", "never", None]),
)
_UPDATE = _maybe(
    instructions=st.sampled_from(["", "x", None, 5]),
    output_modalities=st.sampled_from([["audio"], ["text"], ["audio", "text"], None]),
    modalities=st.sampled_from([["text"], ["text", "audio"]]),
    voice=st.sampled_from(["marin", "nobody", None]),
    max_output_tokens=_ODD,
    tool_choice=_ODD | st.just({"type": "function", "name": "f"}),
    tools=_ODD | st.just([{"name": "f", "description": "d", "parameters": {}}]),
    truncation=_ODD | st.just({"type": "retention_ratio", "retention_ratio": 0.5}),
    tracing=_ODD | st.just({"workflow_name": "w", "metadata": {"a": 1}}),
    prompt=_ODD | st.just({"id": "p", "variables": {"a": "b"}}),
    include=_ODD | st.just(["item.input_audio_transcription.logprobs"]),
    reasoning=_ODD | st.just({"effort": "low"}),
    parallel_tool_calls=_ODD,
    turn_detection=_VAD,
    audio=_ODD
    | _maybe(
        input=_ODD | _maybe(turn_detection=_VAD, transcription=_ODD, noise_reduction=_ODD),
        output=_ODD | _maybe(speed=_ODD, voice=st.just("en-gb")),
    ),
)


@settings(max_examples=25, deadline=None)
@given(st.lists(_UPDATE, min_size=1, max_size=4))
def test_no_order_of_updates_makes_an_invalid_session(updates: list[dict[str, Any]]) -> None:
    config = BASE
    refusals: list[WireError] = []
    for update in updates:
        try:
            config = merged(update, config)
        except WireError as error:
            refusals.append(error)
    assert all((error.param or "").startswith("session.") for error in refusals)
    session = config.to_wire("sess_1")
    check_session(session)
    json.dumps(session, allow_nan=False)
    assert config.voice in VOICES
    assert merged(session, config) == config
