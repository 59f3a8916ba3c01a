from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.clauses import MAX_CHARS, ClauseSplitter, speakable, speakable_text


def split(*deltas: str) -> list[str]:
    splitter = ClauseSplitter()
    clauses = [clause for delta in deltas for clause in splitter.push(delta)]
    return clauses + splitter.flush()


@pytest.mark.parametrize(
    ("text", "clauses"),
    [
        ("Hello there, how are you? Fine.", ["Hello there, ", "how are you? ", "Fine."]),
        ("Sure, I can, and will. No. Never!", ["Sure, I can, ", "and will. ", "No. ", "Never!"]),
        ("Then it is said; now.", ["Then it is said; ", "now."]),
        ("I think so — but not now.", ["I think so — ", "but not now."]),
        (
            "Dr. Smith met J. R. Jones, e.g. today. Ok.",
            ["Dr. Smith met J. R. Jones, ", "e.g. today. ", "Ok."],
        ),
        ("The U.S. has 1,000 and 3.14, at 10:30.", ["The U.S. has 1,000 and 3.14, ", "at 10:30."]),
        ("So am I. You too.", ["So am I. ", "You too."]),
        ("1. Eggs\n2. Milk\n", ["1. Eggs\n", "2. Milk\n"]),
        ("I am 5. You are 6.", ["I am 5. ", "You are 6."]),
        ("Look at https://a.b/c.d?e=f, now.", ["Look at https://a.b/c.d?e=f, ", "now."]),
        ("Well... yes. Hm.", ["Well... yes. ", "Hm."]),
        ('He said "stop." Then he left.', ['He said "stop." ', "Then he left."]),
        ("A range of 3–5 days. Ok.", ["A range of 3–5 days. ", "Ok."]),
        ("你好，世界。今天好吗？「好。」", ["你好，世界。", "今天好吗？", "「好。」"]),
        ("مرحبا يا صديقي، كيف حالك؟ نعم.", ["مرحبا يا صديقي، ", "كيف حالك؟ ", "نعم."]),
        ("यह वाक्य है। दूसरा।", ["यह वाक्य है। ", "दूसरा।"]),
        ("?! ...\n\nYes. ", ["?! ...\n", "\nYes. "]),
        ("", []),
    ],
)
def test_clauses(text: str, clauses: list[str]) -> None:
    assert split(text) == clauses
    assert split(*text) == clauses


def test_the_first_clause_is_out_as_soon_as_the_space_behind_its_comma_is_seen() -> None:
    splitter = ClauseSplitter()
    assert splitter.push("In that case,") == []
    assert splitter.push(" we") == ["In that case, "]


def test_later_clauses_are_whole_sentences_unless_they_are_long() -> None:
    short = "I see, of course. It is late, so go home. "
    assert split(short)[-1] == "It is late, so go home. "
    long = "It is, " * 20
    first, *later = split(long)
    assert first == "It is, It is, "
    assert all(80 <= len(clause) <= 90 for clause in later[:-1])


def test_text_without_marks_is_cut_at_a_space() -> None:
    clauses = split("word " * 100)
    assert all(MAX_CHARS / 2 < len(clause) <= MAX_CHARS for clause in clauses[:-1])
    assert all(clause.endswith("word ") for clause in clauses)


def test_text_without_spaces_is_cut_but_not_inside_an_accented_letter() -> None:
    clauses = split("e\u0301" * 150 + "x\u0301\u0301" * 100)
    assert max(map(len, clauses)) <= MAX_CHARS
    assert all(not clause.startswith("\u0301") for clause in clauses)


TEXT = st.text(
    st.one_of(st.sampled_from('abI .,;:-—!?…\n"*)`1 。，、।́'), st.characters()), max_size=500
)


@given(TEXT, st.lists(st.integers(0, 500)))
def test_any_deltas_give_the_same_clauses_and_lose_nothing(text: str, cuts: list[int]) -> None:
    whole = split(text)
    places = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    assert split(*(text[a:b] for a, b in pairwise(places))) == whole
    assert "".join(whole) == text
    assert all(0 < len(clause) <= MAX_CHARS for clause in whole)


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        ("**Bold**, *it*, ~~off~~ and `code`", "Bold, it, off and code"),
        ("***both*** _x_ snake_case __init__", "both x snake_case init"),
        ("3*4, 3 * 4, 2 < 3", "3*4, 3 * 4, 2 < 3"),
        ("## Head\n- a [link](http://x.y)\n  * b\n> c\n- [x] d", "Head a link b c d"),
        ("**an open ", "an open"),
        ("see [this, ", "see this,"),
        ("that](http://x) now", "that now"),
        ("[x] and a[1]", "[x] and a[1]"),
        ("```python\nprint(1)\n```\n---\n", "print(1)"),
        ("Hi 👍🏽👩‍👩‍👧 there 1️⃣ 🇫🇷!", "Hi there 1 !"),
        ("20°C → €5 ©", "20°C €5 ©"),
        ("| a | b |", "a b"),
        ("क्\u200dष", "क्\u200dष"),
        ("a\x00b\x1b <b>c</b>", "a b c"),
        (" \n😀 ", ""),
    ],
)
def test_speakable(text: str, spoken: str) -> None:
    assert speakable(text) == spoken


@given(TEXT)
def test_speakable_text_knows_the_way_back(text: str) -> None:
    result = speakable_text(text)
    assert result.text == result.text.strip()
    for end in range(1, len(result.text) + 1):
        char = result.text[end - 1]
        origin = text[result.raw_end(end) - 1]
        assert char == (" " if char == " " else origin)
    assert list(result.origins) == sorted(set(result.origins))
    assert result.raw_end(0) == 0
