"""The remote STT, against an endpoint that does what each test says."""

from __future__ import annotations

import io
import threading
import wave
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from handlers.audio import from_pcm16
from handlers.base import Emit, Handler, Observer, StageError
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
from handlers.stt import openai
from handlers.stt.moonshine import MoonshineOptions
from handlers.stt.openai import OpenAISTT, OpenAISTTOptions
from tests.handlers.endpoint import (
    PATIENCE_S,
    Bench,
    Endpoint,
    Exchange,
    endpoint,
    nowhere,
    ticket,
)
from tests.handlers.speech import heard

KEY = "sk-a-secret"
PROSODY = Prosody(0.0, 1.0, 2.0, 3.0, 4.0)


class Ear(Handler[None]):
    """In Moonshine's place: hears a word per piece of audio, is sure of a half."""

    stage = "stt"
    awake = threading.Event()

    def __init__(
        self, options: MoonshineOptions, *, emit: Emit, observer: Observer | None = None
    ) -> None:
        super().__init__(emit)
        self.words: dict[object, list[str]] = {}

    def handle(self, message: Message) -> Iterable[Message]:
        words = self.words.setdefault(message.ticket, [])
        if isinstance(message, Conclude):
            if message.ticket.name == "slow":
                assert self.awake.wait(PATIENCE_S)
            if message.ticket.name == "unlucky":
                raise StageError("stt_busy", "All speech decoders are in use.")
            yield Transcript(message.ticket, "", message.revision, 0.5, heard=" ".join(words))
        else:
            words.append("word")
            yield Transcript(message.ticket, "", heard=" ".join(words))


@pytest.fixture
def remote() -> Iterator[Endpoint]:
    with endpoint() as one:
        yield one


@pytest.fixture
def ear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ear, "awake", threading.Event())
    monkeypatch.setattr(openai, "MoonshineSTT", Ear)


@contextmanager
def stt(url: str, **options: Any) -> Iterator[Bench]:
    bench = Bench()
    chosen = OpenAISTTOptions(base_url=url, api_key=KEY, **options)
    with bench.running(OpenAISTT(chosen, emit=bench.emitted.put)):
        yield bench


def piece(samples: int = 160) -> Samples:
    return np.full(samples, 0.25, np.float32)


def audio_of(exchange: Exchange) -> Samples:
    """What was sent in the form's file."""
    data = exchange.body
    with wave.open(io.BytesIO(data[data.index(b"RIFF") :])) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16_000, 1, 2)
        return from_pcm16(file.readframes(file.getnframes()))


def final(bench: Bench) -> Transcript:
    """With the cues, whichever came first. What comes before it has none."""
    while (found := bench.next(Transcript)).end_probability is None:
        pass
    return found


def field(exchange: Exchange, name: str) -> str | None:
    head = f'name="{name}"\r\n\r\n'.encode()
    if head not in exchange.body:
        return None
    return exchange.body.partition(head)[2].partition(b"\r\n")[0].decode()


@pytest.mark.usefixtures("ear")
def test_the_endpoints_text_and_the_cues_of_our_own(remote: Endpoint) -> None:
    with stt(remote.url, model_name="whisper-x", language="en") as bench:
        owner = ticket()
        bench.put(Heard(owner, piece()))
        assert bench.next(Transcript) == Transcript(owner, "", heard="word")
        bench.put(Heard(owner, piece(80)))
        assert bench.next(Transcript) == Transcript(owner, "", heard="word word")
        bench.put(Conclude(owner, 1, PROSODY))
        exchange = remote.next()
        assert exchange.path == "/v1/audio/transcriptions"
        assert exchange.headers["Authorization"] == f"Bearer {KEY}"
        assert field(exchange, "model") == "whisper-x"
        assert field(exchange, "language") == "en"
        assert field(exchange, "stream") == "true"
        np.testing.assert_array_equal(audio_of(exchange), piece(240))
        exchange.answer('{"text": " Good morning. "}')
        assert final(bench) == Transcript(owner, "Good morning.", 1, 0.5, PROSODY, "word word")


