"""Latency at the listener's ear: `python -m benchmarks.latency`.

A virtual person speaks clips to a Realtime server in real time and hears it through the client's
playback buffer. Everything is measured in the recording of both sides, against the clips' known
ends: last voiced sample → first audible reply sample, barge-in onset → silence, replies that cut
into a turn, replies disturbed by a cough. Without `--url` it starts a server of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.clips import Clip, make_clips, make_interruptions, recorded_clips
from benchmarks.listener import Conversation, Kind, Trace, hold
from benchmarks.measure import AUDIBLE_DBFS
from benchmarks.pictures import draw_latency
from benchmarks.report import (
    SPREAD_HEADERS,
    Cell,
    Spread,
    doubts,
    environment,
    environment_lines,
    table,
    two_places,
    write_json,
    write_recording,
)
from benchmarks.scenes import Scene, interruption, one_after_another, turn
from benchmarks.score import STAGES, Scores
from benchmarks.server_process import CpuMeter, Metrics, Server, ServerFailed, chosen, running
from benchmarks.stub_models import stubbed
from client.realtime import Realtime, RealtimeError

PROMPTS = ("tell me a story", "what can you do", "count from one to twenty")
"""Turns that get a reply long enough to be interrupted."""
BARGE_IN_AFTER_S = (0.3, 2.0)
SESSION_STAGGER_S = 0.7


def make_turns(options: argparse.Namespace) -> list[Clip]:
    recorded = recorded_clips(options.recordings) if options.recordings else []
    return make_clips(options.seed, options.turns) + recorded


def make_sessions(clips: Sequence[Clip], options: argparse.Namespace) -> list[Scene]:
    """The turns, and this seed's interruptions, dealt out to sessions."""
    source = random.Random(options.seed)
    scenes = [turn(clip, options.reply_s) for clip in clips]
    prompts = make_prompts(options.seed, options.interruptions)
    for prompt, clip in zip(prompts, make_interruptions(options.seed, len(prompts)), strict=True):
        after_s = source.uniform(*BARGE_IN_AFTER_S)
        kind: Kind = "noise" if clip.kind == "noise" else "barge_in"
        scenes.append(interruption(prompt, clip, kind, after_s, options.reply_s))
    source.shuffle(scenes)
    size = options.turns_per_session
    groups = [scenes[first : first + size] for first in range(0, len(scenes), size)]
    return [one_after_another(group) for group in groups]


def make_prompts(seed: int, count: int) -> list[Clip]:
    """`count` turns, each one of `PROMPTS`, in voices of this seed."""
    made = make_clips(seed + 1, 2 * count + 2, phrases=PROMPTS)
    return [clip for clip in made if clip.text in PROMPTS][:count]


async def hold_sessions(
    sessions: Sequence[Scene], server: Server, options: argparse.Namespace
) -> Scores:
    """Hold all conversations, `--parallel` at a time."""
    traces: dict[int, Trace] = {}
    failures: list[str] = []
    waiting = iter(enumerate(sessions))

    async def worker(number: int) -> None:
        await asyncio.sleep(number * SESSION_STAGGER_S)
        for index, scene in waiting:
            talk = Conversation(scene, frame_ms=options.frame_ms)
            traces[index] = talk.trace
            try:
                binary = options.wire == "binary"
                async with Realtime.connect(server.url, options.api_key, binary) as client:
                    talk.binary = client.binary
                    await hold(client, talk)
            except RealtimeError as error:
                failures.append(f"session {index}: {error}")

    await asyncio.gather(*(worker(number) for number in range(options.parallel)))
    scores = Scores(errors=failures)
    for index, trace in sorted(traces.items()):  # only now: scoring would hold up the others
        scores.add(trace)
        if options.record and trace.left:
            write_recording(options.record / f"session-{index:02d}.wav", trace.recording())
    return scores


def summary(scores: Scores, planned: int) -> dict[str, Any]:
    """The figures, in milliseconds where they are times."""
    turns = [score for score in scores.turns if score.after == "turn"]
    noises = [score for score in scores.noises if score.tested]
    return {
        "turns": len(turns),
        "turns_never_spoken": planned - len(turns),  # their session broke off
        "turns_with_a_pause": sum(score.pause_ms > 0 for score in turns),
        "latency_ms": Spread.of(scores.latencies_ms()),
        "latency_after_barge_in_ms": Spread.of(scores.latencies_ms(("barge_in",))),
        "cut_ins": sum(score.cut_in_ms is not None for score in turns),
        "cut_ins_by_kind": {
            kind: [
                sum(s.cut_in_ms is not None for s in turns if s.kind == kind),
                sum(s.kind == kind for s in turns),
            ]
            for kind in sorted({score.kind for score in turns})
        },
        "missed": sum(score.missed for score in scores.turns),
        "barge_in_ms": Spread.of(scores.stops_ms()),
        "barge_ins": len(scores.barge_ins),
        "barge_ins_resumed": sum(score.resumed for score in scores.barge_ins),
        "noises": len(noises),
        "noises_that_ended_the_reply": sum(not score.completed for score in noises),
        "noise_pause_ms": Spread.of([score.pause_ms for score in noises]),
        "noise_lost_ms": Spread.of([score.faults.lost_ms for score in noises if score.completed]),
        "noise_repeated_ms": Spread.of(
            [score.faults.repeated_ms for score in noises if score.completed]
        ),
        "stages_ms": {stage: Spread.of(scores.stage_ms(stage)) for stage in (*STAGES, "audible")},
        "generator_lateness_ms": Spread.of(scores.lateness_ms),
        "errors": scores.errors,
    }


