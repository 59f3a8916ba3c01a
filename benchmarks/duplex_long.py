"""One live session for as long as is wished: memory, tick time, and whether the channels drift.

Or many, that speak all the time: whether the ticks stay inside the frame and the audio has no gaps.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from benchmarks.duplex_scenes import Connection, Run, scene
from benchmarks.duplex_trials import Trial
from benchmarks.listener import Conversation, Script, hold
from benchmarks.report import Cell, Spread, table, two_places
from benchmarks.server_process import Cpu, CpuMeter, Histogram, Metrics, Server
from client.playback import PlaybackOptions
from client.realtime import AudioChunk, Realtime, RealtimeError
from handlers.audio import to_pcm16
from handlers.messages import RATE_HZ, Samples

SAMPLE_S = 10.0
WARM_UP_S = 60.0
"""What is allocated once is allocated by then."""
TICK, LATE = "parley_tick_seconds", "parley_tick_lateness_seconds"
HEARD_LATE = "parley_heard_late_seconds"
FRAME_MS = 40.0
"""Of the shipped model."""
MEMORY_GROWTH = 0.02
"""Share of the memory by which a session may change it after the warm-up."""
TICK_GROWTH = 1.25
"""The last quarter's median tick against the first one's."""
PACKET_S = 0.02
PLAYER_MS = float(PlaybackOptions().start_ms)
"""Audio that a player waits for before it begins: a later piece leaves a gap."""
OPEN_S, SETTLE_S = 1.0, 3.0
"""Over which many sessions begin, and then pass before anything is measured."""
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
    memory_mb: float | None  # its processes' own, without what files are mapped
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
        memory_mb = None if usage is None else usage.own_bytes / MB
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
    found = {
        "minutes": session.readings[-1].at_s / 60 if session.readings else 0.0,
        "failure": session.failure,
        "memory_mb": [mb for _, mb in memory[:1] + memory[-1:]],
        "memory_mb_per_minute": trend([at for at, _ in memory], [mb for _, mb in memory]),
        "tick_ms": _quarters(warm, TICK),
        "tick_lateness_ms": _quarters(warm, LATE),
        "heard_late_ms": _quarters(warm, HEARD_LATE),
        "counters": _counted(warm),
        "replies": len(latencies),
        "latency_ms_per_minute": latency_trend,
        "readings": [{"at_s": r.at_s, "memory_mb": r.memory_mb} for r in session.readings],
    }
    measured_minutes = (memory[-1][0] - memory[0][0]) / 60 if memory else 0.0
    return found | {"flat": flatness(found, measured_minutes)}


def flatness(found: dict[str, Any], minutes: float) -> dict[str, bool]:
    """What holds of `long_figures`; what could not be measured does not."""
    slope, heard = found["memory_mb_per_minute"], found["heard_late_ms"]
    ticks, late = found["tick_ms"], found["tick_lateness_ms"]
    change_mb = None if slope is None else abs(slope) * minutes
    p99s = [quarter["p99"] for quarter in ticks + late]
    return {
        "memory": change_mb is not None and change_mb < MEMORY_GROWTH * found["memory_mb"][0],
        "tick time": bool(ticks) and ticks[-1]["p50"] < TICK_GROWTH * ticks[0]["p50"],
        "ticks inside the frame": bool(ticks and late) and max(p99s) < FRAME_MS,
        "no drift": bool(heard) and abs(heard[-1]["p50"] - heard[0]["p50"]) < FRAME_MS,
        "no tick left out": found["counters"].get(COUNTERS[0]) == 0,
        "not broken off": not found["failure"],
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
        ["age of what the model hears, p50", _list([q["p50"] for q in found["heard_late_ms"]])],
        *([name, two_places(value)] for name, value in found["counters"].items()),
        ["replies", found["replies"]],
        ["their latency's trend (ms per minute)", two_places(found["latency_ms_per_minute"])],
        ["broke off", found["failure"] or "no"],
    ]
    rows += [[f"holds: {name}", "yes" if ok else "NO"] for name, ok in found["flat"].items()]
    print("\n" + table(("one session", ""), rows))


def _list(values: Sequence[float | None]) -> str | None:
    return " ".join("–" if v is None else f"{v:.1f}" for v in values) or None


# Many sessions.


@dataclass(slots=True)
class Listening:
    """What one of many clients sent and heard."""

    sent_late_s: list[float] = field(default_factory=list)
    """Of the client's own packets."""
    late_s: list[float] = field(default_factory=list)
    """Of each piece of audio: later than the first of its item by more than the audio between."""
    begins: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def hear(self, chunk: AudioChunk, now_s: float) -> None:
        at_s = now_s - chunk.start_sample / RATE_HZ
        self.late_s.append(at_s - self.begins.setdefault(chunk.item_id, at_s))


@dataclass(frozen=True, slots=True)
class Live:
    sessions: int
    seconds: float
    clients: list[Listening]
    since: dict[str, Histogram]
    counters: dict[str, float]
    cpu: Cpu


def packets(tracks: Sequence[Samples]) -> list[bytes]:
    """One after another, [T] each, as a client sends them."""
    size = 2 * round(PACKET_S * RATE_HZ)
    data = to_pcm16(np.concatenate(tracks))
    return [data[at : at + size] for at in range(0, len(data) - size + 1, size)]


