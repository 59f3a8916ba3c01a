"""No speech recognition: every text is empty, at once. For a brain that needs no words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from handlers.base import Emit, Handler, Observer
from handlers.messages import Conclude, Message, Transcript


@dataclass(frozen=True)
class NoSTTOptions:
    pass


class NoSTT(Handler[None]):
    stage: ClassVar[str] = "stt"
    Options: ClassVar[type[NoSTTOptions]] = NoSTTOptions

    def __init__(
        self, options: NoSTTOptions, *, emit: Emit, observer: Observer | None = None
    ) -> None:
        super().__init__(emit, observer=observer)

    def handle(self, message: Message) -> Iterable[Message]:
        if isinstance(message, Conclude):
            yield Transcript(message.ticket, "", message.revision, prosody=message.prosody)
