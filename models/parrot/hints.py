"""What is said, as a second thing to learn beside the codes, in training only.

Which words the person says, and in which order, reaches a small model only through the reply that
comes seconds later, and it sooner knows the recordings by heart than learns to listen. Where shards
have labels, the model is also asked, frame by frame, what the person said shortly before (in the
middle of its layers, so that the later ones can use it; pauses inside a turn are told from its
end), which word was before that (a layer later: whoever repeats a phrase has to find what follows
on the word that they are saying), and what it will itself be saying soon (behind the last layer).
The answers are heads of their own, which are left behind when training ends.

B rows, T frames, C = 2 channels, H hidden width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.parrot.labels import NOT_SPEAKING, PAUSING, UNKNOWN
from models.parrot.loss import IGNORE

PERSON_LATE_FRAMES = (2, 6)
"""How long ago it was that the person said what is asked for: at once, and when it is over."""
AGENT_AHEAD_FRAMES = (1, 6)


class Hints(nn.Module):
    """`weight` is that of its loss beside the codes'."""

    def __init__(self, width: int, layers: int, labels: int, user_channel: int, weight: float):
        super().__init__()
        self.weight = weight
        self.middle = (layers + 1) // 2
        self._user_channel = user_channel
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.person = nn.Linear(width, labels * len(PERSON_LATE_FRAMES))
        self.before = nn.Linear(width, labels * len(PERSON_LATE_FRAMES))
        self.agent = nn.Linear(width, labels * len(AGENT_AHEAD_FRAMES))

    def forward(
        self, middle: Tensor, later: Tensor, last: Tensor, labels: Tensor, segments: Tensor | None
    ) -> Tensor:
        """Hidden states [B, T, H], `labels` [B, T, C + 1] as `data.build_row` makes them -> the
        mean cross-entropies of what the person says, said before that, and the agent says. [3]"""
        of_person, of_agent = labels[..., self._user_channel], labels[..., 1 - self._user_channel]
        before = torch.stack([_moved(labels[..., -1], n, segments) for n in PERSON_LATE_FRAMES], -1)
        late = torch.stack([_moved(of_person, n, segments) for n in PERSON_LATE_FRAMES], -1)
        ahead = torch.stack([_moved(of_agent, -n, segments) for n in AGENT_AHEAD_FRAMES], -1)
        return torch.stack(
            (
                _loss(self.person(self.norms[0](middle)), late),
                _loss(self.before(self.norms[1](later)), before),
                _loss(self.agent(last), ahead),
            )
        )


def words_before(labels: Tensor) -> Tensor:
    """The word before each frame's in the same turn, `NOT_SPEAKING` at the first one. [T] -> [T]"""
    found, last, previous = [], NOT_SPEAKING, NOT_SPEAKING
    for label in labels.tolist():
        if label == NOT_SPEAKING:
            last = previous = NOT_SPEAKING
        elif label not in (last, PAUSING):
            previous, last = last, label
        found.append(UNKNOWN if label in (PAUSING, UNKNOWN) else previous)
    return torch.tensor(found)


def _moved(labels: Tensor, frames: int, segments: Tensor | None) -> Tensor:
    """[B, T] later by so many frames, inside each recording; `IGNORE` where there is none."""
    segments = torch.ones_like(labels) if segments is None else segments
    moved, source = torch.full_like(labels, IGNORE), torch.zeros_like(segments)
    if frames > 0:
        moved[:, frames:], source[:, frames:] = labels[:, :-frames], segments[:, :-frames]
    else:
        moved[:, :frames], source[:, :frames] = labels[:, -frames:], segments[:, -frames:]
    return moved.masked_fill((source != segments) | (source == 0), IGNORE)


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    """[B, T, N * K], [B, T, N] -> [], 0 where nothing is known"""
    by_target = logits.float().unflatten(-1, (targets.shape[-1], -1)).flatten(0, 2)
    losses = F.cross_entropy(by_target, targets.flatten(), ignore_index=IGNORE, reduction="sum")
    return losses / (targets != IGNORE).sum().clamp(min=1)
