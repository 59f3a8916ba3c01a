"""PocketSphinx: the decoding alone, then the stage with its real processes."""

from __future__ import annotations

import os
import queue
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import pytest

from handlers.audio import to_pcm16
from handlers.messages import (
    EAR_RATE_HZ,
    Conclude,
    Failed,
    Heard,
    Message,
    Prosody,
    Samples,
    Transcript,
)
from handlers.stt.decoding import Decoding, load, words
from handlers.stt.pocketsphinx import PocketSphinxOptions, PocketSphinxSTT, _Worker
from handlers.ticket import Ticket
from tests.handlers.speech import heard, room

ROOT = Path(__file__).parents[2]
PATIENCE_S = 20.0
TEXT = "she went to the market to buy some bread"
T = TypeVar("T", bound=Message)


class Nowhere:
    def receive(self, message: Message) -> None: ...


@pytest.fixture
def ticket() -> Iterator[Ticket]:
    ticket = Ticket(Nowhere())
    yield ticket
    ticket.cancel()


def silence(seconds: float) -> Samples:
    return room(seconds, EAR_RATE_HZ)


# Decoding.


@pytest.fixture(scope="module")
def decoding() -> Decoding:
    return Decoding(load(PocketSphinxOptions().decoder_config()))


@pytest.fixture(autouse=True)
def forgetful(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "decoding" in request.fixturenames:
        request.getfixturevalue("decoding").reset()


def hear(decoding: Decoding, samples: Samples) -> list[str]:
    """The partial texts."""
    bites = np.split(samples, range(1600, len(samples), 1600))
    return [text for bite in bites if (text := decoding.hear(to_pcm16(bite)))]


def test_words_leave_out_what_was_not_said() -> None:
    raw = SimpleNamespace(hypstr="<s> the(2) [NOISE] o'clock ++UH++ <sil> a(3) </s>")
    assert words(raw) == ["the", "o'clock", "a"]
    assert words(None) == []


def test_it_understands_plain_speech(decoding: Decoding) -> None:
    partials = hear(decoding, heard(TEXT))
    final, _ = decoding.conclude()
    assert len(set(final.split()) & set(TEXT.split())) >= 5
    assert len(partials) >= 3
    assert len(set(partials)) > len(partials) // 2


def test_silence_has_no_words(decoding: Decoding) -> None:
    hear(decoding, silence(0.5))
    text, end_probability = decoding.conclude()
    assert text == ""
    assert np.isnan(end_probability)


def test_concluding_again_without_audio_gives_the_same(decoding: Decoding) -> None:
    hear(decoding, heard(TEXT))
    first = decoding.conclude()
    assert first == decoding.conclude()
    assert first[0]


def test_an_utterance_goes_on_after_a_conclusion(decoding: Decoding) -> None:
    hear(decoding, heard("what can you do"))
    before, _ = decoding.conclude()
    partials = hear(decoding, heard(TEXT))
    assert partials
    assert all(text.startswith(before) for text in partials)
    both, _ = decoding.conclude()
    decoding.reset()
    hear(decoding, heard(TEXT))
    assert both.startswith(before + " ")
    assert len(both.split()) >= len(before.split()) + 5


def test_a_reset_leaves_no_trace(decoding: Decoding) -> None:
    hear(decoding, heard(TEXT))
    first = decoding.conclude()
    decoding.reset()
    hear(decoding, heard("count from one to ten"))
    decoding.reset()
    hear(decoding, heard(TEXT))
    assert decoding.conclude() == first


@pytest.mark.parametrize("samples", [1, 7, 400, 1600])
def test_scraps_of_audio_do_no_harm(decoding: Decoding, samples: int) -> None:
    decoding.hear(to_pcm16(silence(1.0)[:samples]))
    assert decoding.conclude()[0] == ""


FINISHED = [
    "what time is it",
    "my name is john",
    "thank you very much",
    "tell me a joke",
    "hello",
    "how are you",
]
UNFINISHED = [
    "my order number is",
    "i would like to",
    "i want to go to the",
    "my name is",
    "and then i",
    "well",
    "because",
]


def end_probability(decoding: Decoding, text: str) -> float:
    decoding._texts = text.split()
    return decoding.conclude()[1]


def test_finished_sentences_may_end_and_unfinished_may_not(decoding: Decoding) -> None:
    ends = [end_probability(decoding, text) for text in FINISHED]
    going_on = [end_probability(decoding, text) for text in UNFINISHED]
    assert min(ends) > 0.09
    assert max(going_on) < 0.07


def test_no_end_probability_for_words_the_language_model_lacks(decoding: Decoding) -> None:
    assert np.isnan(end_probability(decoding, "my xyzzyq"))
    assert end_probability(decoding, "xyzzyq john") > 0


# The stage.


class Stage(PocketSphinxSTT):
    """With its thread and processes; `receive` waits for results, `until` for its workers."""

    def __init__(self, **options: Any) -> None:
        self.results: queue.Queue[Message] = queue.Queue()
        self.stirred: queue.Queue[None] = queue.Queue()
        super().__init__(PocketSphinxOptions(**options), emit=self.results.put)

    def _answered(self, worker: _Worker) -> None:
        super()._answered(worker)
        self.stirred.put(None)

    def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.stirred.get(timeout=PATIENCE_S)

    def receive(self, kind: type[T], ticket: Ticket, revision: int | None = None) -> T:
        while True:
            message = self.results.get(timeout=PATIENCE_S)
            if isinstance(message, kind) and message.ticket is ticket:
                found = message.revision if isinstance(message, Transcript) else None
                if found == revision:
                    return message

    def speak(self, ticket: Ticket, samples: Samples, chunk: int = 512) -> None:
        for at in range(0, len(samples), chunk):
            self.put(Heard(ticket, samples[at : at + chunk]))

    def transcribe(self, samples: Samples, chunk: int = 512) -> str:
        ticket = Ticket(Nowhere())
        self.speak(ticket, samples, chunk)
        self.put(Conclude(ticket, 1, None))
        text = self.receive(Transcript, ticket, 1).text
        ticket.cancel()
        return text

    def worker_of(self, ticket: Ticket) -> int:
        """The pid of the worker that serves it."""
        (pid,) = [worker.pid for worker in self._workers if worker.ticket is ticket]
        assert pid is not None
        return pid

    @property
    def pids(self) -> list[int]:
        return [worker.pid for worker in self._workers if worker.pid is not None]

    @property
    def all_idle(self) -> bool:
        return len(self._idle) == self.options.decoders


def running(**options: Any) -> Stage:
    stage = Stage(**options)
    stage.start()
    stage.wait_ready(PATIENCE_S)
    return stage


@pytest.fixture(scope="module")
def shared() -> Iterator[Stage]:
    stage = running(decoders=3)
    yield stage
    stage.stop()


@pytest.fixture
def stage(shared: Stage) -> Stage:
    shared.until(lambda: shared.all_idle)
    while not shared.results.empty():
        shared.results.get()
    return shared


def test_it_is_ready_when_every_decoder_is() -> None:
    stage = running(decoders=2)
    try:
        assert stage.all_idle
        assert len(stage.pids) == 2
    finally:
        stage.stop()


def test_texts_flow_while_audio_comes_and_the_final_one_last(stage: Stage, ticket: Ticket) -> None:
    prosody = Prosody(-2.0, 0.5, -10.0, 3.0, 120.0)
    stage.speak(ticket, heard(TEXT))
    first = stage.receive(Transcript, ticket)
    assert first.text
    assert first.end_probability is None
    stage.put(Conclude(ticket, 4, prosody))
    final = stage.receive(Transcript, ticket, 4)
    assert len(set(final.text.split()) & set(TEXT.split())) >= 5
    assert final.prosody is prosody
    assert final.end_probability is not None
    assert 0 < final.end_probability < 1
    stage.put(Conclude(ticket, 5, None))
    assert stage.receive(Transcript, ticket, 5).text == final.text
    assert stage.results.empty()


def test_the_size_of_chunks_does_not_matter(stage: Stage) -> None:
    texts = {stage.transcribe(heard(TEXT), chunk) for chunk in (97, 517, 10**6)}
    assert len(texts) == 1


def test_a_request_without_audio_is_answered(stage: Stage, ticket: Ticket) -> None:
    stage.put(Conclude(ticket, 1, None))
    assert stage.receive(Transcript, ticket, 1) == Transcript(ticket, "", 1)


def test_utterances_are_heard_side_by_side(stage: Stage) -> None:
    alone = [stage.transcribe(heard(text)) for text in ("hello how are you", TEXT)]
    tickets = [Ticket(Nowhere()) for _ in alone]
    for ticket, text in zip(tickets, ("hello how are you", TEXT), strict=True):
        stage.speak(ticket, heard(text))
    for ticket in tickets:
        stage.put(Conclude(ticket, 1, None))
    finals: dict[Ticket, str] = {}
    while len(finals) < len(tickets):
        message = stage.results.get(timeout=PATIENCE_S)
        assert isinstance(message, Transcript)
        if message.revision == 1:
            finals[message.ticket] = message.text
    assert [finals[ticket] for ticket in tickets] == alone
    for ticket in tickets:
        ticket.cancel()


def test_one_too_many_is_told_so_once_and_at_once(stage: Stage) -> None:
    seated = [Ticket(Nowhere()) for _ in range(3)]
    for ticket in seated:
        stage.speak(ticket, silence(0.1))
    late = Ticket(Nowhere())
    stage.speak(late, silence(1.0))
    stage.put(Conclude(late, 1, None))
    failure = stage.receive(Failed, late)
    assert (failure.stage, failure.code) == ("stt", "stt_busy")
    stage.put(Conclude(seated[0], 1, None))
    assert stage.receive(Transcript, seated[0], 1).text == ""
    assert stage.results.empty()
    for ticket in seated:
        ticket.cancel()
    late.cancel()
    stage.until(lambda: stage.all_idle)
    assert stage.transcribe(silence(0.1)) == ""


def test_a_dead_utterance_is_dropped_and_its_worker_comes_back(stage: Stage) -> None:
    dead = Ticket(Nowhere())
    stage.speak(dead, heard(TEXT))
    stage.receive(Transcript, dead)
    stage.put(Conclude(dead, 1, None))
    dead.cancel()
    stage.until(lambda: stage.all_idle)
    assert all(not worker.waiting and worker.ticket is None for worker in stage._workers)
    expected = stage.transcribe(heard(TEXT))
    assert len(set(expected.split()) & set(TEXT.split())) >= 5


def test_a_worker_that_dies_fails_its_utterance_and_is_replaced(stage: Stage) -> None:
    unlucky, other = Ticket(Nowhere()), Ticket(Nowhere())
    for ticket in (unlucky, other):
        stage.speak(ticket, silence(0.2))
        stage.put(Conclude(ticket, 1, None))
        stage.receive(Transcript, ticket, 1)
    before = set(stage.pids)
    os.kill(stage.worker_of(unlucky), signal.SIGKILL)
    assert stage.receive(Failed, unlucky).code == "stt_worker_died"
    stage.put(Conclude(other, 2, None))
    assert stage.receive(Transcript, other, 2).text == ""
    stage.speak(unlucky, silence(0.2))
    unlucky.cancel()
    other.cancel()
    stage.until(lambda: stage.all_idle)
    assert len(set(stage.pids) - before) == 1
    assert stage.transcribe(heard(TEXT))


def test_a_nursery_that_dies_is_replaced(stage: Stage) -> None:
    first = stage._nursery
    os.kill(first._process.pid, signal.SIGKILL)
    for pid in stage.pids:
        os.kill(pid, signal.SIGKILL)
    before = set(stage.pids)
    stage.until(lambda: stage.all_idle and not set(stage.pids) & before)
    assert stage._nursery is not first
    assert stage.transcribe(heard(TEXT))


def test_a_worker_too_far_behind_fails_its_utterance(ticket: Ticket) -> None:
    stage = running(decoders=1, backlog_s=2.0)
    stage.speak(ticket, silence(0.1))
    stopped = stage.pids[0]
    os.kill(stopped, signal.SIGSTOP)
    stage.speak(ticket, silence(3.0))
    assert stage.receive(Failed, ticket).code == "stt_overloaded"
    os.kill(stopped, signal.SIGCONT)
    stage.until(lambda: stage.all_idle)
    assert stage.results.empty()
    stage.stop()


# Its processes.


def gone(pid: int) -> bool:
    """Whether the process has ended, at the latest in a while."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], PATIENCE_S)[0])
    finally:
        os.close(handle)


def test_stopping_leaves_no_process() -> None:
    stage = running(decoders=2)
    ticket = Ticket(Nowhere())
    stage.speak(ticket, heard(TEXT))
    stage.receive(Transcript, ticket)
    pids = [*stage.pids, stage._nursery._process.pid]
    began = time.monotonic()
    stage.stop()
    assert time.monotonic() - began < 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_worker_that_hangs_does_not_hold_up_stopping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handlers.stt.pocketsphinx.LEAVE_TIMEOUT_S", 0.05)
    stage = running(decoders=1)
    (pid,) = stage.pids
    os.kill(pid, signal.SIGSTOP)
    stage.stop()
    assert gone(pid)


def test_they_end_with_a_server_that_is_killed() -> None:
    code = (
        "from tests.handlers.test_stt import running; stage = running(decoders=2);"
        "print(stage._nursery._process.pid, *stage.pids, flush=True); input()"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert server.stdout is not None
    pids = [int(pid) for pid in server.stdout.readline().split()]
    assert len(pids) == 3
    server.kill()
    server.communicate()
    assert all(gone(pid) for pid in pids)


def test_a_model_that_does_not_load_is_said_so(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(PocketSphinxOptions, "decoder_config", lambda self: {"nonsense": 1})
    stage = Stage(decoders=1)
    stage.start()
    with pytest.raises(RuntimeError, match="could not be loaded"):
        stage.wait_ready(PATIENCE_S)
    stage.stop()
    assert "nonsense" in capfd.readouterr().err
