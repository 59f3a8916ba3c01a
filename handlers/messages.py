"""What travels between the session (event loop) and the handlers (threads).

Audio is float32 mono in [-1, 1] at the rate its field names. `end_sample` and `start_sample`
count the session's input clock: samples at `RATE_HZ` since the connection opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from handlers.ticket import Ticket

Samples: TypeAlias = npt.NDArray[np.float32]

RATE_HZ = 24_000
"""Rate of everything between the wire and the session, in and out."""
EAR_RATE_HZ = 16_000
"""Rate of the listening models (VAD, STT)."""


# session → ear (the VAD handler)


@dataclass(frozen=True, slots=True)
class AudioIn:
    """The person's audio; `ticket` is the connection's."""

    ticket: Ticket
    samples: Samples  # [T] at RATE_HZ
    start_sample: int


@dataclass(frozen=True, slots=True)
class Retain:
    """Keep audio from `start_sample` on (`None`: only the default look-back window)."""

    ticket: Ticket
    start_sample: int | None


@dataclass(frozen=True, slots=True)
class Listen:
    """Send the connection's audio from `start_sample` on to STT under `utterance`.

    Lasts until `utterance` dies or another `Listen` replaces it.
    """

    ticket: Ticket
    utterance: Ticket
    start_sample: int
    language: str | None = None  # what the client says is spoken, e.g. "de"


@dataclass(frozen=True, slots=True)
class Finish:
    """Ask STT for its best final text of `utterance` as far as the audio has come.

    Travels through the ear behind the audio sent before it. The utterance may go on: more
    audio and a later `Finish` with a higher `revision` are allowed until `utterance` dies.
    """

    ticket: Ticket  # the connection's
    utterance: Ticket
    revision: int


# ear → session, ear → STT


@dataclass(frozen=True, slots=True)
class Voice:
    """One VAD window of the connection: ended at `end_sample`, speech with `probability`."""

    ticket: Ticket
    end_sample: int
    probability: float
    level_db: float  # RMS of the window in dB full scale
    tilt_db: float = 0.0  # RMS of its first difference against that: low for a closed-mouth hum


@dataclass(frozen=True, slots=True)
class Heard:
    """Audio of an utterance on its way to STT; `ticket` is the utterance's."""

    ticket: Ticket
    samples: Samples  # [T] at EAR_RATE_HZ
    language: str | None = None  # see `Listen`


@dataclass(frozen=True, slots=True)
class Conclude:
    """`Finish`, arrived at STT; `ticket` is the utterance's."""

    ticket: Ticket
    revision: int
    prosody: Prosody | None


@dataclass(frozen=True, slots=True)
class Prosody:
    """How the last stretch of speech ended: cues for the endpoint decision.

    Pitches are in semitones, against the same utterance's median or its lowest tenth.
    """

    pitch_end_st: float  # last pitch above the median
    pitch_above_low_st: float  # last pitch above the speaker's low
    pitch_slope_st_s: float  # over the last 250 ms, per second
    pitch_fall_st: float  # from the head of the last 250 ms to the end
    fade_ms: float  # between the last moment at full level and the end


# STT → session


@dataclass(frozen=True, slots=True)
class Transcript:
    """`ticket` is the utterance's. Partial: `revision` None, `text` replaces the last partial."""

    ticket: Ticket
    text: str
    revision: int | None = None
    end_probability: float | None = None  # P(the sentence ends here | its last words)
    prosody: Prosody | None = None
    heard: str | None = None  # for turn-taking, where a quicker recogniser's words serve; else text


# turn model → session


@dataclass(frozen=True, slots=True)
class Completeness:
    """What the sound of `Conclude`'s audio says; `ticket` is the utterance's."""

    ticket: Ticket
    revision: int
    probability: float  # that the turn is complete


# session → LM → session

UNINTELLIGIBLE = "[unintelligible]"
"""What the LM is told of a turn in which no word was recognised."""


@dataclass(frozen=True, slots=True)
class ToolUse:
    """A call of one of the client's functions; `arguments` is JSON if the LM keeps to it."""

    call_id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: Literal["system", "user", "assistant", "tool"]
    content: str
    tool_uses: tuple[ToolUse, ...] = ()  # an assistant's; each has its "tool" message behind it
    call_id: str | None = None  # "tool": the call that `content` is the result of


@dataclass(frozen=True, slots=True)
class Ask:
    """`ticket` is the reply's. Tools are in the Realtime protocol's form."""

    ticket: Ticket
    messages: tuple[ChatMessage, ...]
    max_tokens: int | None = None
    tools: tuple[Mapping[str, Any], ...] = ()  # {"type": "function", "name", "description", ...}
    tool_choice: Any = "auto"  # "auto", "none", "required" or {"type": "function", "name"}


@dataclass(frozen=True, slots=True)
class TextDelta:
    ticket: Ticket
    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """The LM calls a function, be it in the middle of its text. The client runs it."""

    ticket: Ticket
    use: ToolUse


@dataclass(frozen=True, slots=True)
class TextDone:
    ticket: Ticket
    reason: Literal["stop", "length"] = "stop"
    input_tokens: int = 0
    output_tokens: int = 0


# session → TTS → session


@dataclass(frozen=True, slots=True)
class Say:
    """Speak one clause; `index` counts the clauses of the reply."""

    ticket: Ticket
    text: str
    index: int
    voice: str | None = None
    speed: float = 1.0


@dataclass(frozen=True, slots=True)
class WordMark:
    """The word ending at `char_end` of the clause's text is over at `end_sample` of its audio."""

    char_end: int
    end_sample: int  # at RATE_HZ, from the clause's first sample


@dataclass(frozen=True, slots=True)
class Speech:
    ticket: Ticket
    index: int
    samples: Samples  # [T] at RATE_HZ
    marks: tuple[WordMark, ...] = ()


@dataclass(frozen=True, slots=True)
class Spoken:
    """All audio of clause `index` has been emitted."""

    ticket: Ticket
    index: int


# the duplex brain: session → its stages (`handlers.duplex`) → session


@dataclass(frozen=True, slots=True)
class Join:
    """From the next tick on this connection is in every tick, until its ticket dies."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Uttered:
    """The model's frame `number`, silent or not. It belongs to the person's of that number."""

    ticket: Ticket
    number: int
    heard_sample: int
    samples: Samples  # [T] at RATE_HZ
    level_db: float  # RMS in dB full scale


@dataclass(frozen=True, slots=True)
class Skipped:
    """So much of the person's audio was passed over, to stay on time."""

    ticket: Ticket
    samples: int
    reason: Literal["late", "overload"]  # it came late, or the ticks did


# any handler → session


@dataclass(frozen=True, slots=True)
class Failed:
    """The work for `ticket` ended with an error. `message` is safe to show to the client."""

    ticket: Ticket
    stage: str
    code: str
    message: str


Message: TypeAlias = (
    AudioIn
    | Retain
    | Listen
    | Finish
    | Voice
    | Heard
    | Conclude
    | Transcript
    | Completeness
    | Ask
    | TextDelta
    | ToolCall
    | TextDone
    | Say
    | Speech
    | Spoken
    | Join
    | Uttered
    | Skipped
    | Failed
)
