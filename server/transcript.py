"""Partial transcripts that only grow: a word goes out once two hypotheses in a row agree on it."""

from __future__ import annotations


class StablePrefix:
    """Hypotheses in, deltas out. What was sent is never taken back."""

    __slots__ = ("_last", "_sent")

    def __init__(self) -> None:
        self._last: list[str] = []
        self._sent: list[str] = []

    def push(self, hypothesis: str) -> str:
        """The newest hypothesis for the whole utterance → text to append, often empty.

        Nothing more is sent while a hypothesis contradicts what was.
        """
        words = hypothesis.split()
        agreed = 0
        for old, new in zip(self._last, words, strict=False):
            if old != new:
                break
            agreed += 1
        self._last = words
        sent = len(self._sent)
        if agreed <= sent or words[:sent] != self._sent:
            return ""
        fresh = words[sent:agreed]
        self._sent += fresh
        return (" " if sent else "") + " ".join(fresh)
