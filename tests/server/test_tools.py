"""Functions of the client, called by the LM while what it said before is still being heard."""

from __future__ import annotations

from typing import Any

import pytest

from handlers.messages import RATE_HZ, Ask, TextDelta, TextDone, ToolCall, ToolUse
from tests.fakes import deliver
from tests.server.schema import check_event
from tests.server.stage import Stage

TOOL = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather somewhere.",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
}
WEATHER = ToolUse("call_1", "get_weather", '{"place": "Graz"}')
TIME = ToolUse("call_2", "get_time", "{}")
SAYING = "One moment, I am going to look at the weather."


@pytest.fixture
def stage() -> Stage:
    """The LM says what each test lets it say."""
    stage = Stage()
    stage.stages.lm_delay_s = None
    stage.send("session.update", session={"type": "realtime", "tools": [TOOL]})
    return stage


def asked(stage: Stage) -> Ask:
    stage.speech(1.0)
    stage.silence(0.2)
    return stage.stages.asked[-1]


def answer(stage: Stage, text: str, *uses: ToolUse, ask: Ask | None = None) -> None:
    ticket = (ask or stage.stages.asked[-1]).ticket
    if text:
        deliver(TextDelta(ticket, text))
    for use in uses:
        deliver(ToolCall(ticket, use))
    deliver(TextDone(ticket))


def output(stage: Stage, use: ToolUse, text: str) -> None:
    item = {"type": "function_call_output", "call_id": use.call_id, "output": text}
    stage.send("conversation.item.create", item=item)


def events_about(stage: Stage, item_id: str) -> list[str]:
    return [
        event["type"]
        for event in stage.out.events
        if event.get("item_id") == item_id or event.get("item", {}).get("id") == item_id
    ]


def test_the_lm_gets_the_tools(stage: Stage) -> None:
    ask = asked(stage)
    assert ask.tools == (TOOL,)
    assert ask.tool_choice == "auto"
    answer(stage, "Fine.")
    stage.silence(3.0)
    choice = {"type": "function", "name": "get_weather"}
    stage.send("response.create", response={"tool_choice": choice})
    assert stage.stages.asked[-1].tool_choice == choice


def test_a_call_is_told_while_the_words_before_it_are_heard(stage: Stage) -> None:
    asked(stage)
    answer(stage, SAYING, WEATHER, TIME)
    stage.silence(0.5)
    assert "response.done" not in stage.out.types
    message, *calls = stage.out.of("response.output_item.added")
    assert [event["output_index"] for event in (message, *calls)] == [0, 1, 2]
    assert message["item"]["type"] == "message"
    first = calls[0]["item"]
    assert (first["name"], first["arguments"], first["status"]) == (
        "get_weather",
        "",
        "in_progress",
    )
    assert events_about(stage, first["id"]) == [
        "response.output_item.added",
        "conversation.item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "conversation.item.done",
    ]
    done, _ = stage.out.of("response.function_call_arguments.done")
    assert done["arguments"] == WEATHER.arguments
    assert (done["call_id"], done["output_index"]) == ("call_1", 1)
    stage.silence(4.0)  # the tool is slow: what was said is heard to its end all the same
    (done,) = stage.out.of("response.done")
    assert done["response"]["status"] == "completed"
    assert [item["type"] for item in done["response"]["output"]] == [
        "message",
        "function_call",
        "function_call",
    ]
    said = sum(len(clause.text) for clause in stage.stages.said)
    heard = sum(len(samples) for *_, samples in stage.out.audio)
    assert heard == round(stage.stages.char_s * RATE_HZ * said)
    for event in stage.out.events:
        check_event(event)


def test_the_next_response_is_made_meanwhile_and_heard_after(stage: Stage) -> None:
    first = asked(stage)
    answer(stage, SAYING, WEATHER)
    stage.silence(0.5)
    output(stage, WEATHER, "sunny")
    stage.send("response.create")
    assert "error" not in stage.out.types
    second = stage.stages.asked[-1]
    assert second is not first
    assert [message.role for message in second.messages] == ["user", "assistant", "tool"]
    assert second.messages[1].content == SAYING
    assert second.messages[1].tool_uses == (WEATHER,)
    assert (second.messages[2].content, second.messages[2].call_id) == ("sunny", "call_1")
    answer(stage, "It is sunny.", ask=second)
    assert stage.stages.said[-1].text == "It is sunny."  # spoken by TTS already
    assert len(stage.out.of("response.created")) == 1
    stage.send("response.create")
    assert stage.out.events[-1]["error"]["code"] == "conversation_already_has_active_response"
    stage.silence(5.0)
    types = [kind for kind in stage.out.types if kind in ("response.created", "response.done")]
    assert types == ["response.created", "response.done"] * 2


def test_an_interruption_ends_the_waiting_response_too(stage: Stage) -> None:
    asked(stage)
    answer(stage, SAYING, WEATHER)
    stage.silence(0.5)
    output(stage, WEATHER, "sunny")
    stage.send("response.create")
    waiting = stage.stages.asked[-1]
    stage.stages.words = "stop that now please".split()
    stage.speech(1.0)
    assert not waiting.ticket.live
    done = stage.out.of("response.done")
    assert [event["response"]["status"] for event in done] == ["cancelled", "cancelled"]
    assert [event["response"]["id"] for event in stage.out.of("response.created")] == [
        event["response"]["id"] for event in done
    ]


def test_nobody_is_called_for_a_turn_that_goes_on(stage: Stage) -> None:
    stage.stages.words = "what is the weather like in graz".split()
    ask = asked(stage)
    answer(stage, SAYING, WEATHER)
    stage.clock.advance(0.0)
    stage.speech(1.0)
    assert not ask.ticket.live
    asked_again = asked(stage)
    answer(stage, "Where?", ask=asked_again)
    stage.silence(3.0)
    assert stage.out.of("response.function_call_arguments.done") == []
    assert all(message.role != "tool" for message in asked_again.messages)


def test_a_call_without_words_comes_alone(stage: Stage) -> None:
    asked(stage)
    answer(stage, "\n", WEATHER)
    stage.silence(0.5)
    (added,) = stage.out.of("response.output_item.added")
    assert added["output_index"] == 0
    (done,) = stage.out.of("response.done")
    assert [item["type"] for item in done["response"]["output"]] == ["function_call"]
    output(stage, WEATHER, "sunny")
    stage.send("response.create")
    assert [message.role for message in stage.stages.asked[-1].messages] == [
        "user",
        "assistant",
        "tool",
    ]


def test_a_text_response_calls_too(stage: Stage) -> None:
    stage.send("session.update", session={"type": "realtime", "output_modalities": ["text"]})
    asked(stage)
    answer(stage, "Let me see.", WEATHER)
    stage.silence(0.5)
    kinds = [event["item"]["type"] for event in stage.out.of("response.output_item.done")]
    assert sorted(kinds) == ["function_call", "message"]
    (text,) = stage.out.of("response.output_text.done")
    assert text["text"] == "Let me see."
    assert text["output_index"] == 0


def test_out_of_band_calls_are_no_part_of_the_conversation(stage: Stage) -> None:
    given: dict[str, Any] = {"conversation": "none", "input": []}
    stage.send("response.create", response=given)
    answer(stage, "", WEATHER)
    (added,) = stage.out.of("response.output_item.added")
    assert added["item"]["type"] == "function_call"
    assert "conversation.item.added" not in stage.out.types
    stage.send("conversation.item.retrieve", item_id=added["item"]["id"])
    assert stage.out.events[-1]["type"] == "error"
