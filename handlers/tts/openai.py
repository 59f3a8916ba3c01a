"""Any OpenAI-compatible `/v1/audio/speech` endpoint as the TTS stage."""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from handlers.audio import Resampler
from handlers.base import Emit, Observer
from handlers.messages import RATE_HZ, Message, Samples, Say, Speech, Spoken
from handlers.options import option
from handlers.remote import Endpoint, RemoteHandler
from handlers.ticket import Ticket

log = logging.getLogger(__name__)

VOICES = "alloy,ash,ballad,cedar,coral,echo,marin,sage,shimmer,verse"
MAX_CLAUSE_S = 120.0
"""A clause of 200 characters takes about 12 s: an answer this long never ends."""
_SPOKEN_TYPES = ("audio/", "application/octet-stream")
_COMPRESSED_TYPES = tuple(f"audio/{kind}" for kind in ("mpeg", "mp3", "ogg", "opus", "aac", "flac"))


@dataclass(frozen=True)
class OpenAITTSOptions:
    base_url: str = option("http://127.0.0.1:8000/v1", "the endpoint's address", "tts_base_url")
    api_key: str = option("", "its key; else from PARLEY_TTS_API_KEY", "tts_api_key", shown=False)
    model_name: str = option("tts-1", "the model's name there", "tts_model_name")
    voice: str = option("alloy", "voice", "tts_voice")
    voices: str = option(VOICES, "voices that a client may choose (comma-separated)", "tts_voices")
    speed: float = option(1.0, "speaking rate", "tts_speed")
    instructions: str = option("", "how to speak, for models that can be told", "tts_instructions")
    response_format: str = option("pcm", "pcm (16-bit) or wav", "tts_response_format")
    rate_hz: int = option(24_000, "sampling rate of the endpoint's pcm (Hz)", "tts_rate_hz")
    connect_timeout_s: float = option(2.0, "to connect (s)", "tts_connect_timeout_s")
    timeout_s: float = option(
        10.0, "to the first audio, and from chunk to chunk (s)", "tts_timeout_s"
    )


@dataclass(slots=True)
class _Turn:
    """Of one reply: when its latest clause is through, and whether all were spoken so far."""

    latest: asyncio.Event | None = None
    failed: bool = False


class OpenAITTS(RemoteHandler[_Turn]):
    """A reply's clauses are asked for at once and heard in order.

    `Speech` goes out as audio comes in. An answer that is not 16-bit PCM or WAV fails the clause
    as `tts_bad_answer`; the reply's later clauses are then not spoken. No word marks.
    """

    stage: ClassVar[str] = "tts"
    requests: ClassVar[tuple[type, ...]] = (Say,)
    Options: ClassVar[type[OpenAITTSOptions]] = OpenAITTSOptions

    def __init__(
        self, options: OpenAITTSOptions, *, emit: Emit, observer: Observer | None = None
    ) -> None:
        super().__init__(emit, observer=observer)
        self.options = o = options
        others = (name.strip() for name in o.voices.split(","))
        self.voices: tuple[str, ...] = tuple(dict.fromkeys((o.voice, *filter(None, others))))
        key = (o.api_key, "PARLEY_TTS_API_KEY")
        self._endpoint = Endpoint(o.base_url, *key, o.connect_timeout_s)

    def open(self, ticket: Ticket) -> _Turn:
        return _Turn()

    def handle(self, message: Message) -> Iterable[Message]:
        assert isinstance(message, Say)
        turn = self.state(message.ticket)
        before, turn.latest = turn.latest, asyncio.Event()
        self.launch(message.ticket, self._speak, message, turn, before, turn.latest)
        return ()

    async def _speak(
        self, say: Say, turn: _Turn, before: asyncio.Event | None, through: asyncio.Event
    ) -> None:
        try:
            if any(char.isalnum() for char in say.text):
                await self._fetch(say, turn, before)
            elif before is not None:
                await before.wait()
            if not turn.failed:
                self.emit(Spoken(say.ticket, say.index))
        except Exception:
            if before is not None:
                await before.wait()
            if turn.failed:
                return  # one failure of a reply is enough
            turn.failed = True
            raise
        finally:
            through.set()

    async def _fetch(self, say: Say, turn: _Turn, before: asyncio.Event | None) -> None:
        """Ask for a clause; pass its audio on when the clause before it is through."""
        timeout_s, loop = self.options.timeout_s, asyncio.get_running_loop()
        async with (
            asyncio.timeout(timeout_s) as limit,
            self.post(self._endpoint, "/audio/speech", json=self._request(say)) as response,
        ):
            kind = response.headers.get("content-type", _SPOKEN_TYPES[0])
            if not kind.startswith(_SPOKEN_TYPES) or kind.startswith(_COMPRESSED_TYPES):
                raise self.bad_answer("is neither pcm nor wav")
            if before is not None:
                limit.reschedule(None)
                await before.wait()
                limit.reschedule(loop.time() + timeout_s)
            if turn.failed:
                return
            decoder = PcmDecoder(self.options.rate_hz)
            async for data in response.aiter_bytes():
                limit.reschedule(loop.time() + timeout_s)
                self._pass(say, decoder, data)
            self._pass(say, decoder, b"", last=True)
            if not decoder.samples:
                raise self.bad_answer("holds no audio")

    def _pass(self, say: Say, decoder: PcmDecoder, data: bytes, last: bool = False) -> None:
        try:
            samples = decoder.push(data, last)
        except ValueError as error:
            raise self.bad_answer(f"cannot be played: {error}") from None
        if decoder.samples > MAX_CLAUSE_S * RATE_HZ:
            raise self.bad_answer("does not end")
        if len(samples):
            self.emit(Speech(say.ticket, say.index, samples))

    def _request(self, say: Say) -> dict[str, Any]:
        o = self.options
        body: dict[str, Any] = {
            "model": o.model_name,
            "input": say.text,
            "voice": say.voice or o.voice,
            "response_format": o.response_format,
            "speed": o.speed * say.speed,
        }
        return body | ({"instructions": o.instructions} if o.instructions else {})


