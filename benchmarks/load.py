"""Many sessions at once: `python -m benchmarks.load`.

N sessions stream audio all the time; a few of them speak, the others send room noise. For every
N the same turns are spoken and measured at the ear, as in `benchmarks.latency`; the server's
event-loop lag comes from its /metrics, CPU and memory of all its processes from /proc. The load
generator is one process on the same machine; its own CPU and lateness are printed beside.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.clips import Clip, make_clips
from benchmarks.listener import Conversation, Trace
from benchmarks.measure import AUDIBLE_DBFS
from benchmarks.pictures import draw_load
from benchmarks.report import (
    Cell,
    Spread,
    doubts,
    environment,
    environment_lines,
    table,
    two_places,
    write_json,
)
from benchmarks.scenes import turn
from benchmarks.score import Scores
from benchmarks.server_process import (
    Cpu,
    CpuMeter,
    Histogram,
    Server,
    ServerFailed,
    chosen,
)
from benchmarks.swarm import FRAME_QUANTA, Swarm

LOOP_LAG = "parley_loop_lag_seconds"
SETTLE_S = 2.0
"""After connecting, before anything is measured."""
STAGGER_S = 0.35
"""Between the first turns of two speakers."""
FRAME_MS = 10.0 * FRAME_QUANTA
LAG_BAR_MS = 20.0
LATENCY_BAR = 1.5
"""What counts as holding that many sessions: see `held`."""
MB = 1e6


@dataclass(frozen=True, slots=True)
class Point:
    """What was measured with `sessions` connected. Memory in 10⁶ bytes (PSS)."""

    sessions: int
    speaking: int
    seconds: float
    latency_ms: Spread
    turns: int
    cut_ins: int
    missed: int
    unasked_replies: int  # to room noise
    loop_lag_ms: Spread
    loop_lag_p99_ms: float | None
    cpu_cores: Cpu
    server_pss_mb: float | None
    server_threads: int | None
    server_processes: int | None
    generator_lateness_p99_ms: float
    generator_lateness_max_ms: float
    errors: tuple[str, ...]


async def measure_point(
    swarm: Swarm, server: Server, sessions: int, clips: Sequence[Clip], options: argparse.Namespace
) -> Point:
    """Connect up to `sessions`, have all `clips` spoken, `--speaking` at a time."""
    await swarm.grow(sessions)
    await asyncio.sleep(SETTLE_S)
    speaking = min(options.speaking, len(swarm.links))
    known_errors = len(swarm.errors())
    unasked = sum(link.unasked_replies for link in swarm.links)
    meter, began_s = CpuMeter(server), time.monotonic()
    metrics = await asyncio.to_thread(server.metrics)
    swarm.lateness_s.clear()
    traces = await speak_all(swarm, clips, speaking, options.reply_s)
    late_ms = [1000.0 * late for late in swarm.lateness_s]
    later = await asyncio.to_thread(server.metrics)
    cpu, after, seconds = meter.read(), server.usage(), time.monotonic() - began_s

    scores = Scores()  # only now: scoring would hold up the stream
    for trace in traces:
        scores.add(trace)
    lag = Histogram((), ())
    if metrics is not None and later is not None:
        lag = later.histograms_since(metrics).get(LOOP_LAG, lag)
    p99 = lag.quantile(0.99)
    return Point(
        sessions=sum(link.alive for link in swarm.links),
        speaking=speaking,
        seconds=seconds,
        latency_ms=Spread.of(scores.latencies_ms()),
        turns=len(scores.turns),
        cut_ins=sum(score.cut_in_ms is not None for score in scores.turns),
        missed=sum(score.missed for score in scores.turns),
        unasked_replies=sum(link.unasked_replies for link in swarm.links) - unasked,
        loop_lag_ms=lag.spread_ms(),
        loop_lag_p99_ms=None if p99 is None else 1000.0 * p99,
        cpu_cores=cpu,
        server_pss_mb=None if after is None else after.pss_bytes / MB,
        server_threads=None if after is None else after.threads,
        server_processes=None if after is None else after.processes,
        generator_lateness_p99_ms=sorted(late_ms)[math.floor(0.99 * len(late_ms))],
        generator_lateness_max_ms=max(late_ms),
        errors=tuple(swarm.errors()[known_errors:]) + tuple(scores.errors),
    )


async def speak_all(
    swarm: Swarm, clips: Sequence[Clip], speaking: int, reply_s: float
) -> list[Trace]:
    """Every clip is one turn; the turns go round among the sessions."""
    waiting, traces = iter(clips), []
    free = [link for link in swarm.links if link.alive]

    async def speaker(number: int) -> None:
        await asyncio.sleep(number * STAGGER_S)
        for clip in waiting:
            link = free.pop(0)
            talk = Conversation(turn(clip, reply_s), frame_ms=FRAME_MS)
            await swarm.speak(link, talk)
            free.append(link)
            traces.append(talk.trace)

    await asyncio.gather(*(speaker(number) for number in range(speaking)))
    return traces


async def measure_all(server: Server, options: argparse.Namespace) -> list[Point]:
    clips = make_clips(options.seed, options.turns)
    gc.collect()
    gc.freeze()  # what is there stays: no pauses of the generator for looking through it
    swarm = Swarm(server.url, options.api_key)
    points = []
    try:
        for sessions in options.sessions:
            point = await measure_point(swarm, server, sessions, clips, options)
            points.append(point)
            print(f"  {point.sessions} sessions: {point.seconds:.0f} s", flush=True)
    finally:
        swarm.close()
    return points


def memory_per_session_mb(points: Sequence[Point]) -> float | None:
    """Slope of the server's memory over sessions, between the points with all speakers at work."""
    full = [p for p in points if p.server_pss_mb is not None]
    busiest = max((p.speaking for p in full), default=0)
    known = [(p.sessions, p.server_pss_mb) for p in full if p.speaking == busiest]
    if len({sessions for sessions, _ in known}) < 2:
        return None
    count = len(known)
    mean_n = sum(n for n, _ in known) / count
    mean_mb = sum(mb or 0.0 for _, mb in known) / count
    spread = sum((n - mean_n) ** 2 for n, _ in known)
    return sum((n - mean_n) * ((mb or 0.0) - mean_mb) for n, mb in known) / spread


