"""Fakes for the duplex brain: a tokenizer whose codes are loudness, an LM that repeats."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from handlers.duplex.options import ParrotOptions
from handlers.duplex.parts import Parts
from handlers.messages import RATE_HZ, Samples
from handlers.pipeline import DuplexPipeline, PipelineOptions
from handlers.vad.silero import SileroOptions
from models.common.tokens import RowState
from models.parrot.engine import DuplexLM, NoFreeRow
from server.brains import build_hub, build_pipeline
from server.hub import Hub
from server.metrics import Metrics
from server.options import ServerOptions
from tests.server.serving import listening

LEVELS = 100
FRAME_SAMPLES = 960  # at RATE_HZ
FRAME_S = FRAME_SAMPLES / RATE_HZ


class LoudnessTokenizer:
    """A frame's code is its loudest sample in hundredths; its sound a tone as loud."""

    name = "loudness"
    sample_rate_hz = 16_000
    frame_samples = 640
    num_codebooks = 1
    codebook_size = LEVELS + 1
    encode_latency_frames = decode_latency_frames = 0
    frame_rate_hz = 25.0
    traceable = True

    def encoder_state(self, rows: int) -> RowState:
        return RowState(rows)

    decoder_state = encoder_state

    def encode(self, samples: Tensor, state: Any = None, active: Any = None) -> Tensor:
        loudest = samples.unflatten(1, (-1, self.frame_samples)).abs().amax(-1)
        return (loudest * LEVELS).round().clamp(0, LEVELS).long()[..., None]

    def decode(self, codes: Tensor, state: Any = None, active: Any = None) -> Tensor:
        wave = torch.sin(torch.arange(self.frame_samples) * 0.1)
        return (codes[..., 0, None] / LEVELS * wave).flatten(1)


class Repeater:
    """`DuplexLM`: says in frame t + 1 what it hears in frame t. Keeps what went in and out."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.sessions: dict[Hashable, list[tuple[int, int]]] = {}
        self.closed: list[list[tuple[int, int]]] = []
        self.broken = False

    def open(self, session: Hashable, prefix: Tensor | None = None, *, seed: int = 0) -> None:
        if len(self.sessions) == self.rows:
            raise NoFreeRow("full")
        assert session not in self.sessions
        self.sessions[session] = []

    def step(self, user: Mapping[Hashable, Tensor]) -> dict[Hashable, Tensor]:
        if self.broken:
            raise RuntimeError("the LM is broken")
        for session, frame in user.items():
            self.sessions[session].append((int(frame[0]), int(frame[0])))
        return dict(user)

    def close(self, session: Hashable) -> None:
        self.closed.append(self.sessions.pop(session))


@dataclass
class Scripted:
    """`Parts` without a checkpoint."""

    lm: DuplexLM
    device: str = "cpu"

    def tokenizer(self) -> Any:
        return LoudnessTokenizer()

    def engine(self) -> DuplexLM:
        return self.lm

    def stop(self) -> None: ...


@dataclass
class DuplexServing:
    hub: Hub
    pipeline: DuplexPipeline
    port: int
    metrics: Metrics

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/v1/realtime"

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"parley_{name}", labels) or 0.0


@contextlib.asynccontextmanager
async def duplex_serving(
    parts: Parts, parrot: ParrotOptions, **options: Any
) -> AsyncIterator[DuplexServing]:
    """The real server with the real stages and ear, over these parts."""
    loop = asyncio.get_running_loop()
    metrics = Metrics()
    stages = {"vad": SileroOptions(), "parrot": parrot}
    choice = PipelineOptions({"vad": "silero", "stt": "none"}, stages, "parrot")
    pipeline = build_pipeline(choice, loop, metrics, parts)
    assert isinstance(pipeline, DuplexPipeline)
    await asyncio.to_thread(pipeline.start)
    try:
        hub = build_hub(ServerOptions(**options), choice, pipeline, metrics, loop)
        async with listening(hub) as port:
            yield DuplexServing(hub, pipeline, port, metrics)
    finally:
        await asyncio.to_thread(pipeline.stop)


def sound(seconds: float, loudness: float) -> Samples:
    """A tone [T] at RATE_HZ; its loudest sample is `loudness`."""
    time = np.arange(round(seconds * RATE_HZ))
    wave: Samples = (loudness * np.sin(time * 0.1)).astype(np.float32)
    return wave
