"""Streaming English speech recognition by PocketSphinx, which needs no download.

Its binding holds the GIL while it computes, so it decodes in processes of its own (`decoding`).
"""

from __future__ import annotations

import json
import logging
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from handlers.audio import to_pcm16
from handlers.base import Emit, Handler, Observer, StageError
from handlers.messages import EAR_RATE_HZ, Conclude, Heard, Message, Transcript
from handlers.options import option
from handlers.stt import decoding
from handlers.ticket import Ticket

log = logging.getLogger(__name__)

SAMPLE_BYTES = 2
BITE_BYTES = EAR_RATE_HZ // 10 * SAMPLE_BYTES
"""What is decoded at a time: 100 ms, in 10 ms. A quarter cheaper than every 32 ms window alone."""
IN_FLIGHT = 4
"""Messages a worker may have unanswered; the others wait here, where they can be dropped."""
LOAD_TIMEOUT_S = 60.0
LEAVE_TIMEOUT_S = 2.0

BUSY = StageError("stt_busy", "All speech decoders are in use.")
OVERLOADED = StageError("stt_overloaded", "Speech recognition has fallen too far behind.")
DIED = StageError("stt_worker_died", "A speech decoder ended unexpectedly.")


@dataclass(frozen=True)
class PocketSphinxOptions:
    """One pass and the best path through its lattice. Over eSpeak's sentences in five voices that
    leaves 0.43 of the words wrong at 0.07 of real time; with `ds` 2, 0.61 at 0.055. Three passes
    do no better, at 0.17 and 100 ms after the end. Clean recorded speech comes out mostly right.
    """

    decoders: int = option(16, "utterances heard at a time", "stt_decoders")
    backlog_s: float = option(
        75.0, "audio waiting per utterance, more than the ear's look-back (s)", "stt_backlog_s"
    )
    ds: int = option(1, "acoustic scores every n-th frame", "stt_ds")
    topn: int = option(2, "Gaussians scored per codebook", "stt_topn")
    maxhmmpf: int = option(3000, "HMMs searched per frame", "stt_maxhmmpf")
    maxwpf: int = option(10, "words ending per frame", "stt_maxwpf")

    def decoder_config(self) -> dict[str, Any]:
        return {
            "fwdflat": False,
            "bestpath": True,
            "ds": self.ds,
            "topn": self.topn,
            "maxhmmpf": self.maxhmmpf,
            "maxwpf": self.maxwpf,
        }


_Item: TypeAlias = bytes | Conclude | None
"""What a worker answers: audio, a request, or (None) its greeting and `RESET`."""


@dataclass(slots=True, eq=False)
class _Worker:
    pipe: Connection
    pid: int | None = None
    ticket: Ticket | None = None
    waiting: deque[_Item] = field(default_factory=deque)
    waiting_bytes: int = 0
    rest: bytes = b""  # less than a bite
    sent: deque[_Item] = field(default_factory=lambda: deque([None]))

    def hear(self, pcm: bytes) -> None:
        pcm = self.rest + pcm
        whole = len(pcm) - len(pcm) % BITE_BYTES
        self.waiting.extend(pcm[at : at + BITE_BYTES] for at in range(0, whole, BITE_BYTES))
        self.waiting_bytes += whole
        self.rest = pcm[whole:]
        self.pump()

    def conclude(self, request: Conclude) -> None:
        if self.rest:
            self.waiting.append(self.rest)
            self.waiting_bytes += len(self.rest)
            self.rest = b""
        self.waiting.append(request)
        self.pump()

    def pump(self) -> None:
        """Send on what may be sent on."""
        while self.waiting and len(self.sent) < IN_FLIGHT:
            item = self.waiting.popleft()
            self.sent.append(item)
            if isinstance(item, bytes):
                self.waiting_bytes -= len(item)
            with suppress(OSError):  # it died: the reader sees that too
                self.pipe.send_bytes(_encoded(item))

    def forget(self) -> None:
        """Drop the utterance. The worker is idle when it has said that it did."""
        self.ticket = None
        self.waiting.clear()
        self.waiting_bytes = 0
        self.rest = b""
        self.waiting.append(None)
        self.pump()

    def concluding(self) -> bool:
        return any(isinstance(item, Conclude) for item in (*self.sent, *self.waiting))


def _encoded(item: _Item) -> bytes:
    if isinstance(item, bytes):
        return decoding.AUDIO + item
    return decoding.RESET if item is None else decoding.CONCLUDE


