"""The dual-channel language model, independent of its backbone.

B rows, T frames, C = 2 channels, D codebooks, S = C * D slots of a frame, K ids per slot,
P positions in the backbone's sequence per frame (S when joined as `pair`, 1 as `sum`),
L = T * P, H hidden width, E width of an attention head.

`pair`, as published: the S tokens of a frame stand one by one on one rotary position; each slot
has its own embedding, added to queries and keys after the rotation; in the frame, a token sees
the earlier ones of its own channel and none of the other's. What stands at a slot predicts the
same slot of the next frame. The channel of a slot is a learned embedding; its codebook d is
(sin 2 pi d / D, cos 2 pi d / D), for which we learn a projection.

`sum`: a frame is the sum of its embeddings, and all slots of the next frame are predicted from it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from models.common.checkpoint import saved_config
from models.common.errors import ArchitectureError, ConfigError, FrameLengthError, VocabularyError
from models.common.halves import Product, product
from models.common.masks import frame_mask, positions_in_segments
from models.parrot.attention import EAGER, SDPA, FrameCache, KeyValueStore
from models.parrot.config import CHANNELS, LAYOUT, OWN_FIELDS, DualChannelConfig
from models.parrot.frames import to_frames
from models.parrot.hints import Hints
from models.parrot.loss import channel_losses, next_frame_targets

BuildMask = Callable[[int | None], Tensor | None]


@dataclass
class DualChannelOutput(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None
    """[B, T, C, D, K]; those at frame t are for frame t + 1."""
    channel_losses: Tensor | None = None
    """[C], unweighted, in nats."""
    hint_losses: Tensor | None = None
    """As `Hints` gives them."""
    past_key_values: FrameCache | None = None


class DualChannelModel(PreTrainedModel):
    """Stands before a Transformers causal LM among the bases and makes it dual-channel."""

    backbone_config: ClassVar[type[PreTrainedConfig]]
    """The configuration of the ordinary checkpoints that `from_pretrained` converts."""
    new_parameters: ClassVar[frozenset[str]] = frozenset(
        {"channel_embed.weight", "depth_proj.weight"}
    )
    accepts_loss_kwargs = False
    config: DualChannelConfig

    def __init__(self, config: DualChannelConfig) -> None:
        super().__init__(config)
        self.hints: Hints | None = None  # in training only
        self._heads: dict[int, Product] = {}
        head_dim = self.model.layers[0].self_attn.head_dim
        self.channel_embed = nn.Embedding(CHANNELS, head_dim)
        self.depth_proj = nn.Linear(2, head_dim, bias=False) if config.num_codebooks > 1 else None
        if config.join == "sum":  # kept, so that the weights fit either way, but not used
            self.channel_embed.requires_grad_(False)
            if self.depth_proj is not None:
                self.depth_proj.requires_grad_(False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        segments: Tensor | None = None,
        labels: Tensor | None = None,
        hints: Tensor | None = None,
        past_key_values: FrameCache | None = None,
        logits_to_keep: int = 0,
    ) -> DualChannelOutput:
        """Predicts every next frame.

        `input_ids`: [B, T * S] codes, interleaved as `frames.interleave` does. `segments`:
        [B, T], the recording each frame belongs to, 0 for padding; none means one recording per
        row. `labels`: the codes again, [B, T * S], -100 where they don't count; they are shifted
        here. `hints`: what is said, [B, T, C + 1], for `self.hints`. `past_key_values`: the frames
        before these; it grows by them. `logits_to_keep`: the number of last frames to predict from,
        0 for all.

        Raises `FrameLengthError` where the tokens make no whole frames, or labels or segments
        don't match them. That the codes are below K is for `interleave` to check, off the device.
        """
        frames = to_frames(input_ids, self.config.num_codebooks)  # [B, T * S] -> [B, T, C, D]
        rows, count = frames.shape[:2]
        for name, given, wanted in (
            ("labels", labels, input_ids.shape),
            ("segments", segments, (rows, count)),
        ):
            if given is not None and given.shape != wanted:
                raise FrameLengthError(f"{name}: {tuple(given.shape)}, not {tuple(wanted)}")
        past = 0
        if past_key_values is not None:
            past = past_key_values.frames
            past_key_values.extend(rows, count, segments)
            segments = past_key_values.segments  # [B, past + T]
        masks = self.attention_masks(
            lambda window: self._mask(count, past + count, segments, window)
        )
        if segments is None:
            positions = torch.arange(past, past + count, device=frames.device)[None]  # [1, T]
        else:
            positions = positions_in_segments(segments)[:, past:]  # [B, past + T] -> [B, T]
        hidden, middle = self._encode(frames, positions, masks, past_key_values)
        logits = self.predict(hidden[:, -logits_to_keep * self.config.tokens_per_frame :])
        if labels is None:
            return DualChannelOutput(logits=logits, past_key_values=past_key_values)
        if logits_to_keep or past:
            raise ValueError("labels need the logits of all frames, and no past")
        targets = next_frame_targets(to_frames(labels, self.config.num_codebooks), segments)
        losses = channel_losses(logits, targets)  # [C]
        weights = torch.ones_like(losses)
        weights[self.config.user_channel] = self.config.user_loss_weight
        loss, hint_losses = (losses * weights).sum(), None
        if self.hints is not None and middle is not None and hints is not None:
            hint_losses = self.hints(*middle, hidden, hints, segments)
            loss = loss + self.hints.weight * hint_losses.sum()
        return DualChannelOutput(loss, logits, losses, hint_losses, past_key_values)

    @torch.no_grad()
    def step(self, frame: Tensor, cache: FrameCache) -> Tensor:
        """One frame in, the logits of the next out. [B, C, D] -> [B, C, D, K]"""
        output = self(frame.flatten(1), past_key_values=cache)
        logits: Tensor = output.logits[:, -1]  # [B, 1, C, D, K] -> [B, C, D, K]
        return logits

    def encode(
        self,
        frames: Tensor,
        positions: Tensor,
        masks: Any,
        store: KeyValueStore | None = None,
    ) -> Tensor:
        """The backbone over frames [B, T, C, D] at positions [B, T] -> [B, L, H].

        `masks` as `attention_masks` returns them, over all that `store` answers with.
        """
        return self._encode(frames, positions, masks, store)[0]

    def _encode(
        self, frames: Tensor, positions: Tensor, masks: Any, store: KeyValueStore | None
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """And what `self.hints` are learnt from, [B, T, H] of two layers in the middle."""
        tables = torch.arange(self.config.speech_tables, device=frames.device)
        offsets = self.config.base_vocab_size + tables * self.config.slot_size
        offsets = offsets.view(-1, self.config.num_codebooks)  # [C or 1, D]
        embeds = self.get_input_embeddings()(frames + offsets)  # [B, T, C, D] -> [B, T, C, D, H]
        slot_embeds = None
        if self.config.join == "sum":
            embeds = embeds.sum((2, 3))  # -> [B, L, H], L = T
        else:
            embeds = embeds.flatten(1, 3)  # -> [B, L, H], L = T * S
            positions = positions.repeat_interleave(self.config.slots, dim=1)  # [B, T] -> [B, L]
            slot_embeds = self.slot_embeds().repeat(frames.shape[1], 1)  # [S, E] -> [L, E]
        output = self.model(
            inputs_embeds=embeds,
            position_ids=positions,
            attention_mask=masks,
            use_cache=False,
            slot_embeds=slot_embeds,
            store=store,
            output_hidden_states=self.hints is not None,
        )
        middle = None
        if self.hints is not None:
            middle = output.hidden_states[self.hints.middle : self.hints.middle + 2]
        return output.last_hidden_state, middle

    def predict(self, hidden: Tensor, channel: int | None = None) -> Tensor:
        """[B, L, H] -> [B, T, C, D, K], from the head's rows for speech alone; or one channel's,
        [B, T, D, K]"""
        depth = self.config.num_codebooks
        if channel in self._heads:
            return self._heads[channel](hidden).unflatten(-1, (depth, self.config.slot_size))
        weight, bias = self._head(channel)
        if self.config.join == "sum":
            flat = nn.functional.linear(hidden, weight.flatten(0, 2))
            logits = flat.unflatten(-1, weight.shape[:3])
        else:
            by_slot = hidden.unflatten(1, (-1, CHANNELS, depth))  # [B, L, H] -> [B, T, C, D, H]
            if channel is not None:
                by_slot = by_slot[:, :, channel, None]
            weight = weight.expand(by_slot.shape[2], -1, -1, -1)
            logits = torch.einsum("btcdh,cdkh->btcdk", by_slot, weight)
        if bias is not None:
            logits = logits + bias
        return logits if channel is None else logits[:, :, 0]

    def lay_out_head(self, channel: int) -> None:
        """For `predict` of that channel, where one product does it; its weight stays as it is."""
        if self.config.join == "sum":
            weight, bias = self._head(channel)
            flat = None if bias is None else bias.flatten()
            self._heads[channel] = product(weight.flatten(0, 2), flat)

    def _head(self, channel: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Weight [C, D, K, H] and bias [C, D, K] for speech, or those of one channel, C = 1."""
        base = self.config.base_vocab_size
        shape = (-1, self.config.num_codebooks, self.config.slot_size)
        weight, bias = self.lm_head.weight[base:].view(*shape, self.config.hidden_size), None
        if self.lm_head.bias is not None:
            bias = self.lm_head.bias[base:].view(shape)
        if channel is not None:
            weight = weight.expand(CHANNELS, -1, -1, -1)[channel, None]
            bias = None if bias is None else bias.expand(CHANNELS, -1, -1)[channel, None]
        return weight, bias

    def slot_embeds(self) -> Tensor:
        """What the slots of a frame add to queries and keys. [S, E]"""
        embeds = self.channel_embed.weight[:, None]  # [C, 1, E]
        if self.depth_proj is not None:
            depth = self.config.num_codebooks
            angle = torch.arange(depth, device=embeds.device) * (2 * math.pi / depth)
            circle = torch.stack((angle.sin(), angle.cos()), dim=-1).to(embeds.dtype)  # [D, 2]
            embeds = embeds + self.depth_proj(circle)  # -> [C, D, E]
        return embeds.flatten(0, 1)

    def frame_block(self) -> Tensor:
        """Which positions of a frame see which: earlier ones of the same channel. [P, P]"""
        per_frame, depth = self.config.tokens_per_frame, self.config.num_codebooks
        index = torch.arange(per_frame, device=self.device)
        channel = index // depth
        return (index[None] <= index[:, None]) & (channel[None] == channel[:, None])

    def attention_masks(self, build: BuildMask) -> Any:
        """The mask, or masks, that the backbone wants. `build` takes the window in frames."""
        return build(None)

    def _mask(
        self, queries: int, frames: int, segments: Tensor | None, window: int | None
    ) -> Tensor | None:
        """[1 or B, 1, Q * P, T * P], or None where the fast kernel's own causal rule is right."""
        plain = self.config.join == "sum" and segments is None
        limited = window is not None and window < frames
        if plain and not limited and queries in (1, frames) and self._attention() == SDPA:
            return None
        return frame_mask(
            queries, frames, within=self.frame_block(), segments=segments, window=window
        )

    def _attention(self) -> str:
        return str(self.config._attn_implementation)

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, *args: Any, **kwargs: Any
    ) -> str:
        """Any other attention would leave the channels out without a word."""
        ours = {None: SDPA, "sdpa": SDPA, SDPA: SDPA, "eager": EAGER, EAGER: EAGER}
        if attn_implementation not in ours:
            raise ConfigError(
                f"attn_implementation={attn_implementation!r}: dual-channel models have "
                "'sdpa' and 'eager'"
            )
        return ours[attn_implementation]

    @classmethod
    def can_generate(cls) -> bool:
        return False

    def generate(self, *args: Any, **kwargs: Any) -> None:
        """Transformers' loop knows one token per step, not a frame. Use `step`."""
        raise NotImplementedError("a dual-channel model goes frame by frame: use step()")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> Self:
        """Loads a dual-channel checkpoint, or makes one of an ordinary checkpoint.

        Fields of the configuration may be given: all with an ordinary checkpoint, and those that
        leave the weights' shapes alone (`join`, for one) with a dual-channel one.

        Raises `ArchitectureError`, `VocabularyError`.
        """
        path = pretrained_model_name_or_path
        if "config" in kwargs:
            return cls._load(path, *args, **kwargs)
        saved = saved_config(path)
        if saved["model_type"] == cls.config_class.model_type:
            for name in LAYOUT:
                if name in kwargs and kwargs[name] != saved[name]:
                    raise VocabularyError(
                        f"{path}: its {name} is {saved[name]}, not {kwargs[name]}"
                    )
            return cls._load(path, *args, **kwargs)
        if saved["model_type"] == cls.backbone_config.model_type:
            return cls._from_backbone(path, *args, **kwargs)
        raise ArchitectureError(
            f"{path} holds a {saved['model_type']!r} model; {cls.__name__} takes "
            f"{cls.config_class.model_type!r} and {cls.backbone_config.model_type!r}"
        )

    @classmethod
    def _from_backbone(cls, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Self:
        ordinary = cls.backbone_config.from_pretrained(path).to_dict()
        own = {key: kwargs.pop(key) for key in OWN_FIELDS if key in kwargs}
        config = cls.config_class.from_dict(
            ordinary | own | {"base_vocab_size": ordinary["vocab_size"]}
        )
        grown = config.vocab_size
        config.vocab_size = config.base_vocab_size  # the table that the checkpoint has
        model = cls._load(path, *args, config=config, new=cls.new_parameters, **kwargs)
        model.resize_token_embeddings(grown, mean_resizing=False)
        return model

    @classmethod
    def _load(
        cls,
        path: str | os.PathLike[str],
        *args: Any,
        new: frozenset[str] = frozenset(),
        **kwargs: Any,
    ) -> Self:
        model, report = super().from_pretrained(
            path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        for name, saved, wanted in report["mismatched_keys"]:
            raise VocabularyError(
                f"{path}: {name} is {tuple(saved)}, the configuration asks for {tuple(wanted)}"
            )
        missing = set(report["missing_keys"]) - new
        if missing:
            raise ArchitectureError(f"{path} lacks {', '.join(sorted(missing))}")
        loaded: Self = model
        return loaded
