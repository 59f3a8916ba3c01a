"""What a local model writes, taken apart as it comes: words to speak, calls, silent thoughts."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from typing import Any

from handlers.base import StageError
from handlers.messages import ToolUse

_MARKS = {
    "<think>": "</think>",
    "<tool_call>": "</tool_call>",  # Qwen, Hermes, SmolLM
    "[TOOL_CALLS]": "",  # Mistral: to the end
    "<|python_tag|>": "",  # Llama: to the end
}
_MISTRAL = re.compile(r"\s*([\w.-]+)\s*(?:\[ARGS\])?\s*(\{.*)", re.DOTALL)
MAX_CALL_CHARS = 65_536


class Answer:
    """What may be the beginning of a mark, or of a stop text, is held back until that is known.

    Raises `StageError` for a call that can't be read.
    """

    def __init__(self, tools: bool, stops: Sequence[str] = ()) -> None:
        """`stops` end the answer wherever they stand in what is spoken."""
        self._tools, self._stops = tools, stops
        self._known = [*(_MARKS if tools else ["<think>"]), *stops]
        self._held = ""
        self._inside = ""  # the mark that the text is behind
        self._begun = False
        self.stopped = False

    def push(self, text: str) -> list[str | ToolUse]:
        """Nothing more is said once it has `stopped`."""
        self._held += text
        found: list[str | ToolUse] = []
        while self._take(found):
            pass
        if len(self._held) > MAX_CALL_CHARS:
            raise StageError("lm_bad_call", "The lm wrote a call that does not end.")
        return found

    def flush(self) -> list[str | ToolUse]:
        """The answer has ended."""
        held, self._held = self._held, ""
        if self._inside == "<think>" or not held:
            return []
        if self._inside == "{":
            try:
                return list(_calls(held))
            except StageError:
                return [held]
        return list(_calls(held)) if self._inside else [held]

    def _take(self, found: list[str | ToolUse]) -> bool:
        """Takes what is plain by now from what is held. Returns whether there may be more."""
        if self.stopped:
            self._held = ""
            return False
        return self._take_inside(found) if self._inside else self._take_words(found)

    def _take_inside(self, found: list[str | ToolUse]) -> bool:
        held, end = self._held, _MARKS.get(self._inside, "")
        at = held.find(end) if end else -1
        if at < 0:
            if self._inside == "<think>":
                self._held = held[len(held) - _overlap(held, end) :]
            return False
        if self._inside != "<think>":
            found.extend(_calls(held[:at]))
        self._held, self._inside = held[at + len(end) :], ""
        return True

    def _take_words(self, found: list[str | ToolUse]) -> bool:
        held = self._held
        if not self._begun and self._tools and held.lstrip().startswith("{"):
            self._inside = "{"
            return False
        marks = [(at, mark) for mark in self._known if (at := held.find(mark)) >= 0]
        at, mark = min(marks, default=(-1, ""))
        if not marks:
            at = len(held) - max(_overlap(held, mark) for mark in self._known)
            if not self._begun and not held.strip():
                at = 0  # a call may follow
        if text := held[:at]:
            found.append(text)
            self._begun = True
        self._held = held[at + len(mark) :]
        self.stopped = mark in self._stops
        self._inside = "" if self.stopped else mark
        return bool(mark)


def _calls(text: str) -> list[ToolUse]:
    named = _MISTRAL.fullmatch(text)
    try:
        if named:
            return [_use(named[1], json.loads(named[2]))]
        read = json.loads(text)
        calls = read if isinstance(read, list) else [read]
        return [
            _use(call["name"], call["arguments"] if "arguments" in call else call["parameters"])
            for call in calls
        ]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise StageError("lm_bad_call", "The lm wrote a call that can't be read.") from None


def _use(name: Any, arguments: Any) -> ToolUse:
    if not isinstance(name, str) or not name:
        raise ValueError
    written = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return ToolUse(f"call_{secrets.token_hex(10)}", name, written)


def _overlap(text: str, mark: str) -> int:
    """How many of the last characters of `text` are the first of `mark`, but not all of it."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0
