"""The remote TTS, against an endpoint that does what each test says."""

from __future__ import annotations

import io
import struct
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from handlers.audio import Resampler, from_pcm16, to_pcm16
from handlers.messages import RATE_HZ, Failed, Samples, Say, Speech, Spoken
from handlers.tts.openai import OpenAITTS, OpenAITTSOptions, PcmDecoder
from tests.handlers.endpoint import PATIENCE_S, Bench, Endpoint, endpoint, nowhere, ticket

KEY = "sk-a-secret"


@pytest.fixture
def remote() -> Iterator[Endpoint]:
    with endpoint() as one:
        yield one


@contextmanager
def tts(url: str, **options: Any) -> Iterator[Bench]:
    bench = Bench()
    chosen = OpenAITTSOptions(base_url=url, api_key=KEY, **options)
    with bench.running(OpenAITTS(chosen, emit=bench.emitted.put)):
        yield bench


def tone(samples: int, hz: int = RATE_HZ) -> Samples:
    """[T], and what is left of it by 16 bits."""
    pcm = to_pcm16((0.5 * np.sin(np.arange(samples) * 880 * np.pi / hz)).astype(np.float32))
    return from_pcm16(pcm)


def wav(samples: Samples, hz: int, channels: int = 1) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(hz)
        file.writeframes(to_pcm16(np.repeat(samples, channels)))
    return out.getvalue()


def test_audio_goes_out_as_it_comes(remote: Endpoint) -> None:
    with tts(remote.url, model_name="m", voice="verse", instructions="Gently.", speed=1.2) as bench:
        owner = ticket()
        bench.put(Say(owner, "Hello there.", 0, voice="sage", speed=0.5))
        exchange = remote.next()
        assert exchange.path == "/v1/audio/speech"
        assert exchange.headers["Authorization"] == f"Bearer {KEY}"
        assert exchange.json == {
            "model": "m",
            "input": "Hello there.",
            "voice": "sage",
            "response_format": "pcm",
            "speed": 0.6,
            "instructions": "Gently.",
        }
        whole = tone(3000)
        pcm = to_pcm16(whole)
        exchange.begin("audio/pcm")
        exchange.send(pcm[:2001])  # half a sample
        first = bench.next(Speech)
        assert (first.ticket, first.index, len(first.samples)) == (owner, 0, 1000)
        exchange.send(pcm[2001:])
        second = bench.next(Speech)
        exchange.end()
        assert bench.next(Spoken) == Spoken(owner, 0)
        np.testing.assert_array_equal(np.concatenate([first.samples, second.samples]), whole)


def test_clauses_are_asked_for_at_once_and_heard_in_order(remote: Endpoint) -> None:
    with tts(remote.url) as bench:
        owner, other = ticket(), ticket()
        bench.put(Say(owner, "One,", 0))
        one = remote.next()
        bench.put(Say(owner, "two.", 1))
        two = remote.next()
        bench.put(Say(other, "Mine.", 0))
        mine = remote.next()
        two.answer(to_pcm16(tone(200)), "audio/pcm")
        mine.answer(to_pcm16(tone(300)), "audio/pcm")
        assert bench.next(Speech).ticket is other  # nobody waits for another's reply
        assert bench.next(Spoken).ticket is other
        one.answer(to_pcm16(tone(100)), "audio/pcm")
        for index in (0, 1):
            assert bench.next(Speech).index == index
            assert bench.next(Spoken).index == index


def test_nothing_to_speak_needs_no_endpoint() -> None:
    with tts(nowhere()) as bench:
        owner = ticket()
        bench.put(Say(owner, "…", 0))
        assert bench.next(Spoken) == Spoken(owner, 0)


@pytest.mark.parametrize("begun", [False, True])
def test_a_dead_ticket_closes_its_requests(remote: Endpoint, begun: bool) -> None:
    with tts(remote.url) as bench:
        owner = ticket()
        bench.put(Say(owner, "One,", 0))
        bench.put(Say(owner, "two.", 1))
        exchanges = [remote.next(), remote.next()]
        if begun:
            exchanges[0].begin("audio/pcm")
            exchanges[0].send(to_pcm16(tone(100)))
            exchanges[1].begin("audio/pcm")
        owner.cancel()
        for exchange in exchanges:
            exchange.wait_closed()


