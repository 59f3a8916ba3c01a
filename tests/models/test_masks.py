"""Frame masks and positions against loops over their definition."""

import pytest

pytest.importorskip("torch", reason="models need torch")
pytest.importorskip("transformers", reason="models need transformers")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.common.masks import frame_mask, positions_in_segments
from tests.models import tiny


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_mask_is_its_definition(data: st.DataObject) -> None:
    per_frame = data.draw(st.integers(1, 4))
    runs = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    row = [number for number, run in enumerate(runs) for _ in range(run)]
    frames = len(row)
    queries = data.draw(st.integers(1, frames))
    window = data.draw(st.none() | st.integers(1, frames))
    within = torch.randint(0, 2, (per_frame, per_frame)).bool() | torch.eye(per_frame).bool()
    segments = torch.tensor([row, [1] * frames])
    mask = frame_mask(queries, frames, within=within, segments=segments, window=window)
    assert mask.shape == (2, 1, queries * per_frame, frames * per_frame)
    for b in range(2):
        for q in range(queries * per_frame):
            for k in range(frames * per_frame):
                t, u = frames - queries + q // per_frame, k // per_frame
                may = segments[b, t] == segments[b, u] and (window is None or t - u < window)
                may = may and (u < t or (u == t and within[q % per_frame, k % per_frame]))
                assert mask[b, 0, q, k] == bool(may)


def test_without_segments_one_mask_serves_all_rows() -> None:
    within = torch.ones(1, 1, dtype=torch.bool)
    assert torch.equal(frame_mask(4, 4, within=within)[0, 0], torch.ones(4, 4).tril().bool())


def test_positions_start_again_with_each_recording() -> None:
    segments = torch.tensor([[0, 0, 1, 1, 1, 2], [3, 3, 3, 3, 3, 3]])
    expected = [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]
    assert positions_in_segments(segments).tolist() == expected


def test_the_published_pair_mask() -> None:
    """Causal, and an odd position doesn't see the even one before it."""
    model = tiny.model(join="pair")
    mask = frame_mask(3, 3, within=model.frame_block())[0, 0]
    expected = torch.ones(6, 6).tril().bool()
    for t in range(3):
        expected[2 * t + 1, 2 * t] = False
    assert torch.equal(mask, expected)


def test_the_block_of_several_codebooks() -> None:
    """2D x 2D: causal, with the bottom-left D x D masked."""
    expected = torch.ones(6, 6).tril().bool()
    expected[3:, :3] = False
    assert torch.equal(tiny.model(join="pair", num_codebooks=3).frame_block(), expected)
