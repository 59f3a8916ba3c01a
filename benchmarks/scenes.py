"""What the virtual person does, turn by turn."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TypeAlias

from benchmarks.clips import Clip
from benchmarks.listener import Conversation, Kind, Said, Script

ANSWER_TIMEOUT_S = 8.0
"""A turn without an audible reply after this is missed."""
REPLY_TIMEOUT_S = 30.0
REST_TIMEOUT_S = 5.0
SPOKEN_TIMEOUT_S = 120.0
REST_S = 0.4
INTERRUPTION_LEAD_MS = 60.0
"""Room noise of an interrupting clip before its onset."""

Scene: TypeAlias = Callable[[Conversation], Script]


def turn(clip: Clip, reply_s: float, kind: Kind = "turn") -> Scene:
    """Say `clip`, hear the first `reply_s` of the reply, stop it."""

    def script(talk: Conversation) -> Script:
        if (yield from answered(talk, talk.say(clip, kind))):
            yield from talk.wait(reply_s)
        yield from stopped(talk)

    return script


def interruption(prompt: Clip, clip: Clip, kind: Kind, after_s: float, reply_s: float) -> Scene:
    """Say `prompt`, then `clip` when the reply has sounded for `after_s`.

    After a `barge_in` the next reply is heard for `reply_s`, after a `noise` the same reply
    to its end.
    """

    def script(talk: Conversation) -> Script:
        if (yield from answered(talk, talk.say(prompt, "prompt"))):
            yield from talk.wait(after_s)
            yield from talk.until(lambda: talk.quiet_s == 0.0, 1.0)
            said = talk.say(clip, kind, lead_ms=INTERRUPTION_LEAD_MS)
            if kind == "noise":
                yield from talk.until(lambda: talk.sample > said.last_voiced, SPOKEN_TIMEOUT_S)
                yield from talk.until(lambda: talk.at_rest, REPLY_TIMEOUT_S)
            elif (yield from answered(talk, said)):
                yield from talk.wait(reply_s)
        yield from stopped(talk)

    return script


def one_after_another(scenes: Sequence[Scene]) -> Scene:
    def script(talk: Conversation) -> Script:
        for scene in scenes:
            yield from scene(talk)

    return script


def answered(talk: Conversation, said: Said) -> Generator[None, None, bool]:
    """Wait until something is audible after the last voiced sample; False if nothing is."""
    yield from talk.until(lambda: talk.sample >= said.last_voiced, SPOKEN_TIMEOUT_S)
    return (yield from talk.until(lambda: talk.audible_sample > said.last_voiced, ANSWER_TIMEOUT_S))


def stopped(talk: Conversation) -> Script:
    """Press "stop" and wait until all is quiet."""
    talk.hush()
    yield from talk.until(lambda: talk.at_rest, REST_TIMEOUT_S)
    yield from talk.wait(REST_S)
