"""Frame by frame with a cache equals all at once."""

import pytest

pytest.importorskip("torch", reason="models need torch")
pytest.importorskip("transformers", reason="models need transformers")

from typing import Any

import torch

from models.parrot.attention import FrameCache
from models.parrot.backbones import DualMistral, DualQwen2
from models.parrot.modeling import DualChannelModel
from tests.models import tiny

EVERY = pytest.mark.parametrize(("backbone", "shape"), tiny.EVERY, ids=tiny.EVERY_ID)


@EVERY
@pytest.mark.parametrize("prefix", [0, 4])
def test_cached_is_uncached(
    backbone: type[DualChannelModel], shape: dict[str, Any], prefix: int
) -> None:
    model = tiny.model(backbone, **shape)
    frames = tiny.codes(model, frames=8)
    whole = tiny.logits(model, frames)
    cache = FrameCache()
    if prefix:
        last = tiny.logits(model, frames[:, :prefix], past_key_values=cache, logits_to_keep=1)
        torch.testing.assert_close(last, whole[:, prefix - 1 : prefix], **tiny.EXACT)
    for t in range(prefix, 8):
        step = model.step(frames[:, t], cache)
        torch.testing.assert_close(step, whole[:, t], **tiny.EXACT)
    assert cache.frames == 8


@EVERY
def test_a_prefix_may_come_in_pieces(
    backbone: type[DualChannelModel], shape: dict[str, Any]
) -> None:
    model = tiny.model(backbone, **shape)
    frames, cache = tiny.codes(model, frames=9), FrameCache()
    whole = tiny.logits(model, frames)
    for start, end in ((0, 2), (2, 5), (5, 9)):
        piece = tiny.logits(model, frames[:, start:end], past_key_values=cache)
        torch.testing.assert_close(piece, whole[:, start:end], **tiny.EXACT)


@EVERY
def test_batched_rows_equal_single_ones(
    backbone: type[DualChannelModel], shape: dict[str, Any]
) -> None:
    """Prefixes of unlike length, padded on the left, then steps together."""
    model = tiny.model(backbone, **shape)
    frames, prefix, lengths = tiny.codes(model, rows=3, frames=8), 5, (5, 2, 4)
    real = torch.arange(prefix)[None] >= prefix - torch.tensor(lengths)[:, None]  # [B, T]
    together = FrameCache()
    tiny.logits(model, frames[:, :prefix], segments=real.long(), past_key_values=together)
    batched = torch.stack([model.step(frames[:, t], together) for t in range(prefix, 8)], dim=1)
    for row, length in enumerate(lengths):
        alone = tiny.logits(model, frames[row : row + 1, prefix - length :])[:, -3:]
        torch.testing.assert_close(batched[row : row + 1], alone, **tiny.EXACT)


def test_a_new_recording_after_a_plain_past() -> None:
    model = tiny.model()
    frames, cache = tiny.codes(model, frames=6), FrameCache()
    tiny.logits(model, frames[:, :3], past_key_values=cache)
    second = tiny.logits(
        model, frames[:, 3:], segments=torch.full((2, 3), 2), past_key_values=cache
    )
    torch.testing.assert_close(second, tiny.logits(model, frames[:, 3:]), **tiny.EXACT)


@pytest.mark.parametrize(
    ("backbone", "windowed"),
    [
        (DualMistral, {"sliding_window": 3}),
        (DualQwen2, {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 1}),
    ],
)
@pytest.mark.parametrize("join", ["pair", "sum"])
def test_a_window_holds_with_a_cache(
    backbone: type[DualChannelModel], windowed: dict[str, Any], join: str
) -> None:
    model = tiny.model(backbone, join=join, **windowed)
    frames, cache = tiny.codes(model, frames=8), FrameCache()
    whole = tiny.logits(model, frames)
    for t in range(8):
        torch.testing.assert_close(model.step(frames[:, t], cache), whole[:, t], **tiny.EXACT)


def test_a_cached_key_stands_at_its_frames_position() -> None:
    """Both members of frame t are rotated by t, not by 2t or by 2t + 1: seen in the keys."""
    model = tiny.model(num_hidden_layers=1)
    with torch.no_grad():
        model.channel_embed.weight.zero_()
    frame, keys = tiny.codes(model, rows=1, frames=1)[:, 0], []
    cache = FrameCache()
    for _ in range(4):
        model.step(frame, cache)
    store = cache.update(*(torch.zeros(1, 2, 0, 8),) * 2, layer_idx=0)[0][0, 0]  # [L, E]
    for member in (0, 1):
        keys = store[member::2]  # [T, E], the same token in every frame
        half = keys.shape[-1] // 2
        fastest = torch.atan2(keys[:, half], keys[:, 0])  # angle of the pair that turns by 1 rad
        turned = torch.remainder(fastest - fastest[0], 2 * torch.pi)
        torch.testing.assert_close(turned, torch.tensor([0.0, 1.0, 2.0, 3.0]), rtol=0, atol=1e-4)
