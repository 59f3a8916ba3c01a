"""The real server process with its real parts, spoken to over its real wire."""

from __future__ import annotations

import asyncio
import base64
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from openai import AsyncOpenAI

from benchmarks.demo import make_dialogue
from benchmarks.server_process import free_port
from client.realtime import AudioChunk, Disconnected, Realtime
from handlers.audio import to_pcm16
from handlers.messages import RATE_HZ, Samples

ROOT = Path(__file__).parent.parent
PATIENCE_S = 60.0

pytestmark = pytest.mark.asyncio


@dataclass
class Running:
    process: subprocess.Popen[bytes]
    port: int

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/v1/realtime"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    port = free_port()
    command = [sys.executable, "-m", "server", "--port", str(port), "--log_level", "debug"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log)
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"Parley answers at ")
        yield Running(process, port)
        process.kill()
        process.wait()


def greeting() -> Samples:
    """ "Good morning." as the demo's person says it, and silence."""
    samples = make_dialogue().clips["greeting"].samples
    return np.concatenate([samples, np.zeros(2 * RATE_HZ, np.float32)])


async def until(client: Realtime, kind: str) -> tuple[dict[str, Any], list[Samples]]:
    audio: list[Samples] = []
    async with asyncio.timeout(PATIENCE_S):
        async for event in client:
            if isinstance(event, AudioChunk):
                audio.append(event.samples)
            elif event["type"] == kind:
                return event, audio
    raise AssertionError("the connection ended")


@pytest.mark.parametrize("binary", [True, False])
async def test_a_question_is_heard_and_answered_by_voice(server: Running, binary: bool) -> None:
    async with Realtime.connect(server.url, binary=binary) as client:
        await client.send_audio(greeting())
        done, audio = await until(client, "response.done")
        (item,) = done["response"]["output"]
        assert item["content"][0]["transcript"].startswith("Hello")
        assert sum(len(samples) for samples in audio) > RATE_HZ
        assert max(float(np.max(np.abs(samples))) for samples in audio) > 0.05
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as http:
        metrics = (await http.get("/metrics")).text
    assert 'parley_turns_total{outcome="ended"} 1.0' in metrics
    assert "parley_endpoint_to_audio_seconds_count 1.0" in metrics


async def test_the_openai_package_talks_to_it_unchanged(server: Running) -> None:
    local = f"127.0.0.1:{server.port}/v1"
    openai = AsyncOpenAI(
        api_key="none", base_url=f"http://{local}", websocket_base_url=f"ws://{local}"
    )
    said, heard, audio_bytes = "", "", 0
    async with openai.realtime.connect(model="any") as connection, asyncio.timeout(PATIENCE_S):
        await connection.input_audio_buffer.append(
            audio=base64.b64encode(to_pcm16(greeting())).decode()
        )
        async for event in connection:
            match event.type:
                case "conversation.item.input_audio_transcription.completed":
                    heard = event.transcript
                case "response.output_audio_transcript.delta":
                    said += event.delta
                case "response.output_audio.delta":
                    audio_bytes += len(base64.b64decode(event.delta))
                case "response.done":
                    break
    assert heard == "good morning"
    assert said.startswith("Hello")
    assert audio_bytes > 2 * RATE_HZ


async def test_sigterm_in_mid_reply_lets_it_finish_and_exits_with_0(server: Running) -> None:
    async with Realtime.connect(server.url) as client:
        item = {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "what is two plus two"}],
        }
        await client.send({"type": "conversation.item.create", "item": item})
        await client.send({"type": "response.create"})
        await until(client, "response.content_part.added")
        server.process.send_signal(signal.SIGTERM)
        done, _ = await until(client, "response.done")
        assert done["response"]["status"] == "completed"
        with pytest.raises(Disconnected) as ended:
            await until(client, "never")
        assert ended.value.code == 1001
    assert await asyncio.to_thread(server.process.wait, PATIENCE_S) == 0


async def test_nothing_a_person_says_is_logged(server: Running, tmp_path: Path) -> None:
    async with Realtime.connect(server.url) as client:
        await client.send_audio(greeting())
        heard, _ = await until(client, "conversation.item.input_audio_transcription.completed")
        done, _ = await until(client, "response.done")
    log = (tmp_path / "log").read_text()
    assert log  # debug: there is a line per connection
    assert heard["transcript"] not in log
    assert done["response"]["output"][0]["content"][0]["transcript"] not in log