class _Nursery:
    """The process that loads the model and forks workers."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.control, theirs = socket.socketpair()
        with theirs:
            # Not as a module: that would put handlers/stt in front of the path, and with it this
            # file in front of the pocketsphinx package. Own session: Ctrl-C is for the server.
            script = Path(decoding.__file__)
            self._process = subprocess.Popen(
                [sys.executable, "-P", script, str(theirs.fileno()), json.dumps(config)],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

        self.control.settimeout(LOAD_TIMEOUT_S)
        self.loaded = False

    def listen(self) -> bool:
        """Wait for its word that it has loaded; False when it has ended. Raises TimeoutError."""
        try:
            self.loaded = self.control.recv(1) == decoding.READY
        except ConnectionResetError:
            return False
        return self.loaded

    def fork(self) -> _Worker:
        ours, theirs = socket.socketpair()
        with theirs, suppress(OSError):  # its own death is noticed elsewhere
            socket.send_fds(self.control, [decoding.FORK], [theirs.fileno()])
        return _Worker(Connection(ours.detach()))

    def close(self) -> None:
        """Wait until it and its workers, whose pipes are closed, have left."""
        self.control.close()
        try:
            self._process.wait(LEAVE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class PocketSphinxSTT(Handler["_Worker | None"]):
    """An utterance takes a worker at its first audio and gives it back when its ticket dies.

    Fails an utterance as `stt_busy` (at once, if no worker is idle), `stt_overloaded` or
    `stt_worker_died`; a worker that died is replaced.
    """

    stage: ClassVar[str] = "stt"
    requests: ClassVar[tuple[type, ...]] = (Conclude,)
    Options: ClassVar[type[PocketSphinxOptions]] = PocketSphinxOptions

    def __init__(
        self, options: PocketSphinxOptions, *, emit: Emit, observer: Observer | None = None
    ) -> None:
        super().__init__(emit, observer=observer)
        self.options = options
        self._lock = threading.Lock()  # the workers and the idle list: two threads use them
        self._idle: deque[_Worker] = deque()
        self._workers: set[_Worker] = set()
        self._selector = selectors.DefaultSelector()
        self._backlog_bytes = round(options.backlog_s * EAR_RATE_HZ) * SAMPLE_BYTES

    def setup(self) -> None:
        self._nursery = _Nursery(self.options.decoder_config())
        self._end, self._ended = socket.socketpair()
        self._selector.register(self._ended, selectors.EVENT_READ)
        self._fill()
        if self._nursery.listen():
            for worker in list(self._workers):  # an utterance that found none idle would fail
                self._answered(worker)
        if not self._idle:
            self._release()
            raise RuntimeError("PocketSphinx could not be loaded")
        self._selector.register(self._nursery.control, selectors.EVENT_READ, self._nursery)
        self._reader = threading.Thread(target=self._read, name="stt-reader", daemon=True)
        self._reader.start()

    def teardown(self) -> None:
        self._end.close()
        self._reader.join()
        self._release()

    def _release(self) -> None:
        self._selector.close()
        self._ended.close()
        for worker in self._workers:
            worker.pipe.close()
        self._nursery.close()

    def open(self, ticket: Ticket) -> _Worker | None:
        with self._lock:
            worker = self._idle.pop() if self._idle else None
            if worker is not None:
                worker.ticket = ticket
        if worker is None:
            self.emit(self._failure(ticket, BUSY))
        return worker

    def close(self, ticket: Ticket, state: _Worker | None) -> None:
        with self._lock:
            if state is not None and state.ticket is ticket:
                state.forget()

    def handle(self, message: Message) -> Iterable[Message]:
        ticket = message.ticket
        worker = self.state(ticket)
        pcm = to_pcm16(message.samples) if isinstance(message, Heard) else b""
        with self._lock:
            if worker is None or worker.ticket is not ticket:
                return ()  # it has failed before
            if isinstance(message, Conclude):
                worker.conclude(message)
            else:
                worker.hear(pcm)
            if worker.waiting_bytes > self._backlog_bytes:
                worker.forget()
                return (self._failure(ticket, OVERLOADED),)
        return ()

    # The reader thread, and what it shares with `setup`.

    def _read(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    return
                if isinstance(key.data, _Worker):
                    self._answered(key.data)
                else:
                    self._check_nursery()

    def _answered(self, worker: _Worker) -> None:
        if worker not in self._workers:
            return
        try:
            reply = worker.pipe.recv_bytes()
        except (EOFError, OSError):
            self._lost(worker)
            return
        with self._lock:
            item = worker.sent.popleft()
            ticket = worker.ticket
            if item is None:
                if worker.pid is None:
                    (worker.pid,) = decoding.PID.unpack(reply)
                self._idle.append(worker)
            worker.pump()
            concluding = worker.concluding()
        if isinstance(item, Conclude):
            self.emit(_final(item, reply))
        elif item is not None and reply and ticket is not None and not concluding:
            self.emit(Transcript(ticket, reply.decode()))

    def _lost(self, worker: _Worker) -> None:
        ticket = self._remove(worker)
        log.error("stt: the decoder with pid %s ended", worker.pid)
        if worker.pid is not None:  # one that never came up would not the next time
            self._fill()
        if ticket is not None:
            self.emit(self._failure(ticket, DIED))

    def _remove(self, worker: _Worker) -> Ticket | None:
        """Take it out of the pool. Returns the utterance that it served."""
        self._workers.remove(worker)
        self._selector.unregister(worker.pipe)
        with self._lock:
            worker.pipe.close()
            ticket, worker.ticket = worker.ticket, None
            if worker in self._idle:
                self._idle.remove(worker)
        return ticket

    def _fill(self) -> None:
        while len(self._workers) < self.options.decoders:
            worker = self._nursery.fork()
            self._workers.add(worker)
            self._selector.register(worker.pipe, selectors.EVENT_READ, worker)

    def _check_nursery(self) -> None:
        loaded = self._nursery.loaded
        if self._nursery.listen():
            return
        self._selector.unregister(self._nursery.control)
        if not loaded:
            log.error("stt: the process that forks decoders cannot be started again")
            return
        log.error("stt: the process that forks decoders ended; starting another")
        self._nursery.close()
        for worker in [worker for worker in self._workers if worker.pid is None]:
            self._remove(worker)
        self._nursery = _Nursery(self.options.decoder_config())
        self._selector.register(self._nursery.control, selectors.EVENT_READ, self._nursery)
        self._fill()


def _final(request: Conclude, reply: bytes) -> Transcript:
    (end_probability,) = decoding.END.unpack_from(reply)
    return Transcript(
        request.ticket,
        reply[decoding.END.size :].decode(),
        request.revision,
        None if math.isnan(end_probability) else end_probability,
        request.prosody,
    )
