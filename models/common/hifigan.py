"""HiFi-GAN's generator (arXiv 2010.05646), whole or as it comes.

Its convolutions are padded on both sides, so in a stream every layer is late by its right padding.
The network is written once, over a `Flow`: a signal and by how many steps it is late. What stands
before the beginning is zero at every layer, as it is in the whole pass.

Letters: R rows, C channels, N steps of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from models.common.tokens import RowState

SLOPE = 0.1
"""Of the leaky ReLUs, except the last one, which has PyTorch's default (0.01)."""


@dataclass(frozen=True, slots=True)
class Flow:
    """A signal [R, C, N] whose step n stands for step n - late_steps."""

    x: Tensor
    late_steps: int = 0

    def map(self, x: Tensor) -> Flow:
        return Flow(x, self.late_steps)


class Pass(Protocol):
    """How a layer with context on both sides is run."""

    def conv(self, layer: nn.Conv1d, flow: Flow) -> Flow:
        """A convolution of stride 1, padded to the same length."""
        ...

    def up(self, layer: nn.ConvTranspose1d, flow: Flow) -> Flow:
        """A transposed convolution that gives stride times as many steps."""
        ...

    def delay(self, owner: object, flow: Flow, late_steps: int) -> Flow:
        """The same signal, as late as that."""
        ...


class WholePass:
    """A signal from its beginning to its end: nothing is late."""

    def conv(self, layer: nn.Conv1d, flow: Flow) -> Flow:
        return Flow(layer(flow.x))

    def up(self, layer: nn.ConvTranspose1d, flow: Flow) -> Flow:
        return Flow(layer(flow.x))

    def delay(self, owner: object, flow: Flow, late_steps: int) -> Flow:
        return flow


class StreamPass:
    """The next frames of rows that go on where their state left them."""

    def __init__(self, state: RowState, active: Tensor | None, frames: int, like: Tensor) -> None:
        self.state = state
        self.active = active
        self.frames = frames
        self.had_frames = state.count("frames", frames, active, like)  # [R]

    def conv(self, layer: nn.Conv1d, flow: Flow) -> Flow:
        pad = layer.padding[0]
        joined = self.state.extend(layer, flow.x, 2 * pad, self.active)
        x = nnf.conv1d(joined, layer.weight, layer.bias, dilation=layer.dilation)
        return self._begun(Flow(x, flow.late_steps + pad))

    def up(self, layer: nn.ConvTranspose1d, flow: Flow) -> Flow:
        stride, pad = layer.stride[0], layer.padding[0]
        past = math.ceil(layer.kernel_size[0] / stride) - 1
        joined = self.state.extend(layer, flow.x, past, self.active)
        x = nnf.conv_transpose1d(joined, layer.weight, layer.bias, stride=stride)
        x = x[..., past * stride : joined.shape[-1] * stride]
        return self._begun(Flow(x, flow.late_steps * stride + pad))

    def delay(self, owner: object, flow: Flow, late_steps: int) -> Flow:
        past = late_steps - flow.late_steps
        x = self.state.extend((owner, "delay"), flow.x, past, self.active)
        return Flow(x[..., : flow.x.shape[-1]], late_steps)

    def _begun(self, flow: Flow) -> Flow:
        """Zero before the beginning: the next layer finds there what its padding would be."""
        steps = flow.x.shape[-1]
        first = self.had_frames * (steps // self.frames) - flow.late_steps  # [R]
        at = first[:, None] + torch.arange(steps, device=flow.x.device)
        return flow.map(torch.where((at >= 0)[:, None], flow.x, 0.0))


class ResidualBlock(nn.Module):
    """Pairs of a dilated and a plain convolution, each pair added to its input ("type 1").

    A subclass with other activations (BigVGAN's) overrides `activate`.
    """

    def __init__(self, channels: int, kernel_size: int, dilations: Sequence[int]) -> None:
        super().__init__()

        def conv(dilation: int) -> nn.Conv1d:
            pad = dilation * (kernel_size - 1) // 2
            return nn.Conv1d(channels, channels, kernel_size, padding=pad, dilation=dilation)

        self.convs1 = nn.ModuleList(conv(dilation) for dilation in dilations)
        self.convs2 = nn.ModuleList(conv(1) for _ in dilations)

    def activate(self, index: int, flow: Flow, run: Pass) -> Flow:
        """The activation before the index-th convolution of the block."""
        return flow.map(nnf.leaky_relu(flow.x, SLOPE))

    def forward(self, flow: Flow, run: Pass) -> Flow:
        for pair, (first, second) in enumerate(zip(self.convs1, self.convs2, strict=True)):
            inner = run.conv(first, self.activate(2 * pair, flow, run))
            inner = run.conv(second, self.activate(2 * pair + 1, inner, run))
            flow = run.delay(second, flow, inner.late_steps)
            flow = flow.map(flow.x + inner.x)
        return flow


class Generator(nn.Module):
    """Features [R, in_channels, F] to samples [R, 1, F * hop], hop the product of the rates."""

    def __init__(self, config: Mapping[str, Any], in_channels: int) -> None:
        """`config` has upsample_rates, upsample_kernel_sizes, upsample_initial_channel,
        resblock_kernel_sizes, resblock_dilation_sizes: the names of the published config.json.
        """
        super().__init__()
        channels = config["upsample_initial_channel"]
        self.conv_pre = nn.Conv1d(in_channels, channels, 7, padding=3)
        self.ups = nn.ModuleList()
        self.resblocks = nn.ModuleList()
        self.block_kernels = list(config["resblock_kernel_sizes"])
        for rate, kernel in zip(
            config["upsample_rates"], config["upsample_kernel_sizes"], strict=True
        ):
            self.ups.append(
                nn.ConvTranspose1d(
                    channels, channels // 2, kernel, rate, padding=(kernel - rate) // 2
                )
            )
            channels //= 2
            self.resblocks.extend(
                ResidualBlock(channels, size, dilations)
                for size, dilations in zip(
                    self.block_kernels, config["resblock_dilation_sizes"], strict=True
                )
            )
        self.conv_post = nn.Conv1d(channels, 1, 7, padding=3)

    @property
    def hop_samples(self) -> int:
        return math.prod(layer.stride[0] for layer in self.ups)

    @property
    def late_samples(self) -> int:
        """By how much a stream of samples is late: the right side of the receptive field."""
        late = self.conv_pre.padding[0]
        blocks = len(self.block_kernels)
        for stage, up in enumerate(self.ups):
            late = late * up.stride[0] + up.padding[0]
            late += max(
                sum(conv.padding[0] for conv in (*block.convs1, *block.convs2))
                for block in self.resblocks[stage * blocks : (stage + 1) * blocks]
            )
        return int(late + self.conv_post.padding[0])

    def forward(self, x: Tensor, run: Pass) -> Flow:
        flow = run.conv(self.conv_pre, Flow(x))
        blocks = len(self.block_kernels)
        for stage, up in enumerate(self.ups):
            flow = run.up(up, flow.map(nnf.leaky_relu(flow.x, SLOPE)))
            made = [
                block(flow, run) for block in self.resblocks[stage * blocks : (stage + 1) * blocks]
            ]
            late = max(part.late_steps for part in made)
            even = [run.delay((up, i), part, late).x for i, part in enumerate(made)]
            flow = Flow(torch.stack(even).sum(0) / blocks, late)
        flow = run.conv(self.conv_post, flow.map(nnf.leaky_relu(flow.x)))
        return flow.map(torch.tanh(flow.x))
