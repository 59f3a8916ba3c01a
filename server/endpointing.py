"""How long a pause must last before a reply may be heard.

The clock starts at the last voiced sample. Someone who sounds finished is answered after about
0.3 s, someone who plainly is not gets 1.5 s, and in between a pause for breath is waited out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    complete: float | None = None  # a turn model's probability that the turn is; None: not known


class EndpointPolicy(Protocol):
    def hold_ms(self, cues: Cues) -> float:
        """Silence after the last voiced sample, in ms, that ends the turn."""
        ...


@dataclass(frozen=True, slots=True)
class TextPolicySettings:
    """Holds in milliseconds. The longer ones are at least as long as the shorter ones."""

    finished_ms: float = 280.0
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


VOICE_FEATURES = slice(3, None)

NO_SPEECH = 0.1
ROOM_RATE = 0.2  # of the way to the level of each window without speech
ABOVE_ROOM_DB = 3.0
LEAST_SNR_DB = 15.0  # the room is not taken to be louder than this below the speaker
AUDIBLE_RANGE_DB = 30.0
LOUDEST_FALLS_DB = 0.1  # per window: a soft speaker is heard again soon after a loud one

BIAS = -0.32
WEIGHTS = Features(
    length=2.13,
    end=0.6,
    hanging=-1.02,
    end_pitch=0.2,
    low_pitch=-0.31,
    slope=-0.14,
    fall=0.67,
    fade=-0.14,
)
"""A logistic regression of "the turn is over" on `Features`, fitted by
`python -m benchmarks.endpointing --fit --seed 1101 --count 280`; the data are described there."""

UNSURE_BELOW, FINISHED_ABOVE = 1.2, 1.3
"""Log-odds that the turn is over; in between the hold changes in proportion."""
UNFINISHED_BELOW = -1.0
IMPROBABLE_END = 0.02
TYPICAL_END = 0.06
"""P(the sentence ends here) in the recogniser's language model: after "forty dollars" 0.2, after
"my order number is" 0.04, after "book a" 0.005."""

HANGING = frozenset(
    "a an the my your our their its of and or but because if than um uh er to into every very i'm "
    "i've i'd i'll you're you'd you've we're we'd we'll we've he'd he'll she'd she'll they're "
    "they'd they've i we he she they whose as between which".split()
)
PREPOSITIONS = frozenset("about at by for from with".split())
AUXILIARIES = frozenset(
    "am are be can could has is may might must should was were will would".split()
)
"""English words that hardly ever end a turn, the last two kinds with exceptions (see `hangs`)."""
THINKING = ("let me think", "let me see", "hang on", "hold on", "just a moment", "one moment")
ASKING = frozenset("how what what's where where's which who who's whose".split())
PRONOUNS = frozenset("he here i it she that there they this we you".split())

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


SURELY_OVER, SURELY_NOT = 0.9, 0.1
"""Probabilities of a turn model that count more than length, voice and the likelihood of the words,
but not more than words that cannot end a turn, or that are one."""


class TextPolicy:
    """Words first, voice second; for English. With a turn model, that before the voice.

    Without evidence every pause is an unsure one.
    """

    def __init__(self, settings: TextPolicySettings | None = None) -> None:
        settings = settings or TextPolicySettings()
        self.finished_ms = settings.finished_ms
        self.unsure_ms = max(settings.unsure_ms, settings.finished_ms)
        self.unfinished_ms = max(settings.unfinished_ms, self.unsure_ms)

    def hold_ms(self, cues: Cues) -> float:
        words = cues.text.lower().split()
        end = cues.end_probability
        over = cues.complete is not None and cues.complete >= SURELY_OVER
        if not words or end is None or not cues.text.isascii():
            return self.finished_ms if over else self.unsure_ms
        if " ".join(words) in COMPLETE:
            return self.finished_ms
        log_odds, voice = score(cues)
        if hangs(words):
            # The recogniser often hears a function word at the end that was none: the voice and
            # the length of the turn must not say otherwise.
            plain = voice <= 0.0 and log_odds < UNFINISHED_BELOW
            return self.unfinished_ms if plain else self.unsure_ms
        dictating = len(words) >= DICTATED and NUMBERS.issuperset(words[-DICTATED:])
        if dictating:
            return self.unsure_ms
        if over:
            return self.finished_ms
        if end < IMPROBABLE_END or (cues.complete is not None and cues.complete <= SURELY_NOT):
            return self.unsure_ms
        holds_ms = (self.unsure_ms, self.finished_ms)
        return float(np.interp(log_odds, (UNSURE_BELOW, FINISHED_ABOVE), holds_ms))


def hangs(words: Sequence[str]) -> bool:
    """Whether a turn cannot well end with these words."""
    last, before = words[-1], words[-2] if len(words) > 1 else ""
    if last in AUXILIARIES:
        return before not in PRONOUNS  # "yes it is"
    if last in PREPOSITIONS:
        return words[0] not in ASKING  # "where are you from"
    return last in HANGING or " ".join(words).endswith(THINKING)


def score(cues: Cues) -> tuple[float, float]:
    """Log-odds that the turn is over, and the voice's part in them."""
    parts = np.multiply(astuple(WEIGHTS), astuple(features(cues)))
    return BIAS + float(parts.sum()), float(parts[VOICE_FEATURES].sum())


def features(cues: Cues) -> Features:
    words = cues.text.lower().split()
    end = cues.end_probability or TYPICAL_END
    length = math.log(_clip(cues.voiced_ms, 200.0, 2500.0) / 1000)
    end = math.log(_clip(end, 0.003, 0.4) / TYPICAL_END)
    hanging = float(bool(words) and hangs(words))
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


class LevelGate:
    """Speech probability, but 0 where a window is too quiet to hold any of the speaker's words.

    Silero's probability outlasts speech: it falls below 0.35 about 100 ms after the last audible
    sample (median of 1,500 pauses; one in ten over 150 ms). With the gate it is 10 ms, eight in
    ten within -15 and +40 ms.
    """

    def __init__(self) -> None:
        self._loudest_db = -math.inf
        self._room_db: float | None = None

    def __call__(self, probability: float, level_db: float) -> float:
        """The next window's probability and RMS level in dB full scale → its probability."""
        self._loudest_db -= LOUDEST_FALLS_DB
        if probability < NO_SPEECH:
            room_db = level_db if self._room_db is None else self._room_db
            self._room_db = room_db + ROOM_RATE * (level_db - room_db)
            return probability
        self._loudest_db = max(self._loudest_db, level_db)
        bar_db = self._loudest_db - AUDIBLE_RANGE_DB
        if self._room_db is not None:
            room_db = min(self._room_db, self._loudest_db - LEAST_SNR_DB)
            bar_db = max(bar_db, room_db + ABOVE_ROOM_DB)
        return probability if level_db > bar_db else 0.0
