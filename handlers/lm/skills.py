"""What the built-in responder can do: one small function per skill.

To add one, write a function under `@skill(pattern, ...)`. A pattern is searched in the
normalised text of what the user said; the first skill of the file whose pattern is found and
that returns a text answers. None means: not for me after all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from handlers.lm.arithmetic import solve
from handlers.lm.numbers import in_digits, in_words, two_numbers, whole_number
from handlers.messages import UNINTELLIGIBLE, ChatMessage


@dataclass(frozen=True, slots=True)
class Talk:
    heard: str  # the last user message, normalised
    raw: str  # ... and as it came
    before: Sequence[ChatMessage]
    now: datetime

    def said(self, text: str) -> int:
        """How many of the assistant's messages contain `text`."""
        return sum(
            message.role == "assistant" and text in message.content for message in self.before
        )


Match = re.Match[str]
Skill = Callable[[Talk, Match], str | None]
_SKILLS: list[tuple[re.Pattern[str], Skill]] = []


def skill(*patterns: str) -> Callable[[Skill], Skill]:
    def register(function: Skill) -> Skill:
        _SKILLS.extend((re.compile(pattern), function) for pattern in patterns)
        return function

    return register


def answer(messages: Sequence[ChatMessage], now: datetime) -> str:
    """The reply to the last user message; a greeting where there is none."""
    users = [place for place, message in enumerate(messages) if message.role == "user"]
    if not users:
        return "Hello! I'm listening. What can I do for you?"
    raw = messages[users[-1]].content
    talk = Talk(normalised(raw), raw, messages[: users[-1]], now)
    reply = _skilled(talk)
    return _fallback(talk) if reply is None else reply


def _skilled(talk: Talk) -> str | None:
    for pattern, function in _SKILLS:
        found = pattern.search(talk.heard)
        reply = function(talk, found) if found else None
        if reply is not None:
            return reply
    return None


HEARD_CHARS = 1000
"""Of a longer message the rest is ignored, so that no pattern takes long."""
_SPELLINGS = [
    (re.compile(pattern), written)
    for pattern, written in (
        (r"[‘’]", "'"),
        (r"(?<=\d),(?=\d{3})", ""),
        (r"\b(what|who|how|that|it|where|there)(?:'s|s(?= (?:the|your|my|up|a)\b))", r"\1 is"),
        (r"\bi'?m\b", "i am"),
        (r"\blet's\b", "let us"),
        (r"'re\b", " are"),
        (r"[^\w\s'.+*/%^×÷−-]", " "),
        (r"\.(?!\d)|(?<!\w)'|'(?!\w)", " "),
        (r"^(?:(?:um+|uh+|er+|hm+|okay|ok|so|well|and|please|parley|hey parley) )+(?=\S)", ""),
        (r"^(?:(?:can|could|would|will) you|i (?:want|would like) you to)(?: please)? ", ""),
        (r"(?: (?:please|thanks|thank you|parley))+$", ""),
    )
]


def normalised(text: str) -> str:
    """Lower case, no punctuation, contractions in full, without words that mean nothing."""
    text = text[:HEARD_CHARS].lower()
    for pattern, written in _SPELLINGS:
        text = " ".join(pattern.sub(written, text).split())
    return text


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


_GREETINGS = r"hello|hi|hey|good (?:morning|afternoon|evening)|greetings"
_NAME_END = frozenset("and but i what so who how can nice please it is not the a".split())


def _name_in(text: str) -> str | None:
    found = re.search(r"\b(?:my name is|call me|i am called) (.+)", normalised(text))
    name: list[str] = []
    for word in (found[1].split() if found else [])[:3]:
        if word in _NAME_END or not word.replace("'", "").replace("-", "").isalpha():
            break
        name.append(word.title())
    return " ".join(name) or None


def _known_name(talk: Talk) -> str | None:
    users = [message.content for message in talk.before if message.role == "user"]
    return next((name for text in reversed(users) if (name := _name_in(text))), None)


@skill(r"\b(?:what is|do you (?:know|remember)|tell me|say) my name\b", r"\bwho am i\b")
def recall_name(talk: Talk, match: Match) -> str:
    name = _known_name(talk)
    if name is None:
        return "I don't know. You haven't told me your name yet."
    return f"{name}. You told me so."


@skill(r"\b(?:my name is|call me|i am called) \w")
def learn_name(talk: Talk, match: Match) -> str | None:
    name = _name_in(talk.raw)
    return f"Nice to meet you, {name}. What can I do for you?" if name else None


@skill(r"^(?:say (?:that|it) again|repeat (?:that|it|yourself)(?: again)?|what did you say)$")
def say_again(talk: Talk, match: Match) -> str:
    said = [message.content for message in talk.before if message.role == "assistant"]
    return said[-1] if said and said[-1].strip() else "I haven't said anything yet."


