"""Partial transcripts that only grow: a word goes out once two hypotheses in a row agree on it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
"""Scripts that put no spaces between words: each character stands alone."""
_UNIT = re.compile(rf"\s*(?:[{_UNSPACED}]|[^\s{_UNSPACED}]+)")
_ENDING = ".,;:!?…。、，！？"


class StablePrefix:
    """Hypotheses in, deltas out. What was sent is never taken back.

    Case and punctuation decide nothing. A hypothesis that words differently what was sent goes on
    behind it all the same.
    """

    __slots__ = ("_last", "_sent")

    def __init__(self) -> None:
        self._last: list[str] = []
        self._sent: list[str] = []

    def push(self, hypothesis: str) -> str:
        """The newest hypothesis for the whole utterance → text to append, often empty."""
        units = _UNIT.findall(hypothesis)
        keys = [_key(unit) for unit in units]
        at, before = _behind(self._sent, keys), _behind(self._sent, self._last)
        end = at
        for old, new in zip(self._last[before:], keys[at:], strict=False):
            if old != new:
                break
            end += 1
        fresh = "".join(units[at:end])
        if end == len(units):  # of what comes next, nothing is known
            fresh = fresh.rstrip(_ENDING)
        self._last = keys
        first = not self._sent
        self._sent += keys[at:end]
        return fresh.lstrip() if first else fresh


def _key(unit: str) -> str:
    word = unit.strip().casefold()
    return re.sub(r"^\W+|\W+$", "", word) or word


def _behind(sent: Sequence[str], keys: Sequence[str]) -> int:
    """Where in `keys` that ends which `sent` stands for."""
    if list(keys[: len(sent)]) == list(sent):
        return len(sent)
    seen = at = 0
    for block in SequenceMatcher(None, sent, keys, autojunk=False).get_matching_blocks()[:-1]:
        seen, at = block.a + block.size, block.b + block.size
    letters = sum(map(len, sent[seen:]))  # "ice cream" may have become "icecream"
    while at < len(keys) and letters > len(keys[at]) / 2:
        letters -= len(keys[at])
        at += 1
    return at
