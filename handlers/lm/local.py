"""What the LM stages that run a model themselves have in common."""

from __future__ import annotations

import itertools
import json
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from handlers.lm.openai import PROMPT
from handlers.lm.prompts import Prompts
from handlers.messages import Ask, Message, TextDelta, ToolCall, ToolUse
from handlers.options import option
from handlers.ticket import Ticket


@dataclass(frozen=True)
class LocalLMOptions:
    model_name: str = option("", "name on the hub, or folder, of a chat model", "lm_model_name")
    torch_dtype: str = option(
        "auto", "float32, bfloat16 or float16; auto: the checkpoint's", "lm_torch_dtype"
    )
    rows: int = option(16, "answers at a time", "lm_rows")
    context_tokens: int = option(4096, "longest conversation (tokens)", "lm_context_tokens")
    chat_template: str = option("", "Jinja file, in place of the model's", "lm_chat_template")
    init_chat_role: str = option("system", "role of --init_chat_prompt", "init_chat_role")
    init_chat_prompt: str = option(
        PROMPT, "first message of a chat without instructions of its own", "init_chat_prompt"
    )
    gen_max_tokens: int = field(
        default=512,
        metadata={
            "help": "longest answer (tokens)",
            "flag": "--lm_gen_max_tokens",
            "also": ("--lm_gen_max_new_tokens",),
        },
    )
    gen_temperature: float | None = option(
        None,
        "sampling temperature, 0: the likeliest; without it and the next two as the model advises",
        "lm_gen_temperature",
    )
    gen_top_k: int | None = option(None, "of the k likeliest tokens, 0: of all", "lm_gen_top_k")
    gen_top_p: float | None = option(None, "nucleus sampling", "lm_gen_top_p")
    gen_seed: int | None = option(None, "the same answers each time", "lm_gen_seed")
    gen_stop: str = option("[]", "JSON list of texts that end an answer", "lm_gen_stop")

    @property
    def stops(self) -> list[str]:
        """Raises ValueError."""
        try:
            stops = json.loads(self.gen_stop)
        except ValueError:
            stops = None
        if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
            raise ValueError(f"--lm_gen_stop {self.gen_stop}: must be a JSON list of texts")
        return stops

    @property
    def sampling(self) -> dict[str, Any]:
        """What of the model's advice is not taken."""
        names = ("temperature", "top_k", "top_p")
        given = {name: getattr(self, f"gen_{name}") for name in names}
        return {name: value for name, value in given.items() if value is not None}

    def check_named(self) -> None:
        """Raises ValueError."""
        if not self.model_name:
            raise ValueError("--lm_model_name: name a chat model, or the folder of one")

    def prompts(self, tokenizer: Any, tokens: int) -> Prompts:
        """For conversations of so many tokens, answers included. Raises ValueError."""
        return Prompts(
            tokenizer,
            tokens - min(self.gen_max_tokens, tokens // 4),
            role=self.init_chat_role,
            prompt=self.init_chat_prompt,
            template_file=self.chat_template,
        )

    def seeds(self) -> Iterator[int]:
        if self.gen_seed is not None:
            return itertools.repeat(self.gen_seed)
        return iter(lambda: secrets.randbits(31), None)

    def max_tokens(self, ask: Ask) -> int:
        limits = (self.gen_max_tokens, ask.max_tokens)
        return min(limit for limit in limits if limit is not None)


def calls_tools(ask: Ask) -> bool:
    return bool(ask.tools) and ask.tool_choice != "none"


def told(ticket: Ticket, pieces: Iterable[str | ToolUse]) -> Iterator[Message]:
    for piece in pieces:
        if isinstance(piece, ToolUse):
            yield ToolCall(ticket, piece)
        else:
            yield TextDelta(ticket, piece)
