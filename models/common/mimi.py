"""Mimi, the 12.5 Hz neural codec: transformers' weights, streamed by row.

All of Mimi is causal: convolutions padded to the left, transposed convolutions trimmed to the
right, attention over the last 250 positions (arXiv 2410.00037, section 3.3). So each layer needs
of the past only its last few inputs, which a RowState keeps, and nothing is late: the code of a
frame comes with the last sample of that frame.

Letters: R rows, C channels, N steps of a layer, F frames, D codebooks, H heads, S slots of a ring.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from transformers import MimiModel
from transformers.models.mimi.modeling_mimi import (
    MimiConv1d,
    MimiConvTranspose1d,
    MimiResnetBlock,
    rotate_half,
)

from models.common.errors import ArchitectureError, ConfigError
from models.common.tokens import RowState, TokenizerBase

PIECE_FRAMES = 16
"""The most frames in one pass, longer input is taken in pieces: bounds the memory and the rings."""


class MimiTokenizer(TokenizerBase):
    """A SpeechTokenizer. Raises ArchitectureError if the checkpoint's layers are not causal."""

    name = "mimi"
    encode_latency_frames = 0
    decode_latency_frames = 0
    traceable = True

    def __init__(self, model: MimiModel, num_codebooks: int = 8) -> None:
        config = model.config
        if not config.num_semantic_quantizers <= num_codebooks <= config.num_quantizers:
            raise ConfigError(
                f"{num_codebooks} codebooks asked of a Mimi that has {config.num_quantizers}, "
                f"of which the first {config.num_semantic_quantizers} are needed"
            )
        _require_causal(model)
        self.model = model.eval().requires_grad_(False)
        self.num_codebooks = num_codebooks
        self.codebook_size = config.codebook_size
        self.sample_rate_hz = config.sampling_rate
        self.frame_samples = config.frame_size

    @classmethod
    def from_pretrained(
        cls, name_or_folder: str | Path, num_codebooks: int = 8, device: str = "cpu"
    ) -> MimiTokenizer:
        return cls(MimiModel.from_pretrained(name_or_folder).to(device), num_codebooks)

    @torch.no_grad()
    def encode(
        self, samples: Tensor, state: RowState | None = None, active: Tensor | None = None
    ) -> Tensor:
        """[R, F * frame_samples] -> [R, F, D]"""
        self.check_samples(samples, state)
        state = state or self.encoder_state(len(samples))
        pieces = samples.split(PIECE_FRAMES * self.frame_samples, dim=1)
        return torch.cat([self._encode(piece, _Pass(state, active)) for piece in pieces], dim=1)

    @torch.no_grad()
    def decode(
        self, codes: Tensor, state: RowState | None = None, active: Tensor | None = None
    ) -> Tensor:
        """[R, F, D] -> [R, F * frame_samples]"""
        self.check_codes(codes, state)
        state = state or self.decoder_state(len(codes))
        pieces = codes.split(PIECE_FRAMES, dim=1)
        return torch.cat([self._decode(piece, _Pass(state, active)) for piece in pieces], dim=1)

    def _encode(self, samples: Tensor, run: _Pass) -> Tensor:
        x = run.walk(self.model.encoder.layers, samples[:, None])  # [R, C, 2F]
        x = run.transformer(self.model.encoder_transformer, x)
        x = run.conv(self.model.downsample, x)  # [R, C, F]
        codes: Tensor = self.model.quantizer.encode(x, self.num_codebooks)  # [D, R, F]
        return codes.permute(1, 2, 0)

    def _decode(self, codes: Tensor, run: _Pass) -> Tensor:
        x = self.model.quantizer.decode(codes.transpose(1, 2))  # [R, C, F]
        x = run.up(self.model.upsample, x)  # [R, C, 2F]
        x = run.transformer(self.model.decoder_transformer, x)
        return run.walk(self.model.decoder.layers, x)[:, 0]


def _require_causal(model: MimiModel) -> None:
    config = model.config
    if not config.use_causal_conv or config.trim_right_ratio != 1.0:
        raise ArchitectureError("this Mimi has layers that look ahead: it cannot be streamed")
    if config.pad_mode != "constant" or model.downsample is None:
        raise ArchitectureError("this Mimi pads or resamples in a way that is not supported")


