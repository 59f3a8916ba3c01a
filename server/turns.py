"""Turn-taking: who is speaking, when a turn has ended, when a reply must yield.

A pure state machine: no sockets, no threads, no clock of its own. Every method takes the time
or the audio position as an argument and returns actions; `deadline_s` says when `tick` is next
due. Silence is measured in audio samples (the input clock), so network jitter does not move an
endpoint; only when audio stops arriving does wall-clock time stand in for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import TypeAlias

from handlers.messages import RATE_HZ, Prosody
from server.backchannel import is_turn
from server.endpointing import Cues, EndpointPolicy


def samples(ms: float) -> int:
    return round(ms * RATE_HZ / 1000)


@dataclass(frozen=True, slots=True)
class TurnSettings:
    """All times in milliseconds."""

    automatic: bool = True  # False: push-to-talk, the client commits
    create_response: bool = True
    interrupt_response: bool = True
    threshold: float = 0.5  # speech probability that begins a turn
    hysteresis: float = 0.15  # below threshold by this much: silence
    min_speech_ms: float = 64.0  # voiced before speech counts
    min_interrupt: float = 0.8  # speech probability, summed over windows, that pauses a reply
    prefix_padding_ms: float = 300.0  # audio kept from before the onset
    soft_end_ms: float = 96.0  # silence after which the reply is prepared
    resume_ms: float = 64.0  # voiced after a soft end that means: still speaking
    confirm_ms: float = 700.0  # voiced over a reply that interrupts whatever the words
    confirm_words_ms: float = 250.0  # voiced over a reply before partial words may interrupt
    unclear_ms: float = 500.0  # speech without a recognised word that is a turn all the same
    hum_ms: float = 700.0  # a dull sound over a reply that is shorter is an "mm-hm"
    ignore_ms: float = 350.0  # silence after which a sound over a reply was none to stop for
    stall_ms: float = 1000.0  # audio missing for so long counts as silence from then on
    text_wait_ms: float = 5000.0  # silence after which a missing final text counts as failed
    max_turn_s: float = 120.0  # a turn is closed after this, wherever the speaker is


# Actions.


@dataclass(frozen=True, slots=True)
class Open:
    """A turn has begun at `start_sample` (prefix padding included): listen from there."""

    start_sample: int


@dataclass(frozen=True, slots=True)
class FinishText:
    """Ask for the final text up to here."""

    revision: int


@dataclass(frozen=True, slots=True)
class Speculate:
    """Prepare a reply to `text` (empty: no word was recognised); let nobody hear it yet."""

    text: str


@dataclass(frozen=True, slots=True)
class Withdraw:
    """The person goes on: the prepared reply never was."""


@dataclass(frozen=True, slots=True)
class EndTurn:
    """The turn is over. `text` is None if its transcription failed.

    With `respond` the prepared reply may be heard from now on.
    """

    end_sample: int
    text: str | None
    respond: bool


@dataclass(frozen=True, slots=True)
class Drop:
    """It was no turn (noise, or a backchannel during a reply): forget it."""

    end_sample: int


@dataclass(frozen=True, slots=True)
class Pause:
    """Somebody speaks over the reply: stop sending, the listener's buffer is flushed."""


@dataclass(frozen=True, slots=True)
class Resume:
    """It was nothing: go on with the reply from the heard sample."""


@dataclass(frozen=True, slots=True)
class Interrupt:
    """It was a turn: the reply is over, history keeps what was heard of it."""


Action: TypeAlias = (
    Open | FinishText | Speculate | Withdraw | EndTurn | Drop | Pause | Resume | Interrupt
)


class Phase(Enum):
    QUIET = auto()
    SPEAKING = auto()
    PAUSING = auto()  # silent since the soft end


