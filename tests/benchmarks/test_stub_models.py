"""The stub models: what they answer is what the remote stages understand."""

from __future__ import annotations

import json

import httpx2
import pytest

from benchmarks import stub_models
from handlers.clauses import ClauseSplitter
from handlers.messages import RATE_HZ
from server.options import parse


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> httpx2.AsyncClient:
    for delay in ("STT_S", "LM_FIRST_CLAUSE_S", "TTS_S", "WORD_S", "CHUNK_EVERY_S"):
        monkeypatch.setattr(stub_models, delay, 0.0)
    transport = httpx2.ASGITransport(stub_models.app)
    return httpx2.AsyncClient(transport=transport, base_url="http://stub/v1")


@pytest.mark.asyncio
async def test_a_recording_becomes_the_canned_transcript(client: httpx2.AsyncClient) -> None:
    form = {"file": ("speech.wav", b"RIFF", "audio/wav")}
    answer = await client.post("/audio/transcriptions", data={"model": "stub"}, files=form)
    assert answer.json() == {"text": stub_models.TRANSCRIPT}
    assert (await client.post("/audio/transcriptions", data={"model": "stub"})).status_code == 400


@pytest.mark.asyncio
async def test_the_first_piece_of_the_reply_is_a_clause(client: httpx2.AsyncClient) -> None:
    answer = await client.post("/chat/completions", json={})
    chunks = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert chunks.pop() == "[DONE]"
    choices = [json.loads(chunk)["choices"][0] for chunk in chunks]
    assert choices[-1]["finish_reason"] == "stop"
    texts = [choice["delta"].get("content", "") for choice in choices]
    assert ClauseSplitter().push(texts[0]) == [stub_models.FIRST_CLAUSE]
    assert "".join(texts).strip() == stub_models.FIRST_CLAUSE + stub_models.REST


@pytest.mark.asyncio
async def test_speech_is_as_long_as_its_text(client: httpx2.AsyncClient) -> None:
    answer = await client.post("/audio/speech", json={"input": "ten chars."})
    assert len(answer.content) == 2 * round(10 * stub_models.CHAR_S * RATE_HZ)


def test_the_flags_choose_the_stubs_for_every_stage() -> None:
    _, choice = parse(stub_models.behind("http://127.0.0.1:9/v1"))
    for stage in ("stt", "lm", "tts"):
        assert choice.backends[stage] == "openai"
        assert choice.options[stage].base_url == "http://127.0.0.1:9/v1"
