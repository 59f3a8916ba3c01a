"""One table: Parley, Pipecat and Hugging Face speech-to-speech over the same stub models.

`python -m benchmarks.peers`. The models are `benchmarks.stub_models`, the person and the clips are
those of `benchmarks.latency`, one conversation at a time unless `--parallel` says otherwise, one
server after the other in the same run. The peers run from their packages with the settings that
these bring or recommend (`SETTINGS`), each in an environment of its own under `--folder`, which the
first run makes (some GB).
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import uvloop

from benchmarks import latency
from benchmarks.peers.environments import pipecat, speech_to_speech
from benchmarks.report import Cell, doubts, environment, environment_lines, table, write_json
from benchmarks.server_process import CpuMeter, Server, ServerFailed, running
from benchmarks.stub_models import MODELS_S, behind, stub_models

Start = Callable[[Path, str, Path, int], contextlib.AbstractContextManager[Server]]
HEADERS = (
    "at the ear, ms",
    "turns",
    "reply p50",
    "p95",
    "cut in",
    "missed",
    "barge-in → silence p50",
    "p95",
    "n",
    "noise ended reply",
    "CPU, cores",
)


@contextlib.contextmanager
def parley(folder: Path, models: str, log: Path, sessions: int) -> Iterator[Server]:
    with running(behind(models), log) as server:
        yield server


SERVERS: dict[str, Start] = {
    "parley": parley,
    "pipecat": pipecat,
    "speech-to-speech": speech_to_speech,
}
SETTINGS = {
    "parley": "defaults: Silero VAD, a local Moonshine for turn-taking, speculative replies",
    "pipecat": "1.14.0, its template's defaults: Silero VAD (0.2 s), Smart Turn v3.2 (3 s)",
    "speech-to-speech": "1.1.0, defaults: Silero VAD (64 ms), Smart Turn v3.2 (2 s), speculative "
    "turns; LM and TTS streamed; language detector loaded before it is asked",
}


def measure(name: str, options: argparse.Namespace, listener: argparse.Namespace) -> dict[str, Any]:
    """The figures of one server. Raises `ServerFailed`."""
    clips = latency.make_turns(listener)
    sessions = latency.make_sessions(clips, listener)
    log, start = options.folder / f"{name}.log", SERVERS[name]
    with stub_models() as models, start(options.folder, models, log, options.parallel) as server:
        meter = CpuMeter(server)
        scores = uvloop.run(latency.hold_sessions(sessions, server, listener))
        cpu = meter.read()
    figures = latency.summary(scores, len(clips))
    settings = SETTINGS[name]
    return {"settings": settings, "figures": figures, "cpu_cores": cpu, "turns": scores.turns}


def row(name: str, found: dict[str, Any]) -> list[Cell]:
    figures, cpu = found["figures"], found["cpu_cores"]
    reply, stop = figures["latency_ms"], figures["barge_in_ms"]
    noises = f"{figures['noises_that_ended_the_reply']} of {figures['noises']}"
    return [
        name,
        figures["turns"],
        *(reply.p50, reply.p95, figures["cut_ins"], figures["missed"]),
        *(stop.p50, stop.p95, stop.count, noises),
        None if cpu.server is None else f"{cpu.server:.2f}",
    ]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--servers", nargs="+", choices=list(SERVERS), default=list(SERVERS))
    add("--folder", type=Path, default=Path("out/peers"), help="environments and logs")
    add("--turns", type=int, default=33, help="synthetic turns")
    add("--interruptions", type=int, default=16, help="barge-ins and noises, by turns")
    add("--parallel", type=int, default=1, help="conversations at a time")
    add("--seed", type=int, default=0)
    add("--json", type=Path, help="write all figures there")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    # JSON and base64: the variant that all of them speak.
    listener = latency.parse(
        [
            *("--wire", "json", "--parallel", str(options.parallel), "--seed", str(options.seed)),
            *("--turns", str(options.turns), "--interruptions", str(options.interruptions)),
        ]
    )
    facts = environment(vars(options))
    print(environment_lines(facts), flush=True)
    found: dict[str, Any] = {}
    for name in options.servers:
        try:
            found[name] = measure(name, options, listener)
        except ServerFailed as error:
            print(f"{name}: {error}", flush=True)
            continue
        figures = found[name]["figures"]
        print(f"{name} done; errors: {figures['errors'] or 'none'}", flush=True)
        late_ms = figures["generator_lateness_ms"].max
        for line in doubts(late_ms, found[name]["cpu_cores"].others):
            print(line)
    print("\n" + table(HEADERS, [row(name, one) for name, one in found.items()]))
    for name in found:
        print(f"{name}: {SETTINGS[name]}")
    print(f"Of a reply's time the models take {MODELS_S * 1000:.0f} ms, one after the other.")
    if options.json:
        write_json(options.json, {"environment": facts, "servers": found})
    return 0 if len(found) == len(options.servers) else 1


if __name__ == "__main__":
    raise SystemExit(main())
