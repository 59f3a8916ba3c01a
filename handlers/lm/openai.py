"""Any OpenAI-compatible chat endpoint as the LM stage: vLLM, llama.cpp, Ollama, hosted ones."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from handlers.base import Emit, Observer, StageError
from handlers.messages import (
    Ask,
    ChatMessage,
    Message,
    TextDelta,
    TextDone,
    ToolCall,
    ToolUse,
)
from handlers.options import option
from handlers.remote import Endpoint, RemoteHandler

log = logging.getLogger(__name__)

PROMPT = (
    "You are a voice assistant and your answers are spoken aloud. Answer in one to three short "
    "sentences of plain text, without lists, markup or emoji."
)


MAX_ARGUMENTS_CHARS = 65_536
_CALL_ID = re.compile(r"[!-~]{1,64}")
"""What a client may send back; an endpoint's other ids are replaced."""


@dataclass(frozen=True)
class OpenAILMOptions:
    base_url: str = option("http://127.0.0.1:8000/v1", "the endpoint's address", "lm_base_url")
    api_key: str = option("", "its key; else from PARLEY_LM_API_KEY", "lm_api_key", shown=False)
    model_name: str = option("", "the model's name there", "lm_model_name")
    fallback_base_url: str = option(
        "", "endpoint to use while the first one fails", "lm_fallback_base_url"
    )
    fallback_api_key: str = option(
        "", "its key; else from PARLEY_LM_FALLBACK_API_KEY", "lm_fallback_api_key", shown=False
    )
    fallback_model_name: str = option("", "the model's name there", "lm_fallback_model_name")
    fallback_s: float = option(
        30.0, "time until the first endpoint is tried again (s)", "lm_fallback_s"
    )
    init_chat_role: str = option("system", "role of --init_chat_prompt", "init_chat_role")
    init_chat_prompt: str = option(
        PROMPT, "first message of a chat without instructions of its own", "init_chat_prompt"
    )
    connect_timeout_s: float = option(2.0, "to connect (s)", "lm_connect_timeout_s")
    first_token_timeout_s: float = option(
        10.0, "from the question to the first token (s)", "lm_first_token_timeout_s"
    )
    token_timeout_s: float = option(5.0, "from token to token (s)", "lm_token_timeout_s")
    gen_max_tokens: int | None = field(
        default=None,
        metadata={
            "help": "longest answer (tokens)",
            "flag": "--lm_gen_max_tokens",
            "also": ("--lm_gen_max_new_tokens",),
        },
    )
    gen_temperature: float | None = option(None, "sampling temperature", "lm_gen_temperature")
    gen_top_p: float | None = option(None, "nucleus sampling", "lm_gen_top_p")
    gen: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={"help": "any other field of the request (JSON, or text)", "prefix": "--lm_gen_"},
    )


@dataclass(frozen=True, slots=True)
class _Model:
    endpoint: Endpoint
    name: str


@dataclass(slots=True)
class _Call:
    index: int
    call_id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class _Answer:
    """What has come of an answer."""

    begun: bool = False  # something was passed on: no second try
    pieces: int = 0
    reason: str | None = None
    usage: tuple[int, int] | None = None
    call: _Call | None = None  # still being written


