"""One live session for as long as is wished: memory, tick time, and whether the channels drift."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from benchmarks.duplex_scenes import Connection, Run, scene
from benchmarks.duplex_trials import Trial
from benchmarks.listener import Conversation, Script, hold
from benchmarks.report import Cell, table, two_places
from benchmarks.server_process import Histogram, Metrics, Server
from client.realtime import Realtime, RealtimeError
from handlers.messages import RATE_HZ

SAMPLE_S = 10.0
WARM_UP_S = 60.0
"""What is allocated once is allocated by then."""
TICK, LATE = "parley_tick_seconds", "parley_tick_lateness_seconds"
COUNTERS = (
    "parley_ticks_skipped_total",
    "parley_silence_frames_total",
    "parley_audio_skipped_seconds_total",
)
MB = 1e6


@dataclass(frozen=True, slots=True)
class Reading:
    """Of the server, `at_s` after the session began."""

    at_s: float
    memory_mb: float | None  # PSS of all its processes
    metrics: Metrics | None


@dataclass(slots=True)
class LongSession:
    runs: list[Run] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    failure: str = ""


async def hold_long(
    session: LongSession,
    trials: Sequence[Trial],
    server: Server,
    connection: Connection,
    minutes: float,
) -> None:
    """Repeat `trials` in one session for so long."""

    def script(talk: Conversation) -> Script:
        for number in itertools.count():
            trial = trials[number % len(trials)]
            run = Run(replace(trial, name=f"{trial.name}-{number:04d}"))
            session.runs.append(run)
            yield from scene(run)(talk)
            if talk.sample >= minutes * 60 * RATE_HZ:
                return

    talk = Conversation(script, frame_ms=connection.frame_ms)
    watching = asyncio.create_task(_watch(server, session.readings))
    try:
        async with Realtime.connect(
            connection.url, connection.api_key, connection.binary
        ) as client:
            talk.binary = client.binary
            await hold(client, talk)
    except RealtimeError as error:
        session.failure = str(error)
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def _watch(server: Server, readings: list[Reading]) -> None:
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    for number in itertools.count():
        await asyncio.sleep(began_s + number * SAMPLE_S - loop.time())
        usage, metrics = await asyncio.to_thread(lambda: (server.usage(), server.metrics()))
        memory_mb = None if usage is None else usage.pss_bytes / MB
        readings.append(Reading(loop.time() - began_s, memory_mb, metrics))


def trend(times_s: Sequence[float], values: Sequence[float]) -> float | None:
    """Change per minute, by least squares; None for fewer than three values."""
    if len(values) < 3 or max(times_s) == min(times_s):
        return None
    return 60.0 * float(np.polyfit(times_s, values, 1)[0])


def long_figures(session: LongSession, latencies: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """`latencies`: when (s) and how late (ms) replies came, which shows drift between the channels:
    a session that falls behind answers later and later."""
    warm = [r for r in session.readings if r.at_s >= WARM_UP_S] or session.readings
    memory = [(r.at_s, r.memory_mb) for r in warm if r.memory_mb is not None]
    latency_trend = trend([at for at, _ in latencies], [ms for _, ms in latencies])
    return {
        "minutes": session.readings[-1].at_s / 60 if session.readings else 0.0,
        "failure": session.failure,
        "memory_mb": [mb for _, mb in memory[:1] + memory[-1:]],
        "memory_mb_per_minute": trend([at for at, _ in memory], [mb for _, mb in memory]),
        "tick_ms": _quarters(warm, TICK),
        "tick_lateness_ms": _quarters(warm, LATE),
        "counters": _counted(warm),
        "replies": len(latencies),
        "latency_ms_per_minute": latency_trend,
        "readings": [{"at_s": r.at_s, "memory_mb": r.memory_mb} for r in session.readings],
    }


def _quarters(readings: Sequence[Reading], name: str) -> list[dict[str, float | None]]:
    """p50 and p99 in ms in each quarter of the session; empty without that metric."""
    pages = [r.metrics for r in readings if r.metrics is not None]
    if len(pages) < 5:
        return []
    edges = [pages[round(i * (len(pages) - 1) / 4)] for i in range(5)]
    found = []
    for before, after in itertools.pairwise(edges):
        histogram = after.histograms_since(before).get(name, Histogram((), ()))
        if not histogram.count:
            return []
        p50, p99 = histogram.quantile(0.5), histogram.quantile(0.99)
        found.append(
            {
                "p50": None if p50 is None else 1000.0 * p50,
                "p99": None if p99 is None else 1000.0 * p99,
            }
        )
    return found


def _counted(readings: Sequence[Reading]) -> dict[str, float]:
    """How much the duplex counters grew; labels summed."""
    pages = [r.metrics for r in readings if r.metrics is not None]
    if len(pages) < 2:
        return {}

    def total(page: Metrics, name: str) -> float:
        return sum(value for (known, _), value in page.values.items() if known == name)

    names = {name for name, _ in pages[-1].values} & set(COUNTERS)
    return {name: total(pages[-1], name) - total(pages[0], name) for name in sorted(names)}


def print_long(found: dict[str, Any]) -> None:
    rows: list[list[Cell]] = [
        ["minutes", two_places(found["minutes"])],
        ["memory after a minute, at the end (MB)", _list(found["memory_mb"])],
        ["memory per minute (MB)", two_places(found["memory_mb_per_minute"])],
        ["tick p50, by quarters (ms)", _list([q["p50"] for q in found["tick_ms"]])],
        ["tick p99", _list([q["p99"] for q in found["tick_ms"]])],
        ["tick lateness p50", _list([q["p50"] for q in found["tick_lateness_ms"]])],
        ["tick lateness p99", _list([q["p99"] for q in found["tick_lateness_ms"]])],
        *([name, two_places(value)] for name, value in found["counters"].items()),
        ["replies", found["replies"]],
        ["their latency's trend (ms per minute)", two_places(found["latency_ms_per_minute"])],
        ["broke off", found["failure"] or "no"],
    ]
    print("\n" + table(("one session", ""), rows))


def _list(values: Sequence[float | None]) -> str | None:
    return " ".join("–" if v is None else f"{v:.1f}" for v in values) or None
