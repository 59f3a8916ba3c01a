"""Rows for training, packed from shards.

Each recording stands behind one frame of `start_id`. One that fits into a row is never cut; a
longer one is cut at random places into pieces of a row's length. Pieces share rows by best fit
(Ding et al. 2024, "Fewer Truncations Improve Language Modeling"), numbered by `segments`, so that
nothing sees, or is predicted from, another recording.

A single-channel recording stands in a channel drawn at random; the other one holds `start_id`
throughout and doesn't count. That is ordinary next-unit training, of both channels' tables.

B rows, T frames of a row, C = 2 channels, D codebooks, S = C * D slots of a frame.
"""

from __future__ import annotations

import bisect
import itertools
import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from models.common.errors import VocabularyError
from models.parrot.config import CHANNELS, DualChannelConfig
from models.parrot.frames import to_frames
from models.parrot.hints import words_before
from models.parrot.interrupt import broken_off, interrupt, without_echo
from models.parrot.loss import IGNORE, next_frame_targets
from models.parrot.shards import Shards, Vocabulary
from models.parrot.splice import Splicer

MIN_PIECE_FRAMES = 2
"""Fewer have nothing to predict."""

WARP_CLEAR_FRAMES = 10
"""Before something of ours begins, time is left as it is: it says when to begin."""

Piece = tuple[int, int, int]
"""Recording, first frame, the frame behind the last; the start frame is frame 0."""
Row = list[Piece]


@dataclass(frozen=True, slots=True)
class Layout:
    """How recordings become rows."""

    row_frames: int
    start_id: int
    delays: tuple[tuple[int, ...], ...]
    """[C][D], by how many frames a code comes later than the sound it stands for."""
    user_channel: int
    user_token_noise: float = 0.0
    """Share of the person's input codes replaced by random ones; what is to be predicted stays."""
    code_digits: tuple[int, ...] = ()
    """Sizes of a code's numbers; where they are known, noise changes one of them."""
    user_warp: float = 0.0
    """Share of the frames that `warped` leaves out or doubles."""
    new_phrases: float = 0.0
    """Share of the recordings, of those that fit whole into a row, that get new phrases. They keep
    their length: what is too long is cut off, what is missing doesn't count."""
    new_interruptions: float = 0.0
    """Likewise, share of those in which a reply is newly spoken over."""
    without_echo: float = 0.0
    """Likewise, share of those in which no reply returns to the person's channel."""

    @classmethod
    def of(
        cls,
        config: DualChannelConfig,
        row_frames: int,
        user_delay_frames: int = 0,
        user_token_noise: float = 0.0,
        code_digits: tuple[int, ...] = (),
        user_warp: float = 0.0,
        new_phrases: float = 0.0,
        new_interruptions: float = 0.0,
        without_echo: float = 0.0,
    ) -> Layout:
        """`user_delay_frames`: what the tokenizer's encoder is late by when it runs live."""
        of_codebooks = config.delays or [0] * config.num_codebooks
        delays = tuple(
            tuple(d + user_delay_frames * (channel == config.user_channel) for d in of_codebooks)
            for channel in range(CHANNELS)
        )
        changes = (user_token_noise, code_digits, user_warp, new_phrases, new_interruptions)
        return cls(row_frames, config.start_id, delays, config.user_channel, *changes, without_echo)

    def frames_of(self, codes: int) -> int:
        """How many frames a recording of so many becomes."""
        return 1 + codes + min(max(of_channel) for of_channel in self.delays)


def check_vocabulary(config: DualChannelConfig, vocabulary: Vocabulary) -> None:
    """Raises `VocabularyError` where the shards' codes aren't the model's."""
    for name in ("codebook_size", "num_codebooks"):
        ours, theirs = getattr(config, name), getattr(vocabulary, name)
        if ours != theirs:
            raise VocabularyError(
                f"the shards ({vocabulary.tokenizer!r}) have {name} {theirs}, the model {ours}"
            )


