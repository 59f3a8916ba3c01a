"""Any order of events: never a fault of ours, never stale audio, history is what was heard."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from handlers.messages import RATE_HZ, Ask, Failed
from tests.fakes import deliver
from tests.server.stage import Stage

ITEM = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hello"}]}
VAD_OFF = {"type": "realtime", "audio": {"input": {"turn_detection": None}}}
VAD_ON = {"type": "realtime", "audio": {"input": {"turn_detection": {"type": "server_vad"}}}}
QUIET = {"audio": {"input": {"turn_detection": {"type": "server_vad", "create_response": False}}}}
STUBBORN = {
    "audio": {"input": {"turn_detection": {"type": "server_vad", "interrupt_response": False}}}
}

CLIENT = st.sampled_from(
    [
        {"type": "input_audio_buffer.commit"},
        {"type": "input_audio_buffer.clear"},
        {"type": "output_audio_buffer.clear"},
        {"type": "response.create"},
        {"type": "response.create", "response": {"conversation": "none", "input": []}},
        {"type": "response.cancel"},
        {"type": "conversation.item.create", "item": ITEM},
        {"type": "session.update", "session": VAD_OFF},
        {"type": "session.update", "session": VAD_ON},
        {"type": "session.update", "session": QUIET},
        {"type": "session.update", "session": STUBBORN},
        {"type": "session.update", "session": {"output_modalities": ["text"]}},
        {"type": "session.update", "session": {"output_modalities": ["audio"]}},
        {"type": "truncate"},
        {"type": "delete"},
        {"type": "playback"},
        {"type": "nonsense"},
    ]
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("speech"), st.floats(0.02, 1.2)),
        st.tuples(st.just("silence"), st.floats(0.02, 1.2)),
        st.tuples(st.just("wait"), st.floats(0.0, 3.0)),
        st.tuples(st.just("words"), st.sampled_from(["", "mm", "stop that now", "so what is"])),
        st.tuples(st.just("fail"), st.integers(0, 5)),
        st.tuples(st.just("client"), CLIENT),
        st.tuples(st.just("bytes"), st.binary(max_size=9)),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_any_order_of_events(steps: list[tuple[str, Any]]) -> None:
    stage = Stage()
    under_way = watched(stage)
    stage.stages.char_s = 0.1  # slow: a reply is under way when the steps begin
    stage.speech(1.0)
    stage.silence(1.0)
    for name, value in steps:
        match name:
            case "speech" | "silence":
                stage.hear(value, name == "speech")
            case "wait":
                stage.clock.advance(value)
            case "words":
                stage.stages.words = value.split()
            case "fail" if value < len(stage.stages.asked):
                deliver(Failed(stage.stages.asked[-1 - value].ticket, "lm", "lm_error", "no"))
            case "client":
                stage.session.receive_text(json.dumps(about_the_last_item(stage, value)))
            case "bytes":
                stage.session.receive_audio(value)
        if stage.out.audio:
            about_audio(stage)
    stage.clock.advance(60.0)
    about_events(stage)
    assert not any(ask.ticket.live for ask in stage.stages.asked)
    about_history(stage, under_way)
    stage.session.stop()
    stage.clock.advance(1.0)
    assert stage.clock.pending == 0


def about_the_last_item(stage: Stage, event: dict[str, Any]) -> dict[str, Any]:
    item_id = stage.out.audio[-1][0] if stage.out.audio else "item_none"
    match event["type"]:
        case "truncate":
            kind = "conversation.item.truncate"
            return {"type": kind, "item_id": item_id, "content_index": 0, "audio_end_ms": 300}
        case "delete":
            return {"type": "conversation.item.delete", "item_id": item_id}
        case "playback":
            return {"type": "parley.playback", "item_id": item_id, "played_samples": 4800}
    return event


def about_audio(stage: Stage) -> None:
    """Nothing new of a response goes out once it is done: only what a listener has flushed."""
    done = {
        item["id"]
        for event in stage.out.of("response.done")
        for item in event["response"]["output"]
    }
    stage.ended_at = {  # type: ignore[attr-defined]
        item_id: stage.__dict__.get("ended_at", {}).get(item_id, len(stage.out.audio))
        for item_id in done
    }
    for item_id, count in stage.ended_at.items():  # type: ignore[attr-defined]
        ends = [start + len(samples) for of, start, samples in stage.out.audio if of == item_id]
        before = sum(of == item_id for of, _, _ in stage.out.audio[:count])
        assert max(ends[before:], default=0) <= max(ends[:before], default=0)


def about_events(stage: Stage) -> None:
    assert stage.out.closed is None
    codes = {event["error"]["code"] for event in stage.out.of("error")}
    assert "internal_error" not in codes
    created = [event["response"]["id"] for event in stage.out.of("response.created")]
    done = [event["response"]["id"] for event in stage.out.of("response.done")]
    assert len(set(created)) == len(created)
    assert sorted(created) == sorted(done)
    for kind in ("response.output_item", "response.content_part"):
        opened = [event["response_id"] for event in stage.out.of(f"{kind}.added")]
        closed = [event["response_id"] for event in stage.out.of(f"{kind}.done")]
        assert sorted(opened) == sorted(closed)
    started = len(stage.out.of("input_audio_buffer.speech_started"))
    stopped = len(stage.out.of("input_audio_buffer.speech_stopped"))
    assert stopped <= started


def watched(stage: Stage) -> list[set[str]]:
    """Filled with the items that are still being said, whenever the LM is asked."""
    found: list[set[str]] = []
    ask = stage.stages.ask

    def noted(message: Ask) -> None:
        said = {event["item"]["id"] for event in stage.out.of("response.output_item.added")}
        over = {event["item"]["id"] for event in stage.out.of("response.output_item.done")}
        found.append(said - over)
        ask(message)

    stage.stages.ask = noted  # type: ignore[method-assign]
    return found


def about_history(stage: Stage, under_way: list[set[str]]) -> None:
    """What the LM is told that Parley said was said, and no more of it than was sent.

    What is still being said when it is asked counts as heard to its end: if it is not, the reply
    behind it isn't heard either.
    """
    texts: dict[str, str] = {}
    for kind in ("output_audio_transcript", "output_text"):
        for event in stage.out.of(f"response.{kind}.delta"):
            texts[event["item_id"]] = texts.get(event["item_id"], "") + event["delta"]
    sent = {item_id: start + len(samples) for item_id, start, samples in stage.out.audio}
    chars = {item_id: samples / RATE_HZ / stage.stages.char_s for item_id, samples in sent.items()}
    for ask, unfinished in zip(stage.stages.asked, under_way, strict=True):
        for message in ask.messages:
            if message.role == "assistant":
                assert any(
                    text.startswith(message.content)
                    and (
                        item_id in unfinished
                        or len(message.content) <= chars.get(item_id, len(text)) + 1
                    )
                    for item_id, text in texts.items()
                )
