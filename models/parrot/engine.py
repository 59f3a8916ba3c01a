"""Many live conversations with one dual-channel model: a frame of each person in, one of ours out.

R rows, n of them in a span, T frames, C = 2 channels, D codebooks, K ids per slot, S slots of a
row of the ring. The wires between sessions and rows are Python lists; what moves on a step is
tensors of fixed place, so that a step can be captured as a CUDA graph and replayed.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface

from models.common.attention import grouped_attention
from models.common.device import captured, row_counts
from models.common.errors import ConfigError, FrameLengthError, ModelError, VocabularyError
from models.common.halves import halve
from models.common.ring import RingCache, RingView
from models.common.sampling import Sampling, sample, speak_or_rest
from models.common.traced import SETTLING_CALLS, TracedStep, can_trace
from models.parrot.attention import attend
from models.parrot.config import CHANNELS, DualChannelConfig
from models.parrot.modeling import DualChannelModel

CHUNK_FRAMES = 32
"""An heir reads at least so many at a step: about what a step of as many rows costs."""


TRACED_SLOTS = 256
"""Traced steps are made for multiples of so many slots."""

LONGEST_WINDOW = 2048
"""Frames that a session looks back at unless more are asked for."""


class NoFreeRow(ModelError):
    """As many sessions as the engine has rows are open."""


class UnknownSession(ModelError):
    """No session of that name is open."""


class DuplicateSession(ModelError):
    """A session of that name is open already."""


class DuplexLM(Protocol):
    """Sessions that are opened, stepped together frame by frame, and closed. One thread's."""

    def open(self, session: Hashable, prefix: Tensor | None = None, *, seed: int = 0) -> None:
        """`prefix`: [T, C, D], what was said before. Raises `NoFreeRow`."""

    def step(self, user: Mapping[Hashable, Tensor]) -> dict[Hashable, Tensor]:
        """The person's frame t in, [D] each; our frame t + 1 out, [D] each, codes only."""

    def close(self, session: Hashable) -> None: ...