@pytest.mark.usefixtures("ear")
def test_a_later_revision_supersedes(remote: Endpoint) -> None:
    with stt(remote.url) as bench:
        owner = ticket()
        bench.put(Heard(owner, piece()))
        bench.next(Transcript)
        bench.put(Conclude(owner, 1, None))
        first = remote.next()
        bench.put(Heard(owner, piece()))
        bench.next(Transcript)
        bench.put(Conclude(owner, 2, None))
        second = remote.next()
        first.wait_closed()
        assert len(audio_of(second)) == 320  # all of it again
        second.answer('{"text": "Both."}')
        both = final(bench)
        assert (both.text, both.revision, both.heard) == ("Both.", 2, "word word")


OPENAI = (
    {"type": "transcript.text.delta", "delta": "Good "},
    {"type": "transcript.text.delta", "delta": "morning"},
    {"type": "transcript.text.done", "text": "Good morning."},
)
VLLM = (
    {"object": "transcription.chunk", "choices": [{"delta": {"content": "Good "}}]},
    {"object": "transcription.chunk", "choices": [{"delta": {"content": "morning"}}]},
    {"choices": [{"delta": {"content": "."}, "finish_reason": "stop"}]},
    "[DONE]",
)


@pytest.mark.usefixtures("ear")
@pytest.mark.parametrize("events", [OPENAI, VLLM])
def test_text_is_passed_on_as_it_is_made(remote: Endpoint, events: tuple[Any, ...]) -> None:
    with stt(remote.url) as bench:
        owner = ticket()
        bench.put(Heard(owner, piece()))
        bench.next(Transcript)
        bench.put(Conclude(owner, 1, None))
        exchange = remote.next()
        exchange.begin()
        exchange.event(events[0])
        assert bench.next(Transcript) == Transcript(owner, "Good", heard="word")
        for event in events[1:]:
            exchange.event(event)
        exchange.end()
        assert bench.next(Transcript) == Transcript(owner, "Good morning", heard="word")
        assert final(bench) == Transcript(owner, "Good morning.", 1, 0.5, None, "word")


@pytest.mark.usefixtures("ear")
def test_without_its_own_recogniser_the_transcript_still_comes(remote: Endpoint) -> None:
    with stt(remote.url) as bench:
        owner = ticket("unlucky")
        bench.put(Heard(owner, piece()))
        bench.next(Transcript)
        for revision in (1, 2):
            bench.put(Conclude(owner, revision, PROSODY))
            remote.next().answer('{"text": "Hello."}')
            assert bench.next(Transcript) == Transcript(
                owner, "Hello.", revision, None, PROSODY, None
            )


@pytest.mark.usefixtures("ear")
def test_neither_waits_for_the_other(remote: Endpoint) -> None:
    with stt(remote.url) as bench:
        owner = ticket("slow")
        bench.put(Heard(owner, piece()))
        bench.next(Transcript)
        bench.put(Conclude(owner, 1, PROSODY))
        remote.next().answer('{"text": "Hello."}')
        assert bench.next(Transcript) == Transcript(owner, "Hello.", 1, None, PROSODY, "word")
        Ear.awake.set()
        assert bench.next(Transcript) == Transcript(owner, "Hello.", 1, 0.5, PROSODY, "word")


def test_another_language_has_no_recogniser_of_its_own(remote: Endpoint) -> None:
    with stt(remote.url, language="de-AT", stream=False) as bench:
        owner = ticket()
        bench.put(Heard(owner, piece()))
        bench.put(Conclude(owner, 1, PROSODY))
        exchange = remote.next()
        assert field(exchange, "language") == "de-AT"
        assert field(exchange, "stream") is None
        exchange.answer('{"text": "Grüß Gott."}')
        assert bench.next(Transcript) == Transcript(owner, "Grüß Gott.", 1, None, PROSODY, None)


