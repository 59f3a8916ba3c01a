"""What `--brain` chooses: the pipeline, who is admitted, and what kind of session they get."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any, cast

from handlers.duplex.options import ParrotOptions
from handlers.duplex.parts import Parts
from handlers.pipeline import DuplexPipeline, Pipeline, PipelineOptions
from server.config import ServerVad, SessionConfig
from server.duplex import DuplexSession
from server.hub import Brain, Hub, Stages
from server.metrics import Metrics
from server.options import ServerOptions
from server.session import Outbox, Session
from server.stretches import StretchSettings
from server.turns import TurnSettings

REMOTE_SOFT_END_MS = 64.0
"""A window sooner than else: an endpoint's answer is what a reply waits for. A recogniser of our
own is quick, and hears the end of a word better in the longer silence."""
REMOTE_HOLD_MS = 384
"""`--min_silence_ms`, where it is as it was and endpoints hear and answer: what they make of the
soft end is hardly there sooner, so that the longer wait costs nothing. Over 396 turns of
`benchmarks.latency` with its stubs, played through the ear and the turn machine offline, 22 % fewer
pauses were cut into than with 300 ms, and the median reply came 8 ms later."""


class Cascade:
    """Turn by turn: VAD, STT, LM, TTS."""

    def refusal(self, sessions: int) -> None:
        return None

    def session(self, hub: Hub, outbox: Outbox) -> Session:
        return Session(hub, outbox)


class Parrot:
    """A frame at a time, both ways: the duplex model, with a row for each session."""

    def __init__(self, options: ParrotOptions, pipeline: DuplexPipeline) -> None:
        self._rows = options.rows
        self._pipeline = pipeline
        self._settings = StretchSettings(options.silence_db, options.response_end_ms)

    def refusal(self, sessions: int) -> tuple[str, str] | None:
        if sessions >= self._rows:
            message = f"All {self._rows} rows of the model are taken; try again later."
            return "session_limit_reached", message
        if self._pipeline.overloaded:
            return "server_overloaded", "The server is too slow for one more; try again later."
        return None

    def session(self, hub: Hub, outbox: Outbox) -> Session:
        return DuplexSession(hub, outbox, self._pipeline, self._settings)


def build_pipeline(
    choice: PipelineOptions,
    loop: asyncio.AbstractEventLoop,
    metrics: Metrics,
    parts: Parts | None = None,
) -> Pipeline | DuplexPipeline:
    """Not started yet. Raises `handlers.base.CannotServe`."""
    if choice.brain == "cascade":
        return Pipeline(choice, loop, metrics)
    return DuplexPipeline(choice, loop, metrics, parts)


def build_hub(
    options: ServerOptions,
    choice: PipelineOptions,
    pipeline: Pipeline | DuplexPipeline,
    metrics: Metrics,
    loop: asyncio.AbstractEventLoop,
) -> Hub:
    vad: Any = choice.options["vad"]
    stt, lm = choice.backends["stt"], choice.backends.get("lm")
    hold_ms = vad.min_silence_ms
    if stt == lm == "openai" and hold_ms == type(vad)().min_silence_ms:
        hold_ms = REMOTE_HOLD_MS
    detection = ServerVad(
        threshold=vad.thresh,
        prefix_padding_ms=vad.speech_pad_ms,
        silence_duration_ms=hold_ms,
    )
    config = SessionConfig(
        model="parley",
        voice=pipeline.voices[0],
        instructions=options.instructions,
        turn_detection=detection,
        server_vad=detection,
        transcription=None if stt == "none" else {"model": stt},
    )
    brain: Brain = Cascade()
    if isinstance(pipeline, DuplexPipeline):
        brain = Parrot(choice.options["parrot"], pipeline)
        quiet = dataclasses.replace(detection, create_response=False, interrupt_response=False)
        config = dataclasses.replace(config, model="parrot", turn_detection=quiet, server_vad=quiet)
    turns = TurnSettings(min_speech_ms=vad.min_speech_ms)
    if stt == "openai":
        turns = dataclasses.replace(turns, soft_end_ms=REMOTE_SOFT_END_MS)
    stages = cast(Stages, pipeline)  # a duplex session neither asks an LM nor has TTS say things
    return Hub(options, turns, config, stages, metrics, loop, brain)
