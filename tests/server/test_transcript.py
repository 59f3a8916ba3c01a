"""Partial transcripts: what goes out is agreed on, and stays."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.transcript import StablePrefix


def sent(*hypotheses: str) -> str:
    stable = StablePrefix()
    return "".join(stable.push(text) for text in hypotheses)


@pytest.mark.parametrize(
    ("hypotheses", "expected"),
    [
        (["good"], ""),
        (["good", "good morning"], "good"),
        (["good", "good mourning", "good morning"], "good"),
        (["good", "good morning", "good morning all"], "good morning"),
        (["", "", "yes", "yes"], "yes"),
        (["Hello there.", "Hello there."], "Hello there"),
        (
            ["Hello there.", "Hello there.", "hello, there and", "hello there and"],
            "Hello there and",
        ),
        (["ice cream", "ice cream", "icecream for", "icecream for all"], "ice cream for"),
        (["a b c", "a b c", "a b", "a b c d", "a b c d"], "a b c d"),
        (["a b", "a b", "", "", "a b c", "a b c"], "a b c"),
        (["你好", "你好世", "你好世界"], "你好世"),
        (["สวัส", "สวัสดี", "สวัสดี"], "สวัสดี"),
    ],
)
def test_what_two_in_a_row_agree_on_goes_out(hypotheses: list[str], expected: str) -> None:
    assert sent(*hypotheses) == expected


@given(st.lists(st.text("ab .,", max_size=12), max_size=12))
def test_it_only_grows_by_words_that_two_hypotheses_have(hypotheses: list[str]) -> None:
    stable, last = StablePrefix(), ""
    for text in hypotheses:
        delta = stable.push(text)
        for word in delta.split():
            assert word in text
            assert not word.strip(".,") or word.strip(".,") in last
        last = text


def test_a_recogniser_that_wavers_is_followed_to_the_end() -> None:
    words = [f"word{number}" for number in range(60)]
    chance = random.Random(3)
    stable, out = StablePrefix(), ""
    for length in range(1, 61):
        heard = words[:length]
        if chance.random() < 0.5:  # an early word is taken for two
            heard[0] = "wor d0"
        if chance.random() < 0.3:  # and the last is not certain
            heard[-1] = "wort"
        out += stable.push(" ".join(heard))
    said = out.split()
    assert len(said) >= 55
    assert said[2:] == words[words.index(said[2]) :][: len(said) - 2]
