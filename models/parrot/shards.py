"""Token shards: recordings as codes on disk, in files of bounded size with checksums.

A folder holds `manifest.json` and `shard-00000.safetensors` ...; each shard `codes` [sum T, C, D]
(int16, or int32 where the codebook is too large) of its recordings one behind the other, and
`lengths` [recordings]. The names of a shard's recordings are in its header, so that a run that
was broken off knows what it has done. Where it is known what is said, `labels` [sum T, C] tell it.

T frames, C channels (1, or 2: person and agent), D codebooks.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.common.errors import ModelError, VocabularyError

if TYPE_CHECKING:
    from models.common.tokens import SpeechTokenizer

MANIFEST = "manifest.json"
SHARD_FRAMES = 2_000_000
"""A shard is closed behind the recording that reaches this: 22 h at 25 Hz, 8 MB of pairs."""


class ShardError(ModelError):
    """A folder that holds no shards, or shards that aren't what their manifest says."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What shards are made of, and what a model needs to know of them."""

    tokenizer: str
    codebook_size: int
    num_codebooks: int
    frame_rate_hz: float
    channels: int
    labels: int = 0
    """How many there are to say what a frame belongs to; 0: frames have none."""

    @classmethod
    def of(cls, tokenizer: SpeechTokenizer, channels: int, labels: int = 0) -> Self:
        return cls(
            tokenizer.name,
            tokenizer.codebook_size,
            tokenizer.num_codebooks,
            tokenizer.frame_rate_hz,
            channels,
            labels,
        )


@dataclass(frozen=True, slots=True)
class ShardFile:
    name: str
    sha256: str
    frames: int
    recordings: int


class ShardWriter:
    """Appends recordings to a folder; goes on where an earlier writer of the folder stopped.

    A shard counts once its file and the manifest that names it are whole on disk; what was
    appended since then and not closed is lost with the process. Raises `VocabularyError` where
    the folder holds shards of another vocabulary.
    """

    def __init__(
        self, folder: Path, vocabulary: Vocabulary, shard_frames: int = SHARD_FRAMES
    ) -> None:
        self._folder, self._vocabulary, self._shard_frames = folder, vocabulary, shard_frames
        folder.mkdir(parents=True, exist_ok=True)
        self._files: list[ShardFile] = []
        self._codes: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._sources: list[str] = []
        if (folder / MANIFEST).exists():
            found, self._files = read_manifest(folder)
            _same_vocabulary(folder, found, vocabulary)
        self.sources = {name for file in self._files for name in _sources(folder / file.name)}
        """The recordings in the folder, by the names they were appended with."""

    def append(self, codes: Tensor, source: str = "", labels: Tensor | None = None) -> None:
        """One recording, [T, C, D], and its labels [T, C] (below 0: not known) where the
        vocabulary has some. Raises `VocabularyError`."""
        wanted = (self._vocabulary.channels, self._vocabulary.num_codebooks)
        if codes.ndim != 3 or codes.shape[1:] != wanted:
            raise VocabularyError(
                f"{source or 'a recording'}: codes {tuple(codes.shape)}, not [T, {wanted[0]}, "
                f"{wanted[1]}]"
            )
        if not len(codes):
            raise VocabularyError(f"{source or 'a recording'}: no frames")
        if not 0 <= int(codes.min()) <= int(codes.max()) < self._vocabulary.codebook_size:
            raise VocabularyError(
                f"{source or 'a recording'}: codes from {int(codes.min())} to "
                f"{int(codes.max())}; the codebook has {self._vocabulary.codebook_size}"
            )
        if self._vocabulary.labels:
            if labels is None or labels.shape != codes.shape[:2]:
                raise VocabularyError(f"{source or 'a recording'}: every frame needs a label")
            if int(labels.max()) >= self._vocabulary.labels:
                raise VocabularyError(
                    f"{source or 'a recording'}: label {int(labels.max())}; there are "
                    f"{self._vocabulary.labels}"
                )
            self._labels.append(labels.to("cpu", torch.int16))
        small = self._vocabulary.codebook_size <= torch.iinfo(torch.int16).max
        self._codes.append(codes.to("cpu", torch.int16 if small else torch.int32))
        self._sources.append(source)
        if sum(map(len, self._codes)) >= self._shard_frames:
            self.flush()

    def flush(self) -> None:
        """Closes the shard: everything appended so far is on disk afterwards."""
        if not self._codes:
            return
        name = f"shard-{len(self._files):05}.safetensors"
        codes = torch.cat(self._codes)
        lengths = torch.tensor([len(c) for c in self._codes])
        part = self._folder / f"{name}.part"
        tensors = {"codes": codes, "lengths": lengths}
        if self._labels:
            tensors["labels"] = torch.cat(self._labels)
        save_file(tensors, part, {"sources": json.dumps(self._sources)})
        digest = _sha256(part)
        os.replace(part, self._folder / name)
        self._files.append(ShardFile(name, digest, len(codes), len(lengths)))
        self._write_manifest()
        self.sources.update(self._sources)
        self._codes, self._labels, self._sources = [], [], []

    def _write_manifest(self) -> None:
        content = asdict(self._vocabulary) | {"files": [asdict(file) for file in self._files]}
        part = self._folder / f"{MANIFEST}.part"
        part.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(part, self._folder / MANIFEST)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.flush()


