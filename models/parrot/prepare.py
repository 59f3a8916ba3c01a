"""From a folder of recordings to token shards.

    python -m models.parrot.prepare --input_data DIR --output_data DIR --tokenizer tiny

Silence is data: nothing is trimmed and no codes are merged. What can't be used is left out, and
`report.json` beside the shards says why; it also has each recording's facts (rate, clipping,
bleed). A run that was broken off goes on.

C channels, N samples, T frames, D codebooks.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from models.common.errors import ModelError
from models.common.tokens import SpeechTokenizer
from models.parrot.recordings import Finding, Limits, Recording, RecordingError, find, read
from models.parrot.shards import SHARD_FRAMES, ShardWriter, Vocabulary
from models.parrot.tokenizers import load_tokenizer

REPORT = "report.json"
CHUNK_FRAMES = 500
"""A recording is encoded in pieces of this, so that memory doesn't grow with its length."""


@dataclass(frozen=True, slots=True)
class Job:
    input_data: Path
    output_data: Path
    tokenizer: Callable[[], SpeechTokenizer]
    """Called once in every process."""
    channels: int = 2
    processes: int = 1
    limits: Limits = field(default_factory=Limits)
    shard_frames: int = SHARD_FRAMES


@dataclass(frozen=True, slots=True)
class Prepared:
    name: str
    codes: NDArray[np.int32] | None
    """[T, C, D], None where it was refused."""
    finding: Finding | None
    refusal: str = ""


class Preparer:
    """What one process does: recordings in, codes out."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._tokenizer = job.tokenizer()

    def __call__(self, recording: Recording) -> Prepared:
        rate_hz = self._tokenizer.sample_rate_hz
        try:
            samples, finding = read(recording, self._job.channels, rate_hz, self._job.limits)
        except RecordingError as error:
            return Prepared(recording.name, None, None, f"{type(error).__name__}: {error}")
        codes = encode(self._tokenizer, torch.from_numpy(samples))
        return Prepared(recording.name, codes.to(torch.int32).numpy(), finding)


def encode(tokenizer: SpeechTokenizer, samples: Tensor) -> Tensor:
    """[C, N] -> [T, C, D]; code t stands for frame t, the last one filled up with silence."""
    late = tokenizer.encode_latency_frames
    frames = -(-samples.shape[1] // tokenizer.frame_samples) + late
    samples = torch.nn.functional.pad(
        samples, (0, frames * tokenizer.frame_samples - samples.shape[1])
    )
    state = tokenizer.encoder_state(len(samples))
    pieces = samples.split(CHUNK_FRAMES * tokenizer.frame_samples, dim=1)
    with torch.inference_mode():
        codes = torch.cat([tokenizer.encode(piece, state) for piece in pieces], dim=1)
    return codes[:, late:].transpose(0, 1)  # [C, T, D] -> [T, C, D]


def prepare(job: Job) -> dict[str, Any]:
    """Shards of all that isn't in `output_data` yet, and the report, which it returns.

    Raises `RecordingError` where nothing could be used, `VocabularyError` where the folder holds
    shards of another tokenizer.
    """
    recordings = find(job.input_data, job.channels)
    report_path = job.output_data / REPORT
    report: dict[str, Any] = {}
    if report_path.exists():
        report = json.loads(report_path.read_text())
    vocabulary = Vocabulary.of(job.tokenizer(), job.channels)
    with ShardWriter(job.output_data, vocabulary, job.shard_frames) as writer:
        missing = [r for r in recordings if r.name not in writer.sources]
        try:
            for prepared in _prepared(job, missing):
                if prepared.codes is None or prepared.finding is None:
                    report[prepared.name] = {"refused": prepared.refusal}
                    continue
                writer.append(torch.from_numpy(prepared.codes), prepared.name)
                report[prepared.name] = asdict(prepared.finding)
        finally:
            _write(report_path, report)
    used = [name for name, entry in report.items() if "refused" not in entry]
    if not used:
        reasons = [entry["refused"] for entry in report.values()]
        raise RecordingError(f"none of {len(reasons)} recordings could be used: {reasons[0]}")
    return report


def _prepared(job: Job, recordings: Sequence[Recording]) -> Iterator[Prepared]:
    """In order, with a progress bar."""
    with ExitStack() as stack:
        if job.processes == 1:
            done: Iterable[Prepared] = map(Preparer(job), recordings)
        else:
            spawn = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(job.processes, spawn, _begin_process, (job,))
            done = stack.enter_context(pool).map(_in_process, recordings)
        yield from tqdm(done, total=len(recordings), unit="recording")


_preparer: Preparer


def _begin_process(job: Job) -> None:
    global _preparer
    torch.set_num_threads(1)
    _preparer = Preparer(job)


def _in_process(recording: Recording) -> Prepared:
    return _preparer(recording)


def _write(path: Path, report: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(part, path)


def summary(report: dict[str, Any]) -> str:
    """What the report says, in a few lines."""
    used = [entry for entry in report.values() if "refused" not in entry]
    refused = Counter(
        entry["refused"].partition(":")[0] for entry in report.values() if "refused" in entry
    )
    hours = sum(entry["seconds"] for entry in used) / 3600
    lines = [f"{len(used)} recordings, {hours:.2f} h"]
    narrow = sum(entry["narrow_band"] for entry in used)
    if narrow:
        lines.append(f"{narrow} of them have 8 kHz or less: nothing above 4 kHz is heard in them")
    bleeding = [b for entry in used for b in entry["bleed_db"] if b is not None]
    if bleeding:
        lines.append(
            f"one channel is heard in the other in {len(bleeding)} of {2 * len(used)} directions, "
            f"at {max(bleeding):.0f} dB at worst"
        )
    lines += [f"refused {count}: {reason}" for reason, count in refused.items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m models.parrot.prepare")
    parser.add_argument("--input_data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--output_data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--tokenizer", default="tiny", help="a name, or a codec's folder")
    parser.add_argument("--channels", type=int, choices=(1, 2), default=2)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--pad", action="store_true", help="fill up the shorter one of two files")
    parser.add_argument("--allow_silent", action="store_true", help="take silent channels too")
    parser.add_argument("--max_clipped_share", type=float, default=Limits().max_clipped_share)
    parser.add_argument("--max_bleed_db", type=float, help="refuse what bleeds more, e. g. -30")
    given = parser.parse_args(arguments)
    limits = Limits(given.pad, given.allow_silent, given.max_clipped_share, given.max_bleed_db)
    job = Job(
        given.input_data,
        given.output_data,
        partial(load_tokenizer, given.tokenizer),
        given.channels,
        given.processes,
        limits,
    )
    try:
        report = prepare(job)
    except ModelError as error:
        sys.exit(f"prepare: {error}")
    sys.stdout.write(summary(report) + "\n")


if __name__ == "__main__":
    main()