class Turns:
    """The turn-taking of one session."""

    def __init__(self, settings: TurnSettings, policy: EndpointPolicy) -> None:
        self.settings = settings
        self.policy = policy
        self.phase = Phase.QUIET
        self.revision = 0
        self.deadline_s: float | None = None
        self._position = 0  # end of the last VAD window
        self._position_s = 0.0  # when it came
        self._run_start: int | None = None  # first sample of the current voiced run
        self._run = 0  # its voiced samples
        self._run_dull = 0  # ... of which dull
        self._evidence = 0.0  # its speech probability, summed over windows
        self._start = 0  # where the turn began
        self._voiced = 0  # voiced samples in the turn
        self._dull = 0  # ... of which dull
        self._last_voiced = 0  # end of the last voiced window
        self._partial = ""
        self._final: str | None = None  # text at the soft end, once it has come
        self._hold = 0  # silence that ends the turn, in samples
        self._cues: Cues | None = None  # what the hold was decided by
        self._complete: float | None = None  # what the turn model says of this soft end
        self._failed = False
        self._replying = False  # a released reply is not heard to its end
        self._over_reply = False  # this turn began over a reply and has not interrupted it yet
        self._floor = 0  # audio before this belongs to earlier turns

    @property
    def last_voiced(self) -> int:
        """Where the latest turn's last voiced window ended."""
        return self._last_voiced

    # What the session tells.

    def voice(
        self,
        end_sample: int,
        probability: float,
        now_s: float,
        *,
        audible: bool = True,
        dull: bool = False,
    ) -> list[Action]:
        """One VAD window.

        `audible`: loud enough to hold words; a pause inside a turn begins when they cease, though
        the VAD says speech for 100 ms more. `dull`: hardly anything above the hum of a closed
        mouth.
        """
        window = end_sample - self._position
        self._position, self._position_s = end_sample, now_s
        s = self.settings
        if not audible and self.phase is not Phase.QUIET:
            probability = 0.0
        voiced = probability >= s.threshold
        silent = probability < s.threshold - s.hysteresis
        if silent:
            self._run_start, self._run, self._run_dull, self._evidence = None, 0, 0, 0.0
        elif voiced or self._run_start is not None:
            if self._run_start is None:
                self._run_start = end_sample - window
            self._run += window
            self._evidence += probability
            self._run_dull += window if dull else 0
        actions: list[Action] = []
        match self.phase:
            case Phase.QUIET:
                actions = self._quiet()
            case Phase.SPEAKING:
                actions = self._speaking(0 if silent else window, dull)
            case Phase.PAUSING:
                actions = self._pausing()
        self._set_deadline()
        return actions

    def transcript(
        self,
        text: str,
        revision: int | None,
        end_probability: float | None,
        prosody: Prosody | None,
        now_s: float,
        heard: str | None = None,
    ) -> list[Action]:
        """Text of the current turn: a partial (`revision` None), or the final one asked for.

        `heard`: the words to decide by, where they are not those of the text. A final text that
        comes again brings better ones; the hold is decided again with them.
        """
        actions: list[Action] = []
        heard = text if heard is None else heard
        if self.phase is Phase.QUIET:
            return actions
        if revision is None:
            self._partial = heard
            if self.phase is Phase.SPEAKING:
                actions = self._check_interrupt()
        elif self.phase is Phase.PAUSING and revision == self.revision:
            voiced_ms = self._voiced * 1000 / RATE_HZ
            self._cues = Cues(heard, end_probability, prosody, voiced_ms, self._complete)
            self._hold = samples(self.policy.hold_ms(self._cues))
            again = self._final is not None
            unclear = self._unclear()
            if not again or self._over_reply or not (self._final or unclear):
                # A recogniser that comes late is given to making words of a short noise.
                self._final = text if heard or unclear else ""
                actions = self._text_known(self._final, heard)
            if not (again and self._run):  # else the next window tells whether they go on
                actions += self._check_end(self._silence(now_s))
        self._set_deadline()
        return actions

    def completeness(self, probability: float, revision: int, now_s: float) -> list[Action]:
        """A turn model's word on the soft end `revision`; the hold is decided again with it."""
        actions: list[Action] = []
        if self.phase is not Phase.PAUSING or revision != self.revision:
            return actions
        self._complete = probability
        if self._cues is not None:
            self._cues = replace(self._cues, complete=probability)
            self._hold = samples(self.policy.hold_ms(self._cues))
            if not self._run:  # else the next window tells whether they go on
                actions = self._check_end(self._silence(now_s))
        self._set_deadline()
        return actions

    def transcription_failed(self, now_s: float) -> list[Action]:
        """There will be no text for this turn; it ends in silence as an unsure one does."""
        if self.phase is Phase.QUIET:
            return []
        self._failed = True
        self._hold = samples(self.policy.hold_ms(Cues("", None, None, 0.0)))
        actions = self._check_end(self._silence(now_s)) if self.phase is Phase.PAUSING else []
        self._set_deadline()
        return actions

    def reply(self, active: bool) -> None:
        """Whether a released reply is under way: from its release until its end was heard."""
        self._replying = active
        if not active:
            self._over_reply = False

    def commit(self, start_sample: int) -> list[Action]:
        """The client ends the turn by hand; its audio began at `start_sample`.

        The caller takes the turn over: its final text is no longer this machine's business.
        """
        actions: list[Action] = [Interrupt()] if self._over_reply else []
        if self.phase is Phase.QUIET:
            actions.append(Open(start_sample))
        elif self.phase is Phase.PAUSING and self._final is not None:
            actions.append(Withdraw())
        self.revision += 1
        actions.append(FinishText(self.revision))
        self._close()
        return actions

    def clear(self) -> list[Action]:
        """The client discards the audio of the current turn."""
        actions: list[Action] = []
        if self.phase is Phase.PAUSING and self._final is not None:
            actions.append(Withdraw())
        if self.phase is not Phase.QUIET:
            actions += self._drop()
        return actions

    def configure(self, settings: TurnSettings, policy: EndpointPolicy) -> list[Action]:
        """New rules. A turn under way does not survive a change between VAD and push-to-talk."""
        changed = settings.automatic != self.settings.automatic
        actions = self.clear() if changed else []
        self.settings, self.policy = settings, policy
        return actions

    def tick(self, now_s: float) -> list[Action]:
        """A deadline has passed. Call it only when all audio received has come as `voice`."""
        actions: list[Action] = []
        if self.deadline_s is None or now_s < self.deadline_s:
            return actions
        silence = self._silence(now_s)
        if self.phase is Phase.SPEAKING and silence >= samples(self.settings.soft_end_ms):
            actions = self._soft_end()
        elif self.phase is Phase.PAUSING:
            actions = self._check_end(silence)
        self._set_deadline(after_s=now_s)
        return actions

    # Phases.

    def _quiet(self) -> list[Action]:
        s = self.settings
        over = self._replying and s.interrupt_response and s.automatic
        enough = (
            self._evidence >= s.min_interrupt if over else self._run >= samples(s.min_speech_ms)
        )
        if self._run_start is None or not enough:
            return []
        start = max(self._floor, self._run_start - samples(s.prefix_padding_ms), 0)
        self.phase = Phase.SPEAKING
        self._start, self._last_voiced = start, self._position
        self._voiced, self._dull = self._run, self._run_dull
        self._partial, self._final, self._failed = "", None, False
        self._over_reply = over
        actions: list[Action] = [Pause()] if over else []
        return [*actions, Open(start)]

    def _speaking(self, voiced: int, dull: bool) -> list[Action]:
        if voiced:
            self._voiced += voiced
            self._dull += voiced if dull else 0
            self._last_voiced = self._position
        if not self.settings.automatic:
            return []
        silence = self._position - self._last_voiced
        if silence >= samples(self.settings.soft_end_ms) or self._too_long():
            return self._soft_end()
        return self._check_interrupt()

    def _pausing(self) -> list[Action]:
        if self._run and not self._too_long():
            if self._run < samples(self.settings.resume_ms):
                return []  # speech or a click: the next window tells
            withdrawn = self._final is not None
            self.phase = Phase.SPEAKING
            self._voiced += self._run
            self._dull += self._run_dull
            self._last_voiced = self._position
            self._final = None
            actions: list[Action] = [Withdraw()] if withdrawn else []
            return actions + self._check_interrupt()
        return self._check_end(self._position - self._last_voiced)

    def _too_long(self) -> bool:
        return self._position - self._start >= round(self.settings.max_turn_s * RATE_HZ)

    # Decisions.

    def _soft_end(self) -> list[Action]:
        self.phase = Phase.PAUSING
        self._final = self._cues = self._complete = None
        self._run_start, self._run, self._run_dull, self._evidence = None, 0, 0, 0.0
        self.revision += 1
        return [FinishText(self.revision)]

    def _check_interrupt(self) -> list[Action]:
        """Does the speech over a reply amount to a turn?"""
        if not self._over_reply:
            return []
        s = self.settings
        words = self._voiced >= samples(s.confirm_words_ms) and self._is_turn(self._partial)
        if not words and self._voiced < samples(s.confirm_ms):
            return []
        self._over_reply = False
        return [Interrupt()]

    def _is_turn(self, text: str) -> bool:
        short = self._voiced < samples(self.settings.hum_ms)
        return is_turn(text, short=short, dull_share=self._dull / max(1, self._voiced))

    def _text_known(self, text: str, heard: str) -> list[Action]:
        actions: list[Action] = []
        if self._over_reply:
            if not self._is_turn(heard):  # unless words follow at once
                self._final, self._hold = "", samples(self.settings.ignore_ms)
                self._cues = None
                return actions
            self._over_reply = False
            actions.append(Interrupt())
        if (text or self._unclear()) and self.settings.create_response:
            actions.append(Speculate(text))
        return actions

    def _unclear(self) -> bool:
        """So much speech was no noise: better to ask again than to pass over it."""
        return self._voiced >= samples(self.settings.unclear_ms)

    def _check_end(self, silence: int) -> list[Action]:
        """The turn is over once the text is known and the silence has lasted the hold."""
        if self._final is None and silence >= samples(self.settings.text_wait_ms):
            self._failed = True
        if silence < self._hold and not self._too_long():
            return []
        if self._failed:
            if self._over_reply:
                return self._drop()
            end = EndTurn(self._position, None, respond=False)
        elif self._final is None:
            return []
        elif not self._final and (self._over_reply or not self._unclear()):
            return self._drop()
        else:
            end = EndTurn(self._position, self._final, respond=self.settings.create_response)
        self._close()
        return [end]

    def _drop(self) -> list[Action]:
        actions: list[Action] = [Drop(self._position)]
        if self._over_reply:
            actions.append(Resume())
        self._close()
        return actions

    def _close(self) -> None:
        self.phase = Phase.QUIET
        self._floor = self._position
        self._run_start, self._run, self._run_dull, self._evidence = None, 0, 0, 0.0
        self._over_reply = False
        self._final, self._failed, self._partial = None, False, ""
        self.deadline_s = None

    # Time.

    def _silence(self, now_s: float) -> int:
        """Samples of silence since the last voiced one; missing audio counts after a while."""
        missing_s = now_s - self._position_s - self.settings.stall_ms / 1000
        return self._position - self._last_voiced + max(0, round(missing_s * RATE_HZ))

    def _set_deadline(self, after_s: float | None = None) -> None:
        s = self.settings
        self.deadline_s = None
        if not s.automatic or self.phase is Phase.QUIET:
            return
        if self.phase is Phase.SPEAKING:
            wanted = samples(s.soft_end_ms)
        elif self._final is not None or self._failed:
            wanted = self._hold
        else:
            wanted = samples(s.text_wait_ms)
        missing = max(0, wanted - (self._position - self._last_voiced))
        deadline_s = self._position_s + s.stall_ms / 1000 + (missing + 1) / RATE_HZ
        self.deadline_s = deadline_s if after_s is None else max(deadline_s, after_s + 0.02)
