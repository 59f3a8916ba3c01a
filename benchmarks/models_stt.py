"""Speech recognisers alone: `python -m benchmarks.models --stt`.

Random weights in the shape of a released Whisper, so that it is about time and nothing else: every
text has as many tokens as such speech has.

`ready`: what a start takes; compiled, with all shapes compiled, so that nothing is while it serves.
`all at once`: so many utterances end at the same moment; how long until each has its final text.
`live`: so many people speak at the same time, in real time, with partial texts; how long after the
end. The plain way is one `model.generate`, or one `transcribe` of the package, after another.
"""

from __future__ import annotations

import argparse
import queue
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import random_whisper
from benchmarks.report import Cell, Spread, table, two_places
from handlers.messages import EAR_RATE_HZ, Conclude, Failed, Heard, Message, Samples, Transcript
from handlers.stt.faster_whisper import FasterWhisperOptions, FasterWhisperSTT
from handlers.stt.streaming import StreamingSTT
from handlers.stt.whisper import WhisperOptions, WhisperSTT
from handlers.ticket import Ticket

TOKENS_PER_S = 5  # English
CHUNK_SAMPLES = 512
LOAD_TIMEOUT_S = 600.0
HEADERS = (
    "",
    "ready s",
    "rows",
    "RTF",
    "CPU",
    "all at once p50 ms",
    "max",
    "live p50 ms",
    "max",
    "partials each",
)


@dataclass(frozen=True, slots=True)
class Result:
    backend: str
    rows: int
    real_time_factor: float  # time for all of them over their audio
    cpu_factor: float  # processor time over it, which other processes change less
    at_once_s: Spread
    ready_s: float | None = None  # from the start to the first request it may be asked
    live_s: Spread | None = None
    partials: float | None = None  # per utterance, live

    def cells(self) -> list[Cell]:
        live = self.live_s or Spread(0, None, None, None)
        times_ms = [
            None if value is None else 1000 * value
            for value in (self.at_once_s.p50, self.at_once_s.max, live.p50, live.max)
        ]
        partials = two_places(self.partials)
        factors = (two_places(self.real_time_factor), two_places(self.cpu_factor))
        ready = two_places(self.ready_s)
        return [self.backend, ready, self.rows, *factors, *times_ms, partials]


class Nobody:
    def receive(self, message: Message) -> None: ...


@contextmanager
def running(make: Callable[..., StreamingSTT]) -> Iterator[tuple[StreamingSTT, Any]]:
    emitted: queue.Queue[tuple[float, Message]] = queue.Queue()
    stt = make(emit=lambda message: emitted.put((time.monotonic(), message)))
    stt.start()
    try:
        stt.wait_ready(LOAD_TIMEOUT_S)
        yield stt, emitted
    finally:
        stt.stop()


def at_once(stt: StreamingSTT, emitted: Any, audio: Sequence[Samples]) -> list[float]:
    owners = [Ticket(Nobody()) for _ in audio]
    for owner, samples in zip(owners, audio, strict=True):
        stt.put(Heard(owner, samples))
    began_s = time.monotonic()
    for owner in owners:
        stt.put(Conclude(owner, 1, None))
    times_s, _ = _finals(emitted, owners)
    return [times_s[owner] - began_s for owner in owners]


def live(stt: StreamingSTT, emitted: Any, audio: Sequence[Samples]) -> tuple[list[float], float]:
    """Final texts after the end of speech, in seconds; partial texts per utterance."""
    owners = [Ticket(Nobody()) for _ in audio]
    began_s = time.monotonic()
    for at in range(0, len(audio[0]), CHUNK_SAMPLES):
        time.sleep(max(0.0, began_s + at / EAR_RATE_HZ - time.monotonic()))
        for owner, samples in zip(owners, audio, strict=True):
            stt.put(Heard(owner, samples[at : at + CHUNK_SAMPLES]))
    ended_s = time.monotonic()
    for owner in owners:
        stt.put(Conclude(owner, 1, None))
    times_s, partials = _finals(emitted, owners)
    return [times_s[owner] - ended_s for owner in owners], partials / len(owners)


def _finals(emitted: Any, owners: Sequence[Ticket]) -> tuple[dict[Ticket, float], int]:
    """When each had its final text; how many partial texts came before."""
    found: dict[Ticket, float] = {}
    partials = 0
    while len(found) < len(owners):
        now_s, message = emitted.get(timeout=LOAD_TIMEOUT_S)
        if isinstance(message, Failed):
            raise RuntimeError(message.message)
        if isinstance(message, Transcript) and message.revision is not None:
            found[message.ticket] = now_s
        else:
            partials += 1
    for owner in owners:
        owner.cancel()
    return found, partials


def ours(
    name: str,
    make: Callable[..., StreamingSTT],
    audio: Sequence[Samples],
    counts: Sequence[int],
    rounds: int,
) -> list[Result]:
    results = []
    started_s = time.monotonic()
    with running(make) as (stt, emitted):
        ready_s = time.monotonic() - started_s
        at_once(stt, emitted, audio[:1])  # the first has caches to fill
        for rows in counts:
            some = audio[:rows]
            began_cpu_s = time.process_time()
            once = [at_once(stt, emitted, some) for _ in range(rounds)]
            cpu_s = (time.process_time() - began_cpu_s) / rounds
            spoken, partials = live(stt, emitted, some)
            results.append(
                Result(
                    name,
                    rows,
                    float(np.median([max(one) for one in once])) / _seconds(some),
                    cpu_s / _seconds(some),
                    Spread.of([value for one in once for value in one]),
                    ready_s,
                    Spread.of(spoken),
                    partials,
                )
            )
    return results


