"""The latency benchmark over a real websocket, against a server with a known delay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.latency import PROMPTS, hold_sessions, make_prompts, parse, report_on
from benchmarks.pictures import draw_latency
from benchmarks.report import write_json
from benchmarks.scenes import interruption, one_after_another, turn
from benchmarks.server_process import server_at
from client.realtime import AudioChunk
from tests.benchmarks.fakes import FakeServer, clip
from tests.client.fakes import Peer, Script, realtime_server

ANSWER_MS = 200.0
PLAYOUT_MS = 30.0
"""A microphone frame of 20 ms and an ear's quantum of 10 ms: on average half of that."""


def serving(**behaviour: Any) -> Script:
    async def script(peer: Peer) -> None:
        fake = FakeServer(**behaviour)
        await peer.greet()
        while True:
            received = await peer.receive()
            if isinstance(received, dict):
                fake.event(received)
                continue
            for item in fake.hear(received):
                if isinstance(item, AudioChunk):
                    await peer.send_audio(item.item_id, item.start_sample, item.samples)
                else:
                    fields = {key: value for key, value in item.items() if key != "type"}
                    await peer.send(item["type"], **fields)

    return script


@pytest.mark.asyncio
async def test_figures_are_the_servers_delays(tmp_path: Path) -> None:
    talking = one_after_another([turn(clip(200), 0.1), turn(clip(200, 100, 200), 0.1)])
    interrupting = interruption(clip(200), clip(400), "barge_in", 0.2, 0.1)
    options = parse(["--parallel", "2", "--record", str(tmp_path / "wav")])
    async with realtime_server(serving(answer_ms=ANSWER_MS, stop_ms=80.0)) as url:
        scores = await hold_sessions([talking, interrupting], server_at(url), options)
    assert scores.errors == []
    latencies = scores.latencies_ms(("turn", "prompt", "barge_in"))
    assert latencies == pytest.approx([ANSWER_MS + PLAYOUT_MS] * 4, abs=25.0)
    [stop_ms] = scores.stops_ms()
    assert stop_ms == pytest.approx(80.0 + PLAYOUT_MS / 2, abs=25.0)

    document = report_on(scores, 3, options, {})
    write_json(tmp_path / "latency.json", document)
    written = json.loads((tmp_path / "latency.json").read_text())
    assert written["figures"]["turns"] == 2
    assert written["figures"]["turns_never_spoken"] == 1
    assert written["figures"]["latency_ms"]["count"] == 2
    assert written["turns"][0]["latency_ms"] == scores.turns[0].latency_ms
    draw_latency(document, tmp_path / "latency.png")
    assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "wav").glob("*.wav"))) == 2


@pytest.mark.asyncio
async def test_a_server_without_the_binary_variant_is_measured_alike() -> None:
    options = parse(["--parallel", "1", "--wire", "json"])
    async with realtime_server(serving(answer_ms=ANSWER_MS), subprotocols=None) as url:
        scores = await hold_sessions([turn(clip(200), 0.1)], server_at(url), options)
    assert scores.errors == []
    assert scores.latencies_ms() == pytest.approx([ANSWER_MS + PLAYOUT_MS], abs=25.0)


@pytest.mark.asyncio
async def test_a_session_that_breaks_is_an_error_and_the_others_go_on() -> None:
    async def refuse(peer: Peer) -> None:
        await peer.send("error", error={"type": "server_error", "code": "full", "message": "no"})

    scenes = [turn(clip(300), 0.1), turn(clip(300), 0.1)]
    options = parse(["--parallel", "1"])
    async with realtime_server(refuse, serving(answer_ms=ANSWER_MS)) as url:
        scores = await hold_sessions(scenes, server_at(url), options)
    assert len(scores.errors) == 1
    assert "full" in scores.errors[0]
    assert len(scores.latencies_ms()) == 1


def test_prompts_are_what_they_are_asked_to_be() -> None:
    prompts = make_prompts(seed=3, count=7)
    assert len(prompts) == 7
    assert {prompt.text for prompt in prompts} <= set(PROMPTS)
