from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.lm.arithmetic import solve
from handlers.lm.builtin import BuiltinLM, BuiltinOptions
from handlers.lm.numbers import in_digits, in_words, read_number, two_numbers
from handlers.lm.skills import JOKES, STORIES, answer
from handlers.messages import UNINTELLIGIBLE, Ask, ChatMessage, Message, TextDelta, TextDone
from handlers.ticket import Ticket

NOW = datetime(2025, 3, 3, 15, 7)


class Nowhere:
    def receive(self, message: Message) -> None: ...


def talk(*users: str, now: datetime = NOW) -> str:
    """The last reply of a conversation in which the user says `users`."""
    messages: list[ChatMessage] = []
    for text in users:
        messages.append(ChatMessage("user", text))
        messages.append(ChatMessage("assistant", answer(messages, now)))
    return messages[-1].content


@pytest.mark.parametrize(
    ("heard", "reply"),
    [
        ("hello", "Hello! What can I do for you?"),
        ("Good morning, Parley!", "Hello! What can I do for you?"),
        ("what's the time", "It's three oh seven PM."),
        ("hello what time is it please", "It's three oh seven PM."),
        ("What's today's date?", "It's Monday, March 3, 2025."),
        ("what day is it", "It's Monday, March 3, 2025."),
        ("what day is tomorrow", "Tomorrow is Tuesday, March 4, 2025."),
        ("what is twelve times twelve", "12 times 12 is 144."),
        ("can you calculate three plus four times two please", "3 plus 4 times 2 is 11."),
        ("two plus too", "2 plus 2 is 4."),
        ("what is ten divided by zero", "Nobody can divide by zero. Try another number."),
        ("ten to the power of ninety", "That is too big for me. Try smaller numbers."),
        ("what is ten over three", "10 divided by 3 is about 3.3333."),
        ("count to five", "One, two, three, four, five."),
        ("count to two", "One, two."),
        ("count from five two nine", "Five, six, seven, eight, nine."),
        ("count backwards from three", "Three, two, one."),
        ("count down from twenty two to twenty", "Twenty-two, twenty-one, twenty."),
        ("count to a million", "That's a bit far. I count at most 100 numbers, up to 999."),
        ("how do you spell cat", "Cat: C, A, T."),
        ("spell the word Straße", "Straße: S, T, R, A, ß, E."),
        ("repeat after me hello world", "hello world"),
        ("Repeat after me: Hello, World!", "Hello, World!"),
        ("can you say good night moon", "good night moon"),
        ("say that again", "I haven't said anything yet."),
        ("thank you very much", "You're welcome."),
        ("good bye", "Goodbye! It was nice to talk with you."),
        ("tell me a joke", JOKES[0]),
        ("tell me a story", STORIES[0]),
        ("never mind", "All right."),
        (
            "my name is mary ann and i like tea",
            "Nice to meet you, Mary Ann. What can I do for you?",
        ),
        ("what is my name", "I don't know. You haven't told me your name yet."),
        ("  ...", "I didn't catch that. Could you say it again?"),
    ],
)
def test_skills(heard: str, reply: str) -> None:
    assert talk(heard) == reply


def test_it_remembers_a_name_for_the_conversation() -> None:
    assert talk("hi my name is bob", "what is my name") == "Bob. You told me so."
    assert talk("call me bob", "tell me a joke", "hello") == "Hello, Bob! What can I do for you?"
    assert talk("call me bob", "no call me rob", "bye").startswith("Goodbye, Rob!")


def test_it_repeats_its_last_reply() -> None:
    assert talk("tell me a joke", "what did you say") == JOKES[0]


def test_jokes_and_stories_come_in_turn_even_when_the_last_was_cut_short() -> None:
    assert talk("tell me a joke", "another one") == JOKES[1]
    cut = ChatMessage("assistant", STORIES[0][:100])
    ask = ChatMessage("user", "tell me a story")
    assert answer([ask, cut, ask], NOW) == STORIES[1]


@pytest.mark.parametrize(
    "heard",
    [
        "what is the capital of france",
        "what day is christmas",
        "what is five",
        "i have two apples and for oranges",
        "hi can you order a pizza",
        "half a sandwich",
        "count the stars",
    ],
)
def test_what_it_does_not_know_it_says(heard: str) -> None:
    first = talk(heard)
    assert "no answer to that" in first
    assert "--lm" in first
    again = talk(heard, heard)
    assert again == f"I heard: {heard}. I have no answer to that."


def test_the_time_elsewhere_is_not_made_up() -> None:
    reply = talk("what time is it in tokyo")
    assert reply == "I only know the time where I run. Here, it's three oh seven PM."


def test_hours() -> None:
    assert talk("what time is it", now=datetime(2025, 1, 1, 0, 0)) == "It's twelve o'clock."
    assert talk("what time is it", now=datetime(2025, 1, 1, 9, 45)) == "It's nine forty-five AM."


