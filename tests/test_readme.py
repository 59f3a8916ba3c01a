"""What README.md tells people to write works."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from handlers.messages import Ask, ChatMessage, Message, TextDelta, TextDone
from handlers.ticket import Ticket

README = (Path(__file__).parent.parent / "README.md").read_text()


class _Nobody:
    def receive(self, message: Message) -> None: ...


def test_the_handler_in_the_readme_answers() -> None:
    (source,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope: dict[str, Any] = {"__name__": "echo"}
    exec(compile(source, "README.md", "exec", dont_inherit=True), scope)
    sent: list[Message] = []
    stage = scope["EchoLM"](scope["EchoOptions"](prefix="I heard"), emit=sent.append)
    ticket = Ticket(_Nobody())
    for message in stage.process([Ask(ticket, (ChatMessage("user", "hello there"),))]):
        stage.emit(message)
    assert [m.text for m in sent if isinstance(m, TextDelta)] == ["I heard ", "hello ", "there "]
    assert isinstance(sent[-1], TextDone)
    ticket.cancel()
    assert list(stage.process([Ask(ticket, ())])) == []
