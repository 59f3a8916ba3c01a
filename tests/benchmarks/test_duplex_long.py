"""Long and many live sessions: over a real websocket, and what is concluded from the figures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks import duplex_long
from benchmarks.duplex_long import (
    Listening,
    Live,
    LongSession,
    Reading,
    hold_long,
    hold_many,
    live_figures,
    long_figures,
    packets,
    print_live,
    print_long,
    trend,
)
from benchmarks.duplex_scenes import Connection
from benchmarks.duplex_trials import Trial
from benchmarks.server_process import Cpu, Histogram, Metrics, server_at
from client.realtime import AudioChunk
from handlers.messages import RATE_HZ
from tests.benchmarks.fakes import clip
from tests.benchmarks.test_latency import serving
from tests.client.fakes import Peer, realtime_server

MS = RATE_HZ // 1000


def page(ticks: int, slow: int = 0, skipped: int = 0, old: int = 0) -> Metrics:
    """So many ticks of about 5 ms, `slow` more of about 75; `old` frames heard late."""
    lines = []
    for name, few, many in (
        ("tick", ticks, slow),
        ("tick_lateness", ticks, 0),
        ("heard_late", ticks - old, old),
    ):
        lines += [
            f"# TYPE parley_{name}_seconds histogram",
            f'parley_{name}_seconds_bucket{{le="0.01"}} {few}',
            f'parley_{name}_seconds_bucket{{le="0.05"}} {few}',
            f'parley_{name}_seconds_bucket{{le="0.1"}} {few + many}',
            f'parley_{name}_seconds_bucket{{le="+Inf"}} {few + many}',
            f"parley_{name}_seconds_count {few + many}",
            f"parley_{name}_seconds_sum 1",
        ]
    lines += ["# TYPE parley_ticks_skipped counter", f"parley_ticks_skipped_total {skipped}"]
    return Metrics.parse("\n".join(lines) + "\n")


def readings(mb_per_minute: float = 0.0, **last: int) -> list[Reading]:
    """One a minute for nine minutes; `last` is about the last two of them."""
    pages = [page(100 * i) for i in range(7)] + [page(100 * i, **last) for i in (7, 8)]
    return [Reading(60.0 * i, 100.0 + mb_per_minute * i, one) for i, one in enumerate(pages)]


@pytest.mark.asyncio
async def test_a_long_session_repeats_its_trials() -> None:
    session = LongSession()
    spoken = [Trial("turn", "turn", clip(100, lead_ms=20.0))]
    async with realtime_server(serving(answer_ms=50.0, reply_ms=100.0)) as url:
        await hold_long(session, spoken, server_at(url), Connection(url), minutes=0.04)
    assert session.failure == ""
    assert [run.trial.name for run in session.runs][:2] == ["turn-0000", "turn-0001"]
    assert session.runs[-1].end >= 0.04 * 60 * RATE_HZ
    assert len(session.readings) >= 1


def test_a_long_sessions_figures() -> None:
    session = LongSession([], readings(2.0, skipped=7))
    found = long_figures(session, [(0.0, 300.0), (60.0, 301.0), (120.0, 302.0)])
    assert found["memory_mb"] == [102.0, 116.0]  # the first minute is a warm-up
    assert found["memory_mb_per_minute"] == pytest.approx(2.0)
    assert found["latency_ms_per_minute"] == pytest.approx(1.0)
    assert [quarter["p50"] for quarter in found["tick_ms"]] == pytest.approx([5.0] * 4)
    assert found["counters"] == {"parley_ticks_skipped_total": 7.0}
    assert trend([1.0, 2.0], [1.0, 2.0]) is None
    print_long(found)


@pytest.mark.parametrize(
    ("session", "broken"),
    [
        (LongSession([], readings()), set()),
        (LongSession([], readings(0.5)), {"memory"}),
        (LongSession([], readings(slow=30)), {"ticks inside the frame"}),
        (LongSession([], readings(slow=300)), {"ticks inside the frame", "tick time"}),
        (LongSession([], readings(old=190)), {"no drift"}),
        (LongSession([], readings(skipped=1)), {"no tick left out"}),
        (LongSession([], readings(), "closed"), {"not broken off"}),
        (
            LongSession([], [Reading(60.0 * i, None, None) for i in range(9)]),
            {"memory", "tick time", "ticks inside the frame", "no drift", "no tick left out"},
        ),
    ],
)
def test_what_is_not_flat_is_named(session: LongSession, broken: set[str]) -> None:
    flat = long_figures(session, [])["flat"]
    assert {name for name, holds in flat.items() if not holds} == broken


def test_audio_is_late_against_the_first_of_its_item() -> None:
    client, piece = Listening(), np.zeros(40 * MS, np.float32)
    client.hear(AudioChunk("a", 0, piece), 10.0)
    client.hear(AudioChunk("a", 40 * MS, piece), 10.04)
    client.hear(AudioChunk("a", 80 * MS, piece), 10.13)
    client.hear(AudioChunk("b", 0, piece), 20.0)
    assert client.late_s == pytest.approx([0.0, 0.0, 0.05, 0.0], abs=1e-6)


def live(since: dict[str, Histogram], skipped: float = 0.0, failures: tuple[str, ...] = ()) -> Live:
    client = Listening([0.001], [0.0, 0.05], failures=list(failures))
    counters = {"parley_ticks_skipped_total": skipped}
    return Live(1, 10.0, [client], since, counters, Cpu(0.5, 0.1, None))


def test_many_sessions_hold_or_they_dont() -> None:
    quick = page(100).histograms_since(Metrics())
    found = live_figures(live(quick))
    assert found["holds"]
    assert found["audio_gaps"] == 1
    assert found["tick_ms"]["p50"] == pytest.approx(5.0)
    assert found["server_cpu_ms_per_tick"] == pytest.approx(50.0)
    print_live(found)
    assert not live_figures(live(page(100, slow=5).histograms_since(Metrics())))["holds"]
    assert not live_figures(live(quick, skipped=1.0))["holds"]
    assert not live_figures(live(quick, failures=("server_overloaded",)))["holds"]
    assert not live_figures(live({}))["holds"]


@pytest.mark.asyncio
async def test_many_sessions_speak_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplex_long, "OPEN_S", 0.0)
    monkeypatch.setattr(duplex_long, "SETTLE_S", 0.0)
    heard: list[int] = []

    async def answer(peer: Peer) -> None:
        await peer.greet()
        place = len(heard)
        heard.append(0)
        while True:
            received: Any = await peer.receive()
            assert len(received) == 20 * MS
            await peer.send_audio("item", heard[place], received)
            heard[place] += len(received)

    async def refuse(peer: Peer) -> None:
        await peer.greet()
        await peer.send("error", error={"code": "server_overloaded"})
        await peer.receive_event("never")

    track = packets([np.ones(50 * MS, np.float32), np.zeros(50 * MS, np.float32)])
    assert [len(packet) for packet in track] == [2 * 20 * MS] * 5
    async with realtime_server(answer, answer, refuse) as url:
        made = await hold_many(server_at(url), Connection(url), track, 3, 0.3)
    assert all(count >= 15 * 20 * MS for count in heard)
    assert sum(bool(client.late_s) for client in made.clients) == 2
    assert live_figures(made)["failures"] == ["server_overloaded"]
