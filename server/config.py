"""The session's configuration: partial updates in, the full GA session object out."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from handlers.messages import RATE_HZ
from server.config_fields import (
    check_format,
    check_noise_reduction,
    check_voice,
    read_max_output_tokens,
    read_metadata,
    read_modality,
    read_stored,
    read_tool_choice,
    read_tools,
    read_transcription,
    read_voice,
)
from server.fields import Fields, WireError
from server.items import Item, ItemReference, parse_input

Modality: TypeAlias = Literal["audio", "text"]
Eagerness: TypeAlias = Literal["low", "medium", "high", "auto"]

MAX_INPUT_ITEMS = 256
MAX_PREFIX_PADDING_MS = 2_000
MAX_SILENCE_DURATION_MS = 10_000

_PCM16 = {"type": "audio/pcm", "rate": RATE_HZ}
_ALIASES: dict[str, tuple[str, ...]] = {
    "modalities": ("output_modalities",),
    "max_response_output_tokens": ("max_output_tokens",),
    "voice": ("audio", "output", "voice"),
    "speed": ("audio", "output", "speed"),
    "output_audio_format": ("audio", "output", "format"),
    "input_audio_format": ("audio", "input", "format"),
    "input_audio_transcription": ("audio", "input", "transcription"),
    "input_audio_noise_reduction": ("audio", "input", "noise_reduction"),
    "turn_detection": ("audio", "input", "turn_detection"),
}
"""The beta protocol's flat names → where the GA protocol has them."""


@dataclass(frozen=True, slots=True)
class ServerVad:
    threshold: float = 0.5
    prefix_padding_ms: int = 300
    silence_duration_ms: int = 300
    create_response: bool = True
    interrupt_response: bool = True
    idle_timeout_ms: int | None = None

    def to_wire(self) -> dict[str, Any]:
        return {"type": "server_vad", **dataclasses.asdict(self)}


@dataclass(frozen=True, slots=True)
class SemanticVad:
    eagerness: Eagerness = "auto"
    create_response: bool = True
    interrupt_response: bool = True

    def to_wire(self) -> dict[str, Any]:
        return {"type": "semantic_vad", **dataclasses.asdict(self)}


SEMANTIC = SemanticVad()
TurnDetection: TypeAlias = ServerVad | SemanticVad | None


@dataclass(frozen=True, slots=True)
class ResponseParams:
    """What one `response.create` asks for; None: as the session has it."""

    output_modality: Modality | None = None
    instructions: str | None = None
    voice: str | None = None
    max_output_tokens: int | Literal["inf"] | None = None
    tools: tuple[Mapping[str, Any], ...] | None = None
    tool_choice: Any = None
    conversation: Literal["auto", "none"] = "auto"
    metadata: Mapping[str, str] | None = None
    input: tuple[Item | ItemReference, ...] | None = None  # (): an empty context


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """What is in force. `parallel_tool_calls` and all after it are kept and reported only."""

    model: str
    voice: str
    instructions: str = ""
    output_modality: Modality = "audio"
    turn_detection: TurnDetection = ServerVad()
    server_vad: ServerVad = ServerVad()  # what a client gets that switches it off and on
    transcription: Mapping[str, Any] | None = None
    speed: float = 1.0
    max_output_tokens: int | Literal["inf"] = "inf"
    tools: tuple[Mapping[str, Any], ...] = ()
    tool_choice: Any = "auto"
    parallel_tool_calls: bool | None = None
    reasoning: Mapping[str, Any] | None = None
    truncation: Any = "auto"
    tracing: Any = None
    include: tuple[str, ...] = ()
    prompt: Mapping[str, Any] | None = None

    @property
    def max_tokens(self) -> int | None:
        return None if self.max_output_tokens == "inf" else self.max_output_tokens

    def merged(
        self,
        session: Mapping[str, Any],
        *,
        known_voices: Collection[str],
        voice_locked: bool = False,
    ) -> SessionConfig:
        """This configuration with a `session.update`'s `session` laid over it.

        `voice_locked`: the assistant has spoken, so its voice stays. Raises `WireError` at the
        first bad value, naming it by its GA path; nothing has changed then.
        """
        fields = Fields(_to_ga(session), "session")
        if fields.choice("type", "realtime", "transcription") == "transcription":
            message = "Transcription sessions are not supported."
            raise WireError("unsupported_session_type", message, "session.type")
        fields.text("model")  # the server has the one model it has
        changes = {**_common(fields), **read_stored(fields), **self._input_changes(fields)}
        output = _inside(fields, "output")
        if (speed := output.number("speed", 0.25, 1.5)) is not None:
            changes["speed"] = speed
        self._check_voice(changes.get("voice"), known_voices, voice_locked, output.param("voice"))
        return dataclasses.replace(self, **changes)

    def _input_changes(self, fields: Fields) -> dict[str, Any]:
        changes: dict[str, Any] = {}
        heard = _inside(fields, "input")
        check_format(heard)
        check_noise_reduction(heard)
        if heard.has("transcription"):
            changes["transcription"] = read_transcription(heard.object("transcription"))
        if heard.has("turn_detection"):
            given = heard.object("turn_detection")
            changes["turn_detection"] = given and _turn_detection(
                given, self.turn_detection, self.server_vad
            )
        return changes

    def _check_voice(
        self, voice: str | None, known: Collection[str], locked: bool, param: str
    ) -> None:
        if voice is None or voice == self.voice:
            return
        check_voice(voice, known, param)
        if locked:
            raise _voice_is_locked(param)

    def for_response(
        self,
        params: ResponseParams,
        *,
        known_voices: Collection[str],
        voice_locked: bool = False,
    ) -> SessionConfig:
        """The configuration of one response. Raises `WireError` for its voice."""
        self._check_voice(params.voice, known_voices, voice_locked, "response.audio.output.voice")
        asked = {
            name: value for name in _PER_RESPONSE if (value := getattr(params, name)) is not None
        }
        return dataclasses.replace(self, **asked)

    def to_wire(self, session_id: str, expires_at: int | None = None) -> dict[str, Any]:
        """The GA session object. `expires_at` in seconds since 1970."""
        turn_detection = self.turn_detection
        session: dict[str, Any] = {
            "type": "realtime",
            "object": "realtime.session",
            "id": session_id,
            "model": self.model,
            "output_modalities": [self.output_modality],
            "instructions": self.instructions,
            "audio": {
                "input": {
                    "format": _PCM16,
                    "transcription": self.transcription,
                    "noise_reduction": None,
                    "turn_detection": turn_detection.to_wire() if turn_detection else None,
                },
                "output": {"format": _PCM16, "voice": self.voice, "speed": self.speed},
            },
            "tools": list(self.tools),
            "tool_choice": self.tool_choice,
            "max_output_tokens": self.max_output_tokens,
            "truncation": self.truncation,
            "tracing": self.tracing,
            "prompt": self.prompt,
            "include": list(self.include) or None,
            "expires_at": expires_at,
        }
        if self.parallel_tool_calls is not None:
            session["parallel_tool_calls"] = self.parallel_tool_calls
        if self.reasoning is not None:
            session["reasoning"] = self.reasoning
        return session


