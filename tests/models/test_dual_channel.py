"""What the model may see, and that its fast paths compute what the plain one does."""

import pytest

pytest.importorskip("torch", reason="models need torch")
pytest.importorskip("transformers", reason="models need transformers")

from typing import Any

import torch
from torch import Tensor

from models.common.errors import ConfigError, FrameLengthError
from models.parrot.backbones import DualMistral, DualQwen2
from models.parrot.modeling import DualChannelModel
from tests.models import tiny

EVERY = pytest.mark.parametrize(("backbone", "shape"), tiny.EVERY, ids=tiny.EVERY_ID)
A, B = 0, 1


@EVERY
def test_no_frame_sees_a_later_one(backbone: type[DualChannelModel], shape: dict[str, Any]) -> None:
    model = tiny.model(backbone, **shape)
    frames = tiny.codes(model)
    plain = tiny.logits(model, frames)
    for t in range(1, 6):
        changed = tiny.logits(model, tiny.other(frames, (slice(None), slice(t, None)), model))
        torch.testing.assert_close(changed[:, :t], plain[:, :t], **tiny.EXACT)
        assert (changed[:, t] - plain[:, t]).abs().max() > 0.01


@EVERY
def test_channels_see_each_others_past_only(
    backbone: type[DualChannelModel], shape: dict[str, Any]
) -> None:
    """What predicts b_t doesn't know a_t, nor the other way round; what comes later does.

    Predictions for frame t are those at t - 1, which `sum` takes from both channels at t - 1. In
    `pair`, the two tokens of a frame don't see each other either.
    """
    model = tiny.model(backbone, **shape)
    frames, t = tiny.codes(model), 3
    plain = tiny.logits(model, frames)
    for heard, spoken in ((A, B), (B, A)):
        changed = tiny.logits(model, tiny.other(frames, (slice(None), t, heard), model))
        blind = t + 1 if shape["join"] == "pair" else t
        torch.testing.assert_close(
            changed[:, :blind, spoken], plain[:, :blind, spoken], **tiny.EXACT
        )
        assert (changed[:, blind, spoken] - plain[:, blind, spoken]).abs().max() > 0.01


@pytest.mark.parametrize("backbone", [b for b, _ in tiny.EVERY[::4]])
def test_codebooks_of_a_frame_see_the_earlier_ones(backbone: type[DualChannelModel]) -> None:
    model = tiny.model(backbone, join="pair", num_codebooks=3)
    frames, t = tiny.codes(model), 2
    plain = tiny.logits(model, frames)
    changed = tiny.logits(model, tiny.other(frames, (slice(None), t, A, 1), model))
    difference = (changed - plain).abs().amax((0, 4))  # [T, C, D]
    assert difference[t, A, 0] < 2e-5
    assert difference[t, A, 1:].min() > 0.01
    assert difference[t, B].max() < 2e-5


def swap_weights(model: DualChannelModel) -> None:
    """Makes the first channel of the model its second."""
    base, config = model.config.base_vocab_size, model.config
    with torch.no_grad():
        model.channel_embed.weight.copy_(model.channel_embed.weight.flip(0))
        if not config.share_tokens:
            for name, weight in model.named_parameters():
                if "embed_tokens" in name or "lm_head" in name:
                    half = (weight.shape[0] - base) // 2
                    weight[base:] = weight[base:].roll(half, 0)


@EVERY
def test_swapped_channels_swap_the_outputs(
    backbone: type[DualChannelModel], shape: dict[str, Any]
) -> None:
    """All that distinguishes the channels are their embeddings and, if not shared, their rows."""
    for share in (False, True):
        if share and shape["join"] == "sum":
            continue
        model = tiny.model(backbone, share_tokens=share, **shape)
        frames = tiny.codes(model)
        plain = tiny.logits(model, frames)
        assert (tiny.logits(model, frames.flip(2)).flip(2) - plain).abs().max() > 0.01
        swap_weights(model)
        swapped = tiny.logits(model, frames.flip(2)).flip(2)
        torch.testing.assert_close(swapped, plain, **tiny.EXACT)


@EVERY
@pytest.mark.parametrize("channel", [A, B])
def test_one_channel_is_predicted_as_both_are(
    backbone: type[DualChannelModel], shape: dict[str, Any], channel: int
) -> None:
    for shared in {False, shape["join"] == "pair"}:
        model = tiny.model(backbone, **shape, share_tokens=shared)
        hidden = torch.randn(2, 3 * model.config.tokens_per_frame, model.config.hidden_size)
        with torch.no_grad():
            both, one = model.predict(hidden), model.predict(hidden, channel)
        torch.testing.assert_close(one, both[:, :, channel], **tiny.EXACT)


