"""From a conversation to the tokens of a local model, by its own chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from handlers.base import StageError
from handlers.messages import Ask, ChatMessage

CHARS_PER_TOKEN = 6
"""Few texts have more: what is longer by this measure is not even tried."""
MESSAGE_CHARS = 24
"""What a template adds to a message, about."""


class Prompts:
    """What a model is given to answer.

    Of a conversation that is too long the oldest messages are left out, half of what there is room
    for at a time: what remains then begins alike for many turns, and need not be read anew.
    """

    def __init__(
        self, tokenizer: Any, tokens: int, *, role: str, prompt: str, template_file: str = ""
    ) -> None:
        """`tokens`: room for the question. `prompt`, by `role`, begins a conversation that has no
        system message. Raises ValueError where there is no chat template."""
        self._tokenizer, self._tokens = tokenizer, tokens
        self._role, self._prompt = role, prompt
        if template_file:
            try:
                tokenizer.chat_template = Path(template_file).read_text()
            except OSError as error:
                raise ValueError(f"--lm_chat_template {template_file}: {error.strerror}") from error
        if not tokenizer.chat_template:
            raise ValueError(
                "the model's tokenizer has no chat template, so it may be no chat model: choose "
                "an instruct model, or give the template's Jinja file as --lm_chat_template"
            )
        self._has_system = self._accepts_system()

    def ids(self, ask: Ask) -> list[int]:
        """Raises `StageError`."""
        messages = list(ask.messages)
        if self._prompt and not (messages and messages[0].role == "system"):
            messages.insert(0, ChatMessage(self._role, self._prompt))  # type: ignore[arg-type]
        head = 1 if messages and messages[0].role == "system" else 0
        starts = _starts(messages[head:])  # of each, and the end of the last
        block = self._tokens * CHARS_PER_TOKEN // 4
        blocks = max(0, -(-(starts[-1] - self._tokens * CHARS_PER_TOKEN) // block))
        while True:
            first = _first_user(messages[head:], starts, blocks * block)
            ids = self._render([*messages[:head], *messages[head + first :]], ask)
            if len(ids) <= self._tokens:
                return ids
            if first == _last_user(messages[head:]):
                raise StageError("lm_prompt_too_long", "The last message is too long for the lm.")
            blocks += 1

    def _render(self, messages: Sequence[ChatMessage], ask: Ask) -> list[int]:
        import jinja2

        tools = [] if ask.tool_choice == "none" else [_tool(tool) for tool in ask.tools]
        if isinstance(ask.tool_choice, dict):
            name = ask.tool_choice.get("name")
            tools = [tool for tool in tools if tool["function"].get("name") == name]
        try:
            ids: list[int] = self._tokenizer.apply_chat_template(
                [_to_template(message) for message in self._fitted(messages)],
                tools=tools or None,
                add_generation_prompt=True,
                enable_thinking=False,  # nobody wants to wait for what is not spoken
                return_dict=False,
            )
        except jinja2.TemplateError:
            raise StageError(
                "lm_bad_conversation", "The model's chat template does not take this conversation."
            ) from None
        return ids

    def _fitted(self, messages: Sequence[ChatMessage]) -> list[ChatMessage]:
        """Nobody speaks twice in a row, and no system speaks where the template has none."""
        fitted: list[ChatMessage] = []
        for message in messages:
            if message.role == "system" and not self._has_system:
                message = ChatMessage("user", message.content)
            before = fitted[-1] if fitted else None
            plain = not (message.tool_uses or message.call_id)
            if before and before.role == message.role and plain and not before.tool_uses:
                joined = f"{before.content}\n{message.content}".strip()
                fitted[-1] = ChatMessage(message.role, joined)
            else:
                fitted.append(message)
        return fitted

    def _accepts_system(self) -> bool:
        import jinja2

        try:
            shown = self._tokenizer.apply_chat_template(
                [{"role": "system", "content": "Qx7"}, {"role": "user", "content": "a"}],
                add_generation_prompt=True,
                tokenize=False,
            )
        except jinja2.TemplateError:
            return False
        return "Qx7" in shown


def _starts(messages: Sequence[ChatMessage]) -> list[int]:
    """Where each message begins, in characters, and where the last one ends."""
    lengths = [
        len(message.content)
        + sum(len(use.name) + len(use.arguments) for use in message.tool_uses)
        + MESSAGE_CHARS
        for message in messages
    ]
    return [0, *accumulate(lengths)]


def _first_user(messages: Sequence[ChatMessage], starts: Sequence[int], chars: int) -> int:
    """The first message of a user's that begins behind so many characters, or else the last."""
    for index, message in enumerate(messages):
        if starts[index] >= chars and (message.role == "user" or not chars):
            return index
    return _last_user(messages)


def _last_user(messages: Sequence[ChatMessage]) -> int:
    users = [index for index, message in enumerate(messages) if message.role == "user"]
    return users[-1] if users else 0


def _to_template(message: ChatMessage) -> dict[str, Any]:
    shown: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_uses:
        shown["tool_calls"] = [
            {
                "id": use.call_id,
                "type": "function",
                "function": {"name": use.name, "arguments": _parsed(use.arguments)},
            }
            for use in message.tool_uses
        ]
    if message.call_id is not None:
        shown["tool_call_id"] = message.call_id
    return shown


def _parsed(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


def _tool(tool: Any) -> dict[str, Any]:
    """The Realtime protocol's flat form → the nested one that templates know."""
    return {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}
