"""Readers for the parts of a session's configuration. Each raises `WireError`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

from handlers.messages import RATE_HZ
from server.fields import Fields, WireError, invalid_type, invalid_value

MAX_TOOLS = 128
MAX_OUTPUT_TOKENS = 4096
MAX_METADATA_PAIRS = 16
VOICES_NAMED = 12
_FORMATS = {"pcm16": "audio/pcm", "g711_ulaw": "audio/pcmu", "g711_alaw": "audio/pcma"}
_LOGPROBS = "item.input_audio_transcription.logprobs"


def read_modality(fields: Fields) -> Literal["audio", "text"] | None:
    given = fields.array("output_modalities", 2)
    if given is None:
        return None
    if given == ["audio"]:
        return "audio"
    if given == ["text"]:
        return "text"
    raise invalid_value(fields.param("output_modalities"), "give ['audio'] or ['text']")


def check_format(fields: Fields) -> None:
    """Only 16-bit PCM at 24 kHz is spoken here; beta's name for it is `pcm16`."""
    given = fields.values.get("format")
    if isinstance(given, str):
        kind, rate = _FORMATS.get(given, given), None
    else:
        inside = fields.object("format") or Fields({})
        kind = inside.text("type") or "audio/pcm"
        rate = inside.values.get("rate")
    if kind != "audio/pcm" or (rate is not None and rate != RATE_HZ):
        message = f"Only 'audio/pcm' at {RATE_HZ} Hz (16-bit little-endian mono) is supported."
        raise WireError("unsupported_format", message, fields.param("format"))


def read_voice(fields: Fields) -> str | None:
    """A name, or an object with the name as `id`."""
    if isinstance(fields.values.get("voice"), dict):
        voice = fields.object("voice")
        return voice.required(voice.name, "id") if voice else None
    return fields.name("voice")


def check_voice(voice: str, known: Collection[str], param: str) -> None:
    if voice not in known:
        some = ", ".join(f"'{name}'" for name in list(known)[:VOICES_NAMED])
        more = "" if len(known) <= VOICES_NAMED else " and more (GET /v1/audio/voices)"
        raise invalid_value(param, f"there is no such voice; there are: {some}{more}")


def read_max_output_tokens(fields: Fields) -> int | Literal["inf"]:
    if fields.values.get("max_output_tokens") == "inf":
        return "inf"
    return fields.integer("max_output_tokens", 1, MAX_OUTPUT_TOKENS) or "inf"


def read_tools(fields: Fields) -> tuple[Mapping[str, Any], ...]:
    tools = tuple(_tool(one) for one in fields.objects("tools", MAX_TOOLS))
    fields.raw("tools")  # bounds the whole
    return tools


def _tool(fields: Fields) -> Mapping[str, Any]:
    if fields.values.get("type", "function") != "function":
        message = "Only tools of type 'function' are supported."
        raise WireError("unsupported_tool_type", message, fields.param("type"))
    tool: dict[str, Any] = {"type": "function", "name": fields.required(fields.name, "name")}
    if (description := fields.text("description")) is not None:
        tool["description"] = description
    if fields.object("parameters") is not None:
        tool["parameters"] = fields.raw("parameters")
    return tool


def read_tool_choice(fields: Fields) -> Any:
    if isinstance(fields.values.get("tool_choice"), dict):
        choice = fields.object("tool_choice") or Fields({})
        kind = choice.required(choice.text, "type")
        if kind != "function":
            message = "A tool choice can be a mode or of type 'function'."
            raise WireError("unsupported_tool_type", message, choice.param("type"))
        return {"type": "function", "name": choice.required(choice.name, "name")}
    return fields.choice("tool_choice", "auto", "none", "required") or "auto"


