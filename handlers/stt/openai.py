"""Any OpenAI-compatible `/v1/audio/transcriptions` endpoint as the STT stage.

The endpoint is asked at every soft end, for the whole utterance so far. What it will answer comes
too late, and says too little, to decide whether the person has finished: the words that turn-taking
goes by come from a Moonshine of our own, which hears the same audio.
"""

from __future__ import annotations

import asyncio
import io
import json
import wave
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from handlers.audio import to_pcm16
from handlers.base import Emit, Observer, Overloaded
from handlers.messages import EAR_RATE_HZ, Conclude, Failed, Heard, Message, Transcript
from handlers.options import option
from handlers.remote import Endpoint, RemoteHandler
from handlers.stt.moonshine import MoonshineOptions, MoonshineSTT
from handlers.stt.streaming import language_code
from handlers.ticket import Ticket

if TYPE_CHECKING:
    import httpx2

LOCAL_LOAD_S = 60.0


@dataclass(frozen=True)
class OpenAISTTOptions:
    base_url: str = option("http://127.0.0.1:8000/v1", "the endpoint's address", "stt_base_url")
    api_key: str = option("", "its key; else from PARLEY_STT_API_KEY", "stt_api_key", shown=False)
    model_name: str = option("whisper-1", "the model's name there", "stt_model_name")
    language: str = option("", "language spoken, e.g. de (empty: detected)", "stt_language")
    stream: bool = option(True, "ask for the text as it is made", "stt_stream")
    connect_timeout_s: float = option(2.0, "to connect (s)", "stt_connect_timeout_s")
    timeout_s: float = option(4.5, "to the whole transcript (s)", "stt_timeout_s")
    ear_threads: int = option(
        1, "CPU threads of the recogniser that hears for turn-taking", "stt_ear_threads"
    )
    ear_partial_s: float = option(
        1.0, "new audio between its partial texts (s)", "stt_ear_partial_s"
    )


@dataclass(slots=True)
class _Utterance:
    pcm: bytearray  # at EAR_RATE_HZ
    words: str | None  # heard here so far; None: nobody hears, or he has failed
    language: str  # for the endpoint; empty: to be detected there
    request: Conclude | None = None  # the latest
    cue: Transcript | None = None  # what was heard here, for that
    text: str | None = None  # what the endpoint has made of it
    abandon: Callable[[], None] | None = None  # gives up asking


