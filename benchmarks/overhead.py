"""What the server adds to its models' own time: `python -m benchmarks.overhead`.

The models are stubs of fixed delays. The end of speech is fixed too, by a client that commits its
audio and asks for a response, so that no silence is waited for: from there to the first audio, less
what the models take. Beside it the same three requests one after another, without a server.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2
import uvloop

from benchmarks.clips import Clip, make_clips
from benchmarks.report import (
    SPREAD_HEADERS,
    Spread,
    doubts,
    environment,
    environment_lines,
    table,
    write_json,
)
from benchmarks.server_process import CpuMeter, ServerFailed, running
from benchmarks.stub_models import FIRST_CLAUSE, MODELS_S, behind, stub_models
from client.realtime import AudioChunk, Realtime, RealtimeError
from handlers.messages import EAR_RATE_HZ, RATE_HZ

FRAME_S = 0.02
LONGEST_S = 1.5
"""Of each clip: long enough to be speech, short enough to measure many."""
PATIENCE_S = 10.0


async def through_the_server(url: str, clips: Sequence[Clip]) -> list[float]:
    """Seconds from the commit to the first audio of each turn. Raises `RealtimeError`."""
    found = []
    async with Realtime.connect(url) as client:
        events = aiter(client)
        manual = {"type": "realtime", "audio": {"input": {"turn_detection": None}}}
        await client.send({"type": "session.update", "session": manual})
        for clip in clips:
            await speak(client, clip)
            await client.send({"type": "input_audio_buffer.commit"})
            begun = time.perf_counter()
            await client.send({"type": "response.create"})
            async with asyncio.timeout(PATIENCE_S):
                while not isinstance(await anext(events), AudioChunk):
                    pass
                found.append(time.perf_counter() - begun)
                await client.send({"type": "response.cancel"})
                while True:
                    event = await anext(events)
                    if not isinstance(event, AudioChunk) and event["type"] == "response.done":
                        break
    return found


async def speak(client: Realtime, clip: Clip) -> None:
    """Its first words, in real time."""
    size = round(FRAME_S * RATE_HZ)
    begun, spoken = time.perf_counter(), clip.samples[clip.onset_sample :]
    for number, at in enumerate(range(0, round(LONGEST_S * RATE_HZ), size)):
        await asyncio.sleep(begun + number * FRAME_S - time.perf_counter())
        await client.send_audio(spoken[at : at + size])


async def by_themselves(url: str, count: int) -> list[float]:
    """Seconds that the three requests take when each is made as soon as it can be."""
    found = []
    audio = b"RIFF" + bytes(2 * round(LONGEST_S * EAR_RATE_HZ))  # enough for a stub
    async with httpx2.AsyncClient(base_url=url, trust_env=False) as client:
        for _ in range(count):
            begun = time.perf_counter()
            form = {"file": ("speech.wav", audio, "audio/wav")}
            text = (
                await client.post("/audio/transcriptions", data={"model": "stub"}, files=form)
            ).json()["text"]
            chat = {"model": "stub", "messages": [{"role": "user", "content": text}]}
            async with client.stream("POST", "/chat/completions", json=chat) as answer:
                await anext(answer.aiter_bytes())
            say = {"model": "stub", "input": FIRST_CLAUSE, "voice": "alloy"}
            async with client.stream("POST", "/audio/speech", json=say) as answer:
                await anext(answer.aiter_bytes())
            found.append(time.perf_counter() - begun)
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Print the figures; returns them, in milliseconds. Raises `ServerFailed`, `RealtimeError`."""
    clips = make_clips(options.seed, options.turns)
    with stub_models() as url, running(behind(url), options.server_log) as server:
        meter = CpuMeter(server)
        plain = uvloop.run(by_themselves(url, options.turns))
        whole = uvloop.run(through_the_server(server.url, clips))
        others = meter.read().others
    spreads = {
        "the models' own time, nominal": Spread.of([MODELS_S * 1000]),
        "the three requests by themselves": Spread.of([1000 * s for s in plain]),
        "end of speech → first audio": Spread.of([1000 * s for s in whole]),
        "overhead over the nominal time": Spread.of([1000 * (s - MODELS_S) for s in whole]),
    }
    print(table(SPREAD_HEADERS, [spread.row(name) for name, spread in spreads.items()]))
    for line in doubts(None, others):
        print(line)
    return {"environment": environment(vars(options)), "figures_ms": spreads, "others": others}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--server_log", type=Path, help="file for the started server's output")
    options = parser.parse_args(argv)
    print(environment_lines(environment(vars(options))), flush=True)
    try:
        document = measure(options)
    except (ServerFailed, RealtimeError, TimeoutError) as error:
        print(error or "no answer came in time", file=sys.stderr)
        return 1
    if options.json:
        write_json(options.json, document)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
