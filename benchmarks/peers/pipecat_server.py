# mypy: ignore-errors
"""A Pipecat bot behind stub models. Runs in that package's own environment.

`python pipecat_server.py --host HOST --port PORT --models URL`. The pipeline is the one that
Pipecat's own templates make: VAD, Smart Turn and turn strategies as they come. Only the wire is
ours: a serializer that takes and gives the few Realtime events that the benchmark's listener needs.
"""

from __future__ import annotations

import argparse
import base64
import json
import uuid

import numpy as np
import soxr
import uvicorn
from fastapi import FastAPI, WebSocket
from pipecat.audio.vad.silero import SileroVADAnalyzer
from pipecat.frames.frames import (
    BotStoppedSpeakingFrame,
    Frame,
    InputAudioRawFrame,
    InterruptionFrame,
    LLMFullResponseStartFrame,
    OutputAudioRawFrame,
    OutputTransportMessageUrgentFrame,
)
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import (
    LLMContextAggregatorPair,
    LLMUserAggregatorParams,
)
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.serializers.base_serializer import FrameSerializer
from pipecat.services.openai.llm import OpenAILLMService
from pipecat.services.openai.stt import OpenAISTTService
from pipecat.services.openai.tts import OpenAITTSService
from pipecat.transports.websocket.fastapi import (
    FastAPIWebsocketParams,
    FastAPIWebsocketTransport,
)
from pipecat.workers.runner import WorkerRunner

WIRE_HZ, EAR_HZ = 24_000, 16_000


class Realtime(FrameSerializer):
    """Audio both ways, and what a listener must know to fall silent."""

    def __init__(self) -> None:
        super().__init__()
        self.item_id = "item_0"
        self._resampler = soxr.ResampleStream(WIRE_HZ, EAR_HZ, 1, "int16", "MQ")

    async def deserialize(self, data: str | bytes) -> Frame | None:
        event = json.loads(data)
        if event["type"] == "response.cancel":
            return InterruptionFrame()
        if event["type"] != "input_audio_buffer.append":
            return None
        samples = np.frombuffer(base64.b64decode(event["audio"]), "<i2")
        heard = self._resampler.resample_chunk(samples)
        return InputAudioRawFrame(heard.tobytes(), EAR_HZ, 1) if len(heard) else None

    async def serialize(self, frame: Frame) -> str | None:
        if self.should_ignore_frame(frame):
            return None
        if isinstance(frame, OutputAudioRawFrame):
            audio = base64.b64encode(frame.audio).decode()
            event = {"type": "response.output_audio.delta", "item_id": self.item_id, "delta": audio}
        elif isinstance(frame, InterruptionFrame):
            event = {"type": "input_audio_buffer.speech_started"}
        elif isinstance(frame, OutputTransportMessageUrgentFrame):
            event = frame.message
        else:
            return None
        return json.dumps(event)


class Reporter(FrameProcessor):
    """Tells where a response begins and ends."""

    def __init__(self, wire: Realtime) -> None:
        super().__init__()
        self._wire = wire
        self._open = False

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        if isinstance(frame, LLMFullResponseStartFrame):
            self._wire.item_id = f"item_{uuid.uuid4().hex[:12]}"
            await self._tell({"type": "response.created", "response": {}})
            self._open = True
        elif isinstance(frame, BotStoppedSpeakingFrame | InterruptionFrame) and self._open:
            self._open = False
            status = "cancelled" if isinstance(frame, InterruptionFrame) else "completed"
            response = {"status": status, "output": [{"id": self._wire.item_id}]}
            await self._tell({"type": "response.done", "response": response})
        await self.push_frame(frame, direction)

    async def _tell(self, event: dict) -> None:
        await self.push_frame(OutputTransportMessageUrgentFrame(message=event))


async def converse(websocket: WebSocket, models: str) -> None:
    await websocket.accept()
    await websocket.send_json({"type": "session.created", "session": {}})
    wire = Realtime()
    transport = FastAPIWebsocketTransport(
        websocket=websocket,
        params=FastAPIWebsocketParams(
            audio_in_enabled=True, audio_out_enabled=True, serializer=wire
        ),
    )
    endpoint = {"api_key": "stub", "base_url": models}
    aggregators = LLMContextAggregatorPair(
        LLMContext(), user_params=LLMUserAggregatorParams(vad_analyzer=SileroVADAnalyzer())
    )
    pipeline = Pipeline(
        [
            transport.input(),
            OpenAISTTService(**endpoint),
            aggregators.user(),
            OpenAILLMService(**endpoint),
            OpenAITTSService(**endpoint),
            Reporter(wire),
            transport.output(),
            aggregators.assistant(),
        ]
    )
    params = PipelineParams(audio_in_sample_rate=EAR_HZ, audio_out_sample_rate=WIRE_HZ)
    worker = PipelineWorker(pipeline, params=params)
    runner = WorkerRunner(handle_sigint=False)
    await runner.add_workers(worker)

    @transport.event_handler("on_client_disconnected")
    async def _(_transport: FastAPIWebsocketTransport, _client: WebSocket) -> None:
        await worker.cancel()

    await runner.run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--models", required=True, help="the stubs' base URL, /v1 included")
    options, _ = parser.parse_known_args()
    app = FastAPI()

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.websocket("/v1/realtime")
    async def realtime(websocket: WebSocket) -> None:
        await converse(websocket, options.models)

    uvicorn.run(app, host=options.host, port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
