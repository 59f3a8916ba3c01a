"""The process of the duplex stages. `handlers.duplex.process` starts it and owns the other end.

It says when it is ready, or why it never will be; then it takes people and their audio and gives
back, a tick at a time, what the model says and what the stages have measured. A closed pipe is the
order to leave.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import threading
import traceback
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from handlers.base import CannotServe, Overloaded, StageError, failure, start_all
from handlers.duplex.chain import DuplexChain
from handlers.duplex.options import DuplexObserver, ParrotOptions
from handlers.duplex.parts import Checkpoint
from handlers.duplex.process import pack, unpack
from handlers.messages import AudioIn, Failed, Join, Message, Samples, Skipped, Uttered
from handlers.ticket import Ticket

BUSY = StageError("server_overloaded", "The server is overloaded.")


class _Person:
    """At the other end of the pipe."""

    def __init__(self, number: int) -> None:
        self.number = number

    def receive(self, message: Message) -> None: ...


class _Report:
    """What goes back: gathered during a tick, sent at its end."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        self._head: dict[str, list[Any]] = {"seen": [], "uttered": [], "skipped": [], "failed": []}
        self._samples: list[Samples] = []

    def see(self, *call: Any) -> None:
        """A method of `DuplexObserver` and its arguments, for the one at the other end."""
        with self._lock:
            self._head["seen"].append(call)

    def emit(self, message: Message) -> None:
        number = getattr(message.ticket.sink, "number", 0)
        with self._lock:
            match message:
                case Uttered(_, frame, heard_sample, samples, level_db):
                    row = (number, frame, heard_sample, level_db, len(samples))
                    self._head["uttered"].append(row)
                    self._samples.append(samples)
                case Skipped(_, count, reason):
                    self._head["skipped"].append((number, count, reason))
                case Failed(_, stage, code, text):
                    self._head["failed"].append((number, stage, code, text))
                    self._send()

    def flush(self) -> None:
        with self._lock:
            self._send()

    def _send(self) -> None:
        with suppress(OSError):  # the server is gone: whoever reads sees that too
            self._pipe.send_bytes(pack(self._head, self._samples))
        self._clear()


class _Observer:
    """A `DuplexObserver` that reports what it is told."""

    def __init__(self, report: _Report) -> None:
        self._report = report

    def __getattr__(self, name: str) -> Any:
        return partial(self._report.see, name)

    def waited(self, *_: Any) -> None:
        """That is told by the other end, where messages wait, too."""

    def tick_done(self, seconds: float) -> None:
        self._report.see("tick_done", seconds)
        self._report.flush()


class _People:
    def __init__(self, chain: DuplexChain, report: _Report, observer: DuplexObserver) -> None:
        self._chain, self._report, self._observer = chain, report, observer
        self._tickets: dict[int, Ticket] = {}

    def take_in(self, head: dict[str, Any], samples: Samples) -> None:
        for number in head.get("left", ()):
            if (ticket := self._tickets.pop(number, None)) is not None:
                ticket.cancel()
        for number, name in head.get("joined", ()):
            self._tickets[number] = ticket = Ticket(_Person(number), name)
            self._attend(Join(ticket))
        at = 0
        for number, start_sample, count in head.get("audio", ()):
            heard, at = samples[at : at + count], at + count
            if (ticket := self._tickets.get(number)) is not None:
                self._attend(AudioIn(ticket, heard, start_sample))

    def _attend(self, message: Join | AudioIn) -> None:
        try:
            self._chain.put(message)
        except Overloaded:
            self._report.emit(failure(self._chain.stage, message.ticket, BUSY, self._observer))


def main(descriptor: int, level: int, options: ParrotOptions) -> None:
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    pipe = Connection(descriptor)
    report = _Report(pipe)
    observer: Any = _Observer(report)
    people: list[_People] = []
    left = threading.Event()

    def read() -> None:
        try:
            while True:
                message = pipe.recv_bytes()
                people[0].take_in(*unpack(message))  # nobody joins who has not heard "ready"
        except (EOFError, OSError):
            if not people:  # there is nobody left to load for
                os._exit(0)
        finally:
            left.set()

    threading.Thread(target=read, name="duplex-reader", daemon=True).start()
    try:
        chain = DuplexChain(options, Checkpoint(options), emit=report.emit, observer=observer)
        start_all([chain], threading.TIMEOUT_MAX)  # the other end has its own patience
    except CannotServe as error:
        pipe.send_bytes(pack({"broken": str(error)}, []))
        return
    except Exception as error:
        traceback.print_exc()
        pipe.send_bytes(pack({"broken": f"duplex: {type(error).__name__} while it loaded"}, []))
        return
    gc.collect()
    gc.freeze()  # as in `server.__main__`
    people.append(_People(chain, report, observer))
    pipe.send_bytes(pack({}, []))
    left.wait()
    chain.stop()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), ParrotOptions(**json.loads(sys.argv[3])))