class Shards:
    """The recordings of several folders, mapped from disk; `refresh` takes in new ones.

    Raises `ShardError` where a folder or a file isn't what its manifest says, `VocabularyError`
    where the folders' vocabularies differ.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        if not folders:
            raise ShardError("no folders of shards")
        self._folders = list(folders)
        self._codes: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._seen: set[Path] = set()
        self.names: list[str] = []
        """Of each recording: its folder, shard and number there; the same in every run."""
        self.vocabulary = read_manifest(self._folders[0])[0]
        self.refresh()
        if not self._codes:
            raise ShardError(f"{self._folders[0]}: no recordings")

    def refresh(self) -> None:
        """Adds the shards that have come to the folders; those known keep their numbers."""
        for folder in self._folders:
            vocabulary, files = read_manifest(folder)
            _same_vocabulary(folder, vocabulary, self.vocabulary)
            for file in files:
                if folder / file.name not in self._seen:
                    codes, labels = _read_shard(folder / file.name, file, vocabulary)
                    self._codes.extend(codes)
                    self._labels.extend(labels)
                    stem = f"{folder.name}/{file.name}"
                    self.names.extend(f"{stem}:{n}" for n in range(file.recordings))
                    self._seen.add(folder / file.name)

    def __len__(self) -> int:
        return len(self._codes)

    def __getitem__(self, index: int) -> Tensor:
        """A recording's codes [T, C, D], int16 or int32, not to be written to."""
        return self._codes[index]

    def labels(self, index: int) -> Tensor | None:
        """A recording's labels [T, C], int16, not to be written to."""
        return self._labels[index] if self._labels else None

    @property
    def lengths(self) -> list[int]:
        """In frames."""
        return [len(codes) for codes in self._codes]


def read_manifest(folder: Path) -> tuple[Vocabulary, list[ShardFile]]:
    """Raises `ShardError` where there is none or it is broken."""
    try:
        content = json.loads((folder / MANIFEST).read_text())
        files = [ShardFile(**file) for file in content.pop("files")]
        return Vocabulary(**content), files
    except OSError as error:
        raise ShardError(f"{folder / MANIFEST}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ShardError(f"{folder / MANIFEST} is no manifest of shards: {error}") from error


def verify(folder: Path) -> None:
    """Compares the checksums. Raises `ShardError` naming the first file that differs."""
    for file in read_manifest(folder)[1]:
        path = folder / file.name
        if not path.exists() or _sha256(path) != file.sha256:
            raise ShardError(f"{path}: missing, or changed since it was written")


def _read_shard(
    path: Path, file: ShardFile, vocabulary: Vocabulary
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Codes and labels, one tensor per recording, views of the mapped file."""
    labels: Tensor | None = None
    try:
        with safe_open(path, framework="pt") as shard:
            codes, lengths = shard.get_tensor("codes"), shard.get_tensor("lengths")
            if vocabulary.labels:
                labels = shard.get_tensor("labels")
    except (OSError, SafetensorError) as error:
        raise ShardError(f"{path}: {error}") from error
    if len(codes) != file.frames or len(lengths) != file.recordings:
        raise ShardError(f"{path}: not the size that the manifest says")
    counts: list[int] = lengths.tolist()
    return codes.split(counts), () if labels is None else labels.split(counts)


def _sources(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as shard:
            names: list[str] = json.loads((shard.metadata() or {}).get("sources", "[]"))
            return names
    except (OSError, SafetensorError) as error:
        raise ShardError(f"{path}: {error}") from error


def _same_vocabulary(folder: Path, found: Vocabulary, wanted: Vocabulary) -> None:
    if found != wanted:
        differing = ", ".join(
            f"{name} {value}, not {getattr(wanted, name)}"
            for name, value in asdict(found).items()
            if value != getattr(wanted, name)
        )
        raise VocabularyError(f"{folder}: its shards have {differing}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
