"""Stub models behind OpenAI-compatible HTTP, each with a fixed delay and a canned answer.

`python -m benchmarks.stub_models --port 8000`. What is measured over them is the server's own
share: the transcript says nothing of what was spoken, the reply's audio is noise.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
import uvloop
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from benchmarks.server_process import Server, running
from handlers.audio import to_pcm16
from handlers.messages import RATE_HZ

STT_S, LM_FIRST_CLAUSE_S, TTS_S = 0.060, 0.180, 0.060
MODELS_S = STT_S + LM_FIRST_CLAUSE_S + TTS_S
"""What the three take one after the other, up to the first sample of a reply."""
WORD_S = 0.02  # from word to word of the LM, after its first clause
CHUNK_S, CHUNK_EVERY_S = 0.2, 0.02  # TTS: ten times as fast as it is heard
CHAR_S = 0.06
NOISE_LEVEL = 0.1

TRANSCRIPT = "This is what the stub always understands."
FIRST_CLAUSE = "Here is what I have found. "
REST = (
    "The first part of it is rather short, and the second one takes a good deal longer to tell. "
    "Whoever is listening may interrupt at any time and will be heard at once. "
    "If nobody does, then it simply goes on like this until it has come to its end."
)


async def healthz(_: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def transcriptions(request: Request) -> Response:
    body = await request.body()
    if b'name="model"' not in body or b"RIFF" not in body:
        return JSONResponse({"error": {"code": "missing_field"}}, 400)
    await asyncio.sleep(STT_S)
    return JSONResponse({"text": TRANSCRIPT})


async def chat(request: Request) -> Response:
    await request.json()

    async def events() -> AsyncIterator[str]:
        await asyncio.sleep(LM_FIRST_CLAUSE_S)
        yield _chunk({"content": FIRST_CLAUSE})
        for word in REST.split(" "):
            await asyncio.sleep(WORD_S)
            yield _chunk({"content": f"{word} "})
        yield _chunk({}, "stop")
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


def _chunk(delta: dict[str, Any], finish_reason: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return f"data: {json.dumps({'choices': [choice]})}\n\n"


@lru_cache
def _noise(characters: int) -> bytes:
    """Another one for each length. Made anew each time it would hold up the other requests, by 7 ms
    for 5 s of it."""
    samples = round(characters * CHAR_S * RATE_HZ)
    noise = np.random.default_rng(characters).normal(0.0, NOISE_LEVEL, samples)
    return to_pcm16(noise.astype(np.float32))


async def speech(request: Request) -> Response:
    text = (await request.json())["input"]
    pcm = _noise(len(text))

    async def chunks() -> AsyncIterator[bytes]:
        await asyncio.sleep(TTS_S)
        size = 2 * round(CHUNK_S * RATE_HZ)
        for at in range(0, len(pcm), size):
            yield pcm[at : at + size]
            await asyncio.sleep(CHUNK_EVERY_S)

    return StreamingResponse(chunks(), media_type="audio/pcm")


app = Starlette(
    routes=[
        Route("/healthz", healthz),
        Route("/v1/audio/transcriptions", transcriptions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/audio/speech", speech, methods=["POST"]),
    ]
)


@contextlib.contextmanager
def stub_models() -> Iterator[str]:
    """The stubs in a process of their own: their base URL."""
    with running(module="benchmarks.stub_models") as stubs:
        yield f"{stubs.http_url}/v1"


def behind(url: str) -> list[str]:
    """Flags for a Parley whose STT, LM and TTS are at `url`."""
    stages = ("stt", "lm", "tts")
    flags = [f"--{stage}=openai" for stage in stages]
    return [*flags, *(f"--{stage}_base_url={url}" for stage in stages), "--lm_model_name=stub"]


@contextlib.contextmanager
def stubbed(arguments: Sequence[str] = (), log: Path | None = None) -> Iterator[Server]:
    """A Parley with the stubs behind it."""
    with stub_models() as url, running([*behind(url), *arguments], log) as server:
        yield server


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args(argv)
    _noise(len(FIRST_CLAUSE.strip()))
    config = uvicorn.Config(app, options.host, options.port, log_config=None, access_log=False)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(uvicorn.Server(config).serve())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
