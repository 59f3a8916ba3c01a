"""Numbers as speech recognisers write them: words or digits, sometimes homophones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
_VALUES = (
    {word: value for value, word in enumerate(_UNITS)}
    | {word: 10 * value for value, word in enumerate(_TENS, 2)}
    | {"oh": 0, "nought": 0}
)
_HOMOPHONES = {"to": 2, "too": 2, "for": 4, "fore": 4, "won": 1, "ate": 8}
_DIGITS = re.compile(r"\d{1,15}(\.\d{1,15})?")

Found = tuple[Fraction, int]
"""A number and the place behind it."""


def read_number(words: Sequence[str], at: int = 0, homophones: bool = False) -> Found | None:
    """The number that starts at `words[at]`; `homophones` takes "to" for two and the like."""
    group = _below_thousand(words, at, homophones)
    if group is None:
        return None
    value, at = group
    total = Fraction(0)
    while scale := _SCALES.get(_word(words, at)):
        total += value * scale
        value, at = _below_thousand(words, _behind_and(words, at + 1), False) or (
            Fraction(0),
            at + 1,
        )
    total += value
    if _word(words, at) == "point":
        digits = [str(_VALUES.get(word, word)) for word in words[at + 1 :]]
        count = next((i for i, d in enumerate(digits) if len(d) > 1 or d not in "0123456789"), 99)
        decimals = "".join(digits[:count])
        if decimals:
            return total + Fraction(int(decimals), 10 ** len(decimals)), at + 1 + len(
                digits[:count]
            )
    return total, at


def whole_number(words: Sequence[str], homophones: bool = False) -> Fraction | None:
    """The number that `words` are, all of them."""
    found = read_number(words, 0, homophones)
    return found[0] if found and found[1] == len(words) else None


def two_numbers(words: Sequence[str], between: Sequence[str]) -> tuple[Fraction, Fraction] | None:
    """The numbers left and right of one of the words `between`: "one two ten" is 1 (to) 10."""
    for at, word in enumerate(words):
        if word in between:
            left, right = whole_number(words[:at]), whole_number(words[at + 1 :], homophones=True)
            if left is not None and right is not None:
                return left, right
    return None


def in_words(number: int) -> str:
    """0 to 999 in English words."""
    if number >= 100:
        rest = f" {in_words(number % 100)}" if number % 100 else ""
        return f"{_UNITS[number // 100]} hundred{rest}"
    if number < 20:
        return _UNITS[number]
    unit = f"-{_UNITS[number % 10]}" if number % 10 else ""
    return _TENS[number // 10 - 2] + unit


def in_digits(number: Fraction) -> tuple[str, bool]:
    """`number` for the ear, with at most four decimals, and whether that is exact."""
    rounded = round(number, 4)
    text = f"{int(abs(rounded)):,}"
    decimals = f"{int(abs(rounded) % 1 * 10_000):04d}".rstrip("0")
    text += f".{decimals}" if decimals else ""
    return ("minus " if rounded < 0 else "") + text, rounded == number


def _word(words: Sequence[str], at: int) -> str:
    return words[at] if at < len(words) else ""


def _behind_and(words: Sequence[str], at: int) -> int:
    return at + 1 if _word(words, at) == "and" else at


def _below_thousand(words: Sequence[str], at: int, homophones: bool) -> Found | None:
    if _word(words, at) in ("a", "an") and _word(words, at + 1) in ("hundred", *_SCALES):
        found: Found | None = (Fraction(1), at + 1)
    else:
        found = _below_hundred(words, at, homophones)
    if found is None or _word(words, found[1]) != "hundred":
        return found
    hundreds, at = found[0] * 100, found[1] + 1
    rest = _below_hundred(words, _behind_and(words, at), False)
    return (hundreds + rest[0], rest[1]) if rest and rest[0] < 100 else (hundreds, at)


def _below_hundred(words: Sequence[str], at: int, homophones: bool) -> Found | None:
    word = _word(words, at).replace(",", "")
    if _DIGITS.fullmatch(word):
        return Fraction(word), at + 1
    if homophones and word in _HOMOPHONES:
        return Fraction(_HOMOPHONES[word]), at + 1
    if word not in _VALUES:
        return None
    value = _VALUES[word]
    unit = _VALUES.get(_word(words, at + 1), 0)
    if value >= 20 and 0 < unit < 10:
        return Fraction(value + unit), at + 2
    return Fraction(value), at + 1
