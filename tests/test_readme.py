"""What README.md tells people to write works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from handlers.messages import Ask, ChatMessage, Message, TextDelta, TextDone
from handlers.pipeline import STAGES, backend
from handlers.ticket import Ticket
from server.flags import takes
from server.options import ServerOptions, parse
from server.profiles import PROFILES

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


def _commands() -> list[str]:
    """Flags of every `python -m server` in a block of commands; lines that go on, joined."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    lines = (
        "\n".join(text for language, text in blocks if not language)
        .replace("\\\n", " ")
        .splitlines()
    )
    return [
        line.partition("python -m server ")[2]
        for line in lines
        if re.match(r"\S*python -m server ", line)
    ]


@pytest.mark.parametrize("command", _commands())
def test_the_commands_start_a_server(command: str) -> None:
    _, choice = parse(shlex.split(command))
    assert choice.brain == ("parrot" if "--brain parrot" in command else "cascade")


def test_the_profiles_are_those_of_the_table() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", README, re.MULTILINE))
    assert list(rows) == list(PROFILES)
    for name, profile in PROFILES.items():
        cells = rows[name].split(" | ")
        for cell, stage in zip(cells, ("stt", "lm", "tts"), strict=True):
            part = profile.backends()[stage]
            assert f"`{part}`" in cell
            assert profile.options(stage, part).get("model_name", "") in cell


def test_the_flags_that_people_know_are_there() -> None:
    section = README.partition("## Real models")[2].partition("\n## ")[0]
    flags = set(re.findall(r"--[a-z_]+", section)) - {"--profile", "--device", "--help"}
    assert len(flags) > 20
    parts: Any = [backend(stage, name) for stage, names in STAGES.items() for name in names]
    options = [ServerOptions, *(part.Options for part in parts)]
    stages = {f"--{stage}" for stage in STAGES}
    assert {flag for flag in flags - stages if not any(takes(one, flag) for one in options)} == {
        "--tts_gen_"  # Parler's have names
    }