def read_transcription(fields: Fields | None) -> Mapping[str, Any] | None:
    """The object with the fields that are known, null ones left out; None: off."""
    if fields is None:
        return None
    kept: dict[str, Any] = {name: fields.text(name) for name in ("model", "language", "prompt")}
    kept["delay"] = fields.choice("delay", "minimal", "low", "medium", "high", "xhigh")
    for name in ("languages", "keywords"):
        words = fields.array(name, 256)
        if words is not None and not all(isinstance(word, str) for word in words):
            raise invalid_type(fields.param(name), "an array of strings", words)
        kept[name] = fields.raw(name)
    return {name: value for name, value in kept.items() if value is not None}


def check_noise_reduction(fields: Fields) -> None:
    noise_reduction = fields.object("noise_reduction")
    if noise_reduction is not None:
        noise_reduction.choice("type", "near_field", "far_field")
        noise_reduction.number("strength", 0.0, 1.0)


def read_metadata(fields: Fields) -> Mapping[str, str] | None:
    """At most 16 pairs; keys up to 64 characters, values up to 512."""
    given = fields.object("metadata")
    if given is None:
        return None
    for key, value in given.values.items():
        if not isinstance(value, str):
            raise invalid_type(given.path, "an object of strings", value)
        if len(key) > 64 or len(value) > 512:
            raise invalid_value(given.path, "a key has over 64 or a value over 512 characters")
    if len(given.values) > MAX_METADATA_PAIRS:
        raise invalid_value(given.path, f"more than {MAX_METADATA_PAIRS} pairs")
    metadata: Mapping[str, str] = fields.raw("metadata")
    return metadata


def read_stored(fields: Fields) -> dict[str, Any]:
    """What is kept and reported only: the ones that are there, null meaning the default."""
    readers: dict[str, Callable[[], Any]] = {
        "parallel_tool_calls": lambda: fields.boolean("parallel_tool_calls"),
        "reasoning": lambda: _reasoning(fields),
        "truncation": lambda: _truncation(fields),
        "tracing": lambda: _tracing(fields),
        "prompt": lambda: _prompt(fields),
        "include": lambda: _include(fields),
    }
    return {name: read() for name, read in readers.items() if fields.has(name)}


def _reasoning(fields: Fields) -> Mapping[str, Any] | None:
    given = fields.object("reasoning")
    if given is None:
        return None
    effort = given.choice("effort", "minimal", "low", "medium", "high", "xhigh")
    return {"effort": effort} if effort else None


def _truncation(fields: Fields) -> Any:
    if not isinstance(fields.values.get("truncation"), dict):
        return fields.choice("truncation", "auto", "disabled") or "auto"
    given = fields.object("truncation") or Fields({})
    given.required(lambda name: given.choice(name, "retention_ratio"), "type")
    ratio = given.required(lambda name: given.number(name, 0.0, 1.0), "retention_ratio")
    truncation: dict[str, Any] = {"type": "retention_ratio", "retention_ratio": ratio}
    limits = given.object("token_limits")
    if limits is not None:
        tokens = limits.integer("post_instructions", 0, 1_000_000_000)
        truncation["token_limits"] = {"post_instructions": tokens}
    return truncation


def _tracing(fields: Fields) -> Any:
    if not isinstance(fields.values.get("tracing"), dict):
        return fields.choice("tracing", "auto")
    given = fields.object("tracing") or Fields({})
    kept = {name: given.text(name) for name in ("workflow_name", "group_id")}
    given.object("metadata")
    return {**kept, "metadata": given.raw("metadata")}


def _prompt(fields: Fields) -> Mapping[str, Any] | None:
    given = fields.object("prompt")
    if given is None:
        return None
    prompt: dict[str, Any] = {"id": given.required(given.name, "id")}
    variables = given.object("variables")
    if variables is not None:
        for name in variables.values:
            variables.text(name)
        prompt["variables"] = given.raw("variables")
    prompt["version"] = given.text("version")
    return prompt


def _include(fields: Fields) -> tuple[str, ...]:
    include = fields.array("include", 1) or []
    if any(one != _LOGPROBS for one in include):
        raise invalid_value(fields.param("include"), f"supported values are '{_LOGPROBS}'")
    return tuple(include)
