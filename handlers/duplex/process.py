"""The duplex stages in a process of their own: the server's end. `worker` is the other one.

The event loop and the stages want the interpreter's lock for many small steps at the same time; in
one process, the slowest of a hundred ticks takes twice as long as the models do.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar

import numpy as np

from handlers.base import CannotServe, Emit, Handler, StageError
from handlers.child import LEAVE_TIMEOUT_S, Child
from handlers.duplex.encoder import is_overloaded
from handlers.duplex.options import DuplexObserver, ParrotOptions
from handlers.messages import AudioIn, Failed, Join, Message, Samples, Skipped, Uttered
from handlers.ticket import Ticket

log = logging.getLogger(__name__)

GATHER_S = 0.004
"""Audio of all sessions that goes over together."""
DIED = StageError("model_unavailable", "The model ended unexpectedly; try again later.")


class DuplexProcess(Handler[int]):
    """What `DuplexChain` is, elsewhere. A session's state is its number there.

    If the process dies, all sessions fail and another one is started; until that is ready, so does
    everybody who joins.
    """

    stage: ClassVar[str] = "duplex_process"

    def __init__(self, options: ParrotOptions, *, emit: Emit, observer: DuplexObserver) -> None:
        super().__init__(emit, min_interval_s=GATHER_S, observer=observer)
        self._options, self._duplex = options, observer
        self._tickets: dict[int, Ticket] = {}
        self._count = 0
        self._worker: Child | None = None  # None: there is none that could be asked
        self._loading: Child | None = None
        self._skipped_s: float | None = None

    @property
    def overloaded(self) -> bool:
        """For any thread."""
        return is_overloaded(self._skipped_s, time.monotonic())

    def setup(self) -> None:
        self._load()
        threading.Thread(target=self._listen, name=f"{self.stage}-reader", daemon=True).start()

    def stop(self, timeout_s: float = LEAVE_TIMEOUT_S) -> None:
        loading = self._loading
        if loading is not None:  # or it would be waited for
            loading.hang_up()
        super().stop(timeout_s)

    def teardown(self) -> None:
        if self._worker is not None:
            self._worker.close()

    def open(self, ticket: Ticket) -> int:
        self._count += 1
        self._tickets[self._count] = ticket
        return self._count

    def close(self, ticket: Ticket, state: int) -> None:
        del self._tickets[state]
        self._send({"left": [state]}, [])

    def process(self, batch: Sequence[Message]) -> Iterable[Message]:
        joined: list[tuple[int, str]] = []
        audio: list[tuple[int, int, int]] = []
        samples: list[Samples] = []
        for message in batch:
            match message:
                case Join(ticket) if self._worker is None:
                    yield self._failure(ticket, DIED)
                case Join(ticket):
                    joined.append((self.state(ticket), ticket.name))
                case AudioIn(ticket, heard, start_sample) if ticket in self._states:
                    audio.append((self._states[ticket], start_sample, len(heard)))
                    samples.append(heard)
        if joined or audio:
            sent = self._send({"joined": joined, "audio": audio}, samples)
            if not sent:  # it has just died, and the reader may not have seen these yet
                yield from (self._failure(m.ticket, DIED) for m in batch if isinstance(m, Join))

    def _send(self, head: Mapping[str, Any], samples: Sequence[Samples]) -> bool:
        """Whether there was anybody to send it to."""
        worker = self._worker
        if worker is not None:
            with suppress(OSError):  # it died: the reader sees that too, and fails all sessions
                worker.pipe.send_bytes(pack(head, samples))
        return worker is not None

    # What comes back: on the reader's thread.

    def _load(self) -> None:
        """Raises `CannotServe`."""
        level = str(logging.getLogger().getEffectiveLevel())
        options = json.dumps(dataclasses.asdict(self._options))
        self._loading = worker = Child("handlers.duplex.worker", level, options)
        try:
            answer, _ = unpack(worker.pipe.recv_bytes())
        except (EOFError, OSError):
            answer = {"broken": f"{self.stage}: its process ended while it loaded"}
        finally:
            self._loading = None
        if "broken" in answer:
            worker.close()
            raise CannotServe(answer["broken"])
        self._worker = worker

    def _listen(self) -> None:
        while (worker := self._worker) is not None:
            with suppress(EOFError, OSError):
                while True:
                    self._take_in(*unpack(worker.pipe.recv_bytes()))
            self._worker = None
            if self._stopping:
                return
            log.error("%s: the model's process ended; starting another one", self.stage)
            for ticket in list(self._tickets.values()):
                self.emit(self._failure(ticket, DIED))
            self._duplex.rows_in_use(0)
            worker.close()
            try:
                self._load()
            except (CannotServe, OSError) as error:
                if not self._stopping:
                    log.error("no model any more: %s", error)

    def _take_in(self, head: Mapping[str, Any], samples: Samples) -> None:
        for name, *values in head["seen"]:
            if name == "ticks_skipped":
                self._skipped_s = time.monotonic()
            getattr(self._duplex, name)(*values)
        at = 0
        for number, frame, heard_sample, level_db, count in head["uttered"]:
            said, at = samples[at : at + count], at + count
            if (ticket := self._tickets.get(number)) is not None:
                self.emit(Uttered(ticket, frame, heard_sample, said, level_db))
        for number, count, reason in head["skipped"]:
            if (ticket := self._tickets.get(number)) is not None:
                self.emit(Skipped(ticket, count, reason))
        for number, stage, code, text in head["failed"]:
            if (ticket := self._tickets.get(number)) is not None:
                self.emit(Failed(ticket, stage, code, text))


def pack(head: Mapping[str, Any], samples: Sequence[Samples]) -> bytes:
    """A message of either end: JSON, and what sound belongs to it, [T] each."""
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    return b"".join([len(text).to_bytes(4, "little"), text, *(part.tobytes() for part in samples)])


def unpack(message: bytes) -> tuple[dict[str, Any], Samples]:
    """The same, the sound in one piece, which can't be written to."""
    end = 4 + int.from_bytes(message[:4], "little")
    head: dict[str, Any] = json.loads(message[4:end])
    return head, np.frombuffer(message, np.float32, offset=end)
