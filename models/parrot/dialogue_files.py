"""Many dialogues to disk, by several processes: as two-channel WAVs, or at once as token shards.

A run that was broken off and is started again goes on; dialogue n of a seed is the same in any run.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import wave
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soxr
from numpy.typing import NDArray

from models.common.errors import ModelError
from models.parrot.dialogues import LABELS, Dialogue, DialogueOptions, generate, load_options
from models.parrot.speech import Audio
from models.parrot.statistics import TurnTaking, mean_of, turn_taking
from models.parrot.synthesis import RATE_HZ

if TYPE_CHECKING:
    from models.common.tokens import SpeechTokenizer
    from models.parrot.shards import ShardWriter

TASK_DIALOGUES = 8
"""What a process is given at a time."""
SEEDS_APART = 1_000_000_000
SHARD_FRAMES = 250_000
"""What a broken-off run may have to do again: 2.8 h at 25 Hz."""
STATISTICS_FRAME_S = 0.01
FISHER = {"IPU": (21.6, 53.5), "pause": (7.0, 5.5), "gap": (7.5, 4.4), "overlap": (6.5, 3.6)}
"""Count and seconds per minute in real calls: dGSLM (Nguyen et al. 2022), table 2."""


@dataclass(frozen=True, slots=True)
class Job:
    """What every process has to know."""

    options: DialogueOptions
    seed: int
    test: bool
    folder: Path
    tokenizer: str | None
    """None: WAVs."""

    def name_of(self, number: int) -> str:
        return f"{'test' if self.test else 'train'}-{self.seed}-{number:07}"


@dataclass(frozen=True, slots=True)
class Made:
    name: str
    seconds: float
    statistics: TurnTaking
    codes: NDArray[np.int32] | None  # [T frames, C = 2, D]
    labels: NDArray[np.int16] | None  # [T frames, C = 2]


class Maker:
    """Makes dialogues by their numbers. Without a tokenizer they are files on disk afterwards."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._tokenizer: SpeechTokenizer | None = None
        if job.tokenizer is not None:
            import torch

            from models.parrot.tokenizers import load_tokenizer

            torch.set_num_threads(1)
            self._tokenizer = load_tokenizer(job.tokenizer)

    def __call__(self, number: int) -> Made:
        job = self._job
        dialogue = generate(job.seed * SEEDS_APART + number, job.options, test=job.test)
        codes = labels = None
        if self._tokenizer is None:
            write_wav(job.folder / job.name_of(number), dialogue)
        else:
            codes = encode(self._tokenizer, dialogue)
            labels = dialogue.truth.labels(RATE_HZ / self._tokenizer.frame_rate_hz, len(codes))
        seconds = len(dialogue.person) / RATE_HZ
        return Made(job.name_of(number), seconds, statistics_of(dialogue), codes, labels)


_maker: Maker


def _begin_process(job: Job) -> None:
    global _maker
    _maker = Maker(job)


def _make(number: int) -> Made:
    return _maker(number)


def encode(tokenizer: SpeechTokenizer, dialogue: Dialogue) -> NDArray[np.int32]:
    """Both channels in one pass, as far as frames are whole. [T frames, C = 2, D]

    One dialogue at a time: on a CPU, eight of them together take twice as long.
    """
    import torch

    both = np.stack([_at_rate(side, tokenizer) for side in (dialogue.person, dialogue.agent)])
    whole = both.shape[1] // tokenizer.frame_samples * tokenizer.frame_samples
    with torch.inference_mode():
        codes = tokenizer.encode(torch.from_numpy(both[:, :whole].copy()))  # [C, T, D]
    paired: NDArray[np.int32] = codes.transpose(0, 1).to(torch.int32).numpy()
    return paired


def _at_rate(samples: Audio, tokenizer: SpeechTokenizer) -> Audio:
    if tokenizer.sample_rate_hz == RATE_HZ:
        return samples
    resampled: Audio = soxr.resample(samples, RATE_HZ, tokenizer.sample_rate_hz)
    return resampled