@pytest.mark.parametrize("hz", [16_000, 22_050, 44_100])
def test_another_rate_is_resampled(remote: Endpoint, hz: int) -> None:
    whole = tone(hz // 2, hz)
    with tts(remote.url, rate_hz=hz) as bench:
        bench.put(Say(ticket(), "Hello.", 0))
        exchange = remote.next()
        exchange.begin("audio/pcm")
        for piece in np.array_split(whole, 7):
            exchange.send(to_pcm16(piece))
        exchange.end()
        parts = []
        while isinstance(message := bench.emitted.get(timeout=PATIENCE_S), Speech):
            parts.append(message.samples)
    expected = Resampler(hz, RATE_HZ).push(whole, last=True)
    np.testing.assert_allclose(np.concatenate(parts), expected, atol=1e-4)


# The decoder alone.


def decode(data: bytes, step: int, rate_hz: int = RATE_HZ) -> Samples:
    decoder = PcmDecoder(rate_hz)
    pieces = [data[at : at + step] for at in range(0, len(data), step)]
    return np.concatenate([decoder.push(p) for p in pieces] + [decoder.push(b"", last=True)])


@pytest.mark.parametrize("step", [1, 7, 1000, 100_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_wav_in_any_pieces(step: int, channels: int) -> None:
    whole = tone(1200)
    trailer = b"LIST\x04\x00\x00\x00abcd"
    data = wav(whole, RATE_HZ, channels) + trailer
    np.testing.assert_allclose(decode(data, step, rate_hz=8000), whole, atol=1e-6)


def test_wav_of_unknown_length_and_of_floats() -> None:
    whole = tone(1200)
    streamed = bytearray(wav(whole, RATE_HZ))
    struct.pack_into("<I", streamed, 40, 0xFFFFFFFF)
    np.testing.assert_array_equal(decode(bytes(streamed), 999), whole)
    fmt = struct.pack("<HHIIHH", 3, 1, RATE_HZ, 4 * RATE_HZ, 4, 32)
    floats = b"RIFF\0\0\0\0WAVEfmt " + struct.pack("<I", 16) + fmt
    floats += b"data" + struct.pack("<I", 4 * len(whole)) + whole.tobytes()
    np.testing.assert_array_equal(decode(floats, 333), whole)


@pytest.mark.parametrize(
    "data",
    [
        b"ID3\x04\0\0\0\0mp3",
        b"OggS" + bytes(40),
        b"RIFF\0\0\0\0WAVE" + b"junk" * 20_000,
        b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0" + struct.pack("<HHIIHH", 1, 1, 24_000, 0, 1, 8),
        b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0" + struct.pack("<HHIIHH", 1, 0, 24_000, 0, 1, 16),
        b"RIFF\0\0\0\0WAVEfmt \x02\0\0\0xxdata\0\0\0\0",
        b"RIFF",
    ],
)
def test_what_is_no_audio_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="wav"):
        decode(data, 500)


# What goes wrong.


@pytest.mark.parametrize(
    ("kind", "body", "status", "code"),
    [
        ("application/json", '{"error": {"code": "no_such_voice"}}', 400, "tts_refused"),
        ("application/json", "{}", 401, "tts_unauthorized"),
        ("application/json", "{}", 429, "tts_rate_limited"),
        ("application/json", '{"status": "queued"}', 200, "tts_bad_answer"),
        ("audio/mpeg", b"\xff\xfb" + bytes(400), 200, "tts_bad_answer"),
        ("audio/wav", b"RIFF" + bytes(70_000), 200, "tts_bad_answer"),
        ("audio/pcm", b"", 200, "tts_bad_answer"),
    ],
)
def test_a_bad_answer_is_named(
    remote: Endpoint, kind: str, body: str | bytes, status: int, code: str
) -> None:
    with tts(remote.url) as bench:
        bench.put(Say(ticket(), "Hello.", 0))
        remote.next().answer(body, kind, status)
        failed = bench.next(Failed)
        assert (failed.stage, failed.code) == ("tts", code)
        other = ticket()
        bench.put(Say(other, "Hello.", 0))
        remote.next().answer(to_pcm16(tone(100)), "audio/pcm")
        assert bench.next(Speech).ticket is other


def test_breaking_off_fails_the_clause_and_silences_the_next(remote: Endpoint) -> None:
    with tts(remote.url) as bench:
        owner, other = ticket(), ticket()
        bench.put(Say(owner, "One,", 0))
        one = remote.next()
        bench.put(Say(owner, "two.", 1))
        two = remote.next()
        one.begin("audio/pcm")
        one.send(to_pcm16(tone(100)))
        bench.next(Speech)
        one.drop()
        assert bench.next(Failed).code == "tts_interrupted"
        two.answer(to_pcm16(tone(100)), "audio/pcm")
        bench.put(Say(other, "Mine.", 0))
        remote.next().answer(to_pcm16(tone(100)), "audio/pcm")
        assert bench.next(Speech).ticket is other


def test_an_endpoint_that_is_down() -> None:
    with tts(nowhere()) as bench:
        bench.put(Say(ticket(), "Hello.", 0))
        assert bench.next(Failed).code == "tts_unreachable"


def test_an_endpoint_that_is_too_slow(remote: Endpoint) -> None:
    with tts(remote.url, timeout_s=0.3) as bench:
        bench.put(Say(ticket(), "Hello.", 0))
        exchange = remote.next()
        assert bench.next(Failed).code == "tts_timeout"
        exchange.wait_closed()


def test_an_answer_without_end_is_ended(remote: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handlers.tts.openai.MAX_CLAUSE_S", 0.1)
    with tts(remote.url) as bench:
        bench.put(Say(ticket(), "Hello.", 0))
        exchange = remote.next()
        exchange.begin("audio/pcm")
        exchange.send(to_pcm16(tone(2000)))
        bench.next(Speech)
        exchange.send(to_pcm16(tone(2000)))
        assert bench.next(Failed).code == "tts_bad_answer"
        exchange.wait_closed()


def test_the_voices_a_client_may_choose() -> None:
    stage = OpenAITTS(OpenAITTSOptions(voice="nova", voices="alloy, nova,,sage"), emit=print)
    assert stage.voices == ("nova", "alloy", "sage")
