"""Text on its way from LM to TTS: cut into clauses as it streams, cleaned for the ear."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

MAX_CHARS = 200
"""A clause is at most this long: about 12 s of speech."""
FIRST_MIN_SIZE = 10
"""The first clause may end at a comma from this size on, to be heard early."""
LATER_MIN_SIZE = 80
"""Later ones only from here on: speech sounds better in whole sentences."""
WIDE_SIZE = 3  # a Chinese, Japanese or Korean character says about as much as three letters

_STOPS = ".!?…。！？｡।॥؟۔።။។"
_PAUSES = ",;:，、；：､،؛"
_DASHES = "-–—"
_CLOSERS = "\"'”’»›)]}」』）】》*_`~"
_UNSPACED_MARKS = frozenset("。！？｡，、；：､…॥။។")
"""These end a clause without a space behind them."""
_ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof st jr sr vs etc approx dept est inc ltd co corp gen col capt lt sgt rev "
    "hon mt jan feb mar apr jun jul aug sept sep oct nov dec cf al ca fig vol pp".split()
)


class ClauseSplitter:
    """Cuts one reply's text as it arrives; joined, the clauses are the text, unchanged.

    The clauses depend on the text alone, never on how it was cut into deltas. A clause ends at
    a sentence's end, at a line's end, at a comma when it is long enough, or at a space before
    `MAX_CHARS`. The space behind a mark belongs to the clause before it.
    """

    def __init__(self) -> None:
        self._text = ""
        self._min_size = FIRST_MIN_SIZE

    def push(self, delta: str) -> list[str]:
        """The clauses that are complete now."""
        self._text += delta
        clauses = []
        while end := _clause_end(self._text[: MAX_CHARS + 1], self._min_size):
            clauses.append(self._text[:end])
            self._text = self._text[end:]
            self._min_size = LATER_MIN_SIZE
        return clauses

    def flush(self) -> list[str]:
        """What is left at the end of the text; the splitter is then as new."""
        rest, self._text, self._min_size = self._text, "", FIRST_MIN_SIZE
        return [rest] if rest else []


_MARK = re.compile(f"[{re.escape(_STOPS + _PAUSES + _DASHES)}\n]")
_RUN = re.compile(f"[{re.escape(_STOPS + _PAUSES + _CLOSERS)}]*")


def _clause_end(text: str, min_size: int) -> int | None:
    """Where the first clause of `text` ends; None while that cannot be known."""
    at = 0
    while found := _MARK.search(text, at):
        mark = found.start()
        if text[mark] == "\n":
            at = mark + 1
            if text[:mark].strip() and at <= MAX_CHARS:
                return at
            continue
        at = max(_RUN.match(text, mark).end(), mark + 1)  # type: ignore[union-attr]
        if at >= len(text):
            break  # what follows decides
        if _ends_here(text, mark, at, min_size):
            return min(at + 1 if text[at].isspace() else at, MAX_CHARS)
    return _forced_end(text) if len(text) > MAX_CHARS else None


def _ends_here(text: str, mark: int, end: int, min_size: int) -> bool:
    """Whether the marks at `text[mark:end]` end a clause; `text[end]` is there to be seen."""
    if not any(char.isalnum() for char in text[:mark]):
        return False
    marks = text[mark:end]
    spaced = text[end].isspace()
    if marks[0] in _DASHES:
        joined = marks[0] == "—" and not text[end].isdigit()
        apart = spaced and text[mark - 1].isspace()
        return (joined or apart) and _size(text[:end]) >= min_size
    if not spaced and not _UNSPACED_MARKS.intersection(marks):
        return False
    stops = [mark for mark in marks if mark in _STOPS]
    if not stops or "…" in stops or stops[:2] == [".", "."]:
        return _size(text[:end]) >= min_size  # a pause
    return stops != ["."] or not _is_abbreviation(text[:mark])


def _is_abbreviation(before: str) -> bool:
    """Whether a full stop after `before` belongs to its last word: "Dr", "e.g", "J", "\\n2"."""
    words = before.split()
    word = words[-1].lstrip(_CLOSERS + "([{“‘«")
    if word.isdigit():
        return len(words) == 1 or before[: -len(words[-1])].rstrip(" ").endswith("\n")
    initials = all(len(part) == 1 and part.isalpha() for part in word.split("."))
    return (initials and word.isascii() and word != "I") or word.lower() in _ABBREVIATIONS


def _size(text: str) -> int:
    return sum(WIDE_SIZE if unicodedata.east_asian_width(c) in "WF" else 1 for c in text.strip())


def _forced_end(text: str) -> int:
    """A cut in a text of more than MAX_CHARS that has no mark: at a space, else anywhere."""
    end = MAX_CHARS
    while end > MAX_CHARS // 2 and not text[end - 1].isspace():
        end -= 1
    if end > MAX_CHARS // 2:
        return end
    end = MAX_CHARS
    while end > MAX_CHARS // 2 and unicodedata.category(text[end]).startswith("M"):
        end -= 1  # never between a letter and its accents
    return end


# For the ear.


@dataclass(frozen=True, slots=True)
class SpeakableText:
    """What of a clause is to be spoken; `origins[i]` is the place of `text[i]` in the clause."""

    text: str
    origins: tuple[int, ...]

    def raw_end(self, char_end: int) -> int:
        """The place in the clause behind what `text[:char_end]` speaks."""
        return self.origins[char_end - 1] + 1 if char_end > 0 else 0


def speakable(text: str) -> str:
    """`text` without Markdown's marks, emoji and control characters, spaces collapsed."""
    return speakable_text(text).text


_EMOJI = (
    "[\U0001f000-\U0001faff\u2190-\u21ff\u2300-\u23ff\u25a0-\u27bf\u2b00-\u2bff\u3030\u303d]"
    "[\ufe0e\ufe0f\u200d\u20e3\U000e0020-\U000e007f]*|[\ufe0e\ufe0f\u20e3\ufeff]"
)
_SILENT = [
    re.compile(pattern, re.MULTILINE)
    for pattern in (
        r"^\s*(?:```|~~~)[\w+-]*[ \t]*$",  # code fences
        r"`+|\*\*+|~~+",  # code, strong, struck out
        r"(?<![\w)\s])\*(?=\w)|(?<!\S)\*(?=\S)|(?<=\S)\*(?![\w(])",  # emphasis, not 3*4
        r"(?<!\w)_+(?=\S)|(?<=\S)_+(?!\w)",
        r"^\s{0,3}#{1,6}\s+|^\s*>+\s?|^\s*[-*+•]\s+(?:\[[ xX]\]\s+)?",  # heading, quote, bullet
        r"^\s*(?:[-*_]\s*){3,}$",  # rules
        r"!?\[(?=[^\]\n]*(?:\]\(|$))|\]\([^)\s]*\)?",  # links, also those cut in two
        r"</?[A-Za-z][^<>\n]*>",
        _EMOJI,
    )
]
_BLANK = re.compile(r"[\s|\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def speakable_text(text: str) -> SpeakableText:
    """`speakable`, with the way back to `text`."""
    silent = bytearray(len(text))
    for pattern in _SILENT:
        for match in pattern.finditer(text):
            silent[match.start() : match.end()] = b"\1" * (match.end() - match.start())
    chars: list[str] = []
    origins: list[int] = []
    gap: int | None = None
    for place, char in enumerate(text):
        if _BLANK.match(char):
            gap = place
        elif not silent[place]:
            if gap is not None and chars:
                chars.append(" ")
                origins.append(gap)
            gap = None
            chars.append(char)
            origins.append(place)
    return SpeakableText("".join(chars), tuple(origins))
