"""The protocol's own models, from the `openai` package, as a check on what we send."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, get_args

from openai.types.realtime import RealtimeServerEvent, RealtimeSessionCreateRequest
from openai.types.realtime.realtime_session_create_response import RealtimeSessionCreateResponse
from pydantic import BaseModel, TypeAdapter

SERVER_ADDS = {"id", "object", "expires_at"}
"""Fields of `RealtimeSessionCreateResponse` that the model of `session.created` leaves out."""


@functools.cache
def _union() -> TypeAdapter[Any]:
    return TypeAdapter(RealtimeServerEvent)


@functools.cache
def _classes() -> dict[str, type[BaseModel]]:
    union, *_ = get_args(RealtimeServerEvent)
    return {get_args(model.model_fields["type"].annotation)[0]: model for model in get_args(union)}


def check_event(event: Mapping[str, Any]) -> BaseModel:
    """The event as the one model of its type. Fails on any field that this model lacks."""
    parsed: BaseModel = _union().validate_python(event)
    assert type(parsed) is _classes()[event["type"]]
    assert event["event_id"].startswith("event_")
    allowed = {"session": SERVER_ADDS} if event["type"].startswith("session.") else {}
    _refuse_unknown(parsed, event["type"], allowed)
    return parsed


def check_session(session: Mapping[str, Any]) -> None:
    """A session object against both of its models."""
    request = RealtimeSessionCreateRequest.model_validate(session)
    assert set(request.model_extra or ()) <= SERVER_ADDS
    _refuse_unknown(request, "session", {"session": SERVER_ADDS})
    RealtimeSessionCreateResponse.model_validate(session)


def _refuse_unknown(value: object, path: str, allowed: Mapping[str, set[str]]) -> None:
    if isinstance(value, BaseModel):
        unknown = set(value.model_extra or ()) - allowed.get(path.split(".")[-1], set())
        assert not unknown, f"{path}: {unknown}"
        for name in value.model_fields_set & set(type(value).model_fields):
            _refuse_unknown(getattr(value, name), f"{path}.{name}", allowed)
    elif isinstance(value, list):
        for one in value:
            _refuse_unknown(one, path, allowed)