@skill(r"^(?:repeat after me|repeat|say(?! something)) .")
def repeat(talk: Talk, match: Match) -> str | None:
    found = re.search(r"\b(?:repeat after me|repeat|say)\b[\s,:;.!-]*(.+)", talk.raw, re.I | re.S)
    return found[1] if found else None


@skill(
    r"\bhow (?:do|would) (?:you|i) spell (?P<word>.+)",
    r"^spell (?P<word>.+)",
    r"\bhow is (?P<word>\S+) (?:spelled|spelt)",
)
def spell(talk: Talk, match: Match) -> str | None:
    word = re.sub(r"^(?:(?:the|a) )?(?:word|name) |^the (?=\S+$)", "", match["word"])
    letters = [char.upper() if len(char.upper()) == 1 else char for char in word if char.isalpha()]
    if not 0 < len(letters) <= 40 or len(word.split()) > 3:
        return None
    return f"{word.capitalize()}: {', '.join(letters)}."


COUNT_LIMIT = 100


@skill(r"^(?:count|countdown|count down)\b(?P<rest>.*)")
def count(talk: Talk, match: Match) -> str | None:
    rest = match["rest"].split()
    down = "down" in match[0]
    while rest and rest[0] in ("up", "backward", "backwards", "down", "slowly", "from"):
        down = down or rest[0] in ("backward", "backwards", "down")
        rest = rest[1:]
    pair = two_numbers(rest, ("to", "two", "too", "until", "down"))
    number = whole_number(rest[1:] if rest[:1] in (["to"], ["too"], ["two"]) else rest)
    if number is None and rest in (["to"], ["too"], ["two"]):
        number = whole_number(rest, homophones=True)
    if pair is None and number is not None:
        pair = (number, 1 + 0 * number) if down else (1 + 0 * number, number)
    if pair is None or any(n.denominator != 1 for n in pair):
        return None
    first, last = int(pair[0]), int(pair[1])
    if abs(first - last) >= COUNT_LIMIT or max(first, last) > 999:
        return f"That's a bit far. I count at most {COUNT_LIMIT} numbers, up to 999."
    step = 1 if first <= last else -1
    return _sentence(", ".join(in_words(n) for n in range(first, last + step, step)) + ".")


@skill(
    r"(?:what (?:is|are|does|do)|how much (?:is|are)|calculate|compute|work out|tell me)"
    r"(?: (?:the )?(?:answer|result) (?:to|of))? (?P<sum>.+)",
    r"^(?P<sum>.+)$",
)
def arithmetic(talk: Talk, match: Match) -> str | None:
    try:
        found = solve(match["sum"])
    except ZeroDivisionError:
        return "Nobody can divide by zero. Try another number."
    except OverflowError:
        return "That is too big for me. Try smaller numbers."
    if found is None:
        return None
    value, exact = in_digits(found.value)
    return _sentence(f"{found.text} is {'' if exact else 'about '}{value}.")


_ELSEWHERE = r"\btime\b.* in (?!the (?:morning|evening)|a (?:minute|moment))\w"


@skill(_ELSEWHERE)
def time_elsewhere(talk: Talk, match: Match) -> str:
    return f"I only know the time where I run. Here, {_time(talk.now)}"


@skill(
    r"\bwhat time (?:is it|it is|do you have)\b",
    r"\bwhat is the (?:current )?time\b",
    r"\btell me the time\b",
    r"^(?:the )?(?:current )?time(?: now)?$",
    r"\bhave you got the time\b|\bdo you (?:have|know) the time\b",
)
def time(talk: Talk, match: Match) -> str:
    return _sentence(_time(talk.now))


def _time(now: datetime) -> str:
    hour = in_words(now.hour % 12 or 12)
    half = "AM" if now.hour < 12 else "PM"
    if now.minute == 0:
        return f"it's {hour} o'clock."
    minute = f"oh {in_words(now.minute)}" if now.minute < 10 else in_words(now.minute)
    return f"it's {hour} {minute} {half}."


@skill(
    r"\bwhat (?:day|date|year|month) (?:is|was|will)\b(?P<rest>.*)",
    r"\bwhat is (?:the|today) ?'?s? ?(?:date|day|year|month)\b(?P<rest>.*)",
    r"\bwhat (?:is|will be) (?:the )?(?:date|day)\b(?P<rest>.*)",
    r"\btell me the (?:date|day)\b(?P<rest>.*)",
    r"^(?:today's |the )?date(?P<rest>)$",
)
def date(talk: Talk, match: Match) -> str | None:
    unknown = set(match["rest"].split()) - set("it today now be tomorrow yesterday the of".split())
    if unknown - {"date", "day", "month", "year", "current", "is", "week"}:
        return None  # "what day is christmas"
    shift = {"tomorrow": 1, "yesterday": -1}
    word = next((word for word in shift if word in match["rest"].split()), "")
    day = talk.now + timedelta(days=shift.get(word, 0))
    text = f"{day:%A}, {day:%B} {day.day}, {day.year}."
    return (
        f"{word.capitalize()} {'is' if word != 'yesterday' else 'was'} {text}"
        if word
        else f"It's {text}"
    )