async def hold_many(
    server: Server, connection: Connection, track: Sequence[bytes], sessions: int, seconds: float
) -> Live:
    """Sessions that send `track` over and over in real time, each from another place in it."""
    clients = [Listening() for _ in range(sessions)]
    begin_s = asyncio.get_running_loop().time()
    end_s = begin_s + OPEN_S + SETTLE_S + seconds
    talks = [
        asyncio.create_task(_talk(connection, track, client, begin_s, end_s, number / sessions))
        for number, client in enumerate(clients)
    ]
    await asyncio.sleep(OPEN_S + SETTLE_S)
    for client in clients:
        client.sent_late_s.clear()
        client.late_s.clear()
    meter, before = CpuMeter(server), await asyncio.to_thread(server.metrics) or Metrics()
    await asyncio.gather(*talks)
    cpu, after = meter.read(), await asyncio.to_thread(server.metrics) or Metrics()
    readings = [Reading(0.0, None, before), Reading(seconds, None, after)]
    since = after.histograms_since(before)
    return Live(sessions, seconds, clients, since, _counted(readings), cpu)


async def _talk(
    connection: Connection,
    track: Sequence[bytes],
    client: Listening,
    begin_s: float,
    end_s: float,
    share: float,
) -> None:
    loop = asyncio.get_running_loop()
    begin_s += share * OPEN_S
    await asyncio.sleep(begin_s - loop.time())
    try:
        async with Realtime.connect(
            connection.url, connection.api_key, connection.binary
        ) as realtime:
            listening = asyncio.create_task(_listen(realtime, client))
            try:
                for number in itertools.count():
                    due_s = begin_s + number * PACKET_S
                    if due_s >= end_s:
                        break
                    await asyncio.sleep(due_s - loop.time())
                    client.sent_late_s.append(loop.time() - due_s)
                    await realtime.send_audio(track[int(share * len(track) + number) % len(track)])
                    if listening.done():
                        listening.result()
            finally:
                listening.cancel()
                await asyncio.gather(listening, return_exceptions=True)
    except RealtimeError as error:
        client.failures.append(str(error))


async def _listen(realtime: Realtime, client: Listening) -> None:
    loop = asyncio.get_running_loop()
    async for item in realtime:
        if isinstance(item, AudioChunk):
            client.hear(item, loop.time())
        elif item["type"] == "error":
            client.failures.append(str(item["error"]["code"]))


def live_figures(live: Live) -> dict[str, Any]:
    def spread(name: str) -> dict[str, float | None]:
        histogram = live.since.get(name, Histogram((), ()))
        found = {q: histogram.quantile(float(q)) for q in ("0.5", "0.99", "1.0")}
        p50, p99, most = (None if s is None else 1000.0 * s for s in found.values())
        return {"p50": p50, "p99": p99, "max": most}

    ticks = live.since.get(TICK, Histogram((), ())).count
    cpu_s = None if live.cpu.server is None else live.cpu.server * live.seconds
    late_ms = [1000.0 * late for client in live.clients for late in client.late_s]
    sent_ms = [1000.0 * late for client in live.clients for late in client.sent_late_s]
    found = {
        "sessions": live.sessions,
        "seconds": live.seconds,
        "tick_ms": spread(TICK),
        "tick_lateness_ms": spread(LATE),
        "heard_late_ms": spread(HEARD_LATE),
        "counters": live.counters,
        "audio_s": len(late_ms) * FRAME_MS / 1000.0,
        "audio_late_ms": Spread.of(late_ms),
        "audio_gaps": sum(late > PLAYER_MS for late in late_ms),
        "generator_lateness_ms": Spread.of(sent_ms),
        "cpu_cores": live.cpu,
        "server_cpu_ms_per_tick": 1000.0 * cpu_s / ticks if cpu_s is not None and ticks else None,
        "failures": sorted(failure for client in live.clients for failure in client.failures),
    }
    p99s = [spread(name)["p99"] for name in (TICK, LATE)]
    left_out = live.counters.get(COUNTERS[0])
    inside = all(p99 is not None and p99 < FRAME_MS for p99 in p99s)
    return found | {"holds": inside and left_out == 0 and not found["failures"]}


def print_live(found: dict[str, Any]) -> None:
    late, sent, cpu = found["audio_late_ms"], found["generator_lateness_ms"], found["cpu_cores"]
    failures = Counter(found["failures"])
    rows: list[list[Cell]] = [
        ["sessions that speak all the time", found["sessions"]],
        ["seconds", found["seconds"]],
        ["tick p50 p99 max (ms)", _list(list(found["tick_ms"].values()))],
        ["tick lateness p50 p99 max", _list(list(found["tick_lateness_ms"].values()))],
        ["age of what the model hears", _list(list(found["heard_late_ms"].values()))],
        *([name, two_places(value)] for name, value in found["counters"].items()),
        ["audio heard (s, all clients)", two_places(found["audio_s"])],
        ["its lateness p50 p95 max (ms)", _list([late.p50, late.p95, late.max])],
        [f"pieces later than {PLAYER_MS:.0f} ms", found["audio_gaps"]],
        ["the clients' own p50 p95 max", _list([sent.p50, sent.p95, sent.max])],
        ["server's CPU per tick (ms)", two_places(found["server_cpu_ms_per_tick"])],
        ["CPU: server, clients, others (cores)", _list([cpu.server, cpu.generator, cpu.others])],
        ["failures", "; ".join(f"{n} × {f}" for f, n in failures.items()) or "none"],
        [f"p99 inside {FRAME_MS:.0f} ms, none left out", "yes" if found["holds"] else "NO"],
    ]
    print("\n" + table(("live", ""), rows))
