"""What a model needs to yield when it is spoken over, made of codes, in training only.

New interruptions of replies that were not interrupted:

The person's next turn is moved forward into a reply, which breaks off. Where it does, the data's
agent is prompt; a model that missed its moment is then in a state that it has never seen, takes the
person's voice for one that isn't meant to interrupt, and talks on. So in part of the new ones the
agent talks on for a while, which does not count, and stops then: from these a model learns that it
is never too late to stop.

And replies without their echo: where the data's rooms return a third of all replies, a model takes
whoever speaks over it for its echo, and is sure of it.

T frames, C = 2 channels, D codebooks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from models.parrot.labels import NOT_SPEAKING, UNKNOWN
from models.parrot.splice import runs

SOONEST_FRAMES = (2, 3)
"""From the person's onset to the end of the agent's voice, ..."""
HESITATION = 0.3
"""... which comes another frame later with this probability, and so on."""
OVERRUN_SHARE = 0.5
OVERRUN_FRAMES = (1, 14)
HEARD_FRAMES = 4
"""Of a reply, before it is spoken over."""
ONSET_FRAMES = 3
"""Before a word is audible, its sound is in the codes already, with what is before it."""


ECHO_FRAMES = 8
"""So long after the agent's voice its echo may last."""
FEWEST_QUIET_FRAMES = 5


class Interrupted(NamedTuple):
    codes: Tensor
    """[T', C, D]"""
    labels: Tensor
    """[T', C]"""
    counts: Tensor
    """Whether what the agent says counts. [T'] bool"""


def without_echo(codes: Tensor, labels: Tensor, user: int, generator: torch.Generator) -> Tensor:
    """The person's silence while the agent speaks, as it is when nobody does. [T, C, D], [T, C] ->
    [T, C, D]"""
    person, agent = labels[:, user] != NOT_SPEAKING, labels[:, 1 - user] != NOT_SPEAKING
    silent = ~_spread(person, ONSET_FRAMES, ONSET_FRAMES)
    returned = _spread(agent, 0, ECHO_FRAMES)
    quiet = (silent & ~returned).nonzero()[:, 0]
    if len(quiet) < FEWEST_QUIET_FRAMES:
        return codes
    places = (silent & returned).nonzero()[:, 0]
    first = _draw(0, len(quiet) - 1, generator)
    changed = codes.clone()
    changed[places, user] = codes[quiet[(first + torch.arange(len(places))) % len(quiet)], user]
    return changed


def broken_off(codes: Tensor, labels: Tensor, user: int) -> Tensor:
    """Where the agent stops because the person speaks, its codes are those of silence at once.
    [T, C, D], [T, C] -> [T, C, D]

    A word that is cut off ends in codes of a kind that is never the same. All of them together may
    be likelier than the word's next code and each of them is not, so that who takes the likeliest
    talks on.
    """
    agent = 1 - user
    silent = labels[:, agent] == NOT_SPEAKING
    if not silent.any():
        return codes
    rest = codes[silent, agent].mode(0).values  # [D]
    changed = codes.clone()
    for run in runs(silent.long()):
        over = run.start > 0 and bool(labels[run.start - 1, user] != NOT_SPEAKING)
        if run.label and over:
            changed[run.start : run.end, agent] = rest
    return changed


def _spread(mask: Tensor, before: int, after: int) -> Tensor:
    """True so many frames before and after, too. [T]"""
    padded = torch.nn.functional.pad(mask.float(), (after, before))
    return torch.nn.functional.max_pool1d(padded[None], 1 + before + after, 1)[0] > 0


class Passed(NamedTuple):
    """A stretch in which the agent speaks and the person doesn't."""

    start: int
    end: int
    onset: int
    """When the person speaks next; the agent is silent by then ..."""
    answer: int
    """... and until here."""


def interrupt(
    codes: Tensor, labels: Tensor, user: int, generator: torch.Generator
) -> Interrupted | None:
    """Of a recording's replies that the person lets pass, one is spoken over by what they say
    next. None where there is no such reply. [T, C, D], [T, C]"""
    places = passed(labels, user)
    if not places:
        return None
    start, end, old, answer = places[_draw(0, len(places) - 1, generator)]
    soonest = _draw(*SOONEST_FRAMES, generator)
    onset = _draw(start + HEARD_FRAMES, end - soonest - 1, generator)
    latest = min(end, onset + answer - old) - 1
    overrun = 0
    if torch.rand((), generator=generator) < OVERRUN_SHARE:
        overrun = max(0, min(_draw(*OVERRUN_FRAMES, generator), latest - soonest - onset))
    stop = onset + soonest + overrun
    while stop < latest and torch.rand((), generator=generator) < HESITATION:
        stop += 1
    moved = old - onset
    person = torch.cat(
        (torch.arange(onset - ONSET_FRAMES), torch.arange(old - ONSET_FRAMES, len(codes)))
    )
    agent = torch.cat((torch.arange(stop), torch.arange(stop + moved, len(codes))))
    sources = torch.empty(len(person), codes.shape[1], dtype=torch.long)
    sources[:, user], sources[:, 1 - user] = person, agent
    new_labels = labels.gather(0, sources)
    counts = torch.ones(len(person), dtype=torch.bool)
    counts[onset + soonest : onset + soonest + overrun] = False
    new_labels[~counts, 1 - user] = UNKNOWN
    new_codes = codes.gather(0, sources[..., None].expand(-1, -1, codes.shape[2]))
    return Interrupted(new_codes, new_labels, counts)


def passed(labels: Tensor, user: int) -> list[Passed]:
    """Where a reply could have been spoken over: it is long enough, and the person speaks again.
    [T, C]"""
    theirs = [run for run in runs(labels[:, user]) if run.label != NOT_SPEAKING]
    ours = _stretches(labels[:, 1 - user] != NOT_SPEAKING)
    found = []
    for number, (start, end) in enumerate(ours):
        before = max((run.end for run in theirs if run.start < end), default=0)
        onset = min((run.start for run in theirs if run.start >= end), default=len(labels))
        answer = ours[number + 1][0] if number + 1 < len(ours) else len(labels)
        long = end - start > HEARD_FRAMES + SOONEST_FRAMES[1] + 1
        clear = before < start and onset - ONSET_FRAMES >= end
        if long and clear and onset + SOONEST_FRAMES[1] + 2 < answer:
            found.append(Passed(start, end, onset, answer))
    return found


def _stretches(mask: Tensor) -> list[tuple[int, int]]:
    """Where [T] is true."""
    return [(run.start, run.end) for run in runs(mask.long()) if run.label]


def _draw(low: int, high: int, generator: torch.Generator) -> int:
    """Both ends included."""
    return int(torch.randint(low, high + 1, (), generator=generator))
