"""The load generator: its hand-made frames, and sessions on a real websocket."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

import pytest
import uvloop
from websockets.frames import Frame, Opcode
from websockets.streams import StreamReader

from benchmarks import load
from benchmarks.clips import Clip
from benchmarks.load import Point, held, measure_point, memory_per_session_mb, print_report
from benchmarks.pictures import draw_load
from benchmarks.report import Spread
from benchmarks.server_process import Cpu, server_at
from benchmarks.swarm import BINARY, Link, LinkFailed, Swarm, client_frame
from handlers.messages import RATE_HZ
from tests.benchmarks.fakes import clip
from tests.benchmarks.test_latency import serving
from tests.client.fakes import Peer, realtime_server


@pytest.mark.parametrize("size", [0, 5, 125, 126, 1920, 65535, 65536])
def test_frames_are_what_a_websocket_server_reads(size: int) -> None:
    reader = StreamReader()
    payload = bytes(range(256)) * (size // 256) + bytes(size % 256)
    reader.feed_data(client_frame(BINARY, payload))
    parser = Frame.parse(reader.read_exact, mask=True)
    with pytest.raises(StopIteration) as parsed:
        next(parser)
    frame = parsed.value.value
    assert (frame.opcode, frame.fin) == (Opcode.BINARY, True)
    assert frame.data == payload


def point(sessions: int, p95: float, lag: float, pss: float, *errors: str) -> Point:
    return Point(
        sessions=sessions, speaking=8, seconds=1.0, latency_ms=Spread(10, 300.0, p95, p95),
        turns=10, cut_ins=0, missed=0, unasked_replies=0, loop_lag_ms=Spread(9, 1.0, lag, lag),
        loop_lag_p99_ms=lag, cpu_cores=Cpu(0.5, 0.1, 0.0), server_pss_mb=pss,
        server_threads=9, server_processes=2, generator_lateness_p99_ms=1.0,
        generator_lateness_max_ms=1.0, errors=errors,
    )  # fmt: skip


def test_what_counts_as_held() -> None:
    points = [point(10, 400, 2, 100), point(50, 590, 19, 140), point(100, 590, 21, 190)]
    assert held(points) == 50
    assert held([*points, point(150, 610, 5, 240)]) == 50
    assert held([*points, point(150, 500, 5, 240, "overloaded")]) == 50
    assert memory_per_session_mb(points) == pytest.approx(1.0)
    assert memory_per_session_mb(points[:1]) is None


def test_sessions_stream_and_speak(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "SETTLE_S", 0.0)
    options = argparse.Namespace(speaking=2, reply_s=0.1)
    clips: list[Clip] = [clip(200), clip(200), clip(300)]

    async def measure() -> Point:
        async with realtime_server(serving(answer_ms=200.0)) as url:
            swarm = Swarm(url, None)
            try:
                return await measure_point(swarm, server_at(url), 5, clips, options)
            finally:
                swarm.close()

    found = uvloop.run(measure())
    assert found.errors == ()
    assert (found.sessions, found.speaking, found.turns, found.missed) == (5, 2, 3, 0)
    assert found.unasked_replies == 0
    assert found.latency_ms.p50 == pytest.approx(240, abs=40)
    print_report([found])
    assert "5" in capsys.readouterr().out
    draw_load([found], tmp_path / "load.png")
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.asyncio
async def test_idle_sessions_stream_in_real_time() -> None:
    sessions, wanted = 4, RATE_HZ // 2
    listening = asyncio.Semaphore(0)

    async def listen(peer: Peer) -> None:
        await peer.greet()
        await peer.receive_audio(wanted)
        listening.release()
        await peer.socket.wait_closed()

    loop = asyncio.get_running_loop()
    async with realtime_server(listen) as url:
        swarm = Swarm(url, None)
        await swarm.grow(sessions)
        began_s = loop.time()
        for _ in range(sessions):
            await listening.acquire()
        assert loop.time() - began_s == pytest.approx(wanted / RATE_HZ, abs=0.12)
        swarm.close()


@pytest.mark.asyncio
async def test_a_refusal_is_named() -> None:
    async with realtime_server(serving(), api_key="secret") as url:
        with pytest.raises(LinkFailed, match="401"):
            await Link.open(url, None)
        link = await Link.open(url, "secret")
        link.close()


@pytest.mark.asyncio
async def test_a_session_that_the_server_closes_is_an_error() -> None:
    async def leave(peer: Peer) -> None:
        await peer.greet()
        await peer.receive_audio(1)
        await peer.socket.close(1011, "broken")
        gone.set()

    gone = asyncio.Event()
    async with realtime_server(leave) as url:
        swarm = Swarm(url, None)
        await swarm.grow(1)
        await gone.wait()
        assert swarm.errors() == ["closed 1011 broken"]
        swarm.close()