@EVERY
def test_sdpa_is_eager(backbone: type[DualChannelModel], shape: dict[str, Any]) -> None:
    fast, plain = tiny.model(backbone, **shape), tiny.model(backbone, "eager", **shape)
    frames = tiny.codes(fast)
    segments = torch.tensor([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
    for inputs in ({}, {"segments": segments}):
        torch.testing.assert_close(
            tiny.logits(fast, frames, **inputs), tiny.logits(plain, frames, **inputs), **tiny.EXACT
        )
    plain.set_attn_implementation("sdpa")
    assert torch.equal(tiny.logits(plain, frames), tiny.logits(fast, frames))


@EVERY
def test_gradient_checkpointing_changes_nothing(
    backbone: type[DualChannelModel], shape: dict[str, Any]
) -> None:
    results = []
    for checkpointing in (False, True):
        model = tiny.model(backbone, **shape).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        frames = tiny.codes(model).flatten(1)
        loss = model(frames, labels=frames).loss
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert model.is_gradient_checkpointing == checkpointing
        results.append((loss.detach(), grads))
    (loss, grads), (loss_again, grads_again) = results
    torch.testing.assert_close(loss_again, loss)
    for name, grad in grads.items():
        assert grad.abs().sum() > 0, name
        torch.testing.assert_close(grads_again[name], grad, rtol=1e-4, atol=1e-5, msg=name)
    assert ("channel_embed.weight" in grads) == (shape["join"] == "pair")


@EVERY
def test_packed_and_padded_rows_equal_single_ones(
    backbone: type[DualChannelModel], shape: dict[str, Any]
) -> None:
    model = tiny.model(backbone, **shape)
    frames = tiny.codes(model, rows=2, frames=8)
    segments = torch.tensor([[0, 1, 1, 1, 2, 2, 2, 2], [7, 7, 7, 7, 7, 0, 0, 0]])
    packed = tiny.logits(model, frames, segments=segments)
    for row, part in ((0, slice(1, 4)), (0, slice(4, 8)), (1, slice(0, 5))):
        alone = tiny.logits(model, frames[row : row + 1, part])
        torch.testing.assert_close(packed[row : row + 1, part], alone, **tiny.EXACT)
    assert torch.isfinite(packed).all()


@pytest.mark.parametrize(
    ("backbone", "windowed"),
    [
        (DualMistral, {"sliding_window": 3}),
        (DualQwen2, {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 0}),
    ],
)
@pytest.mark.parametrize("join", ["pair", "sum"])
def test_the_backbones_window_counts_frames(
    backbone: type[DualChannelModel], windowed: dict[str, Any], join: str
) -> None:
    """One layer that sees 3 frames; the full-attention one as the control."""
    for kind, sees in ((windowed, False), ({"sliding_window": None}, True)):
        model = tiny.model(backbone, join=join, num_hidden_layers=1, **kind)
        frames = tiny.codes(model, frames=8)
        plain = tiny.logits(model, frames)
        changed = tiny.logits(model, tiny.other(frames, (slice(None), 2), model))
        difference = (changed - plain).abs().amax((0, 2, 3, 4))  # [T]
        assert difference[2:5].min() > 0.001
        assert (difference[5:].max() > 0.001) == sees


def rotate(x: Tensor, position: int) -> Tensor:
    """Rotary embedding of one vector, by pairs (i, i + E/2), as complex numbers."""
    half = x.shape[-1] // 2
    angles = position / 10000.0 ** (torch.arange(half) / half)
    turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones(half), angles)
    return torch.cat((turned.real, turned.imag))


def test_one_layer_against_a_loop_over_the_published_rules() -> None:
    """Llama with grouped heads and D = 2: rotation by frame, then the slot's embedding."""
    model = tiny.model(num_codebooks=2, num_hidden_layers=1, share_tokens=True)
    frames, depth, width, groups = tiny.codes(model, rows=1, frames=3), 2, 8, 2
    layer, weights = model.model.layers[0], dict(model.named_parameters())
    with torch.no_grad():
        order = [(t, c, d) for t in range(3) for c in range(2) for d in range(depth)]
        embedded = [
            weights["model.embed_tokens.weight"][d * 13 + int(frames[0, t, c, d])]
            for t, c, d in order
        ]
        normed = [layer.input_layernorm(x) for x in embedded]
        queries, keys, values = [], [], []
        for x, (t, c, d) in zip(normed, order, strict=True):
            circle = torch.tensor([0.0, 1.0] if d == 0 else [0.0, -1.0])  # D = 2: angles 0, pi
            slot = weights["channel_embed.weight"][c] + weights["depth_proj.weight"] @ circle
            attention = layer.self_attn
            queries.append([rotate(q, t) + slot for q in attention.q_proj(x).split(width)])
            keys.append([rotate(k, t) + slot for k in attention.k_proj(x).split(width)])
            values.append(attention.v_proj(x).split(width))
        expected = []
        for i, (t, c, d) in enumerate(order):
            seen = [
                j for j, (u, e, f) in enumerate(order) if u < t or (u == t and e == c and f <= d)
            ]
            heads = []
            for n, query in enumerate(queries[i]):
                scores = torch.stack([query @ keys[j][n // groups] / width**0.5 for j in seen])
                mixed = torch.stack([values[j][n // groups] for j in seen])
                heads.append(scores.softmax(0) @ mixed)
            hidden = embedded[i] + layer.self_attn.o_proj(torch.cat(heads))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            rows = weights["lm_head.weight"][d * 13 : (d + 1) * 13]
            expected.append(rows @ model.model.norm(hidden))
    computed = tiny.logits(model, frames).reshape(12, 13)  # [1, T, C, D, K] -> [L, K]
    torch.testing.assert_close(computed, torch.stack(expected), **tiny.EXACT)


def test_unknown_attention_is_refused_rather_than_blind_to_the_channels() -> None:
    for name in ("flash_attention_2", "flex_attention"):
        with pytest.raises(ConfigError, match=name):
            tiny.model(attention=name)


def test_a_broken_frame_is_refused() -> None:
    with pytest.raises(FrameLengthError, match="9 tokens"):
        tiny.model(num_codebooks=2)(torch.zeros(1, 9, dtype=torch.long))


@pytest.mark.parametrize("name", ["labels", "segments"])
def test_what_does_not_match_the_frames_is_refused(name: str) -> None:
    model = tiny.model()
    with pytest.raises(FrameLengthError, match=name):
        model(tiny.codes(model).flatten(1), **{name: torch.ones(2, 5, dtype=torch.long)})


def test_generate_is_not_offered() -> None:
    with pytest.raises(NotImplementedError, match="frame by frame"):
        tiny.model().generate(torch.zeros(1, 2, dtype=torch.long))