def plan(recordings: Mapping[int, int], row_frames: int, chance: random.Random) -> list[Row]:
    """{recording: frames} -> every frame once, in rows of at most `row_frames`, shuffled."""
    pieces: list[Piece] = []
    for recording, frames in recordings.items():
        cuts = [0, frames]
        if frames > row_frames:
            cuts = [0, *range(chance.randrange(1, row_frames + 1), frames, row_frames), frames]
        pieces += [
            (recording, begin, end)
            for begin, end in itertools.pairwise(cuts)
            if end - begin >= MIN_PIECE_FRAMES
        ]
    chance.shuffle(pieces)
    pieces.sort(key=lambda piece: piece[1] - piece[2])  # longest first
    rows: list[Row] = []
    open_rows: dict[int, list[Row]] = {}  # by the frames that are free
    free: list[int] = []  # those numbers, sorted
    for piece in pieces:
        size = piece[2] - piece[1]
        at = bisect.bisect_left(free, size)
        if at < len(free):
            room = free[at]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], free[at]
        else:
            room, row = row_frames, []
            rows.append(row)
        row.append(piece)
        left = room - size
        if left >= MIN_PIECE_FRAMES:
            if left not in open_rows:
                open_rows[left] = []
                bisect.insort(free, left)
            open_rows[left].append(row)
    chance.shuffle(rows)
    return rows


def build_row(
    shards: Shards,
    row: Row,
    layout: Layout,
    generator: torch.Generator,
    splicer: Splicer | None = None,
) -> dict[str, Tensor]:
    """`input_ids` [T * S], `labels` [T * S], `segments` [T], as the models take them; and where
    the shards have labels `hints` [T, C + 1], those of the frames and `words_before`."""
    depth = shards.vocabulary.num_codebooks
    hints = torch.full((layout.row_frames, CHANNELS + 1), IGNORE)
    codes = torch.full((layout.row_frames, CHANNELS, depth), layout.start_id)
    labels = torch.full_like(codes, IGNORE)
    segments = torch.zeros(layout.row_frames, dtype=torch.long)
    at = 0
    for number, (recording, begin, end) in enumerate(row, start=1):
        whole, said = shards[recording], shards.labels(recording)  # [T', 1 or C, D], [T', 1 or C]
        here = slice(at, at + end - begin)
        fits = end - begin == layout.frames_of(len(whole))
        if splicer and fits and _happens(layout.new_phrases, generator):
            whole, said = splicer(recording, generator)
        counts = torch.ones(len(whole), dtype=torch.bool)
        if said is not None and whole.shape[1] == CHANNELS:
            whole = broken_off(whole, said, layout.user_channel)
            if fits and _happens(layout.without_echo, generator):
                whole = without_echo(whole, said, layout.user_channel, generator)
            if fits and _happens(layout.new_interruptions, generator):
                new = interrupt(whole, said, layout.user_channel, generator)
                whole, said, counts = new or (whole, said, counts)
        if whole.shape[1] == CHANNELS:
            channels = range(CHANNELS)
            kept = warped(whole, layout.user_channel, layout.user_warp, generator)
            whole, said, counts = whole[kept], None if said is None else said[kept], counts[kept]
        else:
            only = int(torch.randint(CHANNELS, (1,), generator=generator))
            channels = range(only, only + 1)
        for source, channel in zip(range(whole.shape[1]), channels, strict=True):
            for d, delay in enumerate(layout.delays[channel]):
                shift = delay + 1  # the start frame
                first, last = max(begin - shift, 0), min(end - shift, len(whole))
                if first < last:
                    into = slice(at + first + shift - begin, at + last + shift - begin)
                    codes[into, channel, d] = whole[first:last, source, d].long()
                    labels[into, channel, d] = codes[into, channel, d]
                    if channel != layout.user_channel:
                        labels[into, channel, d][~counts[first:last]] = IGNORE
                    if said is not None and d == 0:
                        hints[into, channel] = said[first:last, source].long()
                        if channel == layout.user_channel:
                            hints[into, -1] = words_before(said[:, source])[first:last]
        segments[here] = number
        at += end - begin
    if layout.user_token_noise:
        user = codes[:, layout.user_channel]  # [T, D]
        noisy = torch.rand(user.shape, generator=generator) < layout.user_token_noise
        noisy &= user != layout.start_id
        random_codes = torch.randint(layout.start_id, user.shape, generator=generator)
        if layout.code_digits:
            random_codes = one_digit_of(random_codes, user, layout.code_digits, generator)
        codes[:, layout.user_channel] = torch.where(noisy, random_codes, user)
    made = {"input_ids": codes.flatten(), "labels": labels.flatten(), "segments": segments}
    if shards.vocabulary.labels:
        made["hints"] = hints.masked_fill(hints < 0, IGNORE)
    return made


def _happens(share: float, generator: torch.Generator) -> bool:
    return share > 0 and bool(torch.rand((), generator=generator) < share)


