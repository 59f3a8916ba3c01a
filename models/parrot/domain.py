"""What the shipped model is taught: its words, the questions it answers, voices, and the split.

Phrases are one to four of `WORDS` in any order, so that what is held out can't be known by heart.
"""

from __future__ import annotations

import hashlib
import random

from models.parrot.synthesis import Speaker

WORDS = tuple(
    "apple banana river mountain yellow purple orange window garden monkey tiger robot music "
    "coffee paper table doctor summer winter silver rabbit chicken pencil rocket castle island "
    "thunder dragon kitchen forest butter camera hammer village blanket dolphin market pocket "
    "lemon engine".split()
)
NUMBERS = tuple("zero one two three four five six seven eight nine ten".split())
LONGEST_PHRASE = 4
"""Words that a phrase to be repeated has at most."""

QUESTIONS: dict[str, str] = {
    "hello": "hello there",
    "good morning": "good morning to you",
    "how are you": "very well thank you",
    "what is your name": "my name is parley",
    "who are you": "my name is parley",
    "thank you": "you are welcome",
    "goodbye": "see you soon",
    **{
        f"what is {NUMBERS[a]} plus {NUMBERS[b]}": NUMBERS[a + b]
        for a in range(1, 6)
        for b in range(1, 6)
    },
}
"""What is answered and not repeated, with the answers."""
LONG_TURN_WORDS = (7, 10)
LONG_TURN_REPLY = "i see"
"""What is said after a turn that is too long to repeat."""
BACKCHANNEL = "mm-hm"
LISTENER_SOUNDS = (BACKCHANNEL, "uh-huh", "hmm")
"""What a person says over a reply who doesn't mean to interrupt it."""
SPELLINGS = {BACKCHANNEL: "umhm"}
"""For texts that eSpeak would read letter by letter."""
SAYABLE = tuple(
    dict.fromkeys(
        " ".join(
            [*WORDS, *QUESTIONS, *QUESTIONS.values(), LONG_TURN_REPLY, *LISTENER_SOUNDS]
        ).split()
    )
)
"""Every word that is ever said, by either of the two."""

ONSET, OFFSET = 0.75, 0.05
"""How sure the shipped model has to be of speech to begin, and of silence to stop: `Sampling`."""

AGENT = Speaker("en-us+f5", speed_wpm=160, pitch=50, intonation=50)

_VARIANTS = (
    "m1 m2 m3 m4 m5 m6 m7 m8 f1 f2 f3 f4 klatt klatt2 klatt3 Andy Annie Alicia Alex Lee adam "
    "linda steph steph2 steph3 Jacky Gene Gene2 Mike Reed Denis david edward michel victor travis "
    "paul robert sandro shelby belinda benjamin ian john max quincy rob zac caleb Michael Mario "
    "Marco Andrea anika antonio boris ed edward2 grandma grandpa gustave iven iven2 iven3 marcelo "
    "mike2 miguel norbert pablo pedro"
).split()
HELD_OUT_VARIANTS = (
    "m3",
    "m7",
    "f2",
    "Annie",
    "steph3",
    "Mike",
    "david",
    "belinda",
    "rob",
    "iven2",
)
TRAIN_VARIANTS = tuple(name for name in _VARIANTS if name not in HELD_OUT_VARIANTS)
LANGUAGES = ("en-us", "en-us", "en-us", "en", "en-gb-x-rp")


def held_out(phrase: str) -> bool:
    """A tenth of the phrases of two words and more, never to be trained on."""
    digest = hashlib.sha256(phrase.encode()).digest()
    return " " in phrase and phrase not in QUESTIONS and digest[0] < 26


def draw_phrase(source: random.Random, *, test: bool, words: int | None = None) -> str:
    """From the side of the split that `test` names; of one word only in training."""
    fewest = 2 if test else 1
    while True:
        count = words or source.randint(fewest, LONGEST_PHRASE)
        phrase = " ".join(source.choices(WORDS, k=count))
        if held_out(phrase) == test:
            return phrase


def draw_speaker(source: random.Random, *, test: bool) -> Speaker:
    variants = HELD_OUT_VARIANTS if test else TRAIN_VARIANTS
    return Speaker(
        voice=f"{source.choice(LANGUAGES)}+{source.choice(variants)}",
        speed_wpm=source.randint(120, 210),
        pitch=source.randint(25, 75),
        intonation=source.randint(40, 90),
    )
