"""With the real eSpeak NG, driven step by step on the test's own thread."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import soxr

from handlers.messages import RATE_HZ, Failed, Message, Samples, Say, Speech, Spoken, WordMark
from handlers.ticket import Ticket
from handlers.tts.espeak import OPENAI_VARIANTS, EspeakOptions, EspeakTTS
from handlers.tts.espeak_voice import (
    AUDIBLE,
    GAP_END_S,
    GAP_NONE_S,
    GAP_PAUSE_S,
    EspeakVoice,
    Manner,
    Pcm,
    Words,
    _Chunks,
)

PLAIN = Manner("en-us")
TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps."


class Nowhere:
    def receive(self, message: Message) -> None: ...


class Bench:
    """The stage without its thread, and all that it emitted."""

    def __init__(self) -> None:
        self.emitted: list[Message] = []
        self.cancel_at_speech: Ticket | None = None
        self.stage = EspeakTTS(EspeakOptions(), emit=self._emit)
        self.stage.setup()

    def _emit(self, message: Message) -> None:
        self.emitted.append(message)
        if isinstance(message, Speech) and message.ticket is self.cancel_at_speech:
            message.ticket.cancel()

    def speak(self, *says: Say) -> list[Message]:
        self.emitted = []
        list(self.stage.process(says))
        while self.stage.busy:
            list(self.stage.process([]))
        return self.emitted


@pytest.fixture(scope="module")
def shared() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.stage.teardown()


@pytest.fixture
def bench(shared: Bench) -> Bench:
    shared.cancel_at_speech = None
    return shared


@pytest.fixture(scope="module")
def voice() -> Iterator[EspeakVoice]:
    voice = EspeakVoice()
    yield voice
    voice.close()


@pytest.fixture
def ticket() -> Ticket:
    return Ticket(Nowhere())


def audio_of(messages: list[Message]) -> Samples:
    parts = [message.samples for message in messages if isinstance(message, Speech)]
    return np.concatenate([np.zeros(0, np.float32), *parts])


def marks_of(messages: list[Message]) -> list[WordMark]:
    return [mark for message in messages if isinstance(message, Speech) for mark in message.marks]


# Audio.


def test_a_clause_comes_in_chunks_and_ends_with_spoken(bench: Bench, ticket: Ticket) -> None:
    *speech, last = bench.speak(Say(ticket, TEXT, 7))
    assert last == Spoken(ticket, 7)
    chunks = [message for message in speech if isinstance(message, Speech)]
    assert len(chunks) == len(speech) > 5
    assert {chunk.index for chunk in chunks} == {7}
    assert 0 < len(chunks[0].samples) < 0.15 * RATE_HZ
    assert max(len(chunk.samples) for chunk in chunks) < 0.6 * RATE_HZ
    assert 2 * RATE_HZ < len(audio_of(speech)) < 6 * RATE_HZ


@pytest.mark.parametrize(
    ("text", "gap_s"),
    [
        ("Stop here.", GAP_END_S),
        ('He said "stop here!" ', GAP_END_S),
        ("And then, ", GAP_PAUSE_S),
        ("And then", GAP_NONE_S),
    ],
)
def test_sound_comes_at_once_and_a_gap_follows(voice: EspeakVoice, text: str, gap_s: float) -> None:
    audio = voice.speak(text, PLAIN)
    loud = np.flatnonzero(np.abs(audio) > AUDIBLE)
    assert loud[0] < 0.005 * RATE_HZ
    assert (len(audio) - loud[-1]) / RATE_HZ == pytest.approx(gap_s, abs=0.005)


def raw(voice: EspeakVoice, text: str, manner: Manner = PLAIN) -> list[tuple[Pcm, Words]]:
    frames: list[tuple[Pcm, Words]] = []

    def keep(pcm: Pcm, words: Words) -> bool:
        frames.append((pcm, words))
        return True

    assert voice._synthesize(text, manner, keep, lambda: True)
    return frames


def test_streamed_is_the_same_as_whole(voice: EspeakVoice) -> None:
    frames = raw(voice, TEXT)
    pcm = np.concatenate([frame for frame, _ in frames])
    words = [word for _, starts in frames for word in starts]

    def run(frames: list[tuple[Pcm, Words]]) -> tuple[Samples, list[WordMark], int]:
        parts: list[Samples] = []
        marks: list[WordMark] = []

        def keep(samples: Samples, due: tuple[WordMark, ...]) -> bool:
            parts.append(samples)
            marks.extend(due)
            return True

        chunks = _Chunks(TEXT, voice.rate_hz, GAP_END_S, keep)
        chunks.begin_piece(0)
        assert all(chunks.push(*frame) for frame in frames)
        chunks.finish()
        return np.concatenate(parts), marks, len(parts)

    streamed, streamed_marks, count = run(frames)
    whole, whole_marks, _ = run([(pcm, words)])
    assert count > 5
    assert streamed_marks == whole_marks
    np.testing.assert_allclose(streamed, whole, atol=1e-6)

    audio = pcm.astype(np.float32) / 32768
    loud = np.flatnonzero(np.abs(audio) > AUDIBLE)
    gap = round(GAP_END_S * voice.rate_hz)
    kept = audio[loud[0] : loud[-1] + 1 + gap]
    kept = np.concatenate([kept, np.zeros(loud[-1] + 1 + gap - len(audio), np.float32)])
    one_shot = soxr.resample(kept, voice.rate_hz, RATE_HZ, "HQ")
    np.testing.assert_allclose(streamed, one_shot, atol=1e-4)


def test_marks_of_words_count_the_given_text(voice: EspeakVoice, bench: Bench) -> None:
    for text, name, words in [
        ("Hello there, it's 3.14 o'clock – now. ", "en-us", 6),
        ("Zoë\tdrinks a café\n crème at naïve 日 bars!", "en-us", 9),
        ("Привет, мир! Как дела?", "ru", 4),
    ]:
        messages = bench.speak(Say(Ticket(Nowhere()), text, 0, voice=name))
        marks = marks_of(messages)
        ends = [mark.char_end for mark in marks]
        assert len(marks) == words
        assert all(text[:end].rstrip() == text[:end] for end in ends)
        assert all(text[end : end + 1].strip() == "" or ord(text[end]) > 0x3000 for end in ends)
        assert ends == sorted(set(ends))
        assert ends[-1] == len(text.rstrip())
        times = [mark.end_sample for mark in marks]
        assert times == sorted(times)
        assert times[0] > 0.05 * RATE_HZ
        gap = round(GAP_END_S * RATE_HZ)
        assert times[-1] == pytest.approx(len(audio_of(messages)) - gap, abs=0.01 * RATE_HZ)


def test_a_mark_comes_no_earlier_than_its_audio(bench: Bench, ticket: Ticket) -> None:
    sent = 0
    *speech, _ = bench.speak(Say(ticket, TEXT, 0))
    for message in speech:
        assert isinstance(message, Speech)
        sent += len(message.samples)
        assert all(mark.end_sample <= sent for mark in message.marks)


# Voices and manners.


def test_speed_pitch_and_volume_are_obeyed(voice: EspeakVoice) -> None:
    audio = voice.speak(TEXT, PLAIN)
    fast = voice.speak(TEXT, Manner("en-us", wpm=250))
    assert len(fast) < 0.8 * len(audio)
    loud = voice.speak(TEXT, Manner("en-us", volume=50))
    assert np.std(loud) == pytest.approx(np.std(audio) / 2, rel=0.1)

    assert pitch_hz(voice.speak(TEXT, Manner("en-us", pitch=99))) > 1.2 * pitch_hz(audio)


def pitch_hz(samples: Samples) -> float:
    """The lag from 70 to 400 Hz at which the whole is most like itself."""
    power = np.abs(np.fft.rfft(samples, 2 * len(samples))) ** 2
    alike = np.fft.irfft(power)
    shortest, longest = RATE_HZ // 400, RATE_HZ // 70
    return RATE_HZ / (shortest + int(np.argmax(alike[shortest:longest])))


def test_speed_of_a_message_multiplies_and_is_bounded(bench: Bench, ticket: Ticket) -> None:
    def length(speed: float) -> int:
        return len(audio_of(bench.speak(Say(ticket, TEXT, 0, speed=speed))))

    assert length(1.5) < 0.8 * length(1.0)
    assert length(0.5) > 1.5 * length(1.0)
    assert length(100.0) == pytest.approx(length(1.5), rel=0.01)
    assert length(0.0) == pytest.approx(length(0.25), rel=0.01)


def test_every_openai_voice_speaks_and_no_two_are_alike(bench: Bench, ticket: Ticket) -> None:
    assert set(OPENAI_VARIANTS) < set(bench.stage.voices)
    assert len(set(OPENAI_VARIANTS.values())) == len(OPENAI_VARIANTS)
    for name in OPENAI_VARIANTS:
        assert len(audio_of(bench.speak(Say(ticket, "Hello.", 0, voice=name)))) > 0.3 * RATE_HZ


def test_voices_of_other_languages_and_variants(bench: Bench, ticket: Ticket) -> None:
    assert {"de", "en-gb", "en-us+f3"} < set(bench.stage.voices)
    languages = bench.stage.languages
    assert (languages["alloy"], languages["de"], languages["en-us+f3"]) == ("en-us", "de", "en-us")
    for name in ("de", "DE+M3", "pt-br+Andrea"):
        *speech, last = bench.speak(Say(ticket, "Hallo.", 0, voice=name))
        assert last == Spoken(ticket, 0)
        assert speech


def test_the_configured_voice_comes_first() -> None:
    stage = EspeakTTS(EspeakOptions(voice="de+m3"), emit=lambda message: None)
    stage.setup()
    try:
        assert stage.voices[:2] == ("de+m3", "alloy")
        assert len(set(stage.voices)) == len(stage.voices)
        assert (stage.languages["de+m3"], stage.languages["alloy"]) == ("de", "de")
    finally:
        stage.teardown()


@pytest.mark.parametrize("name", ["nobody", "en-us+nobody", "+f3", "en-us+", "../../etc", ""])
def test_an_unknown_voice_is_named_as_such(bench: Bench, ticket: Ticket, name: str) -> None:
    other = Ticket(Nowhere())
    messages = bench.speak(
        Say(ticket, "One.", 0, voice=name), Say(ticket, "Two.", 1), Say(other, "Three.", 0)
    )
    failure = messages[0]
    assert isinstance(failure, Failed)
    assert (failure.ticket, failure.code) == (ticket, "unknown_voice")
    assert "alloy" in failure.message
    assert {message.ticket for message in messages[1:]} == {other}
    assert messages[-1] == Spoken(other, 0)


def test_a_wrong_default_voice_stops_the_start() -> None:
    stage = EspeakTTS(EspeakOptions(voice="nobody"), emit=lambda message: None)
    stage.start()
    with pytest.raises(Exception, match="no such voice"):
        stage.wait_ready(10)


# Turns and cancellation.


def test_sessions_take_turns_clause_by_clause(bench: Bench) -> None:
    a, b, c = (Ticket(Nowhere(), name) for name in "abc")
    says = [Say(a, "One.", i) for i in range(3)] + [Say(b, "Two.", i) for i in range(3)]
    messages = bench.speak(*says, Say(c, "Three.", 0))
    order = [(m.ticket.name, m.index) for m in messages if isinstance(m, Spoken)]
    assert order == [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]


def test_nobody_waits_behind_a_very_long_text(bench: Bench) -> None:
    a, b = Ticket(Nowhere()), Ticket(Nowhere())
    text = "some words " * 200
    messages = bench.speak(Say(a, text, 0), Say(b, "Hello.", 0))
    before = messages[: messages.index(Spoken(b, 0))]
    assert len(audio_of([m for m in before if m.ticket is a])) < 30 * RATE_HZ
    long = [m for m in messages if m.ticket is a]
    assert long[-1] == Spoken(a, 0)
    assert len(marks_of(long)) == 400
    assert marks_of(long)[-1].char_end == len(text.rstrip())


def test_cancelled_in_mid_word_it_stops_at_once(bench: Bench, ticket: Ticket) -> None:
    bench.cancel_at_speech = ticket
    other = Ticket(Nowhere())
    messages = bench.speak(Say(ticket, TEXT, 0), Say(ticket, TEXT, 1), Say(other, TEXT, 0))
    assert [type(m) for m in messages if m.ticket is ticket] == [Speech]
    whole = [m for m in messages if m.ticket is other]
    assert whole[-1] == Spoken(other, 0)
    assert marks_of(whole)[-1].char_end == len(TEXT)


def test_a_stopped_text_is_not_made_to_its_end_and_leaves_no_echo(voice: EspeakVoice) -> None:
    echoing = Manner("en-us+f2")
    frames = 0

    def push(pcm: Pcm, words: Words) -> bool:
        nonlocal frames
        frames += 1
        return frames < 10

    long = "How now, brown cow. " * 14
    assert not voice._synthesize(long, echoing, push, lambda: True)
    assert frames == 10
    first, _ = raw(voice, "Hello.", echoing)[0]
    assert not first[:200].any()


def test_text_without_sound_is_just_spoken(bench: Bench, ticket: Ticket) -> None:
    for text in ("", "  \n", "...", "?!", "\x00\x1b", "\ud800", "“—”"):
        assert bench.speak(Say(ticket, text, 0)) == [Spoken(ticket, 0)]


@pytest.mark.parametrize(
    "text",
    [
        "a\x00b\x07c\x1b[31m",
        "<speak><break time='60s'/>hi</speak>",
        "[[h@'loU]] [[[[",
        "&lt;&#x41; 100% \\n %s%n",
        "a\ud800b \udfff",
        "\u202eabc\u200b\ufeff \ufffe",
        "e\u0301" * 120,
        "9" * 290,
        "A" * 290,
        "😀👩‍👩‍👧‍👦🏳️‍🌈",
        "שלום ทดสอบ क्षि 日本語",
        "((((" * 70 + "a",
    ],
)
def test_hostile_text_is_spoken_as_plain_text(bench: Bench, ticket: Ticket, text: str) -> None:
    *speech, last = bench.speak(Say(ticket, text, 0))
    assert last == Spoken(ticket, 0)
    audio = audio_of(speech)
    assert np.isfinite(audio).all()
    assert 0.1 < len(audio) / RATE_HZ < 400
    quiet = np.diff(np.flatnonzero(np.abs(audio) > AUDIBLE))
    assert quiet.max() < 2 * RATE_HZ  # no <break> was obeyed


# When the synthesizer itself fails.


def test_a_crash_fails_that_reply_alone(bench: Bench) -> None:
    a, b = Ticket(Nowhere()), Ticket(Nowhere())
    process = bench.stage._espeak._process
    assert process is not None
    process.kill()
    process.wait()
    failure, *rest = bench.speak(Say(a, TEXT, 0), Say(a, TEXT, 1), Say(b, TEXT, 0))
    assert isinstance(failure, Failed)
    assert (failure.ticket, failure.code) == (a, "synthesizer_failed")
    assert {message.ticket for message in rest} == {b}
    assert rest[-1] == Spoken(b, 0)


def test_a_hang_is_a_failure_too_and_leaves_no_process(bench: Bench, ticket: Ticket) -> None:
    espeak = bench.stage._espeak
    stuck = espeak._process
    assert stuck is not None
    espeak._socket.settimeout(0.01)
    stuck.send_signal(signal.SIGSTOP)
    (failure,) = bench.speak(Say(ticket, TEXT, 0))
    assert isinstance(failure, Failed)
    assert stuck.returncode == -signal.SIGKILL
    assert bench.speak(Say(ticket, TEXT, 0))[-1] == Spoken(ticket, 0)


# The stage with its thread.


def test_the_running_stage() -> None:
    done = threading.Event()
    emitted: list[Message] = []

    def emit(message: Message) -> None:
        emitted.append(message)
        if isinstance(message, Spoken):
            done.set()

    stage = EspeakTTS(EspeakOptions(), emit=emit)
    stage.start()
    stage.wait_ready(10)
    process = stage._espeak._process
    ticket = Ticket(Nowhere())
    stage.put(Say(ticket, "Hello there.", 0))
    assert done.wait(10)
    assert isinstance(emitted[0], Speech)
    stage.stop()
    assert process is not None
    assert process.returncode is not None