class OpenAILM(RemoteHandler[None]):
    """All sessions' answers stream at the same time.

    A failure before the first token is answered by the fallback endpoint, which then serves
    everybody for `fallback_s`; one question after that tries the first endpoint again. A failure
    after the first token fails the reply, which keeps what it has.
    """

    stage: ClassVar[str] = "lm"
    requests: ClassVar[tuple[type, ...]] = (Ask,)
    Options: ClassVar[type[OpenAILMOptions]] = OpenAILMOptions

    def __init__(
        self, options: OpenAILMOptions, *, emit: Emit, observer: Observer | None = None
    ) -> None:
        super().__init__(emit, observer=observer)
        self.options = o = options
        endpoint = Endpoint(o.base_url, o.api_key, "PARLEY_LM_API_KEY", o.connect_timeout_s)
        self._models = [_Model(endpoint, o.model_name)]
        if o.fallback_base_url:
            second = Endpoint(
                o.fallback_base_url,
                o.fallback_api_key,
                "PARLEY_LM_FALLBACK_API_KEY",
                o.connect_timeout_s,
            )
            self._models.append(_Model(second, o.fallback_model_name or o.model_name))
        self._retry_at_s = 0.0  # until then the fallback comes first

    def setup(self) -> None:
        """Raises ValueError for options that cannot be."""
        if not self.options.model_name:
            raise ValueError("--lm_model_name: name the model that the endpoint is to use")
        super().setup()

    def handle(self, message: Message) -> Iterable[Message]:
        assert isinstance(message, Ask)
        self.launch(message.ticket, self._answer, message)
        return ()

    async def _answer(self, ask: Ask) -> None:
        models = self._in_turn()
        for model in models:
            answer = _Answer()
            try:
                await self._stream(model, ask, answer)
            except Exception as error:
                named = self.named(error)
                if model is self._models[0]:
                    self._retry_at_s = asyncio.get_running_loop().time() + self.options.fallback_s
                if answer.begun or model is models[-1] or not isinstance(named, StageError):
                    raise
                log.warning("lm: %s; asking the other endpoint", named.code)
                continue
            if model is self._models[0]:
                self._retry_at_s = 0.0
            return

    def _in_turn(self) -> list[_Model]:
        now_s = asyncio.get_running_loop().time()
        if len(self._models) == 1 or not self._retry_at_s:
            return self._models
        if now_s < self._retry_at_s:
            return self._models[::-1]
        self._retry_at_s = now_s + self.options.fallback_s  # the others wait for how this one fares
        return self._models

    async def _stream(self, model: _Model, ask: Ask, answer: _Answer) -> None:
        """Pass on one answer. Raises `StageError` or what httpx raises."""
        o, loop = self.options, asyncio.get_running_loop()
        body = self._request(model, ask)
        async with (
            asyncio.timeout(o.first_token_timeout_s) as limit,
            self.post(model.endpoint, "/chat/completions", json=body) as response,
        ):
            events = aiter(self._httpx.EventSource(response))
            async for event in events:
                if event.data == "[DONE]":
                    answer.reason = answer.reason or "stop"
                    break
                if self._read(event.data, ask, answer):
                    limit.reschedule(loop.time() + o.token_timeout_s)
            if answer.reason is None:
                raise self.error("interrupted", "The lm endpoint broke off.")
            self._end_call(ask, answer)
            reason: Literal["stop", "length"] = "length" if answer.reason == "length" else "stop"
            self.emit(TextDone(ask.ticket, reason, *(answer.usage or (0, answer.pieces))))
            await self.drain(events)

    def _read(self, data: str, ask: Ask, answer: _Answer) -> bool:
        """Whether the event was a sign of life: a token, be it one that is not spoken."""
        try:
            chunk = json.loads(data)
            if "error" in chunk:
                raise self.error("endpoint_error", "The lm endpoint failed while it answered.")
            if usage := chunk.get("usage"):
                answer.usage = (int(usage["prompt_tokens"]), int(usage["completion_tokens"]))
            if not chunk["choices"]:
                return False
            choice = chunk["choices"][0]
            delta = choice.get("delta") or {}
            answer.reason = choice.get("finish_reason") or answer.reason
            text = delta.get("content") or ""
            if text:
                answer.begun = True
                answer.pieces += 1
                self.emit(TextDelta(ask.ticket, str(text)))
            calls = delta.get("tool_calls") or ()
            for call in calls:
                self._add_to_call(call, ask, answer)
            return bool(text or calls) or "reasoning_content" in delta or "reasoning" in delta
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            raise self.bad_answer("is not a chat completion") from None

    def _add_to_call(self, delta: dict[str, Any], ask: Ask, answer: _Answer) -> None:
        """A call is passed on when the next one begins, or at the end."""
        index, function = int(delta.get("index", 0)), delta.get("function") or {}
        if answer.call is None or index != answer.call.index:
            self._end_call(ask, answer)
            call_id = str(delta.get("id") or "")
            if not _CALL_ID.fullmatch(call_id):
                call_id = f"call_{secrets.token_hex(10)}"
            answer.call = _Call(index, call_id, str(function["name"]))
        answer.pieces += 1
        answer.call.arguments += function.get("arguments") or ""
        if len(answer.call.arguments) > MAX_ARGUMENTS_CHARS:
            raise self.bad_answer("holds a call that does not end")

    def _end_call(self, ask: Ask, answer: _Answer) -> None:
        call, answer.call = answer.call, None
        if call is not None:
            answer.begun = True
            use = ToolUse(call.call_id, call.name, call.arguments or "{}")
            self.emit(ToolCall(ask.ticket, use))

    def _request(self, model: _Model, ask: Ask) -> dict[str, Any]:
        o = self.options
        limits = [limit for limit in (ask.max_tokens, o.gen_max_tokens) if limit is not None]
        body = {
            "model": model.name,
            "messages": [_to_wire(message) for message in self._messages(ask)],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": min(limits, default=None),
            "temperature": o.gen_temperature,
            "top_p": o.gen_top_p,
        }
        if ask.tools:
            body["tools"] = [_tool_to_wire(tool) for tool in ask.tools]
            body["tool_choice"] = _choice_to_wire(ask.tool_choice)
        given = {name: value for name, value in body.items() if value is not None}
        given.update(o.gen)
        return given

    def _messages(self, ask: Ask) -> Iterable[ChatMessage]:
        o = self.options
        instructed = ask.messages and ask.messages[0].role == "system"
        if o.init_chat_prompt and not instructed:
            yield ChatMessage(o.init_chat_role, o.init_chat_prompt)  # type: ignore[arg-type]
        yield from ask.messages


def _to_wire(message: ChatMessage) -> dict[str, Any]:
    wire: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_uses:
        wire["tool_calls"] = [
            {
                "id": use.call_id,
                "type": "function",
                "function": {"name": use.name, "arguments": use.arguments},
            }
            for use in message.tool_uses
        ]
    if message.call_id is not None:
        wire["tool_call_id"] = message.call_id
    return wire


def _tool_to_wire(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The Realtime protocol's flat form → the chat protocol's nested one."""
    return {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}


def _choice_to_wire(choice: Any) -> Any:
    if isinstance(choice, str):
        return choice
    return {"type": "function", "function": {"name": choice["name"]}}
