"""The ear with the real Silero model, driven step by step on the test's own thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import soxr

from handlers.base import Overloaded
from handlers.messages import (
    EAR_RATE_HZ,
    RATE_HZ,
    AudioIn,
    Conclude,
    Failed,
    Finish,
    Heard,
    Listen,
    Message,
    Retain,
    Samples,
    Voice,
)
from handlers.ticket import Ticket
from handlers.vad.resample import DELAY_SAMPLES, HISTORY_SAMPLES, resample
from handlers.vad.silero import (
    RAW_WINDOW_SAMPLES,
    WAITING_LIMIT,
    WINDOW_SAMPLES,
    SileroEar,
    SileroModel,
    SileroOptions,
)
from tests.handlers.speech import room, spoken

WINDOW = RAW_WINDOW_SAMPLES


class Nowhere:
    def receive(self, message: Message) -> None: ...


@pytest.fixture(scope="module")
def model() -> SileroModel:
    return SileroModel()


class Ear:
    """The stage without its thread; `log` has all that it emitted and forwarded, in order."""

    def __init__(self, model: SileroModel, **options: float) -> None:
        self.log: list[Message] = []
        self.on_emit: Callable[[Message], None] = lambda message: None
        self.full = False
        self.stage = SileroEar(
            SileroOptions(**options),  # type: ignore[arg-type]
            emit=self._emit,
            forward=self._forward,
        )
        self.stage._model = model
        self.clock: dict[Ticket, int] = {}

    def _emit(self, message: Message) -> None:
        self.log.append(message)
        self.on_emit(message)

    def _forward(self, message: Message) -> None:
        if self.full:
            raise Overloaded
        self.log.append(message)

    def audio(self, ticket: Ticket, samples: Samples) -> AudioIn:
        start = self.clock.get(ticket, 0)
        self.clock[ticket] = start + len(samples)
        return AudioIn(ticket, samples, start)

    def process(self, *messages: Message) -> None:
        list(self.stage.process(messages))
        while self.stage.busy:
            list(self.stage.process([]))

    def hear(self, ticket: Ticket, samples: Samples, chunk: int = 480) -> None:
        for at in range(0, len(samples), chunk):
            self.process(self.audio(ticket, samples[at : at + chunk]))

    def voices(self, ticket: Ticket) -> list[Voice]:
        return [m for m in self.log if isinstance(m, Voice) and m.ticket is ticket]

    def probabilities(self, ticket: Ticket) -> list[float]:
        return [voice.probability for voice in self.voices(ticket)]

    def forwarded(self, utterance: Ticket) -> Samples:
        parts = [m.samples for m in self.log if isinstance(m, Heard) and m.ticket is utterance]
        return np.concatenate([np.zeros(0, np.float32), *parts])


@pytest.fixture
def ear(model: SileroModel) -> Ear:
    return Ear(model)


@pytest.fixture
def ticket() -> Ticket:
    return Ticket(Nowhere())


def resampled(samples: Samples) -> Samples:
    """As the ear does it, whole windows only; sample m is input position 1.5 m - DELAY."""
    whole = len(samples) // WINDOW * WINDOW
    history = np.zeros(HISTORY_SAMPLES, np.float32)
    found: Samples = resample(np.concatenate([history, samples[:whole]])[None])[0]
    return found


def ear_index(clock_sample: int) -> int:
    return (clock_sample + DELAY_SAMPLES) * 2 // 3


# Judging.


def test_speech_is_told_from_silence(ear: Ear, ticket: Ticket) -> None:
    ear.hear(ticket, np.concatenate([room(1.0), spoken("What can you do for me?"), room(1.0)]))
    found = np.array(ear.probabilities(ticket))
    assert found[:30].max() < 0.2
    assert found[-20:].max() < 0.2
    assert np.mean(found[42:-45] > 0.5) > 0.75
    levels = np.array([voice.level_db for voice in ear.voices(ticket)])
    assert levels[:30] == pytest.approx(-63.4, abs=1.5)  # two thirds of the noise's band are left
    assert levels.max() > -25


def test_sessions_together_are_judged_as_each_alone(model: SileroModel) -> None:
    speech = spoken("The quick brown fox jumps over the lazy dog.")
    audio = [np.roll(speech, 5000 * i) * (1.0 - 0.15 * i) for i in range(6)]
    joins, leaves = [0, 0, 7, 13, 13, 30], [60, 20, 55, 60, 17, 60]
    together = Ear(model)
    tickets = [Ticket(Nowhere()) for _ in audio]
    for step in range(60):
        batch = []
        for i, ticket in enumerate(tickets):
            if joins[i] <= step < leaves[i]:
                at = (step - joins[i]) * WINDOW
                batch.append(together.audio(ticket, audio[i][at : at + WINDOW]))
            elif step == leaves[i]:
                ticket.cancel()
        together.process(*(batch if step % 2 else reversed(batch)))
    for i, ticket in enumerate(tickets):
        alone, single = Ear(model), Ticket(Nowhere())
        alone.hear(single, audio[i][: (leaves[i] - joins[i]) * WINDOW])
        assert len(together.probabilities(ticket)) == leaves[i] - joins[i]
        np.testing.assert_allclose(
            together.probabilities(ticket), alone.probabilities(single), atol=1e-5
        )


@pytest.mark.parametrize("chunk", [1, 479, 1000, 10_007])
def test_the_size_of_chunks_does_not_matter(model: SileroModel, chunk: int) -> None:
    audio = spoken("Hello there.")[: 20 * WINDOW + 17]
    whole, parts, a, b = Ear(model), Ear(model), Ticket(Nowhere()), Ticket(Nowhere())
    utterances = a.child(), b.child()
    whole.process(Listen(a, utterances[0], 0), whole.audio(a, audio))
    parts.process(Listen(b, utterances[1], 0))
    parts.hear(b, audio, chunk)
    np.testing.assert_allclose(parts.probabilities(b), whole.probabilities(a), atol=1e-5)
    ends = [voice.end_sample for voice in whole.voices(a)]
    assert [voice.end_sample for voice in parts.voices(b)] == ends
    np.testing.assert_allclose(
        parts.forwarded(utterances[1]), whole.forwarded(utterances[0]), atol=1e-6
    )


def test_resampling_matches_soxr_in_the_speech_band() -> None:
    audio = np.random.default_rng(0).standard_normal(96 * WINDOW).astype(np.float32) * 0.1
    ours = np.fft.rfft(resampled(audio)[DELAY_SAMPLES * 2 // 3 :])
    theirs = soxr.resample(audio, RATE_HZ, EAR_RATE_HZ, "HQ")[: -DELAY_SAMPLES * 2 // 3]
    band = slice(0, round(6500 / 8000 * len(ours)))
    error = np.linalg.norm((ours - np.fft.rfft(theirs))[band]) / np.linalg.norm(ours[band])
    assert 20 * np.log10(error) < -50
    hiss = np.sin(2 * np.pi * 10_000 / RATE_HZ * np.arange(20 * WINDOW)).astype(np.float32)
    assert np.sqrt(np.mean(resampled(hiss)[100:] ** 2)) < 0.001  # would be heard at 6 kHz


@pytest.mark.parametrize("first_sample", [0, 123_456])
@pytest.mark.parametrize("at", [3000, 5 * WINDOW - 30, 5 * WINDOW + 30, 5 * WINDOW + 500])
def test_positions_are_those_of_the_input_clock(
    ear: Ear, ticket: Ticket, at: int, first_sample: int
) -> None:
    click = np.zeros(12 * WINDOW, np.float32)
    click[at] = 1.0
    ear.clock[ticket] = first_sample
    ear.hear(ticket, click)
    loudest = max(ear.voices(ticket), key=lambda voice: voice.level_db)
    within = first_sample + at - (loudest.end_sample - WINDOW)
    assert 0 <= within < WINDOW
    utterance = ticket.child()
    ear.process(Listen(ticket, utterance, first_sample + at - 1500))
    assert abs(int(np.argmax(ear.forwarded(utterance))) - 1000) <= 1


def test_a_gap_in_the_clock_is_kept(ear: Ear, ticket: Ticket) -> None:
    ear.hear(ticket, room(1.0))
    ear.clock[ticket] += 10_000
    before = ear.voices(ticket)[-1].end_sample
    ear.hear(ticket, room(0.1))
    ends = [voice.end_sample for voice in ear.voices(ticket) if voice.end_sample > before]
    assert ends[0] == before + 10_000 + WINDOW
    assert set(np.diff(ends)) == {WINDOW}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_extreme_samples_do_no_lasting_harm(model: SileroModel, bad: float) -> None:
    speech = spoken("Hello there.")
    poisoned = speech.copy()
    poisoned[2000:2400] = bad
    tame = poisoned.copy()
    tame[2000:2400] = 0.0 if np.isnan(bad) else np.sign(bad)
    results = []
    for audio in (poisoned, tame):
        ear, ticket = Ear(model), Ticket(Nowhere())
        ear.process(Listen(ticket, ticket.child(), 0))
        ear.hear(ticket, audio)
        levels = [voice.level_db for voice in ear.voices(ticket)]
        results.append(ear.probabilities(ticket) + levels)
    np.testing.assert_allclose(results[0], results[1], atol=1e-5)


# Looking back and forwarding.


@pytest.mark.parametrize("start_sample", [0, 777, 9 * WINDOW, 20 * WINDOW - DELAY_SAMPLES, 30_000])
def test_an_utterance_gets_its_audio_from_where_it_started(
    ear: Ear, ticket: Ticket, start_sample: int
) -> None:
    audio = spoken("The quick brown fox jumps over the lazy dog.")[: 60 * WINDOW]
    ear.hear(ticket, audio[: 20 * WINDOW + 100])
    utterance = ticket.child()
    ear.process(Listen(ticket, utterance, start_sample))
    ear.hear(ticket, audio[20 * WINDOW + 100 :])
    expected = resampled(audio)[ear_index(start_sample) :]
    np.testing.assert_allclose(ear.forwarded(utterance), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("retained", "kept_s"), [(None, 2.0), (RATE_HZ, 4.0), (2 * RATE_HZ, 3.0), (0, 4.0)]
)
def test_how_far_it_looks_back(
    model: SileroModel, ticket: Ticket, retained: int | None, kept_s: float
) -> None:
    ear = Ear(model, look_back_s=2.0, max_look_back_s=4.0)
    ear.process(Retain(ticket, retained))
    audio = room(5.0)[: 150 * WINDOW]
    ear.hear(ticket, audio, 2400)
    utterance = ticket.child()
    ear.process(Listen(ticket, utterance, 0))
    found = ear.forwarded(utterance)
    since_retained = (len(audio) - (retained or 0)) * 2 // 3
    wanted = min(round(kept_s * EAR_RATE_HZ), since_retained) if retained else kept_s * EAR_RATE_HZ
    assert wanted <= len(found) < wanted + WINDOW_SAMPLES
    np.testing.assert_allclose(found, resampled(audio)[-len(found) :], atol=1e-6)


def test_an_idle_session_keeps_little(ear: Ear, ticket: Ticket) -> None:
    ear.hear(ticket, room(10.0), 2400)
    kept = ear.stage.state(ticket).windows
    owned = [window.base is None for window, _ in kept]
    assert all(owned), "a view keeps its whole batch alive"
    assert sum(window.nbytes for window, _ in kept) < 0.15 * 2**20


def test_audio_goes_to_stt_before_its_voice(ear: Ear, ticket: Ticket) -> None:
    ear.process(Listen(ticket, ticket.child(), 0))
    ear.hear(ticket, spoken("Hello there.")[: 20 * WINDOW])
    assert [type(message) for message in ear.log] == [Heard, Voice] * 20


def test_what_is_heard_says_in_which_language(ear: Ear, ticket: Ticket) -> None:
    ear.process(Listen(ticket, ticket.child(), 0, "de"))
    ear.hear(ticket, spoken("Hello there.")[: 4 * WINDOW])
    found = [message.language for message in ear.log if isinstance(message, Heard)]
    assert found == ["de"] * 4


def test_a_finish_is_behind_all_audio_and_loses_none(ear: Ear, ticket: Ticket) -> None:
    audio = spoken("The quick brown fox jumps over the lazy dog.")[: 60 * WINDOW]
    cut = 25 * WINDOW + 333
    utterance = ticket.child()
    ear.process(
        Listen(ticket, utterance, 0),
        ear.audio(ticket, audio[:cut]),
        Finish(ticket, utterance, 1),
        ear.audio(ticket, audio[cut:]),
        Finish(ticket, utterance, 2),
    )
    concludes = [i for i, message in enumerate(ear.log) if isinstance(message, Conclude)]
    before = [m for m in ear.log[: concludes[0]] if isinstance(m, Heard)]
    assert sum(len(heard.samples) for heard in before) == cut * 2 // 3 - ear_index(0)
    found = [ear.log[i] for i in concludes]
    assert [(m.ticket, m.revision) for m in found if isinstance(m, Conclude)] == [
        (utterance, 1),
        (utterance, 2),
    ]
    np.testing.assert_allclose(
        ear.forwarded(utterance), resampled(audio)[ear_index(0) :], atol=1e-6
    )


def test_a_long_pause_after_a_finish_is_left_out(ear: Ear, ticket: Ticket) -> None:
    first, second = spoken("Hello there."), spoken("What can you do?")
    utterance = ticket.child()
    ear.process(Listen(ticket, utterance, 0))
    ear.hear(ticket, first)
    ear.process(Finish(ticket, utterance, 1))
    before = len(ear.forwarded(utterance))
    ear.hear(ticket, room(2.0))
    assert len(ear.forwarded(utterance)) == before
    ear.hear(ticket, second)
    voiced = np.array(ear.probabilities(ticket)[-len(second) // WINDOW :]) >= 0.25
    onset = int(np.argmax(voiced)) * WINDOW_SAMPLES
    sent = len(ear.forwarded(utterance)) - before
    expected = len(second) * 2 / 3 - onset + 0.3 * EAR_RATE_HZ
    assert sent == pytest.approx(expected, abs=2 * WINDOW_SAMPLES)


def test_the_conclusion_says_how_the_speech_ended(ear: Ear, ticket: Ticket) -> None:
    utterance = ticket.child()
    ear.process(Listen(ticket, utterance, 0))
    ear.hear(ticket, spoken("What can you do for me?"))
    ear.process(Finish(ticket, utterance, 1))
    last = ear.log[-1]
    assert isinstance(last, Conclude)
    assert last.prosody is not None


def test_another_listen_replaces_the_first(ear: Ear, ticket: Ticket) -> None:
    old, new = ticket.child(), ticket.child()
    audio = room(1.0)[: 30 * WINDOW]
    ear.process(Listen(ticket, old, 0))
    ear.hear(ticket, audio[: 10 * WINDOW])
    ear.process(Listen(ticket, new, 10 * WINDOW - DELAY_SAMPLES), Finish(ticket, old, 1))
    ear.hear(ticket, audio[10 * WINDOW :])
    assert len(ear.forwarded(old)) == 10 * WINDOW_SAMPLES - ear_index(0)
    assert len(ear.forwarded(new)) == 20 * WINDOW_SAMPLES
    assert not any(isinstance(message, Conclude) for message in ear.log)


def test_a_dead_utterance_gets_no_more(ear: Ear, ticket: Ticket) -> None:
    utterance = ticket.child()
    ear.process(Listen(ticket, utterance, 0))
    ear.hear(ticket, room(0.5))
    utterance.cancel()
    count = len(ear.forwarded(utterance))
    ear.hear(ticket, room(0.5))
    ear.process(Finish(ticket, utterance, 1))
    assert len(ear.forwarded(utterance)) == count > 0
    assert len(ear.voices(ticket)) == 31


# Failing.


def test_stt_that_is_full_fails_the_utterance_once(ear: Ear, ticket: Ticket) -> None:
    utterance = ticket.child()
    ear.process(Listen(ticket, utterance, 0))
    ear.hear(ticket, room(0.5))
    ear.full = True
    ear.hear(ticket, room(0.5))
    ear.process(Finish(ticket, utterance, 1))
    failures = [message for message in ear.log if isinstance(message, Failed)]
    assert [(f.ticket, f.stage, f.code) for f in failures] == [(utterance, "stt", "stt_overloaded")]
    assert len(ear.voices(ticket)) == 31


def test_a_flood_delays_nobody(ear: Ear) -> None:
    flooding, calm = Ticket(Nowhere()), Ticket(Nowhere())
    flood = [ear.audio(flooding, room(10.0)) for _ in range(3)]
    ear.process(*flood, ear.audio(calm, room(0.1)))
    order = [message.ticket for message in ear.log]
    assert order[:6] == [flooding, calm] * 3
    assert len(ear.voices(flooding)) == 30 * RATE_HZ // WINDOW


def test_new_audio_is_looked_at_while_a_flood_is_worked_off(ear: Ear) -> None:
    flooding, calm = Ticket(Nowhere()), Ticket(Nowhere())
    list(ear.stage.process([ear.audio(flooding, room(60.0))]))
    assert ear.stage.busy
    early = len(ear.voices(flooding))
    list(ear.stage.process([ear.audio(calm, room(0.04))]))
    assert len(ear.voices(calm)) == 1
    assert early < 60 * RATE_HZ // WINDOW


def test_too_many_messages_are_refused_by_name(ear: Ear, ticket: Ticket) -> None:
    ear.process(*[ear.audio(ticket, room(0.001)) for _ in range(WAITING_LIMIT + 2)])
    failures = [message for message in ear.log if isinstance(message, Failed)]
    assert [(f.ticket, f.code) for f in failures] == [(ticket, "vad_overloaded")] * 2


def test_a_connection_that_dies_in_mid_flood_is_dropped_at_once(ear: Ear) -> None:
    dying, other = Ticket(Nowhere()), Ticket(Nowhere())

    def cancel_at_third(message: Message) -> None:
        if len(ear.voices(other)) == 3:
            dying.cancel()

    ear.on_emit = cancel_at_third
    ear.process(ear.audio(dying, room(10.0)), ear.audio(other, room(1.0)))
    assert len(ear.voices(dying)) == 3
    assert len(ear.voices(other)) == 31
    assert ear.stage.busy is False


def test_an_error_fails_one_connection(
    ear: Ear, ticket: Ticket, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, utterance = Ticket(Nowhere()), ticket.child()

    def broken(message: Message) -> None:
        raise ValueError("broken link")

    monkeypatch.setattr(ear.stage, "_forward", broken)
    ear.process(Listen(ticket, utterance, 0))
    ear.process(ear.audio(ticket, room(0.04)), ear.audio(other, room(0.1)))
    failures = [message for message in ear.log if isinstance(message, Failed)]
    assert [(f.ticket, f.code) for f in failures] == [(ticket, "vad_error")]
    assert len(ear.voices(other)) == 3


def test_a_model_that_fails_is_told_to_all_and_tried_again(ear: Ear, ticket: Ticket) -> None:
    works = ear.stage._model

    def broken(*arrays: Samples) -> Iterable[Samples]:
        ear.stage._model = works
        raise RuntimeError("broken model")

    ear.stage._model = broken  # type: ignore[assignment]
    ear.process(ear.audio(ticket, room(0.1)))
    assert [type(message) for message in ear.log] == [Failed, Voice, Voice]


def test_only_a_crowd_gathers(ear: Ear, ticket: Ticket) -> None:
    ear.process(ear.audio(ticket, room(0.04)))
    assert ear.stage._min_interval_s == 0.0
    crowd = [Ticket(Nowhere()) for _ in range(100)]
    ear.process(*[ear.audio(one, room(0.04)) for one in crowd])
    assert 0.005 <= ear.stage._min_interval_s <= 0.010


def test_the_thread_runs_it(ticket: Ticket) -> None:
    done: list[Message] = []
    utterance = ticket.child()
    concluded = threading.Event()

    def forward(message: Message) -> None:
        done.append(message)
        if isinstance(message, Conclude):
            concluded.set()

    ear = SileroEar(SileroOptions(), emit=done.append, forward=forward)
    ear.start()
    ear.wait_ready(30)
    ear.put(Listen(ticket, utterance, 0))
    ear.put(AudioIn(ticket, room(0.1), 0))
    ear.put(Finish(ticket, utterance, 1))
    assert concluded.wait(10)
    ear.stop()
    kinds = [type(message) for message in done]
    assert kinds == [Heard, Voice, Heard, Voice, Heard, Voice, Heard, Conclude]