def one_digit_of(
    others: Tensor, codes: Tensor, sizes: Sequence[int], generator: torch.Generator
) -> Tensor:
    """`codes`, each with one of its numbers, drawn at random, from `others`. Of any one shape."""
    powers = torch.tensor([1, *sizes]).cumprod(0)
    digit = torch.randint(len(sizes), codes.shape, generator=generator)
    power, size = powers[digit], torch.tensor(sizes)[digit]
    return codes + (others // power % size - codes // power % size) * power


def warped(codes: Tensor, user_channel: int, share: float, generator: torch.Generator) -> Tensor:
    """The frames of a recording in which the person speaks a little less evenly, as many.

    Of the frames in which our own channel stands still, and does for the next
    `WARP_CLEAR_FRAMES`, half of the share are left out and as many doubled: what we say stays as
    it is, and as late. Where no code repeats in silence, nothing changes. [T, C, D] -> [T]
    """
    if not share:
        return torch.arange(len(codes))
    ours = codes[:, 1 - user_channel]
    moves = torch.ones(len(codes))
    moves[1:] = (ours[1:] != ours[:-1]).any(-1).float()
    ahead = torch.nn.functional.pad(moves, (0, WARP_CLEAR_FRAMES))
    soon = torch.nn.functional.max_pool1d(ahead[None], 1 + WARP_CLEAR_FRAMES, 1)[0]  # [T]
    still = (soon == 0).nonzero()[:, 0]
    count = round(share * len(still) / 2)
    chosen = still[torch.randperm(len(still), generator=generator)[: 2 * count]]
    times = torch.ones(len(codes), dtype=torch.long)
    times[chosen[:count]], times[chosen[count:]] = 0, 2
    return torch.arange(len(codes)).repeat_interleave(times)


def collate(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """[B, ...] of each. Without `segments` where no row holds two recordings: causality alone
    then keeps what counts apart from the padding behind it, and the attention is faster."""
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    if int(batch["segments"].max()) <= 1:
        del batch["segments"]
    return batch


def counted(batch: Mapping[str, Tensor], num_codebooks: int) -> Tensor:
    """How many codes of each channel a batch has to predict. [C], float64"""
    targets = next_frame_targets(to_frames(batch["labels"], num_codebooks), batch.get("segments"))
    return (targets != IGNORE).sum((0, 1, 3)).double()


class TrainingRows(IterableDataset[dict[str, Tensor]]):
    """Endless: epoch after epoch, each newly cut, packed and shuffled, with the shards that have
    come since. `skip_rows` is where to go on."""

    def __init__(
        self, shards: Shards, held_out: frozenset[str], layout: Layout, seed: int = 0
    ) -> None:
        self._shards, self._held_out, self._layout, self._seed = shards, held_out, layout, seed
        self._splicer = Splicer(shards, layout.user_channel) if layout.new_phrases else None
        self.skip_rows = 0

    def epoch(self, number: int) -> list[Row]:
        recordings = {
            index: self._layout.frames_of(frames)
            for index, (name, frames) in enumerate(
                zip(self._shards.names, self._shards.lengths, strict=True)
            )
            if name not in self._held_out
        }
        chance = random.Random(f"{self._seed}-{number}")
        return plan(recordings, self._layout.row_frames, chance)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        number, skip = 0, self.skip_rows
        while True:
            self._shards.refresh()
            if self._splicer is not None:
                self._splicer.refresh()
            rows = self.epoch(number)
            for index in range(min(skip, len(rows)), len(rows)):
                generator = torch.Generator().manual_seed(hash((self._seed, number, index)))
                yield build_row(self._shards, rows[index], self._layout, generator, self._splicer)
            skip, number = max(0, skip - len(rows)), number + 1


class ValidationRows(Dataset[dict[str, Tensor]]):
    """Rows of the recordings named, packed once."""

    def __init__(
        self, shards: Shards, names: frozenset[str], layout: Layout, max_rows: int
    ) -> None:
        recordings = {
            index: layout.frames_of(frames)
            for index, (name, frames) in enumerate(zip(shards.names, shards.lengths, strict=True))
            if name in names
        }
        self._shards, self._layout = shards, layout
        self._rows = plan(recordings, layout.row_frames, random.Random(0))[:max_rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        return build_row(self._shards, self._rows[index], self._layout, generator)


def hold_out(shards: Shards, share: float) -> frozenset[str]:
    """The names of about that share of the recordings: by their hash, so that a recording stays
    on its side as others come. Raises `VocabularyError` where none is left to train on."""
    if not share:
        return frozenset()
    by_hash = sorted((zlib.crc32(name.encode()) / 2**32, name) for name in shards.names)
    below = [name for value, name in by_hash if value < share]
    held_out = frozenset(below or [by_hash[0][1]])
    if len(held_out) == len(shards):
        raise VocabularyError(
            f"{len(shards)} recordings are too few to hold {share:.0%} out for validation"
        )
    return held_out
