"""Stages whose model answers over HTTP: one client and one event loop in a thread of their own.

An answer is awaited there, never on the stage's own thread, so that one stage serves as many
requests at a time as there are sessions. A ticket that dies closes its request.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from handlers.base import Handler, StageError
from handlers.ticket import Ticket

if TYPE_CHECKING:
    import httpx2

log = logging.getLogger(__name__)

S = TypeVar("S")
P = ParamSpec("P")

MAX_CONNECTIONS = 512
KEEPALIVE_CONNECTIONS = 64
KEEPALIVE_S = 60.0
ERROR_BODY_BYTES = 65_536
DRAIN_S = 0.05
DIRECT = ("all://localhost", "all://127.0.0.1", "all://[::1]")
"""Never through the proxy that the environment may name."""
_IDENTIFIER = re.compile(r"[a-z_]{1,64}")
_FAULTS = {
    401: ("unauthorized", "did not accept the server's key"),
    403: ("unauthorized", "did not accept the server's key"),
    408: ("timeout", "took too long"),
    429: ("rate_limited", "has too many requests"),
}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An OpenAI-compatible service. Without a key, the environment variable's is used."""

    base_url: str  # http://host:port/v1
    api_key: str = field(default="", repr=False)
    key_variable: str = ""
    connect_timeout_s: float = 2.0

    def url(self, path: str) -> str:
        return self.base_url.rstrip("/") + path

    def headers(self) -> dict[str, str]:
        key = self.api_key or os.environ.get(self.key_variable, "")
        return {"Authorization": f"Bearer {key}"} if key else {}


class RemoteHandler(Handler[S]):
    """The HTTP side of a stage. Its failures are `StageError`s named after the stage:

    `STAGE_unreachable`, `_timeout`, `_unauthorized`, `_rate_limited`, `_refused` (another 4xx),
    `_endpoint_error` (5xx), `_interrupted` (it broke off) and `_bad_answer`.
    """

    def setup(self) -> None:
        import httpx2

        for name in ("httpx2", "httpcore2"):  # they would log every URL, and that may hold a key
            logging.getLogger(name).setLevel(logging.WARNING)
        self._httpx = httpx2
        self._launched: set[Future[None]] = set()
        started: Future[None] = Future()
        self._wire = threading.Thread(
            target=lambda: asyncio.run(self._hold_client(started)),
            name=f"{self.stage}-http",
            daemon=True,
        )
        self._wire.start()
        started.result()

    async def _hold_client(self, started: Future[None]) -> None:
        limits = self._httpx.Limits(
            max_connections=MAX_CONNECTIONS,
            max_keepalive_connections=KEEPALIVE_CONNECTIONS,
            keepalive_expiry=KEEPALIVE_S,
        )
        try:
            self._loop = asyncio.get_running_loop()
            self._left = asyncio.Event()
            self._client = self._httpx.AsyncClient(limits=limits, mounts=dict.fromkeys(DIRECT))
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(None)
        async with self._client:
            await self._left.wait()

    def teardown(self) -> None:
        for future in list(self._launched):
            future.cancel()
        self._loop.call_soon_threadsafe(self._left.set)
        self._wire.join()

    def launch(
        self, ticket: Ticket, work: Callable[P, Awaitable[None]], *args: P.args, **kwargs: P.kwargs
    ) -> Callable[[], None]:
        """Run `work` on the HTTP thread until it is done, fails the ticket, or the ticket dies.

        Returns a function that ends it earlier.
        """

        async def guarded() -> None:
            try:
                await work(*args, **kwargs)
            except Exception as error:
                self.emit(self._failure(ticket, self.named(error)))

        future = asyncio.run_coroutine_threadsafe(guarded(), self._loop)
        self._launched.add(future)

        def end() -> None:
            future.cancel()

        forget = ticket.on_cancel(end)

        def over(done: Future[None]) -> None:
            self._launched.discard(done)
            forget()

        future.add_done_callback(over)
        return end

    @asynccontextmanager
    async def post(
        self, endpoint: Endpoint, path: str, **content: Any
    ) -> AsyncIterator[httpx2.Response]:
        """A good answer to a POST, its body still to be read; `content` as httpx takes it.

        No answer, or a 5xx, is asked for once more: a connection kept from before may have been
        closed meanwhile. Raises `StageError` or what httpx raises; see `named`.
        """
        httpx = self._httpx
        timeout = httpx.Timeout(None, connect=endpoint.connect_timeout_s, pool=0.0)
        address, headers = endpoint.url(path), endpoint.headers()
        for last in (False, True):
            request = self._client.build_request(
                "POST", address, headers=headers, timeout=timeout, **content
            )
            try:
                response = await self._client.send(request, stream=True)
            except (httpx.NetworkError, httpx.RemoteProtocolError):
                if last:
                    raise
                continue
            if response.status_code < 500 or last:
                break
            await response.aclose()
        try:
            if not response.is_success:
                raise await self._fault(response)
            yield response
        finally:
            await response.aclose()

    async def drain(self, rest: AsyncIterator[object]) -> None:
        """Read what is behind the last word, if it comes at once: the connection serves again."""
        with suppress(TimeoutError, self._httpx.HTTPError):
            async with asyncio.timeout(DRAIN_S):
                async for _ in rest:
                    pass

    async def _fault(self, response: httpx2.Response) -> StageError:
        """The named error of an answer that is none. Its text stays here: it may quote us."""
        body = b""
        async for piece in response.aiter_bytes():
            body += piece
            if len(body) > ERROR_BODY_BYTES:
                break
        status = response.status_code
        log.warning("%s: the endpoint answered %d %s", self.stage, status, _identifier(body))
        ours = ("endpoint_error", "failed") if status >= 500 else ("refused", "refused the request")
        code, what = _FAULTS.get(status, ours)
        return self.error(code, f"The {self.stage} endpoint {what} (HTTP {status}).")

    def error(self, code: str, message: str) -> StageError:
        return StageError(f"{self.stage}_{code}", message)

    def bad_answer(self, what: str) -> StageError:
        return self.error("bad_answer", f"The {self.stage} endpoint's answer {what}.")

    def named(self, error: Exception) -> Exception:
        """What went wrong with a request, as a `StageError` where it has a name."""
        httpx, where = self._httpx, f"The {self.stage} endpoint"
        match error:
            case httpx.PoolTimeout():
                return self.error("overloaded", f"{where} has too many requests from this server.")
            case httpx.ConnectError() | httpx.ConnectTimeout() | httpx.ProxyError():
                return self.error("unreachable", f"{where} cannot be reached.")
            case httpx.TimeoutException() | TimeoutError():
                return self.error("timeout", f"{where} took too long.")
            case httpx.NetworkError() | httpx.RemoteProtocolError():
                return self.error("interrupted", f"{where} broke off.")
            case httpx.SSEError() | httpx.DecodingError():
                return self.bad_answer("cannot be read")
            case httpx.UnsupportedProtocol() | httpx.InvalidURL() | httpx.LocalProtocolError():
                return self.error("unreachable", f"{where} has no valid address or key.")
        return error


def _identifier(body: bytes) -> str:
    """The error's own code in an endpoint's answer, if it is no more than an identifier."""
    try:
        error = json.loads(body)["error"]
        found = next(error[name] for name in ("code", "type") if isinstance(error[name], str))
    except (ValueError, KeyError, TypeError, StopIteration, RecursionError):
        return ""
    return found if _IDENTIFIER.fullmatch(found) else ""