def server_stages(before: Metrics | None, after: Metrics | None) -> dict[str, Spread]:
    """The server's own histograms of times, in milliseconds; empty without a Prometheus page."""
    if before is None or after is None:
        return {}
    since = after.histograms_since(before)
    return {name: h.spread_ms() for name, h in since.items() if "_seconds" in name}


def print_report(figures: dict[str, Any], stages: dict[str, Spread]) -> None:
    rows: list[list[Cell]] = [
        figures["latency_ms"].row("last voiced → audible reply"),
        figures["latency_after_barge_in_ms"].row("the same after a barge-in"),
        figures["barge_in_ms"].row("barge-in onset → silence"),
        figures["noise_pause_ms"].row("reply's silence around a noise"),
        figures["generator_lateness_ms"].row("this program's own lateness"),
    ]
    print("\nAt the ear, in ms:\n" + table(SPREAD_HEADERS, rows))
    rows = [spread.row(stage) for stage, spread in figures["stages_ms"].items()]
    print(
        "\nEvents as they arrive, ms after the last voiced sample:\n" + table(SPREAD_HEADERS, rows)
    )
    if stages:
        rows = [spread.row(name) for name, spread in stages.items()]
        print("\nThe server's /metrics, in ms:\n" + table(SPREAD_HEADERS, rows))
    kinds = figures["cut_ins_by_kind"].items()
    by_kind = ", ".join(f"{kind} {cut} of {count}" for kind, (cut, count) in kinds)
    print(
        f"\n{figures['turns']} turns, {figures['turns_with_a_pause']} with a pause inside: "
        f"{figures['cut_ins']} cut in, {figures['missed']} missed (of all utterances), "
        f"{figures['turns_never_spoken']} never spoken because the session broke off"
        f"\ncut in, by the kind of turn (see benchmarks/clips.py): {by_kind}"
        f"\n{figures['barge_ins']} barge-ins, {figures['barge_in_ms'].count} of them into a "
        f"sounding reply: {figures['barge_ins_resumed']} old replies came back"
        f"\n{figures['noises']} noises: {figures['noises_that_ended_the_reply']} ended the reply; "
        f"lost at most {figures['noise_lost_ms'].max or 0:.0f} ms, "
        f"repeated at most {figures['noise_repeated_ms'].max or 0:.0f} ms"
        f"\n{len(figures['errors'])} errors {sorted(set(figures['errors'])) or ''}"
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--url", help="a running server (ws://host:port/v1/realtime); else one is started")
    add("--api_key", help="its key")
    add("--wire", choices=("binary", "json"), default="binary", help="audio frames or base64")
    add("--turns", type=int, default=33, help="synthetic turns")
    add("--interruptions", type=int, default=16, help="barge-ins and noises, by turns")
    add("--recordings", type=Path, help="folder of 16-bit mono WAV files: more turns")
    add("--turns_per_session", type=int, default=4, help="1: a fresh session for every turn")
    add("--parallel", type=int, default=4, help="conversations at a time")
    add("--reply_s", type=float, default=1.5, help="how much of a reply is heard (s)")
    add("--frame_ms", type=float, default=20.0, help="length of a microphone frame (ms)")
    add("--seed", type=int, default=0)
    add("--quick", action="store_true", help="4 turns and 2 interruptions")
    add("--json", type=Path, help="write all figures there")
    add("--picture", type=Path, help="draw them there (PNG)")
    add("--record", type=Path, help="folder for two-channel recordings of all sessions")
    add("--remote_stubs", action="store_true", help="have it use benchmarks.stub_models")
    add("--server_log", type=Path, help="file for the started server's output")
    add("server", nargs="*", help="flags for the started server, after --")
    options = parser.parse_args(argv)
    if options.quick:
        options.turns, options.interruptions = 4, 2
    return options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run everything; the report as a JSON-ready document. Raises `ServerFailed`."""
    clips = make_turns(options)
    sessions = make_sessions(clips, options)
    start = stubbed if options.remote_stubs else running
    with chosen(options.url, options.server, options.server_log, start) as server:
        before, meter = server.metrics(), CpuMeter(server)
        scores = uvloop.run(hold_sessions(sessions, server, options))
        cpu = meter.read()
        stages = server_stages(before, server.metrics())
    document = report_on(scores, len(clips), options, stages)
    used = [f"{name} {two_places(cores) or '–'}" for name, cores in asdict(cpu).items()]
    print(f"CPU in cores: {', '.join(used)}")
    if server.start_s is not None:
        print(f"server start to ready: {server.start_s:.2f} s")
    late_ms = document["figures"]["generator_lateness_ms"].max
    for line in doubts(late_ms, cpu.others):
        print(line)
    return document | {"server_start_s": server.start_s, "cpu_cores": cpu}


def report_on(
    scores: Scores, planned: int, options: argparse.Namespace, stages: dict[str, Spread]
) -> dict[str, Any]:
    """Print the figures; returns everything that was found."""
    figures = summary(scores, planned)
    print_report(figures, stages)
    return {
        "environment": environment(vars(options)),
        "audible_dbfs": AUDIBLE_DBFS,
        "figures": figures,
        "server_stages_ms": stages,
        "turns": scores.turns,
        "barge_ins": scores.barge_ins,
        "noises": scores.noises,
    }


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    print(environment_lines(environment(vars(options))), flush=True)
    try:
        document = measure(options)
    except ServerFailed as error:
        print(error, file=sys.stderr)
        return 1
    if options.json:
        write_json(options.json, document)
    if options.picture:
        draw_latency(document, options.picture)
    return 0 if document["figures"]["latency_ms"].count else 1


if __name__ == "__main__":
    raise SystemExit(main())
