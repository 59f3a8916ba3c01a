"""The loss against a loop over the published formula."""

import pytest

pytest.importorskip("torch", reason="models need torch")
pytest.importorskip("transformers", reason="models need transformers")

from typing import Any

import torch
from torch import Tensor

from models.parrot.loss import IGNORE
from models.parrot.modeling import DualChannelModel
from tests.models import tiny


def naive(logits: Tensor, labels: Tensor, segments: Tensor | None = None) -> list[float]:
    """Per channel: the mean of -log p(next code of this slot), counted one by one."""
    rows, frames, channels, depth = labels.shape
    means = []
    for c in range(channels):
        terms = []
        for b in range(rows):
            for t in range(frames - 1):
                if segments is not None and (
                    segments[b, t + 1] == 0 or segments[b, t] != segments[b, t + 1]
                ):
                    continue
                for d in range(depth):
                    code = int(labels[b, t + 1, c, d])
                    if code != IGNORE:
                        terms.append(
                            -float(logits[b, t, c, d].detach().double().softmax(-1)[code].log())
                        )
        means.append(sum(terms) / len(terms) if terms else 0.0)
    return means


@pytest.mark.parametrize(("backbone", "shape"), tiny.EVERY, ids=tiny.EVERY_ID)
def test_loss_is_the_formula(backbone: type[DualChannelModel], shape: dict[str, Any]) -> None:
    model = tiny.model(backbone, user_channel=1, user_loss_weight=0.25, **shape)
    frames = tiny.codes(model)
    labels = frames.clone()
    labels[0, 2:4, 0], labels[1, 3, 1] = IGNORE, IGNORE
    out = model(frames.flatten(1), labels=labels.flatten(1))
    agent, user = naive(out.logits, labels)
    torch.testing.assert_close(out.channel_losses, torch.tensor([agent, user]))
    assert float(out.loss.detach()) == pytest.approx(agent + 0.25 * user, abs=1e-5)


@pytest.mark.parametrize(("backbone", "shape"), tiny.LLAMAS)
def test_padding_and_the_seams_of_packing_do_not_count(
    backbone: type[DualChannelModel], shape: dict[str, Any]
) -> None:
    model = tiny.model(backbone, **shape)
    frames = tiny.codes(model, frames=7)
    segments = torch.tensor([[1, 1, 1, 2, 2, 0, 0], [0, 0, 1, 1, 1, 1, 1]])
    out = model(frames.flatten(1), segments=segments, labels=frames.flatten(1))
    expected = naive(out.logits, frames, segments)
    torch.testing.assert_close(out.channel_losses, torch.tensor(expected))
    noise = torch.where(segments[:, :, None, None] == 0, (frames + 3) % 13, frames)
    again = model(noise.flatten(1), segments=segments, labels=noise.flatten(1))
    torch.testing.assert_close(again.loss, out.loss, **tiny.EXACT)


def test_nothing_to_count_is_zero_with_a_gradient() -> None:
    model = tiny.model()
    frames = tiny.codes(model)
    out = model(frames.flatten(1), labels=torch.full_like(frames, IGNORE).flatten(1))
    out.loss.backward()
    assert float(out.loss.detach()) == 0.0
    assert torch.count_nonzero(model.lm_head.weight.grad) == 0


def test_labels_beside_a_past_or_a_part_are_refused() -> None:
    model = tiny.model()
    frames = tiny.codes(model).flatten(1)
    with pytest.raises(ValueError, match="labels need the logits of all frames"):
        model(frames, labels=frames, logits_to_keep=1)


def test_a_few_steps_learn_one_dialogue() -> None:
    """Both joins overfit; the channel parameters take part in `pair`."""
    for join in ("pair", "sum"):
        model = tiny.model(join=join, initializer_range=0.05).train()
        frames = tiny.codes(model, rows=1, frames=12).flatten(1)
        before = model.channel_embed.weight.detach().clone()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0)
        for _ in range(60):
            optimizer.zero_grad()
            loss = model(frames, labels=frames).loss
            loss.backward()
            optimizer.step()
        assert float(loss.detach()) < 0.2  # two channels, ln 13 = 2.6 nats each at first
        assert torch.equal(model.channel_embed.weight, before) == (join == "sum")