@pytest.mark.usefixtures("ear")
def test_a_sessions_language_is_the_endpoints_and_decides_who_hears(remote: Endpoint) -> None:
    with stt(remote.url, language="en") as bench:
        for spoken, told, words in (("fr-CA", "fr", None), ("en-US", "en", "word")):
            owner = ticket()
            bench.put(Heard(owner, piece(), spoken))
            if words:
                assert bench.next(Transcript) == Transcript(owner, "", heard=words)
            bench.put(Conclude(owner, 1, None))
            exchange = remote.next()
            assert field(exchange, "language") == told
            exchange.answer('{"text": "Oui."}')
            found = final(bench) if words else bench.next(Transcript)
            cue = 0.5 if words else None
            assert found == Transcript(owner, "Oui.", 1, cue, None, words)


def test_no_audio_needs_no_endpoint() -> None:
    with stt(nowhere(), language="fr") as bench:
        owner = ticket()
        bench.put(Conclude(owner, 1, None))
        assert bench.next(Transcript) == Transcript(owner, "", 1)


def test_the_real_recogniser_gives_the_cues(remote: Endpoint) -> None:
    with stt(remote.url) as bench:
        owner = ticket()
        speech = heard("she went to the market to buy some bread")
        for part in np.array_split(speech, len(speech) // 512):
            bench.put(Heard(owner, part))
        bench.put(Conclude(owner, 1, PROSODY))
        remote.next().answer('{"text": "Something else."}')
        found = final(bench)
        assert found.text == "Something else."
        assert "market" in (found.heard or "")
        assert 0.0 < (found.end_probability or 0.0) < 1.0
        owner.cancel()


# What goes wrong.


@pytest.mark.parametrize(
    ("status", "kind", "body", "code"),
    [
        (401, "application/json", "{}", "stt_unauthorized"),
        (429, "application/json", "{}", "stt_rate_limited"),
        (400, "application/json", '{"error": 5}', "stt_refused"),
        (200, "application/json", "{", "stt_bad_answer"),
        (200, "application/json", "[]", "stt_bad_answer"),
        (200, "application/json", '{"task": "transcribe"}', "stt_bad_answer"),
        (200, "text/html", "<html>", "stt_bad_answer"),
        (200, "application/json", '{"error": {"message": "no"}}', "stt_endpoint_error"),
        (200, "text/event-stream", "data: {\n\n", "stt_bad_answer"),
        (200, "text/event-stream", 'data: {"delta": "I wa"}\n\n', "stt_interrupted"),
    ],
)
def test_a_bad_answer_is_named(
    remote: Endpoint, status: int, kind: str, body: str, code: str
) -> None:
    with stt(remote.url, language="de") as bench:
        unlucky, other = ticket(), ticket()
        for owner, answer in ((unlucky, (body, kind, status)), (other, ('{"text": "Ja."}',))):
            bench.put(Heard(owner, piece()))
            bench.put(Conclude(owner, 1, None))
            remote.next().answer(*answer)
        messages = [bench.emitted.get(timeout=PATIENCE_S) for _ in range(2)]
        if isinstance(messages[0], Transcript):  # what had come of it
            messages = [messages[1], bench.next(Transcript)]
        failed, good = messages
        assert isinstance(failed, Failed)
        assert (failed.stage, failed.code, failed.ticket) == ("stt", code, unlucky)
        assert isinstance(good, Transcript)
        assert (good.text, good.ticket) == ("Ja.", other)


def test_an_endpoint_that_is_down_or_too_slow(remote: Endpoint) -> None:
    for url, code in ((nowhere(), "stt_unreachable"), (remote.url, "stt_timeout")):
        with stt(url, language="de", timeout_s=0.1) as bench:
            owner = ticket()
            bench.put(Heard(owner, piece(EAR_RATE_HZ)))
            bench.put(Conclude(owner, 1, None))
            assert bench.next(Failed).code == code


def test_a_dead_ticket_closes_its_request(remote: Endpoint) -> None:
    with stt(remote.url, language="de") as bench:
        owner = ticket()
        bench.put(Heard(owner, piece()))
        bench.put(Conclude(owner, 1, None))
        exchange = remote.next()
        owner.cancel()
        exchange.wait_closed()
