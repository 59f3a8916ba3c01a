"""Parler the plain way: no cache, no rows, all positions at once. What the engine must equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.parler.config import Generation
from models.parler.modeling import ParlerModel


class NoPast:
    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        return key, value


@torch.no_grad()
def logits(
    model: ParlerModel, description: Sequence[int], prompt: Sequence[int], ids: Tensor
) -> Tensor:
    """Of the text's tokens and of `ids` [K, T] behind them. -> [K, P + T, V]"""
    seen = model.describe(torch.tensor([list(description)]))
    text, beside = model.read(torch.tensor([list(prompt)]))
    if beside is not None:
        seen = torch.cat((seen, beside), dim=4)
    x = torch.cat((text, model.embed(ids.T[None])), dim=1)
    length = x.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    seen_mask = torch.ones(1, 1, 1, seen.shape[4], dtype=torch.bool)
    hidden = model(x, torch.arange(length)[None], mask, NoPast(), seen, seen_mask)
    return model.predict(hidden)[0].transpose(0, 1)


def greedy(
    model: ParlerModel, generation: Generation, description: Sequence[int], prompt: Sequence[int]
) -> Tensor:
    """All positions that greedy generation chooses until every codebook has ended. [K, 1 + T]"""
    config = model.config.decoder
    books = config.num_codebooks
    chosen = torch.full((books, 1), config.bos_token_id)
    may_end = 0
    while chosen.shape[1] < generation.max_length:
        length = chosen.shape[1]
        position, book = torch.arange(length)[None], torch.arange(books)[:, None]
        tail = generation.max_length - books + 1
        ids = torch.where(position <= book, config.bos_token_id, chosen)
        ids = torch.where(position >= tail + book, config.pad_token_id, ids)
        scores = logits(model, description, prompt, ids)[:, -1]  # [K, V]
        ended = (chosen == config.eos_token_id).any(1)
        if ended.all():
            break
        may_end = min(may_end + int(ended[may_end]), books - 1)
        scores[may_end + 1 :, config.eos_token_id] = -torch.inf
        if length - 1 < generation.min_new_tokens:
            scores[:, config.eos_token_id] = -torch.inf
        best = torch.where(ended, config.pad_token_id, scores.argmax(1))
        chosen = torch.cat((chosen, best[:, None]), dim=1)
    return chosen


def frames(model: ParlerModel, chosen: Tensor) -> Tensor:
    """The frames with a sound among what was chosen. [K, 1 + T] -> [F, K]"""
    books = chosen.shape[0]
    count = max(chosen.shape[1] - books, 0)
    rows = [chosen[book, book + 1 : book + 1 + count] for book in range(books)]
    found = torch.stack(rows, dim=1)
    return found[(found < model.config.codec.codebook_size).all(1)]


@torch.no_grad()
def sound(model: ParlerModel, codes: Tensor) -> Tensor:
    """[F, K] -> [T], decoded whole."""
    if not len(codes):
        return torch.zeros(0)
    decoded: Tensor = model.audio_encoder.decode(audio_codes=codes.T[None]).audio_values
    return decoded[0]
