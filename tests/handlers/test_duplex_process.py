"""The duplex stages in their own process: the real one, with the shipped checkpoint."""

import pytest

pytest.importorskip("torch", reason="the duplex brain needs torch")
pytest.importorskip("transformers", reason="the duplex brain needs transformers")

import os
import queue
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from handlers.base import CannotServe, start_all
from handlers.duplex.options import ParrotOptions
from handlers.duplex.process import DuplexProcess, pack, unpack
from handlers.messages import RATE_HZ, AudioIn, Failed, Join, Message, Skipped, Uttered
from handlers.ticket import Ticket
from server.metrics import Metrics

FRAME_SAMPLES = RATE_HZ // 25
TIMEOUT_S = 180.0


class Observed(Metrics):
    """Tells when all rows are free."""

    def __init__(self) -> None:
        super().__init__()
        self.empty = threading.Event()

    def rows_in_use(self, rows: int) -> None:
        super().rows_in_use(rows)
        if not rows:
            self.empty.set()

    def value(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"parley_{name}", labels) or 0.0


class Stage:
    def __init__(self, **options: Any) -> None:
        self.metrics = Observed()
        self.out: dict[Ticket, queue.Queue[Message]] = {}
        emit = lambda message: self.out[message.ticket].put(message)  # noqa: E731
        self.process = DuplexProcess(ParrotOptions(**options), emit=emit, observer=self.metrics)
        self.loaded = threading.Semaphore(0)
        load = self.process._load

        def counted() -> None:
            load()
            self.loaded.release()

        self.process._load = counted  # type: ignore[method-assign]

    def join(self) -> Ticket:
        ticket = Ticket(self, "somebody")
        self.out[ticket] = queue.Queue()
        self.process.put(Join(ticket))
        return ticket

    def receive(self, message: Message) -> None: ...

    def next(self, ticket: Ticket) -> Message:
        return self.out[ticket].get(timeout=TIMEOUT_S)

    def uttered(self, ticket: Ticket, count: int) -> list[Uttered]:
        """So many frames; what was skipped on a busy machine is left out."""
        found: list[Uttered] = []
        while len(found) < count:
            message = self.next(ticket)
            assert isinstance(message, Uttered | Skipped)
            if isinstance(message, Uttered):
                found.append(message)
        return found


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    stage = Stage(rows=2)
    start_all([stage.process], TIMEOUT_S)
    assert stage.loaded.acquire(timeout=TIMEOUT_S)
    yield stage
    stage.process.stop()


def test_what_is_packed_comes_out_again() -> None:
    parts = [np.arange(3, dtype=np.float32), np.full(2, -0.5, np.float32)]
    for name in ("a", "ab", "abc", "a\u00e9"):
        head, samples = unpack(pack({"name": name, "numbers": [1, 2.5]}, parts))
        assert head == {"name": name, "numbers": [1, 2.5]}
        assert samples.tolist() == [0, 1, 2, -0.5, -0.5]
    assert unpack(pack({}, []))[1].shape == (0,)


def test_a_session_is_heard_and_answered_frame_by_frame(stage: Stage) -> None:
    before = stage.metrics.value("tick_seconds_count")
    me = stage.join()
    tone = 0.2 * np.sin(np.arange(RATE_HZ) * 0.1).astype(np.float32)
    for start in range(0, len(tone), 480):
        stage.process.put(AudioIn(me, tone[start : start + 480], start))
    frames = stage.uttered(me, 40)
    assert [frame.number for frame in frames[:5]] == [0, 1, 2, 3, 4]
    assert all(frame.samples.shape == (FRAME_SAMPLES,) for frame in frames)
    heard = [frame.heard_sample for frame in frames]
    assert heard == sorted(heard)
    assert heard[-1] == len(tone)
    assert stage.metrics.value("rows_in_use") == 1
    assert stage.metrics.value("tick_seconds_count") - before >= 39
    assert stage.metrics.value("service_seconds_count", stage="duplex_lm") >= 39
    stage.metrics.empty.clear()
    me.cancel()
    assert stage.metrics.empty.wait(TIMEOUT_S)


def test_one_more_than_rows_is_refused_and_disturbs_nobody(stage: Stage) -> None:
    a, b = stage.join(), stage.join()
    stage.uttered(a, 2), stage.uttered(b, 2)
    refused = stage.next(stage.join())
    assert isinstance(refused, Failed)
    assert refused.code == "session_limit_reached"
    stage.uttered(a, 2), stage.uttered(b, 2)
    stage.metrics.empty.clear()
    for ticket in (a, b):
        ticket.cancel()
    assert stage.metrics.empty.wait(TIMEOUT_S)


def test_a_process_that_dies_fails_its_sessions_and_another_one_takes_its_place(
    stage: Stage,
) -> None:
    me = stage.join()
    stage.uttered(me, 2)
    worker = stage.process._worker
    assert worker is not None
    os.kill(worker.pid, signal.SIGKILL)
    while not isinstance(failed := stage.next(me), Failed):
        pass
    assert (failed.stage, failed.code) == ("duplex_process", "model_unavailable")
    early = stage.next(stage.join())
    assert isinstance(early, Failed)
    assert early.code == "model_unavailable"
    me.cancel()
    assert stage.loaded.acquire(timeout=TIMEOUT_S)
    later = stage.join()
    assert [frame.number for frame in stage.uttered(later, 3)] == [0, 1, 2]
    later.cancel()


def test_what_cannot_be_loaded_is_said_and_the_process_leaves(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    stage = Stage(model_path=str(tmp_path))
    with pytest.raises(CannotServe, match="duplex"):
        start_all([stage.process], TIMEOUT_S)
    stage.process.stop()


class Watched(DuplexProcess):
    """Tells when it has begun to load."""

    begun: queue.Queue[Any] = queue.Queue()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_loading" and value is not None:
            self.begun.put(value)


def test_who_is_stopped_while_it_loads_does_not_wait() -> None:
    process = Watched(ParrotOptions(rows=1), emit=print, observer=Metrics())
    process.start()
    loading = process.begun.get(timeout=TIMEOUT_S)
    process.stop()
    with pytest.raises(CannotServe):
        process.wait_ready(TIMEOUT_S)
    assert loading._process.poll() is not None
