"""Mini-batch k-means over features of speech: makes the centroids of `units`.

    python -m models.common.kmeans --input_data DIR --model NAME --features LAYER --output FILE

Mini-batches of whole recordings update per-centroid means (Sculley, "Web-scale k-means
clustering", 2010, with the steps of a batch taken together); the beginning is k-means++ (Arthur
and Vassilvitskii 2007) on the features of the first batches. The file it writes after every batch
is result and state in one: the same command goes on where a run was broken off, to the same end.

Letters: N features, E their width, K centroids.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import wave
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import soxr
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from models.common.errors import ConfigError, FrameLengthError
from models.common.units import FRAME_SAMPLES, RATE_HZ, HubertFeatures, Window, nearest

SEED_FEATURES_PER_CENTROID = 10
"""How many features k-means++ chooses from, per centroid."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What centroids are made with: a run that goes on must ask for the same."""

    model: str
    features: int
    """The layer, from 1."""
    window: Window = Window()  # noqa: RUF009
    clusters: int = 1000
    epochs: int = 1
    batch_files: int = 64
    seed: int = 0


@dataclass(slots=True)
class Clusters:
    """Centroids and how many features each has taken so far."""

    centroids: Tensor  # [K, E]
    counts: Tensor  # [K] int64
    batches: int = 0

    def update(self, features: Tensor) -> float:
        """One batch [N, E]: each centroid becomes the mean of all that were ever nearest to it
        when they came. Returns the mean squared distance before the update.
        """
        chosen = nearest(features, self.centroids)
        error = (features - self.centroids[chosen]).square().sum(1).mean()
        new = torch.bincount(chosen, minlength=len(self.counts))
        sums = torch.zeros_like(self.centroids).index_add_(0, chosen, features)
        total = self.counts + new
        means = (self.centroids * self.counts[:, None] + sums) / total.clamp(min=1)[:, None]
        self.centroids = torch.where((new > 0)[:, None], means, self.centroids)
        self.counts = total
        self.batches += 1
        return float(error)


def seeded(features: Tensor, clusters: int, generator: torch.Generator) -> Clusters:
    """Greedy k-means++: each next centroid is the best of a few features, drawn with chances in
    proportion to the squared distance from the nearest centroid so far. [N, E] -> K

    Raises FrameLengthError.
    """
    if len(features) < clusters:
        raise FrameLengthError(f"{len(features)} frames are too few for {clusters} clusters")
    trials = 2 + int(math.log(clusters))
    chosen = [int(torch.randint(len(features), (1,), generator=generator))]
    distance = _squared_distance(features, chosen[0])
    while len(chosen) < clusters:
        if not distance.any():
            raise FrameLengthError(
                f"the recordings have only {len(chosen)} different frames for {clusters} clusters"
            )
        drawn = torch.multinomial(distance, trials, replacement=True, generator=generator)
        left = {
            candidate: distance.minimum(_squared_distance(features, candidate))
            for candidate in drawn.tolist()
        }
        best = min(left, key=lambda candidate: float(left[candidate].sum()))
        chosen.append(best)
        distance = left[best]
    return Clusters(features[chosen].clone(), torch.zeros(clusters, dtype=torch.long))


def _squared_distance(features: Tensor, index: int) -> Tensor:
    return (features - features[index]).square().sum(1)


def batches_of(files: Sequence[Path], recipe: Recipe) -> list[list[Path]]:
    """Every file once an epoch, in an order that the seed fixes."""
    batches = []
    for epoch in range(recipe.epochs):
        order = sorted(files)
        random.Random(f"{recipe.seed} {epoch}").shuffle(order)
        batches += [
            order[at : at + recipe.batch_files] for at in range(0, len(order), recipe.batch_files)
        ]
    return batches


