"""Many conversations with one causal LM: rows join and leave at every step.

R rows, n of them in a span, T tokens, S slots of a row, V vocabulary. What is done next is decided
on Python lists; a step is at most one call of the model for all that speak and a few for those
whose question is still being read.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.chat.rows import RowCache, aligned
from models.common.errors import ConfigError, ModelError
from models.common.sampling import Sampling, sample

KEEP_SHARE = 0.5
"""A row that is not in use is taken over by a question that begins with at least so much of what
it holds: a smaller part is copied to another row, and the row stays with its own conversation."""
READ_ALONE = 8
"""So many times `read_tokens` are read at a step while nobody speaks."""
FIRST_EXTENT = 256
"""Slots that a compiled step looks at are this, and its doubles."""


class NoFreeRow(ModelError):
    """All rows are in use."""


class TooManyTokens(ModelError):
    """The question does not fit into a row, with one token to answer."""


@dataclass(slots=True)
class _Row:
    index: int
    ids: list[int] = field(default_factory=list)
    held: int = 0
    """Of `ids`, those whose keys and values are in the cache. The others are to be read."""
    session: Hashable | None = None
    used: int = 0
    """When it was opened last, in openings."""
    seed: int = 0
    draws: int = 0


class ChatEngine:
    """`open` a session with the tokens of its question, `step` for the next token of each, `close`
    it when enough was said. One thread's.

    A row keeps its keys and values after `close`: a question that begins as an earlier
    conversation did, whole or in part, reads only the rest. Raises `ArchitectureError` for models
    that can't be served so.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: int,
        tokens: int,
        *,
        sampling: Sampling | None = None,
        read_tokens: int = 64,
        compile_mode: str | None = None,
    ) -> None:
        """`tokens`: the longest conversation. `read_tokens`: how many of questions are read at a
        step while others speak. `compile_mode`: of `torch.compile`, for the step."""
        if rows < 1 or tokens < 2 or read_tokens < 1:
            raise ConfigError(f"{rows=}, {tokens=}, {read_tokens=}: too few")
        self._model = model.eval().requires_grad_(False)
        self._cache = RowCache(model, rows, tokens)
        self._sampling, self._read_tokens = sampling or Sampling(), read_tokens
        self.tokens = tokens
        self._rows = [_Row(index) for index in range(rows)]
        self._open: dict[Hashable, _Row] = {}
        self._openings = 0
        self._compiled: Any = None
        if compile_mode is not None:
            self._compiled = torch.compile(model.forward, mode=compile_mode, dynamic=False)

    @property
    def free(self) -> int:
        """Rows that are not in use."""
        return len(self._rows) - len(self._open)

    @torch.no_grad()
    def open(self, session: Hashable, ids: Sequence[int], *, seed: int = 0) -> int:
        """Returns how many of the tokens need not be read. Raises `NoFreeRow`, `TooManyTokens`."""
        if not 0 < len(ids) < self.tokens:
            raise TooManyTokens(f"{len(ids)} tokens; a row has {self.tokens}")
        if not self.free:
            raise NoFreeRow(f"all {len(self._rows)} rows are in use")
        assert session not in self._open
        row = self._row_for(list(ids))
        self._openings += 1
        row.ids, row.session, row.used = list(ids), session, self._openings
        row.seed, row.draws = seed, 0
        self._open[session] = row
        return row.held

    def close(self, session: Hashable) -> None:
        """Nothing happens to a session that is not open."""
        row = self._open.pop(session, None)
        if row is not None:
            row.session = None
            del row.ids[row.held :]

    @torch.no_grad()
    def step(self) -> dict[Hashable, int]:
        """The next token of every session that speaks or begins to.

        After an exception every session stands as before, and the step may be tried again.
        """
        speaking = [row for row in self._rows if row.session is not None and _left(row) == 1]
        reading = [row for row in self._open.values() if _left(row) > 1]
        said = self._speak(speaking) if speaking else {}
        budget = self._read_tokens * (1 if speaking else READ_ALONE)
        for row in reading:
            count = min(budget, _left(row))
            logits = self._read(row, count)
            budget -= count
            if not _left(row):
                said[row.session] = self._draw(logits, [row])[0]
            if not budget:
                break
        for session, token in said.items():
            row = self._open[session]
            row.ids.append(token)
            row.draws += 1
        return said

    def full(self, session: Hashable) -> bool:
        """No further token of it can be answered."""
        return len(self._open[session].ids) > self.tokens

    @torch.no_grad()
    def warm_up(self) -> None:
        """The largest calls there can be, so that memory is short now or never."""
        count = min(self._read_tokens * READ_ALONE, self.tokens)
        positions = torch.arange(self.tokens - count, self.tokens, device=self._model.device)
        last = len(self._rows) - 1
        ids = torch.zeros_like(positions)[None]
        self._call(slice(last, last + 1), ids, positions[None], self._cache.slots)
        spans = [range(last + 1)] if self._compiled else [range(1), range(last + 1)]
        for extent in self._extents() if self._compiled else [self._cache.slots]:
            for span in spans:
                rows = slice(span.start, span.stop)
                idle = torch.full((len(span), 1), extent - 1, device=self._model.device)
                logits = self._call(rows, torch.zeros_like(idle), idle, extent, self._compiled)
                self._draw(logits, [self._rows[index] for index in span])

    def _row_for(self, ids: list[int]) -> _Row:
        """A free row that holds as much as any of what `ids` begin with, and not all of them."""
        common = {row.index: _common(row.ids[: row.held], ids[:-1]) for row in self._rows}
        source = max(self._rows, key=lambda row: (common[row.index], -row.index))
        begun = common[source.index]
        if source.session is None and begun >= KEEP_SHARE * source.held:
            source.held = begun
            return source
        oldest = min((row for row in self._rows if row.session is None), key=lambda row: row.used)
        if begun > common[oldest.index]:
            self._cache.copy(source.index, oldest.index, begun)
        oldest.held = begun
        return oldest

    def _speak(self, rows: list[_Row]) -> dict[Hashable, int]:
        """A token for each of `rows`. Those between that have nothing to say run idly."""
        span = range(rows[0].index, rows[-1].index + 1)
        end = aligned(max(row.held for row in rows) + 1)
        if self._compiled:
            span = range(len(self._rows))
            end = next(extent for extent in self._extents() if extent >= end)
        between = self._rows[span.start : span.stop]
        # An idle row writes behind what it holds, where nobody looks before it is written over.
        last = [[row.ids[row.held] if row in rows else 0] for row in between]
        device = self._model.device
        positions = torch.tensor([[row.held] for row in between], device=device)
        logits = self._call(
            slice(span.start, span.stop),
            torch.tensor(last, device=device),
            positions,
            end,
            self._compiled,
        )
        drawn = self._draw(logits, between)
        said = {}
        for row, token in zip(between, drawn, strict=True):
            if row in rows:
                row.held += 1
                said[row.session] = token
        return said

    def _read(self, row: _Row, count: int) -> Tensor:
        """Reads on in a question. -> [1, V] of its last token"""
        device, end = self._model.device, row.held + count
        ids = torch.tensor([row.ids[row.held : end]], device=device)
        positions = torch.arange(row.held, end, device=device)[None]
        rows = slice(row.index, row.index + 1)
        logits = self._call(rows, ids, positions, aligned(end))
        row.held = end
        return logits

    def _call(
        self, rows: slice, ids: Tensor, positions: Tensor, end: int, forward: Any = None
    ) -> Tensor:
        """Tokens [n, T] -> [n, V], of the last ones"""
        inputs = self._cache.at(rows, positions, end)
        output = (forward or self._model)(input_ids=ids, logits_to_keep=1, **inputs)
        logits: Tensor = output.logits[:, -1]
        return logits

    def _draw(self, logits: Tensor, rows: Sequence[_Row]) -> list[int]:
        device = logits.device
        seeds = torch.tensor([row.seed for row in rows], device=device)
        draws = torch.tensor([row.draws for row in rows], device=device)
        drawn: list[int] = sample(logits[:, None], self._sampling, seeds, draws)[:, 0].tolist()
        return drawn

    def _extents(self) -> list[int]:
        """Slots that a compiled step looks at: few, each compiled once."""
        extents, extent = [], FIRST_EXTENT
        while extent < self._cache.slots:
            extents.append(extent)
            extent *= 2
        return [*extents, self._cache.slots]


def _left(row: _Row) -> int:
    return len(row.ids) - row.held


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens from the first are the same."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))
