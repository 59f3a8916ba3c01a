"""The built-in responder: an LM stage that needs no model, to talk with out of the box."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import ClassVar

from handlers.base import Emit, Handler, Observer
from handlers.lm.skills import answer
from handlers.messages import Ask, Message, TextDelta, TextDone

WORDS_PER_DELTA = 3  # a real LM streams pieces of about this size
_WORD = re.compile(r"\s*\S+\s*?")


@dataclass(frozen=True)
class BuiltinOptions:
    """It has none."""


class BuiltinLM(Handler[None]):
    """Answers by the skills in `handlers.lm.skills`, and says so where it has no answer.

    System messages are accepted and nothing in them is honoured: the responder follows no
    instructions. A token, as `max_tokens` and `TextDone` count them, is a word here.
    """

    stage: ClassVar[str] = "lm"
    requests: ClassVar[tuple[type, ...]] = (Ask,)
    Options: ClassVar[type[BuiltinOptions]] = BuiltinOptions

    def __init__(
        self,
        options: BuiltinOptions,
        *,
        emit: Emit,
        observer: Observer | None = None,
        clock: Callable[[], datetime] = datetime.now,
    ) -> None:
        super().__init__(emit, observer=observer)
        self._clock = clock

    def handle(self, message: Message) -> Iterable[Message]:
        assert isinstance(message, Ask)
        words = _WORD.findall(answer(message.messages, self._clock()))
        kept = words[: message.max_tokens]
        for start in range(0, len(kept), WORDS_PER_DELTA):
            if not message.ticket.live:
                return
            yield TextDelta(message.ticket, "".join(kept[start : start + WORDS_PER_DELTA]))
        yield TextDone(
            message.ticket,
            reason="stop" if len(kept) == len(words) else "length",
            input_tokens=sum(len(each.content.split()) for each in message.messages),
            output_tokens=len(kept),
        )
