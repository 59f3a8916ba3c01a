"""The wire: client events in, server events out, audio frames. Pure; bytes, text and dicts.

OpenAI Realtime (GA) names and fields, plus the binary variant: see `docs/protocol.md`.
"""

from __future__ import annotations

import binascii
import json
import struct
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from handlers.audio import from_pcm16, to_pcm16
from handlers.messages import RATE_HZ, Samples
from server.client_events import AudioAppend as AudioAppend
from server.client_events import AudioClear as AudioClear
from server.client_events import AudioCommit as AudioCommit
from server.client_events import ClientEvent as ClientEvent
from server.client_events import ItemCreate as ItemCreate
from server.client_events import ItemDelete as ItemDelete
from server.client_events import ItemRetrieve as ItemRetrieve
from server.client_events import ItemTruncate as ItemTruncate
from server.client_events import OutputAudioClear as OutputAudioClear
from server.client_events import Playback as Playback
from server.client_events import ResponseCancel as ResponseCancel
from server.client_events import ResponseCreate as ResponseCreate
from server.client_events import SessionUpdate as SessionUpdate
from server.client_events import parse as parse
from server.client_events import parse_audio_frame as parse_audio_frame
from server.fields import WireError as WireError
from server.fields import new_id as new_id

Event: TypeAlias = dict[str, Any]

SAMPLES_PER_MS = RATE_HZ // 1000


# Server events.


def _event(kind: str, **fields: Any) -> Event:
    return {"type": kind, "event_id": new_id("event"), **fields}


def _content(kind: str, response_id: str, item_id: str, **fields: Any) -> Event:
    """About the one content part of the message of a response, which comes before any call."""
    return _event(
        kind, response_id=response_id, item_id=item_id, output_index=0, content_index=0, **fields
    )


def error(
    code: str,
    message: str,
    *,
    kind: Literal["invalid_request_error", "server_error"] = "invalid_request_error",
    param: str | None = None,
    event_id: str | None = None,
) -> Event:
    """`event_id` is that of the client event which is to blame."""
    detail = {"type": kind, "code": code, "message": message, "param": param, "event_id": event_id}
    return _event("error", error=detail)


def refusal(why: WireError, event_id: str | None = None) -> Event:
    """The `error` for an event that was parsed (`event_id` is its own) or could not be."""
    event_id = event_id or why.event_id
    return error(why.code, why.message, param=why.param, event_id=event_id)


def session_created(session: Mapping[str, Any]) -> Event:
    return _event("session.created", session=session)


def session_updated(session: Mapping[str, Any]) -> Event:
    return _event("session.updated", session=session)


def speech_started(item_id: str, audio_start_ms: int) -> Event:
    kind = "input_audio_buffer.speech_started"
    return _event(kind, item_id=item_id, audio_start_ms=audio_start_ms)


def speech_stopped(item_id: str, audio_end_ms: int) -> Event:
    kind = "input_audio_buffer.speech_stopped"
    return _event(kind, item_id=item_id, audio_end_ms=audio_end_ms)


def committed(item_id: str, previous_item_id: str | None) -> Event:
    kind = "input_audio_buffer.committed"
    return _event(kind, item_id=item_id, previous_item_id=previous_item_id)


def cleared() -> Event:
    return _event("input_audio_buffer.cleared")


def timeout_triggered(item_id: str, audio_start_ms: int, audio_end_ms: int) -> Event:
    return _event(
        "input_audio_buffer.timeout_triggered",
        item_id=item_id,
        audio_start_ms=audio_start_ms,
        audio_end_ms=audio_end_ms,
    )


def item_added(item: Mapping[str, Any], previous_item_id: str | None) -> Event:
    return _event("conversation.item.added", item=item, previous_item_id=previous_item_id)


def item_done(item: Mapping[str, Any], previous_item_id: str | None) -> Event:
    return _event("conversation.item.done", item=item, previous_item_id=previous_item_id)


def item_retrieved(item: Mapping[str, Any]) -> Event:
    return _event("conversation.item.retrieved", item=item)


def item_deleted(item_id: str) -> Event:
    return _event("conversation.item.deleted", item_id=item_id)


def item_truncated(item_id: str, content_index: int, audio_end_ms: int) -> Event:
    return _event(
        "conversation.item.truncated",
        item_id=item_id,
        content_index=content_index,
        audio_end_ms=audio_end_ms,
    )


_TRANSCRIPTION = "conversation.item.input_audio_transcription"


def transcription_delta(item_id: str, delta: str) -> Event:
    return _event(f"{_TRANSCRIPTION}.delta", item_id=item_id, content_index=0, delta=delta)


def transcription_completed(item_id: str, transcript: str, audio_s: float) -> Event:
    return _event(
        f"{_TRANSCRIPTION}.completed",
        item_id=item_id,
        content_index=0,
        transcript=transcript,
        usage={"type": "duration", "seconds": audio_s},
    )


def transcription_failed(item_id: str, code: str, message: str) -> Event:
    detail = {"type": "server_error", "code": code, "message": message, "param": None}
    return _event(f"{_TRANSCRIPTION}.failed", item_id=item_id, content_index=0, error=detail)


