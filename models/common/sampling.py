"""Drawing one of K ids from logits, on the device and without a look at the host.

R rows, D draws per row, K ids. The noise is a function of a row's seed and of how many draws the
row has made, by integer arithmetic alone: a session hears the same whatever rows run beside it, on
any device, and a captured graph needs no generator.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.common.errors import ConfigError

DUE_KEPT = 0.92
"""From one frame to the next; half of it is left after 8 frames."""
WORD = 0xFFFFFFFF
"""32 bits, held in 64 signed ones so that a product with a constant below 2^31 doesn't overflow."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Temperature 0 takes the likeliest id. Raises `ConfigError`."""

    temperature: float = 0.0
    top_k: int = 0
    """Only the k likeliest ids; 0 for all."""
    top_p: float = 1.0
    """Only the likeliest ids that together reach this probability, after `top_k`."""
    rest: int | None = None
    """The id of silence, for who speaks frame by frame. At temperature 0 it is then weighed against
    all sounds together instead of each: there are many ways to begin, and each of them is less
    likely than to go on saying nothing."""
    onset: float = 0.5
    """After silence: the probability of all sounds, summed up over the last frames (see `due`),
    from which on the likeliest one is made."""
    offset: float = 0.5
    """After a sound: the probability of silence above which it follows."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ConfigError(f"temperature={self.temperature}: must not be negative")
        if not 0 < self.onset <= 1:
            raise ConfigError(f"onset={self.onset}: must be above 0 and at most 1")
        if not 0 <= self.offset < 1:
            raise ConfigError(f"offset={self.offset}: must be 0 at least and below 1")
        if self.top_k < 0:
            raise ConfigError(f"top_k={self.top_k}: must not be negative")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p}: must be above 0 and at most 1")


def due(silence: Tensor, before: Tensor) -> Tensor:
    """The probability of a sound, which is all that is not `silence` [R, D], added to what it was
    `before` [R, D], of which some is forgotten. -> [R, D]

    Who could begin at any of the next moments is likely at none of them to begin just then.
    """
    return DUE_KEPT * before + 1 - silence


def speak_or_rest(
    logits: Tensor, sampling: Sampling, last: Tensor, before: Tensor
) -> tuple[Tensor, Tensor]:
    """`weighed`, from logits. [R, D, K], [R, D], [R, D] -> [R, D] each"""
    rest = sampling.rest
    assert rest is not None
    silence = logits.float().softmax(-1)[..., rest]
    sounds = logits.clone()
    sounds[..., rest] = -torch.inf
    return weighed(sounds.argmax(-1), silence, sampling, last, before)


def weighed(
    sound: Tensor, silence: Tensor, sampling: Sampling, last: Tensor, before: Tensor
) -> tuple[Tensor, Tensor]:
    """The likeliest `sound`, or silence, whose probability is `silence`, as `Sampling.rest` says;
    and what is then due: nothing where we have just stopped, or the sound that was given up would
    have us begin again at once. [R, D] each"""
    rest = sampling.rest
    assert rest is not None
    quiet = last == rest
    now = due(silence, before * quiet)
    goes_on = now >= torch.where(quiet, sampling.onset, 1 - sampling.offset)
    chosen = torch.where(goes_on, sound, rest)
    return chosen, now * (quiet & (chosen == rest))


def sample(
    logits: Tensor,
    sampling: Sampling,
    seeds: Tensor,
    draws: Tensor,
    last: Tensor | None = None,
    before: Tensor | None = None,
) -> Tensor:
    """[R, D, K] -> [R, D]. `seeds` and `draws` are [R] int64: which sequence, and how far in it.
    Only `rest` asks for `last` [R, D], the ids before these, and `before` [R, D], what was `due`
    already; none means nothing was.
    """
    if sampling.temperature == 0:
        if sampling.rest is None:
            return logits.argmax(-1)
        assert last is not None
        before = torch.zeros_like(last) if before is None else before
        return speak_or_rest(logits, sampling, last, before)[0]
    scores = logits.float() / sampling.temperature
    noise = gumbel(seeds, draws, scores.shape[1:])
    if not sampling.top_k and sampling.top_p == 1:
        return (scores + noise).argmax(-1)
    count = min(sampling.top_k or scores.shape[-1], scores.shape[-1])
    scores, ids = scores.topk(count)  # [R, D, count], the likeliest first
    before = scores.softmax(-1).cumsum(-1) - scores.softmax(-1)  # of the likelier ones
    scores = scores.masked_fill(before >= sampling.top_p, -torch.inf)
    best = (scores + noise[..., :count]).argmax(-1, keepdim=True)
    return ids.gather(-1, best)[..., 0]


def gumbel(seeds: Tensor, draws: Tensor, shape: torch.Size) -> Tensor:
    """Noise that makes an argmax of log probabilities a draw. [R], [R] -> [R, *shape]"""
    index = torch.arange(shape.numel(), device=seeds.device).view(shape)
    rows = _mix(_mix(seeds & WORD) ^ (draws & WORD)).view(-1, *[1] * len(shape))
    bits = _mix(_mix(rows + 0x9E3779B9 & WORD) ^ index)
    uniform = ((bits >> 9).float() + 0.5) / 2**23  # 23 bits: exact in float32, never 0 or 1
    return -torch.log(-torch.log(uniform))


def _mix(x: Tensor) -> Tensor:
    """A 32-bit integer hash: xor-shift and multiply, each bit of x turning half of the result's."""
    x = (x ^ x >> 16) * 0x21F0AAAD & WORD
    x = (x ^ x >> 15) * 0x735A2D97 & WORD
    return x ^ x >> 15
