"""Client events: text and binary frames in, one frozen dataclass each out. Pure.

Names and fields are the OpenAI Realtime protocol's (GA); `docs/protocol.md` lists them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

from handlers.audio import from_pcm16
from handlers.messages import Samples
from server.config import ResponseParams, parse_response_params
from server.fields import Fields, WireError
from server.items import Item, parse_item

MAX_COUNT = 2**53 - 1
"""Largest integer that every JSON library keeps exact."""


@dataclass(frozen=True, slots=True)
class SessionUpdate:
    session: Mapping[str, Any]  # for `SessionConfig.merged`
    event_id: str | None = None


@dataclass(frozen=True, slots=True)
class AudioAppend:
    audio: Samples  # [T] float32 at RATE_HZ
    event_id: str | None = None


@dataclass(frozen=True, slots=True)
class AudioCommit:
    event_id: str | None = None


@dataclass(frozen=True, slots=True)
class AudioClear:
    event_id: str | None = None


@dataclass(frozen=True, slots=True)
class ItemCreate:
    item: Item
    previous_item_id: str | None = None  # None: at the end; "root": at the front
    event_id: str | None = None


@dataclass(frozen=True, slots=True)
class ItemRetrieve:
    item_id: str
    event_id: str | None = None


@dataclass(frozen=True, slots=True)
class ItemDelete:
    item_id: str
    event_id: str | None = None


@dataclass(frozen=True, slots=True)
class ItemTruncate:
    item_id: str
    content_index: int
    audio_end_ms: int
    event_id: str | None = None


@dataclass(frozen=True, slots=True)
class ResponseCreate:
    params: ResponseParams
    event_id: str | None = None


@dataclass(frozen=True, slots=True)
class ResponseCancel:
    response_id: str | None = None
    event_id: str | None = None


@dataclass(frozen=True, slots=True)
class OutputAudioClear:
    event_id: str | None = None


@dataclass(frozen=True, slots=True)
class Playback:
    """The listener has heard `played_samples` (at RATE_HZ) of an item's audio."""

    item_id: str
    played_samples: int
    event_id: str | None = None


ClientEvent: TypeAlias = (
    SessionUpdate
    | AudioAppend
    | AudioCommit
    | AudioClear
    | ItemCreate
    | ItemRetrieve
    | ItemDelete
    | ItemTruncate
    | ResponseCreate
    | ResponseCancel
    | OutputAudioClear
    | Playback
)


def parse(data: str | bytes) -> ClientEvent:
    """A text frame. Raises `WireError`, with the event's own id if it could be read."""
    try:
        event = _DECODER.decode(data if isinstance(data, str) else data.decode())
    except (ValueError, RecursionError):
        raise WireError("invalid_json", "The message is not JSON that can be read.") from None
    if not isinstance(event, dict):
        raise WireError("invalid_event", "The message is not a JSON object.")
    fields = Fields(event)
    event_id: str | None = None
    try:
        event_id = fields.text("event_id")
        read = READERS.get(fields.required(fields.text, "type"))
        if read is None:
            raise WireError("invalid_event", "There is no client event of this type.", "type")
        return read(fields, event_id)
    except WireError as error:
        error.event_id = event_id
        raise


def parse_audio_frame(data: bytes) -> AudioAppend:
    """A binary frame from a client: pcm16le mono at RATE_HZ. Raises `WireError`."""
    try:
        return AudioAppend(from_pcm16(data))
    except ValueError:
        message = "The audio frame has an odd number of bytes."
        raise WireError("invalid_audio_frame", message) from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def _audio_append(fields: Fields, event_id: str | None) -> AudioAppend:
    return AudioAppend(from_pcm16(fields.required(fields.pcm16, "audio")), event_id)


def _session_update(fields: Fields, event_id: str | None) -> SessionUpdate:
    return SessionUpdate(fields.required(fields.object, "session").values, event_id)


def _item_create(fields: Fields, event_id: str | None) -> ItemCreate:
    item = parse_item(fields.required(fields.object, "item"))
    return ItemCreate(item, fields.name("previous_item_id"), event_id)


def _item_truncate(fields: Fields, event_id: str | None) -> ItemTruncate:
    def count(name: str) -> int | None:
        return fields.integer(name, 0, MAX_COUNT)

    return ItemTruncate(
        fields.required(fields.name, "item_id"),
        fields.required(count, "content_index"),
        fields.required(count, "audio_end_ms"),
        event_id,
    )


def _response_create(fields: Fields, event_id: str | None) -> ResponseCreate:
    response = fields.object("response") or Fields({})
    return ResponseCreate(parse_response_params(response.values), event_id)


def _playback(fields: Fields, event_id: str | None) -> Playback:
    played = fields.required(lambda name: fields.integer(name, 0, MAX_COUNT), "played_samples")
    return Playback(fields.required(fields.name, "item_id"), played, event_id)


READERS: dict[str, Callable[[Fields, str | None], ClientEvent]] = {
    "input_audio_buffer.append": _audio_append,
    "input_audio_buffer.commit": lambda _, event_id: AudioCommit(event_id),
    "input_audio_buffer.clear": lambda _, event_id: AudioClear(event_id),
    "output_audio_buffer.clear": lambda _, event_id: OutputAudioClear(event_id),
    "session.update": _session_update,
    "conversation.item.create": _item_create,
    "conversation.item.retrieve": lambda fields, event_id: ItemRetrieve(
        fields.required(fields.name, "item_id"), event_id
    ),
    "conversation.item.delete": lambda fields, event_id: ItemDelete(
        fields.required(fields.name, "item_id"), event_id
    ),
    "conversation.item.truncate": _item_truncate,
    "response.create": _response_create,
    "response.cancel": lambda fields, event_id: ResponseCancel(
        fields.name("response_id"), event_id
    ),
    "parley.playback": _playback,
}