_WAV_HEAD_BYTES = 64 * 1024
_INT16, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE


class PcmDecoder:
    """A stream of 16-bit mono at `rate_hz`, or of WAV whatever was asked for → RATE_HZ.

    `push` raises ValueError (its text names the reason) for what is neither.
    """

    def __init__(self, rate_hz: int) -> None:
        self.samples = 0  # put out so far
        self._rate_hz = rate_hz
        self._channels = 1
        self._type = np.dtype("<i2")
        self._left: int | None = None  # bytes of a WAV's data; None: to the end
        self._rest = b""
        self._resampler: Resampler | None = None  # None: the beginning has not been seen yet

    def push(self, data: bytes, last: bool = False) -> Samples:
        data = self._rest + data
        if self._resampler is None:
            begun = self._begin(data, last)
            if begun is None:
                self._rest = data
                return np.zeros(0, np.float32)
            data = begun
            self._resampler = Resampler(self._rate_hz, RATE_HZ)
        if self._left is not None:
            data = data[: self._left]
            self._left -= len(data)
        frame = self._channels * self._type.itemsize
        whole = len(data) - len(data) % frame
        self._rest = data[whole:]
        if self._left is not None:
            self._left += len(self._rest)
        frames = np.frombuffer(data[:whole], self._type).reshape(-1, self._channels)  # [T, C]
        scale = np.float32(32768.0 if self._type.kind == "i" else 1.0)
        mono = frames.astype(np.float32).mean(axis=1, dtype=np.float32) / scale
        out = self._resampler.push(mono, last)
        self.samples += len(out)
        return out

    def _begin(self, data: bytes, last: bool) -> bytes | None:
        """The first audio; None: more is needed to know where it begins."""
        if len(data) < 4 and not last:
            return None
        if data[:3] == b"ID3" or data[:4] in (b"OggS", b"fLaC"):
            raise ValueError("neither pcm nor wav")
        if data[:4] != b"RIFF":
            return data
        at = 12
        while at + 8 <= len(data):
            name, size = struct.unpack_from("<4sI", data, at)
            body = at + 8
            if name == b"data":
                self._left = None if size in (0, 0xFFFFFFFF) else size
                return data[body:]
            if body + size > len(data):
                break
            if name == b"fmt ":
                self._read_format(data[body : body + size])
            at = body + size + size % 2
        if last or len(data) > _WAV_HEAD_BYTES:
            raise ValueError("a damaged wav header")
        return None

    def _read_format(self, fmt: bytes) -> None:
        if len(fmt) < 16:
            raise ValueError("a damaged wav header")
        kind, channels, rate_hz, _, _, bits = struct.unpack_from("<HHIIHH", fmt)
        if kind == _EXTENSIBLE and len(fmt) >= 26:
            (kind,) = struct.unpack_from("<H", fmt, 24)
        types = {(_INT16, 16): "<i2", (_FLOAT, 32): "<f4"}
        if (kind, bits) not in types or not 1 <= channels <= 8 or not 4_000 <= rate_hz <= 192_000:
            raise ValueError("a wav of a kind that is not supported")
        self._type = np.dtype(types[kind, bits])
        self._channels, self._rate_hz = channels, rate_hz