class _Pass:
    """One call of the network over rows that go on where their state left them."""

    def __init__(self, state: RowState, active: Tensor | None) -> None:
        self.state = state
        self.active = active

    def walk(self, layers: nn.ModuleList, x: Tensor) -> Tensor:
        for layer in layers:
            if isinstance(layer, MimiConv1d):
                x = self.conv(layer, x)
            elif isinstance(layer, MimiConvTranspose1d):
                x = self.up(layer, x)
            elif isinstance(layer, MimiResnetBlock):
                x = self.walk([layer.shortcut], x) + self.walk(layer.block, x)
            else:
                x = layer(x)
        return x

    def conv(self, layer: MimiConv1d, x: Tensor) -> Tensor:
        """[R, C, N] -> [R, C', N / stride]; before the beginning zeros or the first step."""
        conv = layer.conv
        past = (conv.kernel_size[0] - 1) * conv.dilation[0] + 1 - conv.stride[0]
        joined = self.state.extend(layer, x, past, self.active)
        if layer.pad_mode == "replicate":
            had = self.state.count((layer, "steps"), x.shape[-1], self.active, x)
            begins = (had == 0)[:, None, None]
            before = torch.where(begins, x[..., :1], joined[..., :past])
            joined = torch.cat((before, x), dim=-1)
        out: Tensor = conv(joined)
        return out

    def up(self, layer: MimiConvTranspose1d, x: Tensor) -> Tensor:
        """[R, C, N] -> [R, C', N * stride]"""
        stride = layer.conv.stride[0]
        past = math.ceil(layer.conv.kernel_size[0] / stride) - 1
        out: Tensor = layer.conv(self.state.extend(layer, x, past, self.active))
        return out[..., past * stride : (past + x.shape[-1]) * stride]

    def transformer(self, model: Any, x: Tensor) -> Tensor:
        """[R, C, N] -> [R, C, N], each step over the window's last steps."""
        x = x.transpose(1, 2)
        had = self.state.count(model, x.shape[1], self.active, x)
        steps = had[:, None] + torch.arange(x.shape[1], device=x.device)  # [R, N]
        turns = _rotations(model.rotary_emb, steps)
        for layer in model.layers:
            attended = self._attend(layer.self_attn, layer.input_layernorm(x), steps, turns)
            x = x + layer.self_attn_layer_scale(attended)
            x = x + layer.mlp_layer_scale(layer.mlp(layer.post_attention_layernorm(x)))
        return x.transpose(1, 2)

    def _attend(
        self, attention: Any, x: Tensor, steps: Tensor, turns: tuple[Tensor, Tensor]
    ) -> Tensor:
        rows, length, _ = x.shape
        cos, sin = turns
        q, k, v = (
            projection(x).view(rows, length, -1, attention.head_dim).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )  # [R, H, N, head_dim]
        q, k = (part * cos + rotate_half(part) * sin for part in (q, k))
        keys = self._ring((attention, "k"), k, steps, attention.sliding_window)
        values = self._ring((attention, "v"), v, steps, attention.sliding_window)
        seen = _seen(steps, keys.shape[2], attention.sliding_window)[:, None]
        grouped = bool(k.shape[1] != q.shape[1])  # traced, a shape is no plain number
        out = nnf.scaled_dot_product_attention(
            q, keys, values, seen, scale=attention.scaling, enable_gqa=grouped
        )
        projected: Tensor = attention.o_proj(out.transpose(1, 2).reshape(rows, length, -1))
        return projected

    def _ring(self, owner: Any, x: Tensor, steps: Tensor, window: int) -> Tensor:
        """What was written last at each slot, step s at slot s mod S. [R, H, S, head_dim]"""
        slots = window + 2 * PIECE_FRAMES - 1
        ring = self.state.kept(owner, (x.shape[1], slots, x.shape[3]), x)
        index = (steps % slots)[:, None, :, None].expand_as(x)
        if self.active is not None:
            rows = self.active.to(x.device).view(-1, 1, 1, 1)
            x = torch.where(rows, x, ring.gather(2, index))
        return ring.scatter_(2, index, x)


def _rotations(rotary: Any, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [R, 1, N, head_dim]; angles in float64, as exact after days of speech."""
    angles = steps[..., None].double() * rotary.inv_freq.double()
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return (
        (angles.cos() * rotary.attention_scaling).float(),
        (angles.sin() * rotary.attention_scaling).float(),
    )


def _seen(steps: Tensor, slots: int, window: int) -> Tensor:
    """Which slots a step attends to: its own and those of the window before. [R, N, S] bool"""
    last = steps[:, -1:]  # [R, 1]
    held = last - (last - torch.arange(slots, device=steps.device)) % slots  # [R, S] steps
    age = steps[:, :, None] - held[:, None]
    return (held[:, None] >= 0) & (age >= 0) & (age < window)
