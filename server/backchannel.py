"""Whether a sound over a reply is there to stop it, or only accompanies it. Pure."""

from __future__ import annotations

BACKCHANNELS = frozenset(
    "ah aha alright hm hmm huh mhm mm mmm oh okay ok right sure uh uhuh um uhm yeah yep yes".split()
)
"""Words that accompany a reply instead of answering it."""
NOISE_WORDS = frozenset("a an and but he her him i in it of or that the them this to".split())
"""Function words that a recogniser makes of a cough or a click; alone they are no interruption."""
COMMANDS = frozenset(
    "cancel enough excuse hang hold how never no please quiet sorry stop wait what when where who "
    "why".split()
)
"""Words that stop a reply however they sound."""
DULL_SHARE = 0.4
"""Of "mm-hm" at least so much is closed-mouth hum. Over 27 of them by eSpeak voices 0.40 to 0.93;
over 27 short interruptions under 700 ms 0.0 and 0.05, and up to 0.95 over longer ones."""


def interrupts(text: str) -> bool:
    """Whether words spoken over a reply are meant to stop it."""
    words = text.lower().split()
    return any(word not in BACKCHANNELS and word not in NOISE_WORDS for word in words)


def is_turn(text: str, *, short: bool, dull_share: float) -> bool:
    """A sound over a reply, recognised as `text`: is it a turn?

    A short sound that is mostly dull is taken for an "mm-hm" whatever words the recogniser made
    of it, unless it holds a command.
    """
    if not COMMANDS.isdisjoint(text.lower().split()):
        return True
    return interrupts(text) and not (short and dull_share >= DULL_SHARE)