class OpenAISTT(RemoteHandler[_Utterance]):
    """`Transcript.text` is the endpoint's, `heard` and `end_probability` are Moonshine's.

    Neither waits for the other: where Moonshine comes last, the final transcript is sent again
    with its cues. A later revision supersedes the request for an earlier one. A session's language
    counts more than the option. Moonshine knows English: with another language it is left out,
    and every pause is an unsure one.
    """

    stage: ClassVar[str] = "stt"
    requests: ClassVar[tuple[type, ...]] = (Conclude,)
    Options: ClassVar[type[OpenAISTTOptions]] = OpenAISTTOptions

    def __init__(
        self, options: OpenAISTTOptions, *, emit: Emit, observer: Observer | None = None
    ) -> None:
        super().__init__(emit, observer=observer)
        self.options = o = options
        self._endpoint = Endpoint(o.base_url, o.api_key, "PARLEY_STT_API_KEY", o.connect_timeout_s)
        self._local: MoonshineSTT | None = None
        if language_code(o.language) in (None, "en"):
            ear = MoonshineOptions(threads=o.ear_threads, partial_s=o.ear_partial_s)
            self._local = MoonshineSTT(ear, emit=self._heard_here)

    def setup(self) -> None:
        super().setup()
        if self._local is not None:
            self._local.start()
            self._local.wait_ready(LOCAL_LOAD_S)

    def teardown(self) -> None:
        if self._local is not None:
            self._local.stop()
        super().teardown()

    def _heard_here(self, message: Message) -> None:
        """On the recogniser's thread: its results come to us as messages."""
        try:
            self.put(message)
        except Overloaded as error:
            self.emit(self._failure(message.ticket, self.error("overloaded", str(error))))

    def open(self, ticket: Ticket) -> _Utterance:
        words = None if self._local is None else ""
        return _Utterance(bytearray(), words, self.options.language)

    def close(self, ticket: Ticket, state: _Utterance) -> None:
        state.pcm.clear()

    def handle(self, message: Message) -> Iterable[Message]:
        utterance = self.state(message.ticket)
        match message:
            case Heard(_, samples, language):
                if language is not None and (code := language_code(language)):
                    utterance.language = code
                    utterance.words = utterance.words if code == "en" else None
                utterance.pcm += to_pcm16(samples)
                self._hear_here(message, utterance)
            case Conclude():
                if utterance.abandon is not None:
                    utterance.abandon()
                utterance.request, utterance.cue, utterance.text = message, None, None
                self._hear_here(message, utterance)
                pcm = bytes(utterance.pcm)
                utterance.abandon = self.launch(
                    message.ticket, self._transcribe, message, pcm, utterance
                )
            case Transcript(revision=None):
                utterance.words = message.heard
                yield replace(message, text="")
            case Transcript():
                if utterance.request is not None and message.revision == utterance.request.revision:
                    utterance.words, utterance.cue = message.heard, message
                    self._conclude(utterance.request, utterance)
            case Failed():  # a transcript comes without its word
                utterance.words = None

    def _hear_here(self, message: Heard | Conclude, utterance: _Utterance) -> None:
        if self._local is None or utterance.words is None:
            return
        try:
            self._local.put(message)
        except Overloaded:
            utterance.words = None

    def _conclude(self, request: Conclude, utterance: _Utterance) -> None:
        """Once there is a text, and again if the cue comes after it; from either thread."""
        text, cue = utterance.text, utterance.cue
        if text is None:
            return
        end_probability = cue.end_probability if cue else None
        self.emit(
            Transcript(
                request.ticket,
                text,
                request.revision,
                end_probability,
                request.prosody,
                utterance.words,
            )
        )

    # On the HTTP thread.

    async def _transcribe(self, request: Conclude, pcm: bytes, utterance: _Utterance) -> None:
        text = await self._text(request, pcm, utterance) if pcm else ""
        if request is utterance.request:
            utterance.text = text
            self._conclude(request, utterance)

    async def _text(self, request: Conclude, pcm: bytes, utterance: _Utterance) -> str:
        o = self.options
        fields = {"model": o.model_name, "response_format": "json"}
        if utterance.language:
            fields["language"] = utterance.language
        if o.stream:
            fields["stream"] = "true"
        files = {"file": ("speech.wav", _wav(pcm), "audio/wav")}
        async with (
            asyncio.timeout(o.timeout_s),
            self.post(
                self._endpoint, "/audio/transcriptions", data=fields, files=files
            ) as response,
        ):
            if response.headers.get("content-type", "").startswith("text/event-stream"):
                return await self._streamed(request, response, utterance)
            whole, _, _ = self._parsed(await response.aread())
        if whole is None:
            raise self.bad_answer("is not a transcription")
        return whole.strip()

    async def _streamed(
        self, request: Conclude, response: httpx2.Response, utterance: _Utterance
    ) -> str:
        text, done = "", False
        events = aiter(self._httpx.EventSource(response))
        async for event in events:
            if event.data == "[DONE]":
                done = True
            else:
                whole, delta, done = self._parsed(event.data)
                text = text + delta if whole is None else whole
            if done:
                break
            self.emit(Transcript(request.ticket, text.strip(), heard=utterance.words))
        if not done:
            raise self.error("interrupted", "The stt endpoint broke off.")
        await self.drain(events)
        return text.strip()

    def _parsed(self, data: str | bytes) -> tuple[str | None, str, bool]:
        """The whole text, or a delta; whether that was the last.

        OpenAI streams `transcript.text.delta` and `.done`, vLLM chunks like those of a chat.
        """
        try:
            event = json.loads(data)
            if "error" in event:
                raise self.error("endpoint_error", "The stt endpoint failed while it answered.")
            if "text" in event:
                return str(event["text"]), "", True
            if "delta" in event:
                return None, str(event["delta"]), False
            if "choices" in event:
                deltas = [choice.get("delta") or {} for choice in event["choices"]]
                return None, "".join(delta.get("content") or "" for delta in deltas), False
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise self.bad_answer("is not a transcription") from None
        return None, "", False


def _wav(pcm: bytes) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(EAR_RATE_HZ)
        file.writeframes(pcm)
    return out.getvalue()