def held(points: Sequence[Point]) -> int:
    """The most sessions within both bars, without an error, a missed turn or a lost session."""
    first = points[0].latency_ms.p95
    best = 0
    for point in points:
        lag, p95 = point.loop_lag_p99_ms, point.latency_ms.p95
        if first is None or lag is None or p95 is None:
            continue
        if (
            lag < LAG_BAR_MS
            and p95 <= LATENCY_BAR * first
            and not point.errors
            and not point.missed
        ):
            best = max(best, point.sessions)
    return best


def print_report(points: Sequence[Point]) -> None:
    headers = (
        "sessions", "speaking", "turns", "missed", "cut-ins", "latency p50", "p95", "max",
        "lag p50", "p99", "server CPU", "generator", "others", "late p99", "PSS MB", "threads",
        "errors",
    )  # fmt: skip
    rows: list[list[Cell]] = [
        [
            str(p.sessions), p.speaking, p.turns, p.missed, p.cut_ins,
            p.latency_ms.p50, p.latency_ms.p95, p.latency_ms.max,
            p.loop_lag_ms.p50, p.loop_lag_p99_ms,
            *(two_places(cores) for cores in astuple(p.cpu_cores)),
            p.generator_lateness_p99_ms, p.server_pss_mb, p.server_threads, len(p.errors),
        ]
        for p in points
    ]  # fmt: skip
    print("\nTimes in ms at the ear, CPU in cores:\n" + table(headers, rows))
    slope = memory_per_session_mb(points)
    if slope is not None:
        print(f"\nmemory per further connected session: {slope:.2f} MB")
    print(
        f"held with loop lag p99 < {LAG_BAR_MS:.0f} ms, latency p95 ≤ {LATENCY_BAR} × that of "
        f"{points[0].sessions} and no error or missed turn: {held(points)} sessions"
    )
    others = max((p.cpu_cores.others or 0.0 for p in points), default=0.0)
    for line in doubts(max(p.generator_lateness_max_ms for p in points), others):
        print(line)
    for error in sorted({error for point in points for error in point.errors}):
        print(f"error: {error}")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    counts = [1, 25, 50, 100, 150, 200]
    add("--sessions", type=int, nargs="+", default=counts, help="how many, in rising order")
    add("--speaking", type=int, default=8, help="how many of them speak at a time")
    add("--turns", type=int, default=32, help="turns spoken at each number of sessions")
    add("--reply_s", type=float, default=0.5, help="how much of a reply is heard (s)")
    add("--seed", type=int, default=0)
    add("--url", help="a running server (ws://host:port/v1/realtime); else one is started")
    add("--api_key", help="its key")
    add("--json", type=Path, help="write all figures there")
    add("--picture", type=Path, help="draw the curves there (PNG)")
    add("--server_log", type=Path, help="file for the started server's output")
    add("server", nargs="*", help="flags for the started server, after --")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    facts = environment(vars(options))
    print(environment_lines(facts), flush=True)
    try:
        with chosen(options.url, options.server, options.server_log) as server:
            points = uvloop.run(measure_all(server, options))
    except ServerFailed as error:
        print(error, file=sys.stderr)
        return 1
    print_report(points)
    if options.json:
        slope = memory_per_session_mb(points)
        document: dict[str, Any] = {
            "environment": facts,
            "audible_dbfs": AUDIBLE_DBFS,
            "points": points,
            "memory_per_session_mb": slope,
            "sessions_held": held(points),
        }
        write_json(options.json, document)
    if options.picture:
        draw_load(points, options.picture)
    return 0 if any(point.latency_ms.count for point in points) else 1


if __name__ == "__main__":
    raise SystemExit(main())
