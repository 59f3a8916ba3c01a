"""Sums as they are spoken: "twelve times twelve", "half of ten plus too", "add three to for"."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from math import isqrt, sqrt

from handlers.lm.numbers import in_digits, read_number, two_numbers

LARGEST = 10**15
MAX_WORDS = 40
_PHRASES = [
    (re.compile(pattern), word)
    for pattern, word in (
        (r"multiplied by|times by|\btime\b|\bx\b|\*|×", "times"),
        (r"divided? by|\bover\b|/|÷", "divided"),
        (r"added to|\+", "plus"),
        (r"take away|\bless\b|\bnegative\b|(?<![^\s\d])-(?=[\s\d])|−", "minus"),
        (r"(?:raised )?to the power of|\^", "power"),
        (r"(?:the )?square root of", "root"),
        (r"per ?cent of|% of", "percent"),
        (r"(?:a |one )?half of|\bhalf\b", "half"),
        (r"(?:a|one) third of", "third"),
        (r"(?:a|one) quarter of", "quarter"),
        (r"\btwice\b", "double"),
    )
]
_PREFIXED = {
    "add": (("and", "to", "too", "two"), "plus"),
    "sum of": (("and",), "plus"),
    "subtract": (("from",), "minus"),
    "difference between": (("and",), "minus"),
    "multiply": (("by", "and", "with"), "times"),
    "product of": (("and",), "times"),
    "divide": (("by",), "divided"),
}
_SHARES = {"half": (Fraction(1, 2), "half of"), "third": (Fraction(1, 3), "a third of")}
_SHARES |= {"quarter": (Fraction(1, 4), "a quarter of"), "double": (Fraction(2), "twice")}
_TAIL = frozenset("equal equals to make makes is please then now today what".split())


@dataclass(frozen=True, slots=True)
class Sum:
    text: str  # "12 times 12"
    value: Fraction


def solve(question: str) -> Sum | None:
    """The one sum that `question` is, normalised text without the words that ask; else None.

    Raises ZeroDivisionError, and OverflowError beyond LARGEST.
    """
    if len(question.split()) > MAX_WORDS:
        return None
    question = _unprefixed(question)
    for pattern, word in _PHRASES:
        question = pattern.sub(f" {word} ", question)
    reader = _Reader(question.split())
    try:
        found = reader.terms()
    except SyntaxError:
        return None
    if not reader.counted or not _TAIL.issuperset(reader.words[reader.at :]):
        return None
    return found


def _unprefixed(question: str) -> str:
    for prefix, (between, operator) in _PREFIXED.items():
        found = re.match(rf"(?:the )?{prefix} (.+)", question)
        pair = two_numbers(found[1].split(), between) if found else None
        if pair:
            left, right = pair[::-1] if prefix == "subtract" else pair
            return f"{in_digits(left)[0]} {operator} {in_digits(right)[0]}"
    return question


class _Reader:
    """Recursive descent: terms of factors of operands. Raises SyntaxError on anything else."""

    def __init__(self, words: list[str]) -> None:
        self.words = words
        self.at = 0
        self.counted = 0  # operators so far

    def terms(self) -> Sum:
        left = self._factors()
        while word := self._operator("plus", "minus"):
            right = self._factors()
            sign = 1 if word == "plus" else -1
            left = _limited(f"{left.text} {word} {right.text}", left.value + sign * right.value)
        return left

    def _factors(self) -> Sum:
        left = self._power()
        while word := self._operator("times", "divided"):
            right = self._power()
            if word == "times":
                left = _limited(f"{left.text} times {right.text}", left.value * right.value)
            else:
                left = _limited(f"{left.text} divided by {right.text}", left.value / right.value)
        return left

    def _power(self) -> Sum:
        base = self._operand()
        while word := self._operator("squared", "cubed", "power"):
            if word == "power":
                exponent = self._operand()
                base = _raised(f"{base.text} to the power of {exponent.text}", base, exponent)
            else:
                exponent = Sum("", Fraction(2 if word == "squared" else 3))
                base = _raised(f"{base.text} {word}", base, exponent)
        return base

    def _operand(self) -> Sum:
        if word := self._operator(*_SHARES):
            share, text = _SHARES[word]
            whole = self._operand()
            return Sum(f"{text} {whole.text}", share * whole.value)
        if self._operator("root"):
            return _root(self._operand())
        if self.words[self.at : self.at + 1] == ["minus"]:
            self.at += 1
            number = self._operand()
            return Sum(f"minus {number.text}", -number.value)
        found = read_number(self.words, self.at, homophones=True)
        if found is None:
            raise SyntaxError
        value, self.at = found
        number = _limited(in_digits(value)[0], value)
        if self._operator("percent"):
            whole = self._operand()
            return Sum(f"{number.text} percent of {whole.text}", number.value * whole.value / 100)
        return number

    def _operator(self, *wanted: str) -> str | None:
        if self.at < len(self.words) and self.words[self.at] in wanted:
            self.at += 1
            self.counted += 1
            return self.words[self.at - 1]
        return None


def _limited(text: str, value: Fraction) -> Sum:
    if abs(value) > LARGEST:
        raise OverflowError
    return Sum(text, value)


def _raised(text: str, base: Sum, exponent: Sum) -> Sum:
    if exponent.value.denominator != 1:
        raise SyntaxError
    if abs(exponent.value) > 64 or base.value.denominator > LARGEST:
        raise OverflowError
    return _limited(text, base.value ** int(exponent.value))


def _root(of: Sum) -> Sum:
    if of.value < 0:
        raise SyntaxError
    whole = isqrt(int(of.value))
    value = Fraction(whole) if whole * whole == of.value else Fraction(sqrt(of.value))
    return Sum(f"the square root of {of.text}", value)