@dataclass(frozen=True, slots=True)
class Memory:
    """How far a session looks back, in frames. Raises `ConfigError`.

    With `keep` it is read anew from its last `keep` frames before `frames` are full, a few at each
    step in a spare row, which then takes the old one's place. Without, the oldest frame gives way
    to the newest, and the first `sinks` stay.
    """

    frames: int = 384
    keep: int = 0
    sinks: int = 0

    def __post_init__(self) -> None:
        if self.frames < 2 or self.keep < 0 or self.sinks < 0:
            raise ConfigError(f"{self}: need 2 frames at least, and no negative number")
        if self.sinks >= self.frames:
            raise ConfigError(f"{self}: sinks leave no room for other frames")

    def pace(self, rows: int) -> tuple[int, int]:
        """How many frames an heir reads at each step so that all rows can be read anew one after
        another in the time they have, and in how many steps it is done."""
        steps = (self.frames - self.keep) // (rows + 1)
        if not steps:
            raise ConfigError(f"{self}: frames are too few to keep so many for {rows} rows")
        chunk = max(CHUNK_FRAMES, -(-(self.keep + steps - 1) // steps))
        return chunk, -(-(self.keep - 1) // (chunk - 1))


class _State:
    """What a row has beside keys and values, on the device. [R, ...]"""

    def __init__(self, rows: int, frames: int, depth: int, device: torch.device) -> None:
        numbers = partial(torch.zeros, dtype=torch.long, device=device)
        self.user, self.last = numbers(rows, depth), numbers(rows, depth)
        """The person's frame, and ours in the frame to come."""
        self.active = torch.zeros(rows, dtype=torch.bool, device=device)
        self.due = torch.zeros(rows, depth, device=device)
        """What has come together in silence, see `models.common.sampling.due`."""
        self.position, self.seeds, self.draws = numbers(rows), numbers(rows), numbers(rows)
        self.history = numbers(rows, frames, CHANNELS, depth)
        """The frame at each position; past the end it begins again at the front."""

    def move(self, source: int, target: int) -> None:
        for state in (self.last, self.due, self.position, self.seeds, self.draws, self.history):
            state[target] = state[source]


@dataclass(slots=True)
class _Heir:
    """The spare row, on its way to take a session's row over."""

    session: Hashable
    first: int
    """The frame of the old row that it begins with."""
    read: int = 0


class TorchEngine:
    """`DuplexLM` on plain PyTorch. The model is its own from then on.

    Live sessions stand in the first rows, side by side: when one leaves, the last one moves into
    its row. A step runs over the rows from the first that has work to the last; those between
    that have none don't advance. Without `memory` it looks back as far as it was trained to, by
    its `max_position_embeddings`. `traced`: on a CPU, a step is one call (`models.common.traced`),
    for which it takes about 0.3 s to get ready for each power of two up to `rows`. Raises
    `ConfigError` where `memory` doesn't fit `rows`.
    """

    def __init__(
        self,
        model: DualChannelModel,
        rows: int,
        *,
        memory: Memory | None = None,
        sampling: Sampling | None = None,
        traced: bool = False,
    ) -> None:
        config: DualChannelConfig = model.config
        if rows < 1:
            raise ConfigError(f"rows={rows}: need one at least")
        if config.delays is not None and max(config.delays) > 0:
            raise ConfigError(f"delays={config.delays}: live sessions have no delays")
        self._model, self._config, self._capacity = model, config, rows
        self._memory = memory or Memory(min(config.max_position_embeddings, LONGEST_WINDOW))
        self._sampling = sampling or Sampling()
        self._pace = self._memory.pace(rows) if self._memory.keep else None
        model.eval().requires_grad_(False)
        halve(model.model)
        model.lay_out_head(1 - config.user_channel)
        config._attn_implementation = GROUPED
        device = self._device = model.device
        attention = model.model.layers[0].self_attn
        self._ring = RingCache(
            rows + 1,  # the last one is the heir's
            self._memory.frames,
            layers=config.num_hidden_layers,
            heads=config.num_key_value_heads,
            width=attention.head_dim,
            tokens_per_frame=config.tokens_per_frame,
            sinks=0 if self._memory.keep else self._memory.sinks,
            dtype=model.dtype,
            device=device,
        )
        self._within = model.frame_block()  # [P, P]
        depth, pinned = config.num_codebooks, device.type == "cuda"
        state = self._state = _State(rows, self._memory.frames, depth, device)
        self._start = torch.full((1, CHANNELS, depth), config.start_id, device=device)
        # The host's side of what goes in and comes out: the same memory where there is no other.
        self._staged = [
            torch.zeros_like(there, device="cpu").pin_memory() if pinned else there
            for there in (state.user, state.active, state.last)
        ]
        self._sessions: list[Hashable] = []
        self._rows: dict[Hashable, int] = {}
        self._seen: list[int] = []
        """Frames in each live row, as the position says on the device."""
        self._heir: _Heir | None = None
        self._granule = -(-self._ring.slots // 64) * 8 if pinned else 1
        self._graphs = self._steps = None
        if pinned:
            extents = self._ring.extents(self._granule)
            self._graphs = captured(self._advance, rows, extents, device)
        elif traced and can_trace(device):
            self._granule = TRACED_SLOTS
            self._steps = self._traced()

    @torch.no_grad()
    def open(self, session: Hashable, prefix: Tensor | None = None, *, seed: int = 0) -> None:
        """Of a prefix longer than the memory, the end. Raises `NoFreeRow`, `DuplicateSession`,
        `FrameLengthError`, `VocabularyError`."""
        if session in self._rows:
            raise DuplicateSession(f"session {session!r} is open already")
        if len(self._sessions) == self._capacity:
            raise NoFreeRow(f"all {self._capacity} rows have a session")
        frames = self._start
        if prefix is not None:
            limit = self._memory.keep or self._memory.frames - 1
            kept = check_prefix(prefix, self._config)[-limit:]
            frames = torch.cat((frames, kept.to(self._device)))
        row, seen, state = len(self._sessions), frames.shape[0], self._state
        state.seeds[row], state.draws[row], state.position[row] = seed, 0, seen
        state.history[row, :seen] = frames
        state.last[row], state.due[row] = frames[-1, 1 - self._config.user_channel], 0.0
        self._ring.reset(row)
        rows = slice(row, row + 1)
        hidden = self._read(frames, row, 0)
        last = hidden[:, -self._config.tokens_per_frame :]
        state.last[rows], state.due[rows] = self._draw(last, rows)
        state.draws[row] += 1
        self._sessions.append(session)
        self._rows[session] = row
        self._seen.append(seen)

    @torch.no_grad()
    def step(self, user: Mapping[Hashable, Tensor]) -> dict[Hashable, Tensor]:
        """Codes on the CPU. Raises `UnknownSession`, `FrameLengthError`, `VocabularyError`; no
        session has advanced then."""
        if not user:
            return {}
        rows = [self._row(session) for session in user]
        staged_user, staged_active, chosen = self._staged
        staged_user[rows] = check_user(user.values(), self._config)
        staged_active.zero_()[rows] = True
        for row in rows:
            self._seen[row] += 1
        self._state.user.copy_(staged_user, non_blocking=True)
        self._state.active.copy_(staged_active, non_blocking=True)
        slots = self._ring.extent(max(self._seen[row] for row in rows), self._granule)
        count = next(n for n in row_counts(self._capacity) if n > max(rows))
        if self._graphs is not None:
            self._graphs[count, slots].replay()
            chosen.copy_(self._state.last, non_blocking=True)
            torch.cuda.current_stream(self._device).synchronize()
        elif self._steps is not None:
            self._steps[count, slots]()
        else:
            self._advance(slice(min(rows), max(rows) + 1), slots)
        frames = chosen[rows]  # [n, D], a copy
        self._renew()
        return dict(zip(user, frames, strict=True))

    @torch.no_grad()
    def close(self, session: Hashable) -> None:
        """Raises `UnknownSession`."""
        row, last = self._row(session), len(self._sessions) - 1
        if self._heir is not None and self._heir.session == session:
            self._heir = None
        if row != last:
            self._ring.move(last, row, self._seen[last])
            self._state.move(last, row)
            self._sessions[row], self._seen[row] = self._sessions[last], self._seen[last]
            self._rows[self._sessions[row]] = row
        del self._rows[session], self._sessions[last], self._seen[last]

    def _traced(self) -> dict[tuple[int, int], TracedStep]:
        """A step for every number of rows and of slots. No row is active while they are made."""
        steps = {}
        holders = (vars(self._state), vars(self._ring))
        for count in row_counts(self._capacity):
            for slots in self._ring.extents(self._granule):
                step = TracedStep(partial(self._advance, slice(0, count), slots), holders)
                for _ in range(SETTLING_CALLS):
                    step()
                steps[count, slots] = step
        return steps

    def _advance(self, rows: slice, slots: int) -> Tensor:
        """A step of the active ones of these rows: only tensors of fixed place, no look at them.
        [n, D]"""
        state = self._state
        active, positions = state.active[rows], state.position[rows]
        channels = [state.last[rows]] * CHANNELS
        channels[self._config.user_channel] = state.user[rows]
        frames = torch.stack(channels, dim=1)[:, None]  # [n, 1, C, D]
        view = self._ring.at(rows, positions[:, None], slots, active)
        chosen, behind = self._draw(self._encode(frames, positions[:, None], view), rows)
        own = torch.arange(rows.stop - rows.start, device=self._device)
        place = own, positions % self._memory.frames
        history = state.history[rows]
        history[place] = torch.where(active[:, None, None], frames[:, 0], history[place])
        state.last[rows] = torch.where(active[:, None], chosen, state.last[rows])
        state.due[rows] = torch.where(active[:, None], behind, state.due[rows])
        state.position[rows] += active
        state.draws[rows] += active
        return state.last[rows]

    def _read(self, frames: Tensor, row: int, position: int) -> Tensor:
        """Frames [T, C, D] into one row -> [1, L, H]"""
        end = position + frames.shape[0]
        positions = torch.arange(position, end, device=self._device)[None]  # [1, T]
        view = self._ring.at(slice(row, row + 1), positions, self._ring.extent(end, self._granule))
        return self._encode(frames[None], positions, view)

    def _encode(self, frames: Tensor, positions: Tensor, view: RingView) -> Tensor:
        masks = self._model.attention_masks(lambda window: view.mask(self._within, window))
        return self._model.encode(frames, positions, masks, view)

    def _draw(self, hidden: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Our next frame, codes only, and what is due behind it. [n, P, H] -> [n, D] each"""
        logits = self._model.predict(hidden, 1 - self._config.user_channel)[:, 0]  # [n, D, K]
        codes = logits[..., : self._config.codebook_size]
        state, sampling = self._state, self._sampling
        last, before = state.last[rows], state.due[rows]
        if sampling.temperature == 0 and sampling.rest is not None:
            return speak_or_rest(codes, sampling, last, before)
        return sample(codes, sampling, state.seeds[rows], state.draws[rows]), before

    def _renew(self) -> None:
        """Reads the longest row anew, by a chunk, so that none runs full."""
        if self._pace is None:
            return
        (chunk, steps), heir, history = self._pace, self._heir, self._state.history
        if heir is None:
            seen, row = max((seen, row) for row, seen in enumerate(self._seen))
            if seen < self._memory.frames - steps * (len(self._seen) + 1):
                return
            heir = self._heir = _Heir(self._sessions[row], first=seen - self._memory.keep)
            self._ring.reset(self._capacity)
            history[row, heir.first] = self._start[0]
        row = self._rows[heir.session]
        begin = heir.first + heir.read
        end = min(begin + chunk, self._seen[row])
        self._read(history[row, begin:end], self._capacity, heir.read)
        heir.read += end - begin
        if end == self._seen[row]:
            self._ring.move(self._capacity, row, heir.read)
            history[row, : heir.read] = history[row, heir.first : end].clone()
            self._state.position[row] = self._seen[row] = heir.read
            self._heir = None

    def _row(self, session: Hashable) -> int:
        if session not in self._rows:
            raise UnknownSession(f"no session {session!r} is open")
        return self._rows[session]


def check_prefix(prefix: Tensor, config: DualChannelConfig) -> Tensor:
    """[T, C, D], as int64. Raises `FrameLengthError`, `VocabularyError`."""
    if prefix.shape[1:] != (CHANNELS, config.num_codebooks):
        raise FrameLengthError(
            f"a prefix must be [frames, {CHANNELS}, {config.num_codebooks}], "
            f"not {list(prefix.shape)}"
        )
    return _known(prefix, config)


def check_user(frames: Collection[Tensor], config: DualChannelConfig) -> Tensor:
    """[D] each -> [n, D], int64. Raises `FrameLengthError`, `VocabularyError`."""
    for frame in frames:
        if frame.shape != (config.num_codebooks,):
            raise FrameLengthError(
                f"a person's frame must be [{config.num_codebooks}], not {list(frame.shape)}"
            )
    return _known(torch.stack(tuple(frames)), config)


def _known(frames: Tensor, config: DualChannelConfig) -> Tensor:
    ids = frames.long()
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < config.slot_size:
        raise VocabularyError(
            f"ids from {int(ids.min())} to {int(ids.max())}; "
            f"the model knows 0 to {config.slot_size - 1}"
        )
    return ids


GROUPED = "dual_grouped"
AttentionInterface.register(GROUPED, partial(attend, grouped_attention))
