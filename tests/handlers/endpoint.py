"""An HTTP endpoint on loopback that answers when, and as far as, a test says."""

from __future__ import annotations

import json
import queue
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

from handlers.messages import Message
from handlers.remote import RemoteHandler
from handlers.ticket import Ticket

PATIENCE_S = 30.0
T = TypeVar("T")


class Exchange:
    """One request, and the means to answer it."""

    def __init__(self, handler: BaseHTTPRequestHandler) -> None:
        self._handler = handler
        self.over = threading.Event()
        self.path = handler.path
        self.headers = handler.headers
        self.peer = handler.client_address
        self.body = handler.rfile.read(int(handler.headers["Content-Length"]))

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def begin(self, kind: str = "text/event-stream", status: int = 200) -> None:
        """The head of an answer that comes in chunks."""
        self._handler.send_response(status)
        self._handler.send_header("Content-Type", kind)
        self._handler.send_header("Transfer-Encoding", "chunked")
        self._handler.end_headers()

    def send(self, data: str | bytes) -> None:
        data = data.encode() if isinstance(data, str) else data
        self._write(b"%x\r\n%b\r\n" % (len(data), data))

    def _write(self, data: bytes) -> None:
        with suppress(ConnectionError):  # the other side has seen enough
            self._handler.wfile.write(data)

    def event(self, data: Any) -> None:
        self.send(f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n")

    def end(self) -> None:
        self._write(b"0\r\n\r\n")
        self.over.set()

    def answer(self, data: str | bytes, kind: str = "application/json", status: int = 200) -> None:
        """All of an answer."""
        self.begin(kind, status)
        if data:
            self.send(data)
        self.end()

    def drop(self) -> None:
        """Reset the connection, whatever has been said."""
        linger = struct.pack("ii", 1, 0)
        self._handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._handler.close_connection = True
        self.over.set()

    def wait_closed(self) -> None:
        """Until the other side has closed the connection."""
        self._handler.connection.settimeout(PATIENCE_S)
        with suppress(ConnectionResetError):  # so it is if it left something unread
            assert self._handler.connection.recv(1) == b""
        self._handler.close_connection = True
        self.over.set()


class Endpoint:
    """Requests in the order in which they came; nothing is answered by itself."""

    def __init__(self) -> None:
        self.requests: queue.Queue[Exchange] = queue.Queue()
        requests = self.requests

        class Handle(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 0

            def do_POST(self) -> None:
                exchange = Exchange(self)
                requests.put(exchange)
                exchange.over.wait(PATIENCE_S)

            def log_message(self, format: str, *args: Any) -> None: ...

        class Server(ThreadingHTTPServer):
            request_queue_size = 64
            daemon_threads = True
            block_on_close = False

        self._server = Server(("127.0.0.1", 0), Handle)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def next(self) -> Exchange:
        return self.requests.get(timeout=PATIENCE_S)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def endpoint() -> Iterator[Endpoint]:
    one = Endpoint()
    try:
        yield one
    finally:
        while not one.requests.empty():
            one.requests.get().drop()
        one.close()


def nowhere() -> str:
    """The address of an endpoint that is down."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/v1"


class Nobody:
    def receive(self, message: Message) -> None: ...


def ticket(name: str = "") -> Ticket:
    return Ticket(Nobody(), name)


class Bench:
    """A started stage, and what it emits."""

    def __init__(self) -> None:
        self.emitted: queue.Queue[Message] = queue.Queue()

    @contextmanager
    def running(self, stage: RemoteHandler[Any]) -> Iterator[Bench]:
        stage.start()
        try:
            stage.wait_ready(PATIENCE_S)
            self.put = stage.put
            self._stage = stage
            yield self
        finally:
            stage.stop()

    def settle(self) -> None:
        """Until all requests are over and done with."""
        assert not wait(set(self._stage._launched), PATIENCE_S).not_done

    def next(self, kind: type[T]) -> T:
        message = self.emitted.get(timeout=PATIENCE_S)
        assert isinstance(message, kind), message
        return message