def response(
    response_id: str,
    *,
    status: str,
    status_details: Mapping[str, Any] | None,
    output: list[dict[str, Any]],
    conversation_id: str | None,
    modality: str,
    voice: str | None,
    max_tokens: int | None,
    metadata: Mapping[str, Any] | None,
    usage: tuple[int, int] | None,
) -> dict[str, Any]:
    """The GA response object; `usage` is (input, output) in text tokens."""
    counted = None
    if usage is not None:
        counted = {
            "total_tokens": sum(usage),
            "input_tokens": usage[0],
            "output_tokens": usage[1],
            "input_token_details": {"text_tokens": usage[0], "audio_tokens": 0, "cached_tokens": 0},
            "output_token_details": {"text_tokens": usage[1], "audio_tokens": 0},
        }
    voiced = {"format": {"type": "audio/pcm", "rate": RATE_HZ}, "voice": voice}
    return {
        "id": response_id,
        "object": "realtime.response",
        "status": status,
        "status_details": status_details,
        "output": output,
        "conversation_id": conversation_id,
        "output_modalities": [modality],
        "max_output_tokens": max_tokens or "inf",
        "audio": {"output": voiced},
        "usage": counted,
        "metadata": metadata,
    }


def response_created(response: Mapping[str, Any]) -> Event:
    return _event("response.created", response=response)


def response_done(response: Mapping[str, Any]) -> Event:
    return _event("response.done", response=response)


def output_item_added(response_id: str, item: Mapping[str, Any], index: int = 0) -> Event:
    kind = "response.output_item.added"
    return _event(kind, response_id=response_id, output_index=index, item=item)


def output_item_done(response_id: str, item: Mapping[str, Any], index: int = 0) -> Event:
    kind = "response.output_item.done"
    return _event(kind, response_id=response_id, output_index=index, item=item)


def function_call(response_id: str, item: Mapping[str, Any], index: int) -> tuple[Event, Event]:
    """The arguments of a `function_call` item, at once and whole."""
    about = {"response_id": response_id, "item_id": item["id"], "output_index": index}
    about["call_id"], arguments = item["call_id"], item["arguments"]
    kind = "response.function_call_arguments"
    return (
        _event(f"{kind}.delta", **about, delta=arguments),
        _event(f"{kind}.done", **about, name=item["name"], arguments=arguments),
    )


def _part(spoken: bool, text: str) -> dict[str, str]:
    return {"type": "audio", "transcript": text} if spoken else {"type": "text", "text": text}


def content_part_added(response_id: str, item_id: str, spoken: bool) -> Event:
    return _content("response.content_part.added", response_id, item_id, part=_part(spoken, ""))


def content_part_done(response_id: str, item_id: str, spoken: bool, text: str) -> Event:
    return _content("response.content_part.done", response_id, item_id, part=_part(spoken, text))


def output_text_delta(response_id: str, item_id: str, delta: str) -> Event:
    return _content("response.output_text.delta", response_id, item_id, delta=delta)


def output_text_done(response_id: str, item_id: str, text: str) -> Event:
    return _content("response.output_text.done", response_id, item_id, text=text)


def transcript_delta(response_id: str, item_id: str, delta: str) -> Event:
    return _content("response.output_audio_transcript.delta", response_id, item_id, delta=delta)


def transcript_done(response_id: str, item_id: str, transcript: str) -> Event:
    kind = "response.output_audio_transcript.done"
    return _content(kind, response_id, item_id, transcript=transcript)


def output_audio_done(response_id: str, item_id: str) -> Event:
    return _content("response.output_audio.done", response_id, item_id)


def audio_delta(response_id: str, item_id: str, samples: Samples) -> str:
    """`response.output_audio.delta` for [T] float32 at RATE_HZ, as the text of its frame."""
    delta = binascii.b2a_base64(to_pcm16(samples), newline=False).decode("ascii")
    event = _content("response.output_audio.delta", response_id, item_id, delta=delta)
    return json.dumps(event, separators=(",", ":"))


# Audio frames of the binary variant, server → client.

_AUDIO_KIND = 1


def encode_audio_frame(item_id: str, start_sample: int, samples: Samples) -> bytes:
    """[T] float32 at RATE_HZ, from `start_sample` of the item's audio on."""
    name = item_id.encode("ascii")
    return (
        bytes((_AUDIO_KIND, len(name))) + name + struct.pack("<I", start_sample) + to_pcm16(samples)
    )


def decode_audio_frame(data: bytes) -> tuple[str, int, Samples]:
    """(item_id, start_sample, samples [T]). Raises `WireError` if it is no such frame."""
    if len(data) < 2 or data[0] != _AUDIO_KIND or len(data) < 6 + data[1]:
        raise WireError("invalid_audio_frame", "This is not an audio frame.")
    end = 2 + data[1]
    try:
        item_id = data[2:end].decode("ascii")
        samples = from_pcm16(memoryview(data)[end + 4 :])
    except ValueError:
        raise WireError("invalid_audio_frame", "The audio frame is damaged.") from None
    return item_id, struct.unpack_from("<I", data, end)[0], samples
