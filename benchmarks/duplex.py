"""Full-duplex behaviour at the listener's ear: `python -m benchmarks.duplex`.

A virtual person talks to a Realtime server in real time, many sessions side by side: finished
turns, turns with a pause inside, questions, interruptions, long turns, noise, whole dialogues. The
server is a black box; all is measured in the recordings of both sides. `--partner parrot` speaks
the shipped duplex model's domain, `--partner assistant` talks to a cascade. Without `--url` it
starts a server of its own. `--minutes N` holds one session that long instead; the exit status says
whether its memory and ticks stayed flat and its channels together.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.duplex_judge import CLOSED_ANSWERS, Judge, Understood, answer_words, says
from benchmarks.duplex_long import LongSession, hold_long, long_figures, print_long
from benchmarks.duplex_report import Share, bars, figures, print_report
from benchmarks.duplex_scenes import Connection, Run, hold_all
from benchmarks.duplex_score import Scorer
from benchmarks.duplex_trials import (
    PARTNERS,
    Booth,
    Counts,
    Trial,
    in_sessions,
    recorded_trials,
    to_wire_rate,
)
from benchmarks.measure import AUDIBLE_DBFS
from benchmarks.pictures import draw_duplex
from benchmarks.report import (
    Spread,
    doubts,
    environment,
    environment_lines,
    two_places,
    write_json,
    write_recording,
)
from benchmarks.server_process import CpuMeter, Server, ServerFailed, chosen
from handlers.messages import RATE_HZ
from models.parrot import domain
from models.parrot.dialogues import DialogueOptions, load_options
from models.parrot.speech import agent_clip

DIALOGUES = Path(__file__).parents[1] / "models/parrot/configs/dialogues/tiny.yaml"
BRAIN = {"parrot": ("--brain", "parrot"), "assistant": ()}
"""Flags that a started server gets with each partner."""
LONG = ("pause", "turn", "question", "backchannel")
"""Tasks of a long session."""


def make_trials(options: argparse.Namespace, data: DialogueOptions) -> list[Trial]:
    counts = Counts().scaled(options.scale)
    with Booth(options.seed, PARTNERS[options.partner](), data) as booth:
        made = booth.trials(counts)
    if options.tasks:
        made = [trial for trial in made if trial.task in options.tasks]
    return made + (recorded_trials(options.recordings) if options.recordings else [])


def measure(options: argparse.Namespace, server: Server) -> dict[str, Any]:
    """Hold all trials and score them; prints, and returns everything that was found."""
    trials = make_trials(options, load_options(options.dialogues))
    sessions = [
        [Run(trial) for trial in session] for session in in_sessions(trials, options.per_session)
    ]
    print(f"{len(trials)} trials in {len(sessions)} sessions", flush=True)
    connection = Connection(server.url, options.api_key, options.wire == "binary", options.frame_ms)
    meter = CpuMeter(server)
    failures = uvloop.run(hold_all(sessions, connection, options.parallel))
    cpu = meter.read()
    document = score(sessions, options) | {"errors": failures, "cpu_cores": cpu}
    traces = [session[0].trace for session in sessions if session[0].trace is not None]
    late_ms = Spread.of([1000.0 * late for trace in traces for late in trace.lateness_s])
    used = [f"{name} {two_places(cores) or '–'}" for name, cores in asdict(cpu).items()]
    print(f"\nCPU in cores: {', '.join(used)}; {len(failures)} errors {sorted(set(failures))}")
    for line in doubts(late_ms.max, cpu.others):
        print(line)
    if options.record:
        for index, trace in enumerate(traces):
            if trace.left:
                write_recording(options.record / f"session-{index:02d}.wav", trace.recording())
    return document | {"generator_lateness_ms": late_ms}


def measure_long(options: argparse.Namespace, server: Server) -> dict[str, Any]:
    """One session of `--minutes`; prints, and returns everything that was found."""
    trials = [t for t in make_trials(options, load_options(options.dialogues)) if t.task in LONG]
    connection = Connection(server.url, options.api_key, options.wire == "binary", options.frame_ms)
    session = LongSession()
    uvloop.run(hold_long(session, trials, server, connection, options.minutes))
    document = score([session.runs], options)
    ends = {run.trial.name: run for run in session.runs}
    latencies = [
        (ends[o.name].end / RATE_HZ, o.latency_ms)
        for o in document["outcomes"]
        if o.latency_ms is not None
    ]
    found = long_figures(session, latencies)
    print_long(found)
    return document | {"long": found, "errors": [session.failure] if session.failure else []}


def score(sessions: Sequence[Sequence[Run]], options: argparse.Namespace) -> dict[str, Any]:
    runs = [run for session in sessions for run in session]
    if options.partner == "parrot":
        judge = Judge(domain.WORDS, CLOSED_ANSWERS)
    else:
        spoken = {word for run in runs for word in run.trial.answer.split()}
        judge = Judge(answer_words() | spoken)
    scorer = Scorer(judge.hear, options.audible_dbfs)
    outcomes = [outcome for run in runs if (outcome := scorer.outcome(run)) is not None]
    held = {outcome.name for outcome in outcomes}
    answers = [
        (run.trial.task, run.trial.answer, original(run.trial.answer, judge))
        for run in runs
        if run.trial.name in held and run.trial.task in ("turn", "question") and run.trial.answer
    ]
    originals = [Understood.of(answer, heard) for _, answer, heard in answers]
    asked = [says(answer, heard) for task, answer, heard in answers if task == "question"]
    right = Share(sum(asked), len(asked))
    expected = sum(len(run.trial.backchannels) for run in runs if run.trial.name in held)
    found = figures(outcomes, originals, expected, len(runs) - len(outcomes), right)
    against = bars(found, options.partner)
    print_report(found, against)
    return {"figures": found, "bars": against, "outcomes": outcomes}


def original(answer: str, judge: Judge) -> str:
    """What the judge hears of an answer in the agent's original voice."""
    return judge.hear(to_wire_rate(agent_clip(answer).samples))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--partner", choices=tuple(PARTNERS), default="parrot", help="what kind of server it is")
    add("--url", help="a running server (ws://host:port/v1/realtime); else one is started")
    add("--api_key", help="its key")
    add("--wire", choices=("binary", "json"), default="binary", help="audio frames or base64")
    add("--tasks", nargs="+", choices=tuple(asdict(Counts())), help="only these")
    add("--scale", type=float, default=1.0, help="times the usual number of trials of each task")
    add("--recordings", type=Path, help="folder of 16-bit mono WAV files: more turns")
    add("--dialogues", type=Path, default=DIALOGUES, help="options of the data's dialogues (YAML)")
    add("--per_session", type=int, default=5, help="trials one after the other in a session")
    add("--parallel", type=int, default=8, help="sessions at a time")
    add("--frame_ms", type=float, default=20.0, help="length of a microphone frame (ms)")
    add("--audible_dbfs", type=float, default=AUDIBLE_DBFS, help="peak from which a sound is heard")
    add("--minutes", type=float, help="hold one session for so long instead")
    add("--seed", type=int, default=0)
    add("--json", type=Path, help="write all figures there")
    add("--picture", type=Path, help="draw them there (PNG)")
    add("--record", type=Path, help="folder for two-channel recordings of all sessions")
    add("--server_log", type=Path, help="file for the started server's output")
    add("server", nargs="*", help="flags for the started server, after --")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    facts = environment(vars(options))
    print(environment_lines(facts), flush=True)
    try:
        flags = [*BRAIN[options.partner], *options.server]
        with chosen(options.url, flags, options.server_log) as server:
            document = (measure_long if options.minutes else measure)(options, server)
    except ServerFailed as error:
        print(error, file=sys.stderr)
        return 1
    if options.json:
        write_json(options.json, {"environment": facts} | document)
    if options.picture:
        draw_duplex(document, options.picture)
    flat = not options.minutes or all(document["long"]["flat"].values())
    return 0 if document["outcomes"] and flat else 1


if __name__ == "__main__":
    raise SystemExit(main())
