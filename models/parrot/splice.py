"""New phrases from words that were said, as codes: dialogues that nobody has to make.

A small model hears single words well long before it learns to repeat them in their order, and knows
the orders of its recordings by heart instead. So in part of the recordings every phrase that is
repeated is made a new one: its words, and the reply's, are exchanged for others from anywhere in
the shards that stand alike (at the beginning, before a pause, at the end). Phrases that are held
out stay so.

T frames, C = 2 channels, D codebooks.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from models.parrot import domain
from models.parrot.labels import FIRST_WORD, NOT_SPEAKING, PAUSING
from models.parrot.shards import Shards

PHRASE_LABELS = range(FIRST_WORD, FIRST_WORD + len(domain.WORDS))
"""Of the words that are repeated: `domain.SAYABLE` begins with them."""


class Run(NamedTuple):
    """Frames of one label, from `start` to before `end`."""

    label: int
    start: int
    end: int


class Place(NamedTuple):
    """A word and what stands around it."""

    channel: int
    label: int
    before: int
    """The label before it; of the person, no matter which word."""
    behind: int
    """`NOT_SPEAKING`, `PAUSING`, or `FIRST_WORD` for any word."""


class Echo(NamedTuple):
    """A phrase and the reply that repeats it, both whole; nobody else speaks in them."""

    phrase: list[Run]
    reply: list[Run]


class Splicer:
    """Of shards that have labels."""

    def __init__(self, shards: Shards, user_channel: int) -> None:
        self._shards, self._user = shards, user_channel
        self._words: dict[Place, list[tuple[int, int, int]]] = defaultdict(list)
        self._read = 0
        self.refresh()

    def refresh(self) -> None:
        """Takes in the words of the recordings that have come."""
        for index in range(self._read, len(self._shards)):
            labels = self._shards.labels(index)
            assert labels is not None
            whole = {run for echo in echoes(labels, self._user) for run in echo.reply}
            for channel in range(labels.shape[1]):
                for before, run, behind in _with_neighbours(runs(labels[:, channel])):
                    broken_off = channel != self._user and run not in whole
                    if run.label in PHRASE_LABELS and not broken_off:
                        place = self._place(channel, before, run.label, behind)
                        self._words[place].append((index, run.start, run.end))
        self._read = len(self._shards)

    def __call__(self, index: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A recording's codes [T', C, D] and labels [T', C], with new phrases where it has
        some that are repeated."""
        codes, labels = self._shards[index], self._shards.labels(index)
        assert labels is not None
        exchanged: list[tuple[Run, int, tuple[int, int, int]]] = []
        for echo in echoes(labels, self._user):
            exchanged += self._exchange(labels, echo, generator)
        parts, at = [], 0
        for run, channel, (source, start, end) in sorted(exchanged, key=_start):
            parts.append((codes[at : run.start], labels[at : run.start]))
            kept = run.start + torch.arange(end - start) * (run.end - run.start) // (end - start)
            new_codes, new_labels = codes[kept].clone(), labels[kept].clone()
            new_codes[:, channel] = self._shards[source][start:end, channel]
            theirs = self._shards.labels(source)
            assert theirs is not None
            new_labels[:, channel] = theirs[start:end, channel]
            parts.append((new_codes, new_labels))
            at = run.end
        parts.append((codes[at:], labels[at:]))
        return torch.cat([c for c, _ in parts]), torch.cat([each for _, each in parts])

    def _exchange(
        self, labels: Tensor, echo: Echo, generator: torch.Generator
    ) -> list[tuple[Run, int, tuple[int, int, int]]]:
        """Each run with its channel and what comes instead: recording, start, end."""
        count = len(echo.phrase)
        while True:
            drawn = torch.randint(len(PHRASE_LABELS), (count,), generator=generator).tolist()
            if not domain.held_out(" ".join(domain.WORDS[n] for n in drawn)):
                break
        chosen = []
        for channel, old in ((self._user, echo.phrase), (1 - self._user, echo.reply)):
            around = {run: (b, a) for b, run, a in _with_neighbours(runs(labels[:, channel]))}
            last = NOT_SPEAKING
            for run, word in zip(old, drawn, strict=True):
                before, behind = around[run]
                before, last = last if before >= FIRST_WORD else before, PHRASE_LABELS[word]
                words = self._words.get(self._place(channel, before, last, behind))
                if not words:
                    return []
                pick = int(torch.randint(len(words), (1,), generator=generator))
                chosen.append((run, channel, words[pick]))
        return chosen

    def _place(self, channel: int, before: int, label: int, behind: int) -> Place:
        """Our own voice runs words into each other always in the same way, which is to be kept;
        there are too many other voices to look for the same two words of one."""
        if channel == self._user:
            before = min(before, FIRST_WORD)
        return Place(channel, label, before, min(behind, FIRST_WORD))


def _start(exchange: tuple[Run, int, tuple[int, int, int]]) -> int:
    return exchange[0].start


def runs(labels: Tensor) -> list[Run]:
    """[T] -> its stretches of one label, in order."""
    changes = (labels[1:] != labels[:-1]).nonzero()[:, 0].add(1).tolist()
    edges = [0, *changes, len(labels)]
    values = labels[torch.tensor(edges[:-1])].tolist()
    return [Run(v, a, b) for v, (a, b) in zip(values, pairwise(edges), strict=True)]


def echoes(labels: Tensor, user: int) -> list[Echo]:
    """The phrases [T, C] that are repeated whole and undisturbed."""
    phrases, replies = (_turns(runs(labels[:, c])) for c in (user, 1 - user))
    found = []
    for reply in replies:
        earlier = [phrase for phrase in phrases if phrase[-1].end <= reply[0].start]
        if not earlier:
            continue
        phrase = earlier[-1]
        same = [run.label for run in phrase] == [run.label for run in reply]
        begin, middle, end = phrase[0].start, phrase[-1].end, reply[-1].end
        alone = bool((labels[begin:middle, 1 - user] == NOT_SPEAKING).all())
        alone &= bool((labels[middle:end, user] == NOT_SPEAKING).all())
        ours = all(run.label in PHRASE_LABELS for run in phrase)
        if same and alone and ours and end < len(labels):
            found.append(Echo(phrase, reply))
    return found


def _turns(found: list[Run]) -> list[list[Run]]:
    """The words of each turn, without its pauses."""
    turns: list[list[Run]] = [[]]
    for run in found:
        if run.label == NOT_SPEAKING:
            turns.append([])
        elif run.label != PAUSING:
            turns[-1].append(run)
    return [turn for turn in turns if turn]


def _with_neighbours(found: list[Run]) -> list[tuple[int, Run, int]]:
    """Each run with the labels before and behind it."""
    labels = [NOT_SPEAKING, *(run.label for run in found), NOT_SPEAKING]
    return list(zip(labels, found, labels[2:], strict=False))