def write_wav(path: Path, dialogue: Dialogue) -> None:
    """`path`.wav, person left and agent right, and `path`.json, which is written last."""
    both = np.stack((dialogue.person, dialogue.agent), axis=1)
    with wave.open(f"{path}.wav", "wb") as file:
        file.setparams((2, 2, RATE_HZ, 0, "NONE", ""))
        file.writeframes(np.round(both.clip(-1, 1) * 32767).astype("<i2").tobytes())
    part = path.with_suffix(".json.part")
    part.write_text(json.dumps(asdict(dialogue.truth), indent=1) + "\n")
    part.replace(path.with_suffix(".json"))


def statistics_of(dialogue: Dialogue) -> TurnTaking:
    frame_samples = round(STATISTICS_FRAME_S * RATE_HZ)
    return turn_taking(*dialogue.truth.activity(frame_samples), STATISTICS_FRAME_S)


def run(job: Job, hours: float, processes: int) -> list[Made]:
    """Makes what is missing of so many hours; gives what it made, without the codes."""
    mean_s = sum(job.options.length_s) / 2
    numbers = range(math.ceil(hours * 3600 / mean_s))
    job.folder.mkdir(parents=True, exist_ok=True)
    if job.tokenizer is None:
        missing = [n for n in numbers if not (job.folder / f"{job.name_of(n)}.json").exists()]
        return [_counted(made) for made in _made(job, missing, processes)]
    from models.parrot.shards import ShardWriter, Vocabulary
    from models.parrot.tokenizers import load_tokenizer

    vocabulary = Vocabulary.of(load_tokenizer(job.tokenizer), channels=2, labels=LABELS)
    with ShardWriter(job.folder, vocabulary, SHARD_FRAMES) as writer:
        missing = [n for n in numbers if job.name_of(n) not in writer.sources]
        return [_counted(made, writer) for made in _made(job, missing, processes)]


def _made(job: Job, numbers: Sequence[int], processes: int) -> Iterator[Made]:
    """In order, with a progress bar."""
    from tqdm import tqdm

    with ExitStack() as stack:
        if processes == 1:
            made: Iterable[Made] = map(Maker(job), numbers)
        else:
            spawn = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(processes, spawn, _begin_process, (job,))
            made = stack.enter_context(pool).map(_make, numbers, chunksize=TASK_DIALOGUES)
        yield from tqdm(made, total=len(numbers), unit="dialogue")


def _counted(made: Made, writer: ShardWriter | None = None) -> Made:
    """Its codes handed to the writer and not kept."""
    if writer is not None and made.codes is not None and made.labels is not None:
        import torch

        writer.append(torch.from_numpy(made.codes), made.name, torch.from_numpy(made.labels))
    return replace(made, codes=None, labels=None)


def table(made: Sequence[Made]) -> str:
    """What was made against real conversation."""
    mean = mean_of([one.statistics for one in made])
    lines = [f"{len(made)} dialogues, {sum(one.seconds for one in made) / 3600:.2f} h", ""]
    lines += ["| per minute | count | seconds | Fisher | seconds |", "|---|---|---|---|---|"]
    for (name, (count, seconds)), rate in zip(FISHER.items(), astuple(mean), strict=True):
        lines.append(f"| {name} | {rate[0]:.1f} | {rate[1]:.1f} | {count} | {seconds} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Makes synthetic dialogues with the agent.")
    parser.add_argument("--output_data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--hours", type=float, required=True, help="at least so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--test", action="store_true", help="held-out phrases and voices")
    parser.add_argument("--config", type=Path, help="YAML of options; default: rates of real calls")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--wav", action="store_true", help="two-channel WAVs, the truth beside them")
    kind.add_argument("--tokenizer", metavar="FOLDER", help="paired token shards of this tokenizer")
    chosen = parser.parse_args(arguments)
    if chosen.hours <= 0 or chosen.processes < 1 or chosen.seed < 0:
        parser.error("--hours and --processes have to be above 0, --seed 0 or more")
    try:
        options = load_options(chosen.config) if chosen.config else DialogueOptions()
        job = Job(options, chosen.seed, chosen.test, chosen.output_data, chosen.tokenizer)
        made = run(job, chosen.hours, chosen.processes)
    except (ModelError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    print(table(made) if made else "nothing was missing")