def plain(
    name: str,
    recognise: Callable[[Samples], Any],
    audio: Sequence[Samples],
    counts: Sequence[int],
    rounds: int,
) -> list[Result]:
    recognise(audio[0])
    results = []
    for rows in counts:
        waited, whole = [], []
        began_cpu_s = time.process_time()
        for _ in range(rounds):
            began_s = time.monotonic()
            once = []
            for samples in audio[:rows]:
                recognise(samples)
                once.append(time.monotonic() - began_s)
            waited += once
            whole.append(once[-1])
        seconds = _seconds(audio[:rows])
        cpu_factor = (time.process_time() - began_cpu_s) / rounds / seconds
        factor = float(np.median(whole)) / seconds
        results.append(Result(name, rows, factor, cpu_factor, Spread.of(waited)))
    return results


def _seconds(audio: Sequence[Samples]) -> float:
    return sum(map(len, audio)) / EAR_RATE_HZ


def plain_generate(folder: str, tokens: int, device: str) -> Callable[[Samples], Any]:
    from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model: Any = AutoModelForSpeechSeq2Seq.from_pretrained(folder).to(device)

    def recognise(samples: Samples) -> Any:
        inputs = processor(samples, sampling_rate=EAR_RATE_HZ, return_tensors="pt").to(device)
        ids = model.generate(**inputs, language="en", task="transcribe", max_new_tokens=tokens)
        return processor.batch_decode(ids, skip_special_tokens=True)

    return recognise


def plain_package(folder: str, tokens: int, device: str) -> Callable[[Samples], Any]:
    from faster_whisper import WhisperModel

    model = WhisperModel(folder, device=device)
    only_once = {
        "temperature": 0.0,
        "no_speech_threshold": None,
        "log_prob_threshold": None,
        "compression_ratio_threshold": None,
        "condition_on_previous_text": False,
        "without_timestamps": True,
    }

    def recognise(samples: Samples) -> Any:
        segments, _ = model.transcribe(
            samples, language="en", beam_size=1, max_new_tokens=2 * tokens, **only_once
        )
        return list(segments)

    return recognise


def measure(args: argparse.Namespace, folder: str, converted: str) -> Iterator[list[Result]]:
    generator = np.random.default_rng(1)
    counts = [int(count) for count in args.stt_sessions.split(",")]
    length = round(args.stt_seconds * EAR_RATE_HZ)
    audio = [
        (0.1 * generator.standard_normal(length)).astype(np.float32) for _ in range(max(counts))
    ]
    tokens = round(args.stt_seconds * TOKENS_PER_S)
    what = (audio, counts, args.stt_rounds)
    common = {"device": args.stt_device, "language": "en", "max_batch": max(counts)}

    def by_transformers(**more: Any) -> Callable[..., StreamingSTT]:
        gen = {"max_new_tokens": tokens}
        return lambda emit: WhisperSTT(WhisperOptions(folder, gen=gen, **common, **more), emit=emit)

    def by_ctranslate2(**more: Any) -> Callable[..., StreamingSTT]:
        gen = {"max_length": 2 * tokens}
        return lambda emit: FasterWhisperSTT(
            FasterWhisperOptions(converted, gen=gen, **common, **more), emit=emit
        )

    generate = plain_generate(folder, tokens, args.stt_device)
    yield plain("generate, one by one", generate, *what)
    yield ours("whisper", by_transformers(), *what)
    if mode := args.stt_compile_mode:
        yield ours(f"whisper, {mode}", by_transformers(compile_mode=mode), *what)
    package = plain_package(converted, tokens, args.stt_device)
    yield plain("faster-whisper, one by one", package, *what)
    for kind in args.stt_compute_types.split(","):
        yield ours(f"faster-whisper, {kind}", by_ctranslate2(compute_type=kind), *what)


def add_flags(group: Any) -> None:
    sizes = sorted(random_whisper.SIZES)
    group.add_argument("--stt", action="store_true", help="measure the recognisers")
    group.add_argument("--stt_size", choices=sizes, default="tiny", help="of the random weights")
    group.add_argument("--stt_whisper", default="", help="a checkpoint instead of random weights")
    group.add_argument("--stt_faster_whisper", default="", help="the same, converted")
    group.add_argument("--stt_device", default="cpu")
    group.add_argument("--stt_compile_mode", default="", help="measured too")
    group.add_argument("--stt_compute_types", default="float32,int8")
    group.add_argument("--stt_sessions", default="1,4,16", help="utterances at once")
    group.add_argument("--stt_seconds", type=float, default=4.0, help="length of an utterance")
    group.add_argument("--stt_rounds", type=int, default=3)


def section(args: argparse.Namespace) -> list[dict[str, Any]]:
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder, converted = Path(scratch) / "whisper", Path(scratch) / "converted"
        if not (args.stt_whisper and args.stt_faster_whisper):
            random_whisper.save(folder, random_whisper.SIZES[args.stt_size], endless=True)
            random_whisper.convert(folder, converted)
        names = (args.stt_whisper or str(folder), args.stt_faster_whisper or str(converted))
        for group in measure(args, *names):
            results += group
            print(table(HEADERS, [result.cells() for result in group]), "\n", flush=True)
    return [asdict(result) for result in results]
