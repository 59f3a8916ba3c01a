"""`python -m server`: build the pipeline, serve, drain on SIGTERM or SIGINT, exit 0."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
from collections.abc import Iterator, Sequence

import uvicorn
import uvloop
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.http11 import Request

from handlers.base import CannotServe
from handlers.pipeline import PipelineOptions
from server import app, downloads
from server.brains import build_hub, build_pipeline
from server.metrics import Metrics
from server.options import PROG, ServerOptions, parse

log = logging.getLogger("parley")

LONGEST_HOLD_S = 0.0001
"""A thread keeps the interpreter's lock so long while others want it. With Python's own 5 ms the
slowest of a hundred ticks of 16 duplex sessions took two to three times as long."""


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


@contextlib.contextmanager
def bound(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Every address that the name has here, taken before models are loaded for it and listened to
    after. Raises `CannotServe`."""
    with contextlib.ExitStack() as held:
        sockets = []
        try:
            if not 0 <= port < 2**16:  # getaddrinfo would take it modulo that
                raise ValueError("there is no such port")
            found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
            for family, kind, protocol, _, address in found:
                one = held.enter_context(socket.socket(family, kind, protocol))
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                one.bind(address)
                sockets.append(one)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CannotServe(f"--host {host} --port {port}: {reason}") from error
        yield sockets


async def serve(
    options: ServerOptions, choice: PipelineOptions, sockets: list[socket.socket]
) -> None:
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for sig in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sig, stopping.set)
    metrics = Metrics()
    pipeline = build_pipeline(choice, loop, metrics)
    loading = asyncio.create_task(asyncio.to_thread(pipeline.start, options.load_timeout_s))
    stopped = asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait((loading, stopped), return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():  # models may take minutes to come
            return
        await loading
        hub = build_hub(options, choice, pipeline, metrics, loop)
        # What has been loaded stays: to look through it again would stop all threads at once, for
        # a tenth of a second with model libraries.
        gc.collect()
        gc.freeze()
        server = Server(
            uvicorn.Config(
                app.build(hub),
                ws=WebSocketProtocol,
                ws_max_size=options.max_message_bytes,
                ws_per_message_deflate=False,
                lifespan="off",
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=5,
            )
        )
        watch = asyncio.create_task(metrics.watch_loop())
        serving = asyncio.create_task(server.serve(sockets))
        await asyncio.wait((serving, stopped), return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            log.info("draining %d sessions", len(hub.sessions))
            await hub.drain()
            server.should_exit = True
        watch.cancel()
        await serving
    finally:
        await asyncio.to_thread(pipeline.stop)
        await asyncio.gather(loading, return_exceptions=True)


def main(argv: Sequence[str] | None = None) -> int:
    sys.setswitchinterval(LONGEST_HOLD_S)
    options, choice = parse(argv)
    logging.basicConfig(
        level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    if options.log_level != "debug":
        for name in ("uvicorn", "httpx", "httpx2"):  # no line per connection or request
            logging.getLogger(name).setLevel(logging.WARNING)
    hints: list[str] = []
    try:
        with bound(options.host, options.port) as sockets:
            hints = _hints(choice)
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(serve(options, choice, sockets))
    except CannotServe as error:
        print("; ".join([f"{PROG}: {error}", *hints]), file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before there was a loop to tell
        return 130
    return 0


def _hints(choice: PipelineOptions) -> list[str]:
    """What else to say where the parts cannot be loaded. Settles whether the hub is asked."""
    remark = downloads.prepare(choice)
    if choice.brain != "cascade" or choice.backends == PipelineOptions().backends:
        return []
    return [*filter(None, [remark]), f"{PROG} --profile embedded needs no model"]


if __name__ == "__main__":
    sys.exit(main())
