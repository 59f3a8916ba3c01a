"""Replies that are newly spoken over."""

import pytest

pytest.importorskip("torch", reason="models need torch")
pytest.importorskip("espeakng_loader", reason="dialogues are spoken by eSpeak NG")

import torch
from torch import Tensor

from models.parrot.interrupt import (
    HEARD_FRAMES,
    ONSET_FRAMES,
    SOONEST_FRAMES,
    broken_off,
    interrupt,
    passed,
    without_echo,
)
from models.parrot.labels import FIRST_WORD, NOT_SPEAKING, UNKNOWN
from models.parrot.splice import runs

WORD, REPLY, LATER = FIRST_WORD + 1, FIRST_WORD + 2, FIRST_WORD + 3


def labels_of(person: list[tuple[int, int]], agent: list[tuple[int, int]]) -> Tensor:
    """Each channel as (label, frames). [T, 2]"""
    return torch.stack(
        [torch.tensor([v for v, n in each for _ in range(n)]) for each in (person, agent)], 1
    )


def dialogue() -> Tensor:
    return labels_of(
        [(0, 5), (WORD, 10), (0, 45), (LATER, 10), (0, 30)],
        [(0, 21), (REPLY, 25), (0, 30), (LATER, 10), (0, 14)],
    )


def codes_of(labels: Tensor) -> Tensor:
    """Every frame of a channel a code of its own. [T, 2] -> [T, 2, 1]"""
    return torch.arange(labels.numel()).view(-1, 2, 1)


def made(seed: int, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    found = interrupt(codes_of(labels), labels, 0, torch.Generator().manual_seed(seed))
    assert found is not None
    return found


def test_only_replies_that_the_person_lets_pass_count() -> None:
    assert passed(dialogue(), 0) == [(21, 46, 60, 76)]
    with_listener = dialogue()
    with_listener[30:34, 0] = WORD
    assert passed(with_listener, 0) == []
    last = dialogue()[:60]  # nobody speaks after it
    assert passed(last, 0) == []
    assert interrupt(codes_of(last), last, 0, torch.Generator()) is None


@pytest.mark.parametrize("seed", range(30))
def test_the_next_turn_comes_over_the_reply_and_ends_it(seed: int) -> None:
    old = dialogue()
    codes, labels, counts = made(seed, old)
    assert len(codes) == len(labels) == len(counts) < len(old)
    onset = next(run.start for run in runs(labels[:, 0]) if run.label == LATER)
    moved = 60 - onset
    assert len(codes) == len(old) - moved
    spoken = labels[:, 1] != NOT_SPEAKING
    stop = next(t for t in range(onset, len(labels)) if not spoken[t])
    assert 21 + HEARD_FRAMES <= onset < stop <= 46
    assert stop - onset >= SOONEST_FRAMES[0]
    # Each channel is what it was, but for frames that are left out; their later parts together.
    numbers = codes[..., 0] // 2
    assert numbers[: onset - ONSET_FRAMES, 0].tolist() == list(range(onset - ONSET_FRAMES))
    assert numbers[onset - ONSET_FRAMES :, 0].tolist() == list(range(60 - ONSET_FRAMES, len(old)))
    assert numbers[:stop, 1].tolist() == list(range(stop))
    assert numbers[stop:, 1].tolist() == list(range(stop + moved, len(old)))
    assert torch.equal(labels[stop:, 1], old[stop + moved :, 1])
    # What doesn't count is in the reply, behind the moment at which it might have stopped.
    skipped = (~counts).nonzero()[:, 0].tolist()
    if skipped:
        assert onset + SOONEST_FRAMES[0] <= skipped[0] <= onset + SOONEST_FRAMES[1]
        assert skipped == list(range(skipped[0], skipped[-1] + 1))
        assert skipped[-1] < stop
        assert (labels[skipped, 1] == UNKNOWN).all()


def test_half_of_them_are_late() -> None:
    late = [bool((~made(seed, dialogue())[2]).any()) for seed in range(200)]
    assert 70 < sum(late) < 130


def test_what_returns_of_a_reply_is_left_out() -> None:
    labels = dialogue()
    codes = codes_of(labels)
    noise, echo, speech = 7, 8, 9
    codes[:, 0] = noise
    codes[22:52, 0] = echo  # of the first reply, a little later
    codes[labels[:, 0] != NOT_SPEAKING, 0] = speech
    made = without_echo(codes, labels, 0, torch.Generator().manual_seed(0))
    assert torch.equal(made[:, 1], codes[:, 1])
    assert torch.equal(made[:, 0] == speech, codes[:, 0] == speech)
    assert (made[:, 0] == echo).sum() == 0
    loud = labels.clone()
    loud[:, 1] = REPLY  # nobody is ever silent
    assert torch.equal(without_echo(codes, loud, 0, torch.Generator()), codes)


def test_a_reply_that_is_broken_off_is_silent_at_once() -> None:
    labels = labels_of([(0, 10), (WORD, 30), (0, 30)], [(0, 5), (REPLY, 12), (0, 33), (LATER, 20)])
    codes = codes_of(labels)
    rest = 7
    codes[labels[:, 1] == NOT_SPEAKING, 1] = rest
    codes[17:20, 1] = 8  # the tail of a word that was cut
    codes[40:44, 1] = 9
    made = broken_off(codes, labels, 0)
    assert torch.equal(made[:, 0], codes[:, 0])
    assert (made[17:50, 1] == rest).all()
    assert torch.equal(made[:17, 1], codes[:17, 1])
    assert torch.equal(made[50:, 1], codes[50:, 1])
    alone = labels.clone()
    alone[:, 0] = NOT_SPEAKING  # it ended by itself
    assert torch.equal(broken_off(codes, alone, 0), codes)