_PER_RESPONSE = (
    "output_modality",
    "instructions",
    "voice",
    "max_output_tokens",
    "tools",
    "tool_choice",
)


def parse_response_params(response: Mapping[str, Any]) -> ResponseParams:
    """`response.create`'s `response`; null fields count as absent.

    Raises `WireError`. Whether the voice exists is checked by `SessionConfig.for_response`.
    """
    given = {name: value for name, value in response.items() if value is not None}
    fields = Fields(_to_ga(given), "response")
    items = tuple(parse_input(one) for one in fields.objects("input", MAX_INPUT_ITEMS))
    conversation: Any = fields.choice("conversation", "auto", "none") or "auto"
    read_stored(fields)
    return ResponseParams(
        conversation=conversation,
        metadata=read_metadata(fields),
        input=items if fields.has("input") else None,
        **_common(fields),
    )


def _common(fields: Fields) -> dict[str, Any]:
    """What a session and a single response have in common; only what is given."""
    changes: dict[str, Any] = {}
    output = _inside(fields, "output")
    check_format(output)
    if (modality := read_modality(fields)) is not None:
        changes["output_modality"] = modality
    if (voice := read_voice(output)) is not None:
        changes["voice"] = voice
    if fields.has("instructions"):
        changes["instructions"] = fields.text("instructions") or ""
    if fields.has("max_output_tokens"):
        changes["max_output_tokens"] = read_max_output_tokens(fields)
    if fields.has("tools"):
        changes["tools"] = read_tools(fields)
    if fields.has("tool_choice"):
        changes["tool_choice"] = read_tool_choice(fields)
    return changes


def _inside(fields: Fields, direction: str) -> Fields:
    """`audio.input` or `audio.output`, empty where it is absent."""
    audio = fields.object("audio") or Fields({}, fields.param("audio"))
    return audio.object(direction) or Fields({}, audio.param(direction))


def _turn_detection(fields: Fields, current: TurnDetection, default: ServerVad) -> TurnDetection:
    """`fields` laid over what is in force, or over the default where the kind changes."""
    kind = fields.choice("type", "server_vad", "semantic_vad")
    if kind is None:
        kind = "semantic_vad" if isinstance(current, SemanticVad) else "server_vad"
    changes: dict[str, Any] = {
        "create_response": fields.boolean("create_response"),
        "interrupt_response": fields.boolean("interrupt_response"),
    }
    if kind == "semantic_vad":
        changes["eagerness"] = fields.choice("eagerness", "low", "medium", "high", "auto")
        base: ServerVad | SemanticVad = current if isinstance(current, SemanticVad) else SEMANTIC
    else:
        base = current if isinstance(current, ServerVad) else default
        changes["threshold"] = fields.number("threshold", 0.0, 1.0)
        for name, limit in (
            ("prefix_padding_ms", MAX_PREFIX_PADDING_MS),
            ("silence_duration_ms", MAX_SILENCE_DURATION_MS),
        ):
            changes[name] = fields.integer(name, 0, limit)
    changes = {name: value for name, value in changes.items() if value is not None}
    if kind == "server_vad" and fields.has("idle_timeout_ms"):
        changes["idle_timeout_ms"] = fields.integer("idle_timeout_ms", 5_000, 30_000)
    return dataclasses.replace(base, **changes)


def _voice_is_locked(param: str) -> WireError:
    message = "The voice of a session cannot be changed once the assistant has spoken."
    return WireError("cannot_update_voice", message, param)


def _to_ga(given: Mapping[str, Any]) -> dict[str, Any]:
    """The same object with the beta names moved to their GA places, which take precedence."""
    moved = dict(given)
    for alias, path in _ALIASES.items():
        if alias not in given:
            continue
        place = moved
        for name in path[:-1]:
            inside = place.get(name)
            if inside is not None and not isinstance(inside, dict):
                break  # the wrong type: refused by whoever reads it
            place[name] = place = dict(inside or {})
        else:
            place.setdefault(path[-1], given[alias])
    asked = moved.get("output_modalities")
    if "modalities" in given and isinstance(asked, list) and "audio" in asked:
        moved["output_modalities"] = ["audio"]  # beta's ["text", "audio"]
    return moved
