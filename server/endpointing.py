"""How long a pause must last before a reply may be heard.

The clock starts at the last voiced sample. Someone who sounds finished is answered after about
0.3 s, someone who plainly is not gets 1.5 s, and in between a pause for breath is waited out.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import Protocol

import numpy as np

from handlers.messages import Prosody


@dataclass(frozen=True, slots=True)
class Cues:
    """What is known at a pause."""

    text: str  # what the recogniser has heard, possibly wrong, possibly nothing
    end_probability: float | None  # P(the sentence ends | its last words); None: no idea
    prosody: Prosody | None
    voiced_ms: float  # speech in the turn so far, pauses not counted


class EndpointPolicy(Protocol):
    def hold_ms(self, cues: Cues) -> float:
        """Silence after the last voiced sample, in ms, that ends the turn."""
        ...


@dataclass(frozen=True, slots=True)
class TextPolicySettings:
    """Holds in milliseconds. The longer ones are at least as long as the shorter ones."""

    finished_ms: float = 290.0
    unsure_ms: float = 650.0  # outlasts most pauses for breath or for a word
    unfinished_ms: float = 1500.0


@dataclass(frozen=True, slots=True)
class Features:
    """The cues as numbers near 0, where 0 is what an average pause has, or what is unknown."""

    length: float
    end: float
    hanging: float
    end_pitch: float = 0.0
    low_pitch: float = 0.0
    slope: float = 0.0
    fall: float = 0.0
    fade: float = 0.0


WEIGHTS = Features(
    length=2.0,
    end=0.5,
    hanging=-0.5,
    end_pitch=-0.3,
    low_pitch=-0.6,
    slope=-0.3,
    fall=0.9,
    fade=0.2,
)
BIAS = 0.3
"""A logistic regression of "the turn is over" on `Features`, fitted by
`python -m benchmarks.endpointing --fit` to synthetic turns with pauses inside; see there."""

UNFINISHED_BELOW = -3.0
UNSURE = (-2.0, 0.3)
FINISHED_ABOVE = 0.9
"""Log-odds that the turn is over; between these the hold changes in proportion."""

TYPICAL_END_PROBABILITY = 0.06

HANGING = frozenset(
    "a an the my your our their its of and or but because if than um uh er into with from "
    "every very i'm i've i'd i'll you're you'd we're we'd we'll he'd he'll she'd she'll they're "
    "they'd i we he she they to at for is are was were be am would will should could can may "
    "might must has whose as by between which".split()
)
"""English words that hardly ever end a turn."""

COMPLETE = frozenset(
    (
        "yes|no|okay|ok|hello|hi|hey|stop|wait|help|thanks|thank you|thank you very much|bye|"
        "goodbye|good morning|good evening|good night|yes please|no thanks|no thank you|"
        "never mind|nevermind|go on|continue|again|louder|slower|faster|cancel|pause|please stop|"
        "stop please|that's all|that is all|that's it|what|why|who|how|sorry|all right|alright|"
        "of course|maybe|sure|right|exactly|really|repeat|say that again|what time is it|"
        "what's the time|what day is it|how are you|who are you|what can you do"
    ).split("|")
)
"""Whole turns too short for the other cues."""

NUMBERS = frozenset(
    "zero oh one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty "
    "ninety hundred double".split()
)
DICTATED = 3
"""So many numbers in a row may be a telephone number, and more may come."""


class TextPolicy:
    """Words first, voice second. For English; without evidence every pause is an unsure one."""

    def __init__(self, settings: TextPolicySettings | None = None) -> None:
        settings = settings or TextPolicySettings()
        self.finished_ms = settings.finished_ms
        self.unsure_ms = max(settings.unsure_ms, settings.finished_ms)
        self.unfinished_ms = max(settings.unfinished_ms, self.unsure_ms)

    def hold_ms(self, cues: Cues) -> float:
        words = cues.text.lower().split()
        if not words or cues.end_probability is None or not cues.text.isascii():
            return self.unsure_ms
        if " ".join(words) in COMPLETE:
            return self.finished_ms
        hold_ms = self._of_score(score(cues))
        if len(words) >= DICTATED and NUMBERS.issuperset(words[-DICTATED:]):
            return max(hold_ms, self.unsure_ms)
        return hold_ms

    def _of_score(self, log_odds: float) -> float:
        holds_ms = (self.unfinished_ms, self.unsure_ms, self.unsure_ms, self.finished_ms)
        return float(np.interp(log_odds, (UNFINISHED_BELOW, *UNSURE, FINISHED_ABOVE), holds_ms))


def score(cues: Cues) -> float:
    """Log-odds that the turn is over."""
    return BIAS + float(np.dot(astuple(WEIGHTS), astuple(features(cues))))


def features(cues: Cues) -> Features:
    words = cues.text.lower().split()
    end = cues.end_probability or TYPICAL_END_PROBABILITY
    length = math.log(_clip(cues.voiced_ms, 200.0, 2500.0) / 1000)
    end = math.log(_clip(end, 0.003, 0.4) / TYPICAL_END_PROBABILITY)
    hanging = float(bool(words) and words[-1] in HANGING)
    p = cues.prosody
    if p is None:
        return Features(length, end, hanging)
    return Features(
        length,
        end,
        hanging,
        end_pitch=_clip(p.pitch_end_st, -6.0, 6.0) / 3,
        low_pitch=_clip(p.pitch_above_low_st, 0.0, 8.0) / 4 - 0.4,
        slope=_clip(p.pitch_slope_st_s, -30.0, 30.0) / 10,
        fall=_clip(p.pitch_fall_st, 0.0, 10.0) / 5 - 0.3,
        fade=_clip(p.fade_ms, 0.0, 300.0) / 100 - 0.5,
    )


def _clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