@skill(r"\bhow are you\b|\bhow is it going\b|\bhow do you do\b")
def how_are_you(talk: Talk, match: Match) -> str:
    return "I'm fine, thank you. What can I do for you?"


@skill(
    r"\bwhat (?:else )?(?:can|do) you do\b",
    r"^help(?: me)?$",
    r"\bwhat (?:are you able to do|are your skills|can i (?:ask|say))\b",
)
def abilities(talk: Talk, match: Match) -> str:
    return (
        "A few things. I can tell you the time and the date, do arithmetic, count, spell a word, "
        "repeat after you, and tell a joke or a story. You can interrupt me whenever you like."
    )


@skill(
    r"^(?:who|what) are you\b", r"\bwhat is your name\b", r"\bare you (?:a )?(?:human|robot|real)\b"
)
def introduce(talk: Talk, match: Match) -> str:
    return "I'm Parley, a voice server. Behind me is a small built-in responder, no language model."


JOKES = (
    "Why did the scarecrow win a prize? Because he was outstanding in his field.",
    "I told my computer a joke about time. It is still waiting for the right moment.",
    "What do you call a fish without eyes? A fsh.",
    "Why don't skeletons fight each other? They don't have the guts.",
)
STORIES = (
    "All right. Once upon a time, a lighthouse keeper lived alone on a small rock in the sea. "
    "Every evening he climbed two hundred steps, lit the lamp, and read aloud to the gulls. "
    "One night the lamp went out in a storm, and far away he heard a ship that was blowing its "
    "horn. He took the only thing that he had, his voice, and read his book into the wind as "
    "loudly as he could. The captain followed the words past the rocks, and in the morning he "
    "came ashore to hear how the story ended.",
    "Here is one. A young fox wanted to know where the river ends. She followed it through the "
    "forest, past the mill, and under seven bridges. At every bridge an old heron told her that "
    "it was not far now. When she reached the sea at last, she asked the heron why he had come "
    "with her all the way. Because, said the heron, I wanted to know it too, and alone I never "
    "dared to go.",
)


@skill(r"\b(?:joke|make me laugh|something funny)\b", r"^another one$|^one more$")
def joke(talk: Talk, match: Match) -> str | None:
    told = sum(talk.said(text) for text in JOKES)
    if "one" in match[0] and not told:
        return None
    return JOKES[told % len(JOKES)]


@skill(r"\b(?:tell|read|know|want|hear)\b.*\bstory\b", r"^(?:a|another) story$", r"^say something$")
def story(talk: Talk, match: Match) -> str:
    # An interrupted story stands in the history only as far as it was heard.
    told = sum(talk.said(text.partition(".")[0]) for text in STORIES)
    return STORIES[told % len(STORIES)]


@skill(rf"^(?:{_GREETINGS})(?: there| again| everybody)?$")
def greet(talk: Talk, match: Match) -> str:
    name = _known_name(talk)
    return f"Hello{f', {name}' if name else ''}! What can I do for you?"


@skill(r"^(?:thank you|thanks|thank)\b|\bthank you(?: very much| so much)?$")
def welcome(talk: Talk, match: Match) -> str:
    return "You're welcome."


@skill(r"\b(?:goodbye|good bye|bye|see you|good night)\b")
def goodbye(talk: Talk, match: Match) -> str:
    name = _known_name(talk)
    return f"Goodbye{f', {name}' if name else ''}! It was nice to talk with you."


@skill(r"^(?:stop|stop it|be quiet|never mind|enough|that is enough|shut up|wait|cancel)$")
def stop(talk: Talk, match: Match) -> str:
    return "All right."


@skill(rf"^(?:(?:{_GREETINGS})(?: there| parley)? )+(?P<rest>.+)")
def greeted_first(talk: Talk, match: Match) -> str | None:
    return _skilled(replace(talk, heard=normalised(match["rest"])))


ATTACH = "start the server with the --lm flag"


def _fallback(talk: Talk) -> str:
    heard = " ".join(talk.raw.split())[:200].rstrip(" .?!,;:")
    if talk.raw == UNINTELLIGIBLE or not any(char.isalnum() for char in heard):
        return "I didn't catch that. Could you say it again?"
    if talk.said(ATTACH):
        return f"I heard: {heard}. I have no answer to that."
    return (
        f"I heard: {heard}. I'm only the built-in responder, so I have no answer to that. "
        f"To talk with a real language model, {ATTACH}. Or ask me what I can do."
    )
