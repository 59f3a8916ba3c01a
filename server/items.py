"""Conversation items: what a client may create, what we hold, what goes out."""

from __future__ import annotations

import binascii
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from handlers.messages import ChatMessage, ToolUse
from server.fields import MAX_TEXT_CHARS, Fields, WireError, new_id
from server.spoken import SpokenText

Role: TypeAlias = Literal["system", "user", "assistant"]
Status: TypeAlias = Literal["in_progress", "completed", "incomplete"]
PartType: TypeAlias = Literal["input_text", "input_audio", "output_text", "output_audio"]

MAX_PARTS = 64
_PART_TYPES: dict[str, tuple[PartType, ...]] = {
    "system": ("input_text",),
    "user": ("input_text", "input_audio"),
    "assistant": ("output_text",),
}


@dataclass(slots=True)
class Part:
    """One content part of a message; `text` is the transcript where the type is audio."""

    type: PartType
    text: str | None = None
    audio: bytes | None = None  # a user's, pcm16le mono 24 kHz, while it is kept

    def to_wire(self, audio: bool) -> dict[str, Any]:
        if self.type in ("input_text", "output_text"):
            return {"type": self.type, "text": self.text or ""}
        part: dict[str, Any] = {"type": self.type, "transcript": self.text}
        if audio and self.audio is not None:
            part["audio"] = binascii.b2a_base64(self.audio, newline=False).decode("ascii")
        return part


@dataclass(slots=True)
class MessageItem:
    """A message. An assistant's spoken one has `spoken` in place of `content`.

    `heard_samples` is where its audio was cut (24 kHz, from its first sample), None if it was
    not: after a cut only the words heard count, on the wire and for the LM.
    """

    id: str
    role: Role
    content: list[Part] = field(default_factory=list)
    status: Status = "completed"
    spoken: SpokenText | None = None
    heard_samples: int | None = None
    truncated: bool = False  # the client itself said where

    @property
    def text(self) -> str:
        """What the LM gets of it: texts, transcripts, and of a spoken reply what was heard."""
        if self.spoken is None:
            return "\n".join(part.text for part in self.content if part.text)
        return heard_text(self, self.heard_samples)

    @property
    def length_chars(self) -> int:
        return len(self.text)

    def append_text(self, delta: str) -> None:
        """A text reply goes on."""
        part = self.content[-1]
        part.text = (part.text or "") + delta

    def cut(self, heard_samples: int) -> None:
        """The spoken reply was interrupted. What the client itself has said is better known."""
        if not self.truncated:
            self.heard_samples = heard_samples

    def to_wire(self, audio: bool = False) -> dict[str, Any]:
        """The GA item object, with the audio that is kept if `audio`.

        A reply in progress has no content yet: its parts are announced one by one.
        """
        if self.role == "assistant" and self.status == "in_progress":
            parts = []
        elif self.spoken is not None:
            parts = [{"type": "output_audio", "transcript": self.text}]
        else:
            parts = [part.to_wire(audio) for part in self.content]
        return _wire(self.id, "message", self.status, role=self.role, content=parts)


@dataclass(slots=True)
class FunctionCallItem:
    id: str
    name: str
    arguments: str
    call_id: str
    status: Status = "completed"

    @property
    def length_chars(self) -> int:
        return len(self.arguments)

    @property
    def use(self) -> ToolUse:
        return ToolUse(self.call_id, self.name, self.arguments)

    def to_wire(self, audio: bool = False) -> dict[str, Any]:
        fields = {"name": self.name, "call_id": self.call_id, "arguments": self.arguments}
        return _wire(self.id, "function_call", self.status, **fields)


@dataclass(slots=True)
class FunctionOutputItem:
    id: str
    call_id: str
    output: str
    status: Status = "completed"

    @property
    def length_chars(self) -> int:
        return len(self.output)

    def to_wire(self, audio: bool = False) -> dict[str, Any]:
        fields = {"call_id": self.call_id, "output": self.output}
        return _wire(self.id, "function_call_output", self.status, **fields)


Item: TypeAlias = MessageItem | FunctionCallItem | FunctionOutputItem


@dataclass(frozen=True, slots=True)
class ItemReference:
    """Stands for an item of the conversation in the `input` of `response.create`."""

    id: str


def _wire(item_id: str, kind: str, status: Status, **fields: Any) -> dict[str, Any]:
    return {"id": item_id, "object": "realtime.item", "type": kind, "status": status, **fields}


def user_audio(item_id: str, audio: bytes | None, transcript: str | None = None) -> MessageItem:
    """What a person said; `audio` is pcm16le mono 24 kHz."""
    return MessageItem(item_id, "user", [Part("input_audio", transcript, audio)])


