"""Interleaving, delays and packed ids."""

import pytest

pytest.importorskip("torch", reason="models need torch")
pytest.importorskip("transformers", reason="models need transformers")

import torch
from hypothesis import given
from hypothesis import strategies as st

from models.common.errors import (
    ConfigError,
    FrameLengthError,
    PackedIdOverflowError,
    VocabularyError,
)
from models.parrot.config import DualChannelConfig
from models.parrot.frames import delay, interleave, pack, to_frames, undelay, unpack


def test_interleaving_is_the_published_order() -> None:
    config = DualChannelConfig(codebook_size=100, num_codebooks=2)
    a, b = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[51, 52], [53, 54]])
    tokens = interleave(a, b, config)
    assert tokens.tolist() == [1, 2, 51, 52, 3, 4, 53, 54]
    frames = to_frames(tokens, 2)
    assert torch.equal(frames[:, 0], a)
    assert torch.equal(frames[:, 1], b)


def test_interleaving_refuses_what_does_not_fit() -> None:
    config = DualChannelConfig(codebook_size=10)
    good = torch.zeros(5, 1, dtype=torch.long)
    with pytest.raises(FrameLengthError, match="unequal lengths"):
        interleave(good, good[:4], config)
    with pytest.raises(VocabularyError, match="second channel has 2 codebooks, the model 1"):
        interleave(good, good.expand(5, 2), config)
    with pytest.raises(VocabularyError, match="second channel has ids from 12 to 12"):
        interleave(good, good + 12, config)  # 10 codes and 2 specials: 0 to 11
    with pytest.raises(VocabularyError, match="first channel"):
        interleave(good - 1, good, config)
    assert interleave(good, good + config.end_id, config).max() == 11


def test_a_broken_frame_is_refused() -> None:
    with pytest.raises(FrameLengthError, match="7 tokens"):
        to_frames(torch.zeros(1, 7, dtype=torch.long), 1)
    with pytest.raises(FrameLengthError, match="6 tokens"):
        to_frames(torch.zeros(1, 6, dtype=torch.long), 2)


@given(st.integers(0, 5), st.lists(st.integers(0, 4), min_size=1, max_size=4))
def test_delay_and_back(length: int, delays: list[int]) -> None:
    frames = torch.arange(length * 2 * len(delays)).view(length, 2, len(delays))
    delayed = delay(frames, delays, fill=-1)
    assert delayed.shape[0] == length + max(delays)
    assert (delayed == -1).sum() == max(delays) * 2 * len(delays)
    for d, shift in enumerate(delays):
        for t in range(length):
            assert torch.equal(delayed[t + shift, :, d], frames[t, :, d])
    assert torch.equal(undelay(delayed, delays), frames)


def test_too_few_frames_to_undo_a_delay() -> None:
    with pytest.raises(FrameLengthError, match="too few"):
        undelay(torch.zeros(2, 2, 2), [0, 3])


@pytest.mark.parametrize(("codebook_size", "depth"), [(1000, 1), (46338, 1), (200, 2)])
def test_packed_ids_number_every_frame(codebook_size: int, depth: int) -> None:
    config = DualChannelConfig(codebook_size=codebook_size, num_codebooks=depth)
    frames = torch.randint(0, config.slot_size, (50, 2, depth))
    frames[0], frames[1] = 0, config.slot_size - 1
    ids = pack(frames, config)
    assert ids[0] == 0
    assert ids[1] == config.packed_ids - 1
    assert torch.equal(unpack(ids, config), frames)
    if depth == 1:
        assert torch.equal(ids, frames[:, 0, 0] * config.slot_size + frames[:, 1, 0])


@pytest.mark.parametrize(("codebook_size", "depth"), [(46339, 1), (2048, 2)])
def test_ids_that_overflow_are_refused(codebook_size: int, depth: int) -> None:
    config = DualChannelConfig(codebook_size=codebook_size, num_codebooks=depth)
    with pytest.raises(PackedIdOverflowError, match="packed ids"):
        pack(torch.zeros(2, depth), config)


@pytest.mark.parametrize(
    "wrong",
    [
        {"join": "interleave"},
        {"join": "sum", "share_tokens": True},
        {"codebook_size": 0},
        {"num_codebooks": 0},
        {"user_channel": 2},
        {"user_loss_weight": -0.5},
        {"delays": [1, 2]},
        {"delays": []},
        {"num_codebooks": 2, "delays": [0, -1]},
    ],
)
def test_a_configuration_that_contradicts_itself(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong)).split("_")[0]):
        DualChannelConfig(**wrong)
