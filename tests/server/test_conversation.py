from __future__ import annotations

import base64
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers.messages import RATE_HZ, ChatMessage, ToolUse, WordMark
from server.conversation import BYTES_PER_S, Conversation
from server.fields import WireError
from server.items import (
    FunctionCallItem,
    FunctionOutputItem,
    ItemReference,
    MessageItem,
    Part,
    chat,
    heard_text,
    spoken_reply,
    text_reply,
    user_audio,
)
from server.spoken import UNHEARD_TAIL_SAMPLES, SpokenText

S = RATE_HZ


def user(item_id: str, text: str = "hello") -> MessageItem:
    return MessageItem(item_id, "user", [Part("input_text", text)])


def reply(item_id: str, *clauses: str, word_samples: int = S // 2) -> MessageItem:
    """Each word of each clause takes `word_samples`."""
    item = spoken_reply(item_id)
    assert item.spoken is not None
    for clause in clauses:
        index = item.spoken.add_clause(clause)
        marks = marks_of(clause, word_samples)
        item.spoken.add_audio(index, word_samples * len(marks), marks)
        item.spoken.end_clause(index)
    item.status = "completed"
    return item


def marks_of(clause: str, word_samples: int) -> list[WordMark]:
    marks, at = [], 0
    for number, word in enumerate(clause.split(), 1):
        at = clause.index(word, at) + len(word)
        bare = at - (len(word) - len(word.rstrip(".,?")))
        marks.append(WordMark(bare, number * word_samples))
    return marks


def refusal(call: Any, *args: Any) -> WireError:
    with pytest.raises(WireError) as caught:
        call(*args)
    return caught.value


# What was heard.


def test_heard_text_ends_after_the_last_word_heard() -> None:
    item = reply("a", "Well, it is ", "ten past four. ", "Anything else?")
    assert [heard_text(item, n * S // 2) for n in range(9)] == [
        "",
        "Well,",
        "Well, it",
        "Well, it is ",
        "Well, it is ten",
        "Well, it is ten past",
        "Well, it is ten past four. ",
        "Well, it is ten past four. Anything",
        "Well, it is ten past four. Anything else?",
    ]
    assert heard_text(item, None) == "Well, it is ten past four. Anything else?"


def test_a_word_that_was_mostly_heard_counts() -> None:
    item = reply("a", "one two")
    almost = S - UNHEARD_TAIL_SAMPLES
    assert heard_text(item, almost) == "one two"
    assert heard_text(item, almost - 1) == "one"
    short = reply("b", "one two", word_samples=300)
    assert heard_text(short, 499) == "one"
    assert heard_text(short, 500) == "one two"


def test_without_marks_the_words_are_spread_over_the_clause() -> None:
    spoken = SpokenText()
    spoken.add_clause("one two three four")
    spoken.add_audio(0, 4 * S)
    spoken.end_clause(0)
    assert spoken.heard(2 * S) == "one two "
    assert spoken.heard(4 * S) == "one two three four"
    assert spoken.heard(4 * S - 1) == "one two three "


def test_of_a_clause_still_being_made_no_more_is_counted_than_can_have_been_said() -> None:
    spoken = SpokenText()
    spoken.add_clause("a clause of which hardly any audio is there yet")
    spoken.add_audio(0, S // 2)
    assert spoken.heard(S // 2) == "a "
    spoken.add_audio(0, S // 2)
    assert spoken.heard(S) == "a clause of "


def test_the_next_clause_says_that_the_one_before_is_complete() -> None:
    spoken = SpokenText()
    spoken.add_clause("one two, ")
    spoken.add_audio(0, S, [WordMark(3, S // 2)])
    assert spoken.heard(S) == "one"
    spoken.add_clause("three")
    spoken.add_audio(1, S)
    assert spoken.heard(S) == "one two, "
    assert spoken.samples == 2 * S


_CLAUSES = st.lists(
    st.tuples(
        st.sampled_from(["Well, ", "it is ten past four. ", "no ", "word", "Um… (yes) "]),
        st.integers(1, 60_000),
        st.lists(st.tuples(st.integers(0, 30), st.integers(0, 70_000)), max_size=4),
    ),
    max_size=4,
)


@settings(max_examples=40, deadline=None)
@given(_CLAUSES, st.lists(st.integers(0, 250_000), min_size=2, max_size=6))
def test_heard_text_is_a_growing_prefix(clauses: list[Any], at: list[int]) -> None:
    spoken = SpokenText()
    for text, samples, marks in clauses:
        index = spoken.add_clause(text)
        chars, ends = (
            (sorted(numbers) for numbers in zip(*marks, strict=True)) if marks else ((), ())
        )
        spoken.add_audio(index, samples, list(map(WordMark, chars, ends)))
        spoken.end_clause(index)
    heard = [spoken.heard(samples) for samples in sorted(at)]
    assert all(spoken.text.startswith(text) for text in heard)
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(heard))
    assert spoken.heard(0) == ""
    assert spoken.heard(spoken.samples) == spoken.text


# Order.


def test_items_go_where_they_are_put() -> None:
    conversation = Conversation()
    assert conversation.add(user("b")) is None
    assert conversation.add(user("d")) == "b"
    assert conversation.add(user("c"), "b") == "b"
    assert conversation.add(user("a"), "root") is None
    assert [item.id for item in conversation] == ["a", "b", "c", "d"]
    conversation.delete("c")
    assert [item.id for item in conversation] == ["a", "b", "d"]
    assert "c" not in conversation
    assert conversation.retrieve("d").id == "d"


def test_ids_that_are_taken_or_unknown_are_refused() -> None:
    conversation = Conversation()
    conversation.add(user("a"))
    assert refusal(conversation.add, user("a")).code == "item_create_duplicate_item_id"
    error = refusal(conversation.add, user("b"), "nowhere")
    assert error.code == "item_create_invalid_previous_item_id"
    assert error.param == "previous_item_id"
    assert refusal(conversation.retrieve, "x").code == "item_retrieve_invalid_item_id"
    assert refusal(conversation.delete, "x").code == "item_delete_invalid_item_id"
    assert refusal(conversation.truncate, "x", 0, 0).code == "item_truncate_invalid_item_id"
    assert [item.id for item in conversation] == ["a"]


# Truncation.


def test_truncation_keeps_the_words_heard() -> None:
    conversation = Conversation()
    conversation.add(user("u", "what time is it"))
    conversation.add(reply("a", "It is ten past four. ", "Anything else?"))
    conversation.truncate("a", 0, 1500)
    assert conversation.history("be brief") == (
        ChatMessage("system", "be brief"),
        ChatMessage("user", "what time is it"),
        ChatMessage("assistant", "It is ten"),
    )
    content = conversation.retrieve("a").to_wire()["content"]
    assert content == [{"type": "output_audio", "transcript": "It is ten"}]


def test_truncation_past_the_end_is_refused_and_changes_nothing() -> None:
    conversation = Conversation()
    conversation.add(reply("a", "one two"))
    error = refusal(conversation.truncate, "a", 0, 1001)
    assert error.code == "invalid_value"
    assert error.message == "Audio content of 1000ms is already shorter than 1001ms."
    assert conversation.history("")[0].content == "one two"
    conversation.truncate("a", 0, 1000)
    assert conversation.history("")[0].content == "one two"
    conversation.truncate("a", 0, 500)
    assert refusal(conversation.truncate, "a", 0, 501).code == "invalid_value"
    conversation.truncate("a", 0, 0)
    assert conversation.history("") == ()


def test_a_length_that_is_no_whole_millisecond_can_be_named() -> None:
    conversation = Conversation()
    conversation.add(reply("a", "one two", word_samples=100))
    conversation.truncate("a", 0, 9)  # 200 samples are 8.3 ms
    assert conversation.history("")[0].content == "one two"


def test_what_the_client_says_counts_more_than_what_we_reckon() -> None:
    conversation = Conversation()
    item = reply("a", "one two three four")
    conversation.add(item)
    item.cut(S // 2)
    assert item.text == "one"
    conversation.truncate("a", 0, 1500)
    assert item.text == "one two three"
    item.cut(S // 2)
    assert item.text == "one two three"


def test_only_spoken_replies_can_be_truncated() -> None:
    conversation = Conversation()
    text = text_reply("t")
    text.append_text("hi")
    for item in (user("u"), text, user_audio("h", b"\0\0"), FunctionCallItem("c", "f", "", "1")):
        conversation.add(item)
        error = refusal(conversation.truncate, item.id, 0, 0)
        assert error.code == "unsupported_content_type"
    conversation.add(reply("a", "one"))
    assert refusal(conversation.truncate, "a", 1, 0).param == "content_index"


# What the LM gets, and what the client gets.


def test_history_leaves_out_what_has_no_words() -> None:
    conversation = Conversation()
    text = text_reply("t")
    text.append_text("an")
    text.append_text("swer")
    for item in (
        MessageItem("s", "system", [Part("input_text", "be polite")]),
        user_audio("h", b"\0\0"),
        user("u", " "),
        text,
        FunctionCallItem("c", "f", "{}", "1"),
        FunctionOutputItem("o", "2", "result"),
        spoken_reply("r"),
    ):
        conversation.add(item)
    assert conversation.history("", extra=" and now? ") == (
        ChatMessage("system", "be polite"),
        ChatMessage("assistant", "answer"),
        ChatMessage("user", "and now?"),
    )
    conversation.set_transcript("h", "what I said")
    assert conversation.history("")[1] == ChatMessage("user", "what I said")
    for other in ("s", "t", "c", "gone"):
        conversation.set_transcript(other, "not theirs")
    assert conversation.history("")[0].content == "be polite"
    assert conversation.history("")[2].content == "answer"


def test_calls_stand_where_they_were_made_with_their_outputs() -> None:
    said = text_reply("t")
    said.append_text("Let me see.")
    items = (
        user("u", "weather and time?"),
        said,
        FunctionCallItem("c1", "weather", "{}", "1"),
        FunctionCallItem("c2", "time", "{}", "2"),
        FunctionOutputItem("o2", "2", "noon"),
        user("v", "well?"),
        FunctionOutputItem("o1", "1", "sunny"),
        FunctionCallItem("c3", "mood", "[]", "3"),
        FunctionOutputItem("o3", "3", "good"),
        FunctionCallItem("c4", "never answered", "{}", "4"),
    )
    weather, time, mood = (
        ToolUse("1", "weather", "{}"),
        ToolUse("2", "time", "{}"),
        ToolUse("3", "mood", "[]"),
    )
    assert chat(items, "") == (
        ChatMessage("user", "weather and time?"),
        ChatMessage("assistant", "Let me see.", (weather, time)),
        ChatMessage("tool", "sunny", call_id="1"),
        ChatMessage("tool", "noon", call_id="2"),
        ChatMessage("user", "well?"),
        ChatMessage("assistant", "", (mood,)),
        ChatMessage("tool", "good", call_id="3"),
    )


def test_references_stand_for_items() -> None:
    conversation = Conversation()
    conversation.add(user("u", "first"))
    given = conversation.resolve([ItemReference("u"), user("other", "second")])
    assert [message.content for message in chat(given, "")] == ["first", "second"]
    error = refusal(conversation.resolve, [ItemReference("x")])
    assert (error.code, error.param) == ("item_reference_invalid_item_id", "response.input[0].id")


def test_a_reply_in_progress_shows_no_content() -> None:
    item = reply("a", "not heard yet")
    item.status = "in_progress"
    assert item.to_wire()["content"] == []
    item.status = "incomplete"
    assert item.to_wire()["content"] == [{"type": "output_audio", "transcript": "not heard yet"}]


def test_user_audio_is_given_back_only_when_asked_for() -> None:
    item = user_audio("h", b"\x01\x02", "hi")
    assert item.to_wire()["content"] == [{"type": "input_audio", "transcript": "hi"}]
    (part,) = item.to_wire(audio=True)["content"]
    assert base64.b64decode(part["audio"]) == b"\x01\x02"


# Bounds.


def test_the_oldest_audio_goes_first() -> None:
    conversation = Conversation(kept_audio_s=2.0)
    items = [user_audio(name, bytes(BYTES_PER_S), name) for name in "abc"]
    for item in items:
        conversation.add(item)
    assert [item.content[0].audio is None for item in items] == [True, False, False]
    assert [message.content for message in conversation.history("")] == ["a", "b", "c"]


def test_the_oldest_items_go_first_but_none_in_progress() -> None:
    conversation = Conversation(max_items=2)
    running = spoken_reply("running")
    for item in (running, user("a"), user("b"), user("c")):
        conversation.add(item)
    assert [item.id for item in conversation] == ["running", "c"]
    conversation = Conversation(max_chars=10)
    for name in "abc":
        conversation.add(user(name, "12345"))
    assert [item.id for item in conversation] == ["b", "c"]
    conversation.add(user("long", "x" * 50))
    assert [item.id for item in conversation] == ["long"]


_IDS = st.sampled_from("abcdef")
_OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), _IDS, _IDS | st.sampled_from([None, "root"])),
        st.tuples(st.just("say"), _IDS, st.none()),
        st.tuples(st.just("delete"), _IDS, st.none()),
        st.tuples(st.just("truncate"), _IDS, st.integers(0, 2500)),
        st.tuples(st.just("cut"), _IDS, st.integers(0, 60_000)),
        st.tuples(st.just("transcript"), _IDS, st.none()),
    ),
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(_OPERATIONS)
def test_any_order_of_operations(operations: list[tuple[str, str, Any]]) -> None:
    conversation = Conversation(max_items=4, max_chars=60, kept_audio_s=0.001)
    for kind, item_id, argument in operations:
        before = [item.id for item in conversation]
        try:
            apply(conversation, kind, item_id, argument)
        except WireError:
            assert [item.id for item in conversation] == before
        check_invariants(conversation)


def apply(conversation: Conversation, kind: str, item_id: str, argument: Any) -> None:
    match kind:
        case "add":
            item = user_audio(item_id, bytes(20), f"said {item_id}")
            assert conversation.add(item, argument) in (None, *(i.id for i in conversation))
            assert item_id in conversation
        case "say":
            conversation.add(reply(item_id, "one two three four"))
        case "delete":
            conversation.delete(item_id)
            assert item_id not in conversation
        case "truncate":
            conversation.truncate(item_id, 0, argument)
            heard = conversation.retrieve(item_id)
            assert isinstance(heard, MessageItem)
            assert heard.text == heard_text(heard, argument * RATE_HZ // 1000)
        case "cut":
            item = next((i for i in conversation if i.id == item_id), user("none"))  # type: ignore[assignment]
            if isinstance(item, MessageItem) and item.spoken is not None:
                item.cut(argument)
        case "transcript":
            conversation.set_transcript(item_id, "new words")


def check_invariants(conversation: Conversation) -> None:
    items = list(conversation)
    ids = [item.id for item in items]
    assert len(set(ids)) == len(ids) == len(conversation) <= 4
    kept = [p.audio for i in items if isinstance(i, MessageItem) for p in i.content if p.audio]
    assert sum(map(len, kept)) <= 0.001 * BYTES_PER_S
    for item in items:
        assert conversation.retrieve(item.id) is item
    assert conversation.history("") == tuple(
        ChatMessage(item.role, item.text.strip())
        for item in items
        if isinstance(item, MessageItem) and item.text.strip()
    )