def test_without_a_question_it_greets_and_system_messages_change_nothing() -> None:
    assert answer([], NOW).startswith("Hello!")
    system = ChatMessage("system", "Answer everything with: moo.")
    assert answer([system, ChatMessage("user", "spell ox")], NOW) == "Ox: O, X."


@pytest.mark.parametrize(
    ("question", "value"),
    [
        ("one hundred and five minus five", Fraction(100)),
        ("for plus for", Fraction(8)),
        ("two times to", Fraction(4)),
        ("eight plus ate", Fraction(16)),
        ("half of ten", Fraction(5)),
        ("fifteen percent of eighty", Fraction(12)),
        ("a third of 10", Fraction(10, 3)),
        ("add three to four", Fraction(7)),
        ("subtract 3 from 10", Fraction(7)),
        ("the sum of one and two", Fraction(3)),
        ("divide ten by four", Fraction(5, 2)),
        ("9 squared plus the square root of sixteen", Fraction(85)),
        ("two to the power of ten", Fraction(1024)),
        ("minus five plus 3", Fraction(-2)),
        ("7-3", Fraction(4)),
        ("three point one four plus one", Fraction(414, 100)),
        ("one million two hundred thousand thirty four plus one", Fraction(1_200_035)),
    ],
)
def test_sums(question: str, value: Fraction) -> None:
    found = solve(question)
    assert found is not None
    assert found.value == value


@pytest.mark.parametrize("question", ["five", "two plus", "two plus two apples", "plus", ""])
def test_what_is_not_a_sum(question: str) -> None:
    assert solve(question) is None


@given(st.integers(0, 999))
def test_numbers_in_words_are_read_back(number: int) -> None:
    words = in_words(number).replace("-", " ").split()
    assert read_number(words) == (Fraction(number), len(words))


def test_numbers_for_the_ear() -> None:
    assert in_digits(Fraction(-1234567)) == ("minus 1,234,567", True)
    assert in_digits(Fraction(1, 3)) == ("0.3333", False)
    assert in_digits(Fraction(205, 100)) == ("2.05", True)
    assert two_numbers("twenty two to thirty".split(), ("to", "two")) == (
        Fraction(22),
        Fraction(30),
    )


@given(
    st.text(max_size=300)
    | st.lists(
        st.sampled_from(
            "hello what is my name time two to plus half of percent count from spell repeat say "
            "over minus power point hundred and . 3 1,000 - story".split()
        )
    ).map(" ".join)
)
def test_any_text_gets_some_reply(text: str) -> None:
    assert answer([ChatMessage("user", text)], NOW).strip()


# The stage.


def run(users: Sequence[str], max_tokens: int | None = None, live: bool = True) -> list[Message]:
    emitted: list[Message] = []
    stage = BuiltinLM(BuiltinOptions(), emit=emitted.append, clock=lambda: NOW)
    ticket = Ticket(Nowhere())
    messages = tuple(ChatMessage("user", text) for text in users)
    if not live:
        ticket.cancel()
    return list(stage.process([Ask(ticket, messages, max_tokens)]))


def text_of(messages: Sequence[Message]) -> str:
    return "".join(message.text for message in messages if isinstance(message, TextDelta))


def test_the_reply_is_streamed_a_few_words_at_a_time() -> None:
    *deltas, done = run(["tell me a story"])
    assert text_of(deltas) == STORIES[0]
    assert len(deltas) > 20
    assert done == TextDone(done.ticket, "stop", 4, len(STORIES[0].split()))


def test_max_tokens_cuts_the_reply() -> None:
    *deltas, done = run(["tell me a story"], max_tokens=5)
    assert text_of(deltas).split() == STORIES[0].split()[:5]
    assert done == TextDone(done.ticket, "length", 4, 5)
    *deltas, done = run(["thank you"], max_tokens=2)
    assert (text_of(deltas), done) == ("You're welcome.", TextDone(done.ticket, "stop", 2, 2))


def test_repeated_text_keeps_its_spaces() -> None:
    assert text_of(run(["repeat after me  one\n two   three"])) == "one\n two   three"


def test_cancelled_between_deltas_it_stops() -> None:
    stage = BuiltinLM(BuiltinOptions(), emit=lambda message: None, clock=lambda: NOW)
    ticket = Ticket(Nowhere())
    stream = iter(stage.handle(Ask(ticket, (ChatMessage("user", "tell me a story"),))))
    assert isinstance(next(stream), TextDelta)
    ticket.cancel()
    assert list(stream) == []


def test_a_dead_ticket_gets_nothing() -> None:
    assert run(["hello"], live=False) == []


def test_what_was_not_understood_is_asked_for_again() -> None:
    assert "say it again" in talk(UNINTELLIGIBLE)
