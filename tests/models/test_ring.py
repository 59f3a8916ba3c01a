"""A ring of rows holds what a growing cache holds, and rows keep to themselves."""

import pytest

pytest.importorskip("torch", reason="models need torch")

import torch
from torch import Tensor

from models.common.ring import ALIGNMENT, RingCache

HEADS, WIDTH, LAYERS = 2, 4, 2
PLAIN = torch.ones(1, 1, dtype=torch.bool)


def ring(frames: int = 10, rows: int = 3, **changes: int) -> RingCache:
    return RingCache(rows, frames, layers=LAYERS, heads=HEADS, width=WIDTH, **changes)


def written(tokens: int, rows: int = 1) -> Tensor:
    return torch.randn(rows, HEADS, tokens, WIDTH)


def put(of: RingCache, row: int, position: int, value: Tensor, active: bool = True) -> Tensor:
    """One frame into a row; which slots it may see, [slots]."""
    view = of.at(slice(row, row + 1), torch.tensor([[position]]), of.slots, torch.tensor([active]))
    for layer in range(LAYERS):
        view.update(value, value + 1, layer)
    seen: Tensor = view.mask(PLAIN)[0, 0, 0]
    return seen


def visible(of: RingCache, row: int, position: int) -> Tensor:
    """The keys that a frame written as zeros sees beside its own, in no order. [*, WIDTH]"""
    seen = put(of, row, position, torch.zeros(1, HEADS, 1, WIDTH))
    keys: Tensor = of.keys[0, row, 0][seen]
    return keys[keys.abs().sum(-1) > 0]


def same_set(a: Tensor, b: Tensor) -> bool:
    return sorted(map(tuple, a.tolist())) == sorted(map(tuple, b.tolist()))


def test_all_frames_are_seen_while_they_fit() -> None:
    of, values = ring(), written(7)
    for t in range(7):
        put(of, 1, t, values[:, :, t : t + 1])
    assert same_set(visible(of, 1, 7), values[0, 0])
    assert torch.equal(of.keys[1, 1, :, 1:8], values[0]), "every layer, in the order of time"
    assert torch.equal(of.values[1, 1, :, 1:8], values[0] + 1)


@pytest.mark.parametrize("sinks", [0, 3])
def test_the_oldest_goes_and_the_sinks_stay(sinks: int) -> None:
    of, values = ring(sinks=sinks), written(40)
    for t in range(40):
        put(of, 0, t, values[:, :, t : t + 1])
    newest = values[0, 0, 40 - (10 - sinks) + 1 :]  # frame 40 itself takes one slot
    assert same_set(visible(of, 0, 40), torch.cat((values[0, 0, :sinks], newest)))


def test_an_idle_row_stays_as_it_was() -> None:
    of, values = ring(), written(3)
    for t in range(2):
        put(of, 0, t, values[:, :, t : t + 1])
    before = of.keys[:, 0, :, 1:].clone(), of.stamps[0].clone()
    seen = put(of, 0, 2, values[:, :, 2:], active=False)
    assert torch.equal(of.keys[:, 0, :, 1:], before[0])
    assert torch.equal(of.stamps[0], before[1])
    assert seen.any(), "an empty row of a mask would make NaN"


def test_a_row_is_reset_alone() -> None:
    of, values = ring(), written(2)
    for row in (0, 1):
        for t in range(2):
            put(of, row, t, values[:, :, t : t + 1])
    of.reset(0)
    assert visible(of, 0, 0).shape[0] == 0
    assert same_set(visible(of, 1, 2), values[0, 0])


@pytest.mark.parametrize("frames", [4, 40])
def test_a_row_moves_whole(frames: int) -> None:
    of, values = ring(sinks=2), written(frames)
    for t in range(frames):
        put(of, 2, t, values[:, :, t : t + 1])
    of.move(2, 0, frames)
    assert same_set(visible(of, 0, frames), visible(of, 2, frames))


def test_slots_hold_all_that_was_seen_and_come_in_steps() -> None:
    of = ring(frames=30)
    for frames in range(1, 100):
        slots = of.slots_for(frames)
        assert min(1 + min(frames, 30), of.slots) <= slots <= of.slots
        assert slots % ALIGNMENT == 0


def test_the_tokens_of_a_frame_see_each_other_as_told() -> None:
    of = ring(tokens_per_frame=2)
    within = torch.tensor([[True, False], [False, True]])
    view = of.at(slice(0, 1), torch.tensor([[0, 1]]), 8)
    view.update(written(4), written(4), 0)
    mask = view.mask(within)[0, 0].unflatten(-1, (-1, 2))  # [4, slots, 2]
    assert mask[0, 1].tolist() == [True, False], "own frame: the own channel"
    assert mask[1, 1].tolist() == [False, True]
    assert not mask[:2, 2].any(), "the next frame is not seen"
    assert mask[2:, 1].all(), "the frame before is seen whole"
    assert not mask[:, [0, *range(3, 8)]].any(), "slots without frames"


def test_a_window_limits_the_view() -> None:
    of, values = ring(), written(6)
    for t in range(6):
        put(of, 0, t, values[:, :, t : t + 1])
    view = of.at(slice(0, 1), torch.tensor([[6]]), of.slots)
    assert view.mask(PLAIN, window=3).sum() == 3, "two earlier ones and its own"
