"""VITS in two steps: a clause's latents at once, for several rows; their sound piece by piece.

The model is transformers' `VitsModel` (arXiv 2106.06103; the MMS-TTS checkpoints are of this kind).
Its `forward` draws its noise inside and sounds the whole clause: here the noise belongs to the row,
so that a row sounds the same in any batch, and the decoder can be run over any stretch of frames.

Letters: B rows, L tokens, F frames, C channels of a latent, E width of a speaker's embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize
from transformers import VitsConfig, VitsModel

from models.common.errors import ArchitectureError, ModelError, listed

LONGEST_S = 120.0
"""A clause of 200 characters takes about 15 s: durations that add up to this are broken."""
NAMES_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Clause:
    tokens: Sequence[int]
    speaker: int = 0
    speed: float = 1.0  # multiplies the checkpoint's own rate
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Latents:
    """What the decoder sounds of one clause."""

    frames: Tensor  # [C, F]
    ends: tuple[int, ...]  # [L] the frame before which each token is over
    speaker: int

    @property
    def length(self) -> int:
        return int(self.frames.shape[1])


class Vits:
    """A checkpoint, ready to speak. All but the decoder stays in float32."""

    def __init__(
        self, model: VitsModel, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> None:
        config: VitsConfig = model.config
        self.model = model.eval().requires_grad_(False).to(device)
        del model.posterior_encoder  # for training only
        for module in model.flow.modules():
            if parametrize.is_parametrized(module, "weight"):  # a weight norm, else made each time
                parametrize.remove_parametrizations(module, "weight")
        self.decoder: Any = model.decoder.to(dtype or torch.float32)
        self.device = torch.device(device)
        self.dtype = dtype or torch.float32
        self.rate_hz: int = config.sampling_rate
        self.speakers: int = max(config.num_speakers, 1)
        self.hop_samples: int = math.prod(config.upsample_rates)
        self.context_frames = _context_frames(config)

    @classmethod
    def load(
        cls, name_or_folder: str, device: torch.device | str = "cpu", dtype: Any = None
    ) -> Vits:
        """By name on the hub or from a folder.

        Raises `ArchitectureError`, which names the keys that are missing or unexpected, and what
        `from_pretrained` raises where there is no such model.
        """
        model, report = VitsModel.from_pretrained(name_or_folder, output_loading_info=True)
        problems = []
        for kind in ("missing", "unexpected", "mismatched"):
            keys = sorted(str(key) for key in report[f"{kind}_keys"])
            keys = [key for key in keys if not key.startswith("posterior_encoder.")]
            if keys:
                problems.append(f"{kind}: {listed(keys, NAMES_SHOWN)}")
        if problems:
            raise ArchitectureError(f"{name_or_folder} is no VITS model; {'; '.join(problems)}")
        return cls(model, device, dtype)

    def compile(self, mode: str) -> None:
        """`torch.compile` the decoder. Windows of few different lengths are then worth having."""
        self.decoder = torch.compile(self.decoder, mode=mode, dynamic=True)

    @torch.inference_mode()
    def plan(self, clauses: Sequence[Clause]) -> list[Latents]:
        """Text encoder, durations and flow of all rows together. Raises `ModelError`."""
        model = self.model
        lengths = [len(clause.tokens) for clause in clauses]
        ids = torch.zeros((len(clauses), max(lengths)), dtype=torch.long)
        for row, clause in enumerate(clauses):
            ids[row, : lengths[row]] = torch.tensor(clause.tokens)
        mask = _mask(lengths).to(self.device)  # [B, 1, L]
        text = model.text_encoder(
            input_ids=ids.to(self.device),
            padding_mask=mask.transpose(1, 2),
            attention_mask=mask[:, 0].long(),
        )
        voice = self._voice([clause.speaker for clause in clauses])
        noises = [torch.Generator().manual_seed(clause.seed) for clause in clauses]
        hidden = text.last_hidden_state.transpose(1, 2)
        log_durations = self._log_durations(hidden, mask, voice, noises, lengths)[:, 0]  # [B, L]
        speeds = torch.tensor([[clause.speed] for clause in clauses], device=self.device)
        durations = torch.ceil(log_durations.exp() * mask[:, 0] / (speeds * model.speaking_rate))
        totals = durations.sum(1)
        if not bool((totals * self.hop_samples < LONGEST_S * self.rate_hz).all()):  # NaN too
            raise ModelError(f"the durations of a clause add up to more than {LONGEST_S:.0f} s")
        frames, ends = self._flow(text, durations.long(), voice, noises)
        return [
            Latents(
                frames[row, :, : int(total)], tuple(ends[row, :length].tolist()), clause.speaker
            )
            for row, (total, length, clause) in enumerate(
                zip(totals, lengths, clauses, strict=True)
            )
        ]

    def _log_durations(
        self,
        hidden: Tensor,
        mask: Tensor,
        voice: Tensor | None,
        noises: list[torch.Generator],
        lengths: list[int],
    ) -> Tensor:
        """[B, C, L] -> [B, 1, L]"""
        predictor = self.model.duration_predictor
        if not self.model.config.use_stochastic_duration_prediction:
            found: Tensor = predictor(hidden, mask, voice)
            return found
        x = predictor.conv_pre(hidden)
        if voice is not None:
            x = x + predictor.cond(voice)
        x = predictor.conv_proj(predictor.conv_dds(x, mask)) * mask
        # From noise back through the flows, without the one that only training needs.
        z = _noise(noises, 2, lengths).to(self.device) * self.model.noise_scale_duration
        for flow in (*reversed(predictor.flows[2:]), predictor.flows[0]):
            z, _ = flow(z.flip(1), mask, global_conditioning=x, reverse=True)
        return z[:, :1]

    def _flow(
        self, text: Any, durations: Tensor, voice: Tensor | None, noises: list[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        """Each token's prior held for its frames, drawn from, and turned into latents.

        Durations [B, L] -> latents [B, C, F], ends [B, L].
        """
        model = self.model
        ends = durations.cumsum(1)
        lengths = [int(end) for end in ends[:, -1]]
        mask = _mask(lengths).to(self.device)  # [B, 1, F]
        frames = torch.arange(max(lengths), device=self.device).expand(len(lengths), -1)
        token = torch.searchsorted(ends, frames.contiguous(), right=True)
        token = token.clamp(max=durations.shape[1] - 1)[..., None]  # [B, F, 1]

        def held(prior: Tensor) -> Tensor:
            return prior.gather(1, token.expand(-1, -1, prior.shape[2])).transpose(1, 2)

        noise = _noise(noises, model.config.flow_size, lengths, frame_by_frame=True).to(self.device)
        spread = held(text.prior_log_variances).exp() * model.noise_scale
        latents = model.flow(held(text.prior_means) + noise * spread, mask, voice, reverse=True)
        return latents * mask, ends

    def window(self, latents: Latents, begin: int, end: int, least: int = 0) -> tuple[int, int]:
        """What frames the decoder must see for those from `begin` to `end` to be as in the whole.

        Together at least `least`, where there are so many before `end` and what belongs to it.
        """
        last = min(end + self.context_frames, latents.length)
        return max(min(begin - self.context_frames, last - least), 0), last

    @torch.inference_mode()
    def sound(self, windows: Sequence[tuple[Latents, int, int]]) -> Tensor:
        """The sound of frames (latents, first, last), equally many of each row. [B, samples]

        Right, but for `context_frames` at each end that is not the clause's own.
        """
        frames = torch.stack([latents.frames[:, first:last] for latents, first, last in windows])
        voice = self._voice([latents.speaker for latents, _, _ in windows])
        if voice is not None:
            voice = voice.to(self.dtype)
        sound: Tensor = self.decoder(frames.to(self.dtype), voice)[:, 0]
        return sound.float()

    def _voice(self, speakers: list[int]) -> Tensor | None:
        """[B, E, 1]; None for a checkpoint with one speaker."""
        if self.speakers == 1:
            return None
        ids = torch.tensor(speakers, device=self.device)
        voice: Tensor = self.model.embed_speaker(ids)[..., None]
        return voice


def _mask(lengths: Sequence[int]) -> Tensor:
    """[B, 1, longest], one where there is something."""
    places = torch.arange(max(lengths))
    return (places < torch.tensor(lengths)[:, None]).float()[:, None]


def _noise(
    rows: Sequence[torch.Generator],
    channels: int,
    lengths: Sequence[int],
    *,
    frame_by_frame: bool = False,
) -> Tensor:
    """[B, channels, longest], each row's its own whatever stands beside it.

    As `VitsModel.forward` draws after `manual_seed`: for the frames, which lie there with their
    channels side by side, torch draws in that order, and by another method.
    """
    noise = torch.zeros(len(rows), channels, max(lengths))
    for row, (generator, length) in enumerate(zip(rows, lengths, strict=True)):
        if frame_by_frame:
            drawn = torch.empty(1, length, channels).transpose(1, 2)
            noise[row, :, :length] = drawn.normal_(generator=generator)[0]
        else:
            noise[row, :, :length] = torch.randn(channels, length, generator=generator)
    return noise


def _context_frames(config: VitsConfig) -> int:
    """How many frames to each side one sample of the decoder's output depends on, or a few more."""
    reach = 3  # samples; the last convolution
    widest = max(
        sum((kernel - 1) * (dilation + 1) // 2 for dilation in dilations)
        for kernel, dilations in zip(
            config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True
        )
    )
    stages = zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True)
    for rate, kernel in reversed(list(stages)):
        reach = math.ceil((reach + widest + kernel) / rate)
    return reach + 3  # the first convolution