def spoken_reply(item_id: str) -> MessageItem:
    """An audio reply about to begin: feed its `spoken`, then set its `status`."""
    return MessageItem(item_id, "assistant", status="in_progress", spoken=SpokenText())


def text_reply(item_id: str) -> MessageItem:
    """A text reply about to begin: `append_text`, then set its `status`."""
    return MessageItem(item_id, "assistant", [Part("output_text")], status="in_progress")


def heard_text(item: MessageItem, heard_samples: int | None) -> str:
    """The words of a spoken reply that were heard in its first `heard_samples` (None: all)."""
    if item.spoken is None:
        return item.text
    return item.spoken.text if heard_samples is None else item.spoken.heard(heard_samples)


def chat(
    items: Iterable[Item], instructions: str, extra: str | None = None
) -> tuple[ChatMessage, ...]:
    """What the LM gets: instructions, then each message that has words, then `extra` (user).

    A function call and its output stand where the call was made, behind what was said with it;
    a call without an output, and an output without a call, are left out.
    """
    items = list(items)
    outputs = {item.call_id: item.output for item in items if isinstance(item, FunctionOutputItem)}
    messages = [ChatMessage("system", instructions)] if instructions.strip() else []
    calls: list[ToolUse] = []
    for item in items:
        if isinstance(item, FunctionCallItem):
            if item.call_id in outputs:
                calls.append(item.use)
            continue
        _add_calls(messages, calls, outputs)
        calls = []
        if isinstance(item, MessageItem) and (text := item.text.strip()):
            messages.append(ChatMessage(item.role, text))
    _add_calls(messages, calls, outputs)
    if extra and extra.strip():
        messages.append(ChatMessage("user", extra.strip()))
    return tuple(messages)


def _add_calls(
    messages: list[ChatMessage], calls: list[ToolUse], outputs: Mapping[str, str]
) -> None:
    if not calls:
        return
    said = ""
    if messages and messages[-1].role == "assistant":
        said = messages.pop().content
    messages.append(ChatMessage("assistant", said, tuple(calls)))
    messages += [ChatMessage("tool", outputs[use.call_id], call_id=use.call_id) for use in calls]


# From the wire.


def parse_item(fields: Fields) -> Item:
    """An item as a client may create it. Raises `WireError`."""
    kind = fields.required(fields.text, "type")
    item_id = fields.name("id") or new_id("item")
    if kind == "message":
        return _parse_message(fields, item_id)
    if kind == "function_call":
        name = fields.required(fields.name, "name")
        arguments = fields.required(fields.text, "arguments")
        return FunctionCallItem(item_id, name, arguments, fields.name("call_id") or new_id("call"))
    if kind == "function_call_output":
        call_id = fields.required(fields.name, "call_id")
        return FunctionOutputItem(item_id, call_id, fields.required(fields.text, "output"))
    raise WireError(
        "unsupported_item_type",
        "Items of type 'message', 'function_call' and 'function_call_output' can be created.",
        fields.param("type"),
    )


def parse_input(fields: Fields) -> Item | ItemReference:
    """An element of `response.create`'s `input`: an item or a reference. Raises `WireError`."""
    if fields.values.get("type") == "item_reference":
        return ItemReference(fields.required(fields.name, "id"))
    return parse_item(fields)


def _parse_message(fields: Fields, item_id: str) -> MessageItem:
    role: Any = fields.required(lambda name: fields.choice(name, *_PART_TYPES), "role")
    fields.required(lambda name: fields.array(name, MAX_PARTS), "content")
    content = [_parse_part(part, role) for part in fields.objects("content", MAX_PARTS)]
    if sum(len(part.text or "") for part in content) > MAX_TEXT_CHARS:
        param = fields.param("content")
        raise WireError(
            "string_above_max_length",
            f"'{param}' holds more than {MAX_TEXT_CHARS} characters.",
            param,
        )
    return MessageItem(item_id, role, content)


_BETA_PART_TYPES = {"text": "output_text", "audio": "output_audio"}


def _parse_part(fields: Fields, role: Role) -> Part:
    given = fields.required(fields.text, "type")
    kind: Any = _BETA_PART_TYPES.get(given, given) if role == "assistant" else given
    if kind not in _PART_TYPES[role]:
        allowed = ", ".join(f"'{one}'" for one in _PART_TYPES[role])
        what = "Assistant audio cannot be created" if kind == "output_audio" else "Not supported"
        raise WireError(
            "unsupported_content_type",
            f"{what}: content of {role} messages can be {allowed}.",
            fields.param("type"),
        )
    if kind != "input_audio":
        return Part(kind, fields.required(fields.text, "text"))
    audio = fields.required(fields.pcm16, "audio")
    return Part(kind, fields.text("transcript"), audio)
