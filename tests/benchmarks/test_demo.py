"""The demo's script and its picture, with a fake server on a virtual clock."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.demo import Dialogue, LiveTranscript, figures, make_dialogue
from benchmarks.listener import Conversation
from benchmarks.pictures import draw_conversation
from benchmarks.score import Scores
from tests.benchmarks.fakes import FakeServer, run


@pytest.fixture(scope="module")
def dialogue() -> Dialogue:
    return make_dialogue()


def test_a_whole_conversation(
    dialogue: Dialogue, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = Conversation(dialogue.script, on_event=LiveTranscript())
    run(talk, FakeServer(answer_ms=500.0, reply_ms=5000.0, stop_ms=100.0, keep_ms=350.0))
    assert dialogue.missed is None
    kinds = [said.kind for said in talk.trace.said]
    assert kinds == ["turn", "turn", "turn", "barge_in", "turn", "noise", "turn"]
    scores = Scores()
    scores.add(talk.trace)
    spreads = figures(scores)
    assert spreads["last voiced → audible reply"].count == 6
    assert spreads["interruption → silence"].count == 1
    draw_conversation(talk.trace, scores, tmp_path / "conversation.png")
    assert (tmp_path / "conversation.png").stat().st_size > 20_000
    assert "your turn number 1" in capsys.readouterr().out


def test_a_turn_without_a_reply_is_named(dialogue: Dialogue) -> None:
    silent = Dialogue(dialogue.clips)
    run(Conversation(silent.script), FakeServer(answer_ms=500.0, mute_turns=(0,)))
    assert silent.missed == "Good morning."
