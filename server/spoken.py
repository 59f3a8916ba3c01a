"""What of a spoken reply was heard: its text against the timeline of its audio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from handlers.messages import RATE_HZ, WordMark

UNHEARD_TAIL_SAMPLES = RATE_HZ // 10
"""A word counts as heard when at most this much of its end, and at most a third of it, is missing:
people recognise a word before it is over."""
CHARS_PER_S = 15
"""Speaking rate of English, for audio that comes without marks and has not ended yet."""
CLOSING = ".,;:!?…)]}\"'”’"


@dataclass(slots=True)
class _Clause:
    text: str
    start_sample: int | None = None  # in the item's audio; None: no audio yet
    samples: int = 0
    marks: list[WordMark] = field(default_factory=list)
    complete: bool = False

    def heard(self, samples: int) -> str:
        """The text of the first `samples` of this clause's audio."""
        if self.complete and samples >= self.samples:
            return self.text
        chars = self._marked(samples) if self.marks else self._estimated(samples)
        if chars:
            while chars < len(self.text) and self.text[chars] in CLOSING:
                chars += 1
        return self.text[:chars]

    def _marked(self, samples: int) -> int:
        chars = begin = 0
        for mark in self.marks:
            tail = min((mark.end_sample - begin) // 3, UNHEARD_TAIL_SAMPLES)
            if samples < mark.end_sample - tail:
                break
            chars, begin = mark.char_end, mark.end_sample
        return chars

    def _estimated(self, samples: int) -> int:
        whole = self.samples
        if not self.complete:
            whole = max(whole, len(self.text) * RATE_HZ // CHARS_PER_S)
        chars = min(len(self.text) * samples // max(whole, 1), len(self.text))
        at_end = chars == len(self.text) or self.text[chars].isspace()
        return chars if at_end else self.text.rfind(" ", 0, chars) + 1


class SpokenText:
    """The clauses of one assistant item, their audio (samples at `RATE_HZ`) and word marks.

    Clauses are spoken in order. `text` is their texts joined as they are, spaces included.
    """

    __slots__ = ("_clauses", "samples")

    def __init__(self) -> None:
        self._clauses: list[_Clause] = []
        self.samples = 0  # all audio so far

    @property
    def text(self) -> str:
        return "".join(clause.text for clause in self._clauses)

    def add_clause(self, text: str) -> int:
        """Append a clause that is about to be spoken. Returns its index."""
        self._clauses.append(_Clause(text))
        return len(self._clauses) - 1

    def add_audio(self, index: int, samples: int, marks: Sequence[WordMark] = ()) -> None:
        """Clause `index` goes on for `samples`; `marks`, in order, count from its first sample."""
        clause = self._clauses[index]
        if clause.start_sample is None:
            clause.start_sample = self.samples
            for earlier in self._clauses[:index]:
                earlier.complete = True
        clause.samples += samples
        clause.marks.extend(marks)
        self.samples += samples

    def end_clause(self, index: int) -> None:
        """Clause `index` has all its audio (which the start of the next one also says)."""
        self._clauses[index].complete = True

    def heard(self, samples: int) -> str:
        """The text up to the last word heard in the first `samples` of the item's audio."""
        kept: list[str] = []
        for clause in self._clauses:
            if clause.start_sample is None or samples <= clause.start_sample:
                break
            kept.append(clause.heard(samples - clause.start_sample))
        return "".join(kept)
