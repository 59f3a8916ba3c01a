"""What a dual-channel model has beside its backbone's configuration."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from models.common.errors import ConfigError, PackedIdOverflowError

CHANNELS = 2
SPECIALS = 2
"""Ids behind each codebook's codes: `start_id` (nothing yet) and `end_id`."""
MAX_PACKED_IDS = 2**31
JOINS = ("pair", "sum")
LAYOUT = ("codebook_size", "num_codebooks", "share_tokens")
"""The fields that decide the shapes of the weights. `join` is not among them."""


class DualChannelConfig(PreTrainedConfig):
    """Fields that stand beside those of the backbone; stand it behind the backbone's class.

    `vocab_size` follows from the others and can't be chosen. Raises `ConfigError`.
    """

    join: str = "pair"
    """`pair`: the frame's tokens one by one on one position (as published). `sum`: their
    embeddings summed into one, and a head per channel."""
    codebook_size: int = 1000
    num_codebooks: int = 1
    """D, codebooks per channel, all predicted at once for the next frame."""
    share_tokens: bool = False
    """Both channels use the same rows of the embedding and the head, as published. `pair` only:
    a sum could not tell who said what. Off, a checkpoint runs with either `join`."""
    delays: list[int] | None = None
    """By how many frames each codebook comes later than the first, see `frames.delay`."""
    base_vocab_size: int = 0
    """Rows of the embedding that a text checkpoint brought along, before the speech tokens."""
    user_channel: int = 0
    user_loss_weight: float = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        self._check()
        self.vocab_size = self.base_vocab_size + self.speech_tables * self.slot_size
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        if self.join not in JOINS:
            raise ConfigError(f"join={self.join!r}: must be one of {', '.join(JOINS)}")
        if self.join == "sum" and self.share_tokens:
            raise ConfigError(
                "join='sum' needs share_tokens=False: a sum of shared embeddings "
                "doesn't tell the channels apart"
            )
        if self.codebook_size < 1 or self.num_codebooks < 1:
            raise ConfigError(
                f"codebook_size={self.codebook_size}, num_codebooks="
                f"{self.num_codebooks}: both must be at least 1"
            )
        if self.user_channel not in range(CHANNELS):
            raise ConfigError(f"user_channel={self.user_channel}: must be 0 or 1")
        if self.user_loss_weight < 0:
            raise ConfigError(f"user_loss_weight={self.user_loss_weight}: must not be negative")
        if self.delays is not None and (
            len(self.delays) != self.num_codebooks or min(self.delays) < 0
        ):
            raise ConfigError(
                f"delays={self.delays}: need {self.num_codebooks} numbers of frames, "
                "one per codebook, none negative"
            )

    @property
    def start_id(self) -> int:
        """Stands before the first frame, and for codes that are delayed and not there yet."""
        return self.codebook_size

    @property
    def end_id(self) -> int:
        return self.codebook_size + 1

    @property
    def slot_size(self) -> int:
        """K, ids per codebook, specials included."""
        return self.codebook_size + SPECIALS

    @property
    def slots(self) -> int:
        """S, tokens per frame: channel by channel, codebook by codebook."""
        return CHANNELS * self.num_codebooks

    @property
    def speech_tables(self) -> int:
        """Tables of `slot_size` rows in the embedding."""
        return self.num_codebooks if self.share_tokens else self.slots

    @property
    def tokens_per_frame(self) -> int:
        """Positions in the backbone's sequence, and in its cache, that a frame takes."""
        return self.slots if self.join == "pair" else 1

    @property
    def packed_ids(self) -> int:
        """How many ids number every possible frame. Raises `PackedIdOverflowError`."""
        count = int(self.slot_size**self.slots)
        if count > MAX_PACKED_IDS:
            raise PackedIdOverflowError(
                f"{self.slots} tokens of {self.slot_size} ids per frame make {count} packed ids; "
                f"the limit is {MAX_PACKED_IDS}"
            )
        return count


OWN_FIELDS = tuple(DualChannelConfig.__annotations__)
