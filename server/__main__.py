"""`python -m server`: build the pipeline, serve, drain on SIGTERM or SIGINT, exit 0."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import uvicorn
import uvloop
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.http11 import Request

from handlers.pipeline import Pipeline, PipelineOptions
from server import app
from server.config import ServerVad, SessionConfig
from server.hub import Hub
from server.metrics import Metrics
from server.options import ServerOptions, parse
from server.turns import TurnSettings

log = logging.getLogger("parley")


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """Lets the application drop the socket of a client that does not read."""

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        if hasattr(self, "scope"):
            self.scope["state"]["transport"] = self.transport


class Server(uvicorn.Server):
    """Signals are ours: they drain first. Says on standard output where it answers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in self.servers:
            host, port = listener.sockets[0].getsockname()[:2]
            name = f"[{host}]" if ":" in host else host
            print(f"Parley answers at http://{name}:{port}/", flush=True)


def build_hub(
    options: ServerOptions,
    choice: PipelineOptions,
    pipeline: Pipeline,
    metrics: Metrics,
    loop: asyncio.AbstractEventLoop,
) -> Hub:
    vad: Any = choice.options["vad"]
    detection = ServerVad(
        threshold=vad.thresh,
        prefix_padding_ms=vad.speech_pad_ms,
        silence_duration_ms=vad.min_silence_ms,
    )
    config = SessionConfig(
        model="parley",
        voice=pipeline.voices[0],
        instructions=options.instructions,
        turn_detection=detection,
        server_vad=detection,
        transcription={"model": choice.backends["stt"]},
    )
    turns = TurnSettings(min_speech_ms=vad.min_speech_ms)
    return Hub(options, turns, config, pipeline, metrics, loop)


async def serve(options: ServerOptions, choice: PipelineOptions) -> None:
    loop = asyncio.get_running_loop()
    metrics = Metrics()
    pipeline = Pipeline(choice, loop, metrics)
    try:
        await asyncio.to_thread(pipeline.start)
        hub = build_hub(options, choice, pipeline, metrics, loop)
        server = Server(
            uvicorn.Config(
                app.build(hub),
                host=options.host,
                port=options.port,
                ws=WebSocketProtocol,
                ws_max_size=options.max_message_bytes,
                ws_per_message_deflate=False,
                lifespan="off",
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=5,
            )
        )
        stopping = asyncio.Event()
        for sig in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sig, stopping.set)
        watch = asyncio.create_task(metrics.watch_loop())
        serving = asyncio.create_task(server.serve())
        stopped = asyncio.create_task(stopping.wait())
        await asyncio.wait((serving, stopped), return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            log.info("draining %d sessions", len(hub.sessions))
            await hub.drain()
            server.should_exit = True
        watch.cancel()
        await serving
    finally:
        await asyncio.to_thread(pipeline.stop)


def main(argv: Sequence[str] | None = None) -> int:
    options, choice = parse(argv)
    logging.basicConfig(
        level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    if options.log_level != "debug":
        logging.getLogger("uvicorn").setLevel(logging.WARNING)  # no line per connection
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(options, choice))
    return 0


if __name__ == "__main__":
    sys.exit(main())