def fit(
    files: Sequence[Path],
    features_of: Callable[[Path], Tensor],
    recipe: Recipe,
    output: Path,
) -> Iterator[tuple[int, int, float]]:
    """Fits, writing `output` after each batch, and yields (batches done, of how many, error).

    Raises ConfigError where `output` holds the state of another recipe, FrameLengthError where
    there is too little speech for so many clusters.
    """
    batches = batches_of(files, recipe)

    def features(batch: list[Path]) -> Tensor:
        return torch.cat([features_of(path) for path in batch])  # [N, E]

    if output.exists():
        clusters = _load(output, recipe)
    else:
        sample, needed = [], SEED_FEATURES_PER_CENTROID * recipe.clusters
        for batch in batches:
            sample.append(features(batch))
            if sum(map(len, sample)) >= needed:
                break
        generator = torch.Generator().manual_seed(recipe.seed)
        clusters = seeded(torch.cat(sample), recipe.clusters, generator)
    while clusters.batches < len(batches):
        error = clusters.update(features(batches[clusters.batches]))
        _save(output, clusters, recipe)
        yield clusters.batches, len(batches), error


def _save(output: Path, clusters: Clusters, recipe: Recipe) -> None:
    part = output.with_name(output.name + ".part")
    notes = {"recipe": json.dumps(asdict(recipe)), "batches": str(clusters.batches)}
    tensors = {"centroids": clusters.centroids.contiguous(), "counts": clusters.counts}
    save_file(tensors, part, metadata=notes)
    os.replace(part, output)


def _load(output: Path, recipe: Recipe) -> Clusters:
    with safe_open(output, "pt") as file:
        notes = file.metadata() or {}
        if json.loads(notes.get("recipe", "{}")) != asdict(recipe):
            raise ConfigError(
                f"{output} was made with {notes.get('recipe')}: choose another file, or that"
            )
        return Clusters(
            file.get_tensor("centroids"), file.get_tensor("counts"), int(notes["batches"])
        )


def read_speech(path: Path) -> Tensor:
    """A 16-bit WAV file as [1, F * 320] at 16 kHz, channels averaged, an incomplete frame cut.

    Raises FrameLengthError.
    """
    try:
        with wave.open(str(path)) as file:
            if file.getsampwidth() != 2:
                raise FrameLengthError(f"{path}: {8 * file.getsampwidth()} bits, 16 are needed")
            pcm = np.frombuffer(file.readframes(file.getnframes()), "<i2")
            samples = pcm.reshape(-1, file.getnchannels()).mean(1, dtype=np.float32) / 32768
            samples = soxr.resample(samples, file.getframerate(), RATE_HZ)
    except (wave.Error, EOFError) as error:
        raise FrameLengthError(f"{path}: {error}") from None
    whole = len(samples) // FRAME_SAMPLES * FRAME_SAMPLES
    if not whole:
        raise FrameLengthError(f"{path} is shorter than a frame")
    return torch.from_numpy(samples[None, :whole])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--input_data", type=Path, required=True, help="folder of WAV files")
    parser.add_argument("--output", type=Path, default=Path("kmeans.safetensors"))
    parser.add_argument("--model", required=True, help="HuBERT, a name or a folder")
    parser.add_argument("--features", type=int, required=True, help="its layer, from 1")
    parser.add_argument("--device", default="cpu", help="where HuBERT runs")
    for field in (*fields(Recipe)[3:], *fields(Window)):
        parser.add_argument(f"--{field.name}", type=int, default=field.default)
    asked = vars(parser.parse_args(arguments))
    folder, output, device = (asked.pop(name) for name in ("input_data", "output", "device"))
    window = Window(**{field.name: asked.pop(field.name) for field in fields(Window)})
    recipe = Recipe(window=window, **asked)
    files = sorted(folder.rglob("*.wav"))
    if not files:
        parser.error(f"no WAV files in {folder}")
    hubert = HubertFeatures.from_pretrained(recipe.model, recipe.features, window, device)

    def features_of(path: Path) -> Tensor:
        return hubert.of_recordings(read_speech(path).to(device))[0].cpu()

    steps = fit(files, features_of, recipe, output)
    with tqdm(unit="batch") as bar:
        for done, of, error in steps:
            bar.total = of
            bar.set_postfix(squared_error=f"{error:.4g}")
            bar.update(done - bar.n)


if __name__ == "__main__":
    main()
