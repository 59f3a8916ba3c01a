"""What a recogniser of whole audio gets to hear and may be trusted, and when it is asked."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from handlers.base import StageError
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
from handlers.stt.streaming import (
    Abandoned,
    Hypothesis,
    Row,
    StreamingOptions,
    StreamingSTT,
    unknown_language,
)
from handlers.stt.window import Window, is_silent, quietest, spoken, unspoken, without_loops
from handlers.ticket import Ticket
from server.transcript import StablePrefix
from tests.handlers.endpoint import ticket
from tests.handlers.speech import heard, room

PATIENCE_S = 20.0
PROSODY = Prosody(0.0, 1.0, 2.0, 3.0, 4.0)


def tone(seconds: float, level: float = 0.25) -> Samples:
    return np.full(round(seconds * EAR_RATE_HZ), level, np.float32)


# The window.


def test_a_short_utterance_is_one_section() -> None:
    window = Window()
    window.push(tone(0.5))
    window.push(tone(0.25))
    (section,) = window.unheard()
    np.testing.assert_array_equal(section.samples, tone(0.75))
    assert window.settle() is None
    section.text = "hello"
    assert window.settle() == "hello"
    assert (window.fresh, window.unheard()) == (0, [])
    window.push(tone(0.1))
    assert window.fresh == 1600
    assert window.settle() is None
    (again,) = window.unheard()
    assert len(again.samples) == 13_600


def test_a_long_one_is_cut_at_a_pause_and_memory_is_bounded() -> None:
    limit = 4 * EAR_RATE_HZ
    window = Window(limit)
    audio = tone(30.0)
    pauses = np.arange(1, 33) * round(0.9 * EAR_RATE_HZ)
    for pause in pauses:
        audio[pause - 1600 : pause + 1600] *= 0.01
    pieces: list[Samples] = []
    for at in range(0, len(audio), 512):
        window.push(audio[at : at + 512])
        sections = window.unheard()
        for section in sections[:-1]:
            section.text = str(len(pieces) + 1)
            pieces.append(section.samples)
        sections[-1].text = "…"
        window.settle()
        assert window.kept_samples <= limit
    ends = np.cumsum([len(piece) for piece in pieces])
    assert len(ends) >= 30 / 4
    assert np.abs(ends[:, None] - pauses).min(axis=1).max() <= 1600
    (last,) = window.unheard() or [window._last]
    np.testing.assert_array_equal(np.concatenate([*pieces, last.samples]), audio)
    assert window.settle() == " ".join([*map(str, range(1, len(pieces) + 1)), "…"])


def test_much_audio_at_once_becomes_sections_too() -> None:
    window = Window(4 * EAR_RATE_HZ)
    audio = np.random.default_rng(1).standard_normal(20 * EAR_RATE_HZ).astype(np.float32)
    window.push(audio)
    sections = window.unheard()
    assert max(len(section.samples) for section in sections) < 4 * EAR_RATE_HZ
    np.testing.assert_array_equal(np.concatenate([s.samples for s in sections]), audio)


def test_the_cut_is_in_the_quietest_place() -> None:
    audio = tone(10.0)
    audio[: 2 * EAR_RATE_HZ] = 0.0  # too early
    audio[7 * EAR_RATE_HZ : 7 * EAR_RATE_HZ + 3200] = 0.001
    audio[-EAR_RATE_HZ:] = 0.0  # too late
    assert 7 * EAR_RATE_HZ <= quietest(audio) <= 7 * EAR_RATE_HZ + 3200


# What is to be trusted.


def test_silence_and_scraps_hold_nothing() -> None:
    assert is_silent(np.zeros(0, np.float32))
    assert is_silent(tone(0.05))
    assert is_silent(room(2.0, EAR_RATE_HZ) * np.float32(0.25))
    quiet = np.zeros(EAR_RATE_HZ, np.float32)
    quiet[8000:9000] = 0.01
    assert not is_silent(quiet)
    assert not is_silent(heard("yes"))


def test_whispers_rule_for_made_up_text() -> None:
    assert unspoken(0.9, -1.5)
    assert not unspoken(0.9, -0.5)
    assert not unspoken(0.3, -1.5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" hello there ", "hello there"),
        ("", ""),
        ("no no no no no", "no no no no no"),
        ("I said " + "thank you very much " * 20 + "bye", "I said thank you very much bye"),
        ("ha " * 100, "ha"),
        ("哈" * 200, ""),
    ],
)
def test_texts_that_go_in_circles(text: str, expected: str) -> None:
    assert without_loops(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes.", "yes"),
        ("It's $40, isn’t it?", "it's forty isn't it"),
        ("Call 555-0199!", "call five hundred fifty five zero one nine nine"),
        ("Grüß Gott — 你好。", "grüß gott 你好"),
    ],
)
def test_words_as_they_are_said(text: str, expected: str) -> None:
    assert spoken(text) == expected


# When it is asked.


class Scripted(StreamingSTT):
    """Hears a word per 100 ms that names the level; `gate` holds it up, levels can be faulty."""

    def __init__(self, **options: Any) -> None:
        self.emitted: queue.Queue[Message] = queue.Queue()
        self.batches: list[list[Row]] = []
        self.entered: queue.Queue[Abandoned] = queue.Queue()
        self.gate: threading.Semaphore | None = None
        super().__init__(StreamingOptions(**options), emit=self.emitted.put)
        self.took_s = 0.0  # for each batch
        self.room = 99  # rows that the memory has room for
        self._clock = lambda: self.took_s * len(self.batches)

    def load(self) -> None: ...

    def check_language(self, language: str) -> None:
        if language not in ("en", "de"):
            raise unknown_language(language, ["en", "de"])

    def recognise(self, rows: Sequence[Row], abandoned: Abandoned) -> list[Hypothesis]:
        self.batches.append(list(rows))
        if self.gate is not None:
            self.entered.put(abandoned)
            assert self.gate.acquire(timeout=PATIENCE_S)
        if len(rows) > self.room:
            raise RuntimeError("CUDA out of memory.")
        if any(0.6 < row.samples[0] < 0.7 for row in rows):
            raise ValueError("faulty")
        return [Hypothesis(_words(row.samples), row.language or "en") for row in rows]

    def next(self) -> Message:
        return self.emitted.get(timeout=PATIENCE_S)

    def until_idle(self) -> None:
        """Until all that was put has been dealt with."""
        marker = ticket()
        self.put(Conclude(marker, 1, None))
        self.final(marker)

    def final(self, owner: Ticket) -> Transcript:
        while not (
            isinstance(found := self.next(), Transcript)
            and found.ticket is owner
            and found.revision is not None
        ):
            pass
        return found


def _words(samples: Samples) -> str:
    return " ".join(f"w{at // 1600}" for at in range(0, len(samples) - 1599, 1600))


@pytest.fixture
def stt() -> Iterator[Scripted]:
    with_partials = Scripted(partial_s=0.2)
    yield from _running(with_partials)


@pytest.fixture
def finals() -> Iterator[Scripted]:
    yield from _running(Scripted(partial_s=0.0))


def _running(stage: Scripted) -> Iterator[Scripted]:
    stage.start()
    stage.wait_ready(PATIENCE_S)
    yield stage
    if stage.gate is not None:
        stage.gate.release(1000)
    stage.stop()


def test_partials_as_it_grows_then_the_final(stt: Scripted) -> None:
    owner, stable, sent = ticket(), StablePrefix(), ""
    for number in range(1, 5):
        stt.put(Heard(owner, tone(0.2)))
        found = stt.next()
        assert isinstance(found, Transcript)
        assert (found.text, found.revision) == (_words(tone(0.2 * number)), None)
        sent += stable.push(found.text)
    assert sent == "w0 w1 w2 w3 w4 w5"
    stt.put(Heard(owner, tone(0.1)))
    stt.put(Conclude(owner, 1, PROSODY))
    final = stt.next()
    words = _words(tone(0.9))
    assert final == Transcript(owner, words, 1, None, PROSODY, words)
    assert len(stt.batches) == 5


def test_a_slow_model_makes_fewer_partials() -> None:
    stt, owner = Scripted(partial_s=0.2), ticket()
    stt.setup()
    stt.took_s = 0.7
    heard: list[Message] = [Heard(owner, tone(0.1)) for _ in range(20)]
    for message in [*heard, Conclude(owner, 1, None)]:
        stt.process([message])
        while stt.busy:
            stt.process([])
    assert [len(rows[0].samples) / 1600 for rows in stt.batches] == [2, 16, 20]


def test_an_end_probability_for_english_words(finals: Scripted) -> None:
    owner = ticket()
    finals._at_work.clear()
    for words, language, least in (("What time is it?", "en", 0.09), ("Wie spät ist es?", "de", 0)):
        end = finals.end_probability(words, language)
        assert end is None if language == "de" else end is not None and end > least
    assert finals.end_probability("my order number is", "en") < 0.07  # type: ignore[operator]
    plain, asked, listed = (finals.end_probability(f"Who is it{m}", "en") for m in ("", "?", ","))
    assert plain is not None
    assert (asked, listed) == (2 * plain, plain / 2)
    assert owner.live


def test_what_has_not_grown_is_not_heard_again(stt: Scripted) -> None:
    owner = ticket()
    stt.put(Heard(owner, tone(0.2)))
    partial = stt.next()
    stt.put(Conclude(owner, 1, None))
    final = stt.final(owner)
    assert isinstance(partial, Transcript)
    assert final.text == partial.text
    assert len(stt.batches) == 1


def test_an_utterance_goes_on_after_a_final(finals: Scripted) -> None:
    owner = ticket()
    finals.put(Heard(owner, tone(0.3)))
    finals.put(Conclude(owner, 1, None))
    assert finals.final(owner).text == "w0 w1 w2"
    finals.put(Heard(owner, tone(0.2)))
    finals.put(Conclude(owner, 2, None))
    assert finals.final(owner) == Transcript(
        owner, "w0 w1 w2 w3 w4", 2, None, None, "w0 w1 w2 w3 w4"
    )


def test_silence_is_told_without_asking_the_model(finals: Scripted) -> None:
    owner = ticket()
    finals.put(Heard(owner, tone(1.0, 0.0)))
    finals.put(Conclude(owner, 1, None))
    assert finals.final(owner).text == ""
    assert finals.batches == []


def test_all_that_waits_is_one_batch_finals_first(stt: Scripted) -> None:
    stt.gate = threading.Semaphore(0)
    first = ticket("first")
    stt.put(Heard(first, tone(0.2)))
    abandoned = stt.entered.get(timeout=PATIENCE_S)
    assert abandoned() == [False]
    growing, *ending = [ticket(str(n)) for n in range(4)]
    for owner in (growing, *ending):
        for _ in range(20):  # far more than there is time for
            stt.put(Heard(owner, tone(0.1)))
    for owner in ending:
        stt.put(Conclude(owner, 1, None))
    assert abandoned() == [True]  # a partial text gives way
    stt.gate.release()
    stt.entered.get(timeout=PATIENCE_S)
    assert [len(row.samples) for row in stt.batches[1]] == [32_000] * 3
    stt.gate.release()
    stt.entered.get(timeout=PATIENCE_S)
    assert sorted(len(row.samples) for row in stt.batches[2]) == [3200, 32_000]
    stt.gate.release()
    assert [stt.next().ticket for _ in range(3)] == ending
    assert {stt.next().ticket for _ in range(2)} == {first, growing}


def test_a_dead_ticket_is_abandoned_and_emits_nothing(finals: Scripted) -> None:
    finals.gate = threading.Semaphore(0)
    dead, alive = ticket(), ticket()
    finals.put(Heard(dead, tone(0.3)))
    finals.put(Conclude(dead, 1, None))
    abandoned = finals.entered.get(timeout=PATIENCE_S)
    dead.cancel()
    assert abandoned() == [True]
    finals.put(Heard(alive, tone(0.3)))
    finals.put(Conclude(alive, 1, None))
    finals.gate.release(2)
    assert finals.next().ticket is alive


def test_one_that_fails_hurts_no_other(finals: Scripted) -> None:
    finals.gate = threading.Semaphore(0)
    blocker, good, bad = ticket(), ticket(), ticket()
    finals.put(Heard(blocker, tone(0.3)))
    finals.put(Conclude(blocker, 1, None))
    finals.entered.get(timeout=PATIENCE_S)
    for owner, level in ((good, 0.25), (bad, 0.65)):
        finals.put(Heard(owner, tone(0.3, level)))
        finals.put(Conclude(owner, 1, None))
    finals.gate.release(10)
    found = {message.ticket: message for message in (finals.next() for _ in range(3))}
    assert isinstance(found[good], Transcript)
    assert found[bad] == Failed(bad, "stt", "stt_error", "The stt stage failed.")
    finals.put(Conclude(good, 2, None))
    assert finals.final(good).text == "w0 w1 w2"


@pytest.mark.parametrize("room", [2, 0])
def test_too_little_memory_means_smaller_batches_then_a_refusal(
    finals: Scripted, room: int
) -> None:
    finals.gate = threading.Semaphore(0)
    blocker, *owners = [ticket(str(n)) for n in range(9)]
    for owner in (blocker, *owners):
        finals.put(Heard(owner, tone(0.3)))
        finals.put(Conclude(owner, 1, None))
        if owner is blocker:
            finals.entered.get(timeout=PATIENCE_S)
            finals.room = room
    finals.gate.release(100)
    found = [finals.next() for _ in range(9)]
    if room:
        assert all(isinstance(message, Transcript) for message in found)
        assert [len(rows) for rows in finals.batches] == [1, 8, 4, 2, 2, 4, 2, 2]
        assert finals._max_batch == 2
    else:
        codes = [message.code for message in found if isinstance(message, Failed)]
        assert codes == ["stt_out_of_memory"] * len(codes)
        assert len(codes) >= 8


def test_a_language_nobody_knows_fails_that_utterance(finals: Scripted) -> None:
    odd, german = ticket(), ticket()
    finals.put(Heard(odd, tone(0.3), "tlh"))
    failed = finals.next()
    assert isinstance(failed, Failed)
    assert (failed.ticket, failed.code) == (odd, "stt_language_unknown")
    assert "tlh" in failed.message
    finals.put(Conclude(odd, 1, None))
    finals.put(Heard(german, tone(0.3), "de-AT"))
    finals.put(Conclude(german, 1, None))
    assert finals.next().ticket is german
    assert finals.batches[0][0].language == "de"


def test_a_bad_language_option_stops_the_start() -> None:
    stage = Scripted(language="tlh")
    stage.start()
    with pytest.raises(StageError, match="tlh"):
        stage.wait_ready(PATIENCE_S)


def test_a_batch_has_its_limit(finals: Scripted) -> None:
    finals._max_batch = 2
    finals.gate = threading.Semaphore(0)
    owners = [ticket(str(n)) for n in range(6)]
    for owner in owners:
        finals.put(Heard(owner, tone(0.3)))
        finals.put(Conclude(owner, 1, None))
    finals.gate.release(10)
    assert [finals.next().ticket for _ in owners] == owners
    assert max(map(len, finals.batches)) <= 2
