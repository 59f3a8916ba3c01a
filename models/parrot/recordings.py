"""Recordings on disk: finding them, reading them, and saying what is wrong with them.

A conversation is one file of two channels (Fisher's layout, what `listen_and_play --record`
writes: left the person, right Parley), or two files of one channel whose names differ in the last
part alone: `x_a.wav` and `x_b.wav`, `x.A.wav` and `x.B.wav`, `x-0.wav` and `x-1.wav`, and so on.

C channels, N samples.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from models.common.errors import ModelError

Samples = NDArray[np.float32]

SUFFIXES = frozenset({".wav", ".flac", ".sph", ".ogg", ".opus", ".mp3"})
PARTNERS = (("a", "b"), ("0", "1"), ("1", "2"), ("left", "right"), ("l", "r"), ("user", "agent"))
TAGGED = re.compile(r"(.+[._-])([A-Za-z0-9]+)")

SILENT_DBFS = -60.0
"""A channel whose loudest 20 ms are below this says nothing."""
CLIPPED_AT = 0.999
CLIPPED_RUN_SAMPLES = 3
"""So many neighbours at full scale: a peak that merely touches it is no clipping."""
UNEQUAL_TOLERANCE_S = 0.1
"""Two recorders that were stopped together differ by less."""
NARROW_HZ = 8000
BLEED_LAG_S = 0.5
BLEED_BLOCK = 2**17
BLEED_CORRELATION = 0.05
"""Below this, what two channels have in common is chance."""
DOMINATES_DB = 10.0


class RecordingError(ModelError):
    """A recording that can't be used. Its subclasses say why."""


class UnreadableError(RecordingError):
    """No audio file, or of a kind that can't be read."""


class ChannelsError(RecordingError):
    """One channel where two are needed, or the other way round, or more than two."""


class UnequalLengthError(RecordingError):
    """The two files of a conversation differ in length."""


class SilentChannelError(RecordingError):
    """Nobody speaks in a channel."""


class ClippedError(RecordingError):
    """Too much of it is cut off at full scale."""


class BleedError(RecordingError):
    """One channel is heard in the other."""


@dataclass(frozen=True, slots=True)
class Recording:
    name: str
    """The path of the (first) file below the folder."""
    files: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Limits:
    """What is still accepted."""

    pad: bool = False
    """The shorter one of two files is filled up with silence, however much it lacks."""
    allow_silent: bool = False
    max_clipped_share: float = 0.001
    max_bleed_db: float | None = None
    """None: bleed is measured and not refused."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A recording's facts, for the report."""

    seconds: float
    rate_hz: int
    narrow_band: bool
    clipped_share: list[float]
    """Of each channel."""
    bleed_db: list[float | None]
    """Of the first into the second, and back: its level against the original; None: not found."""


def find(folder: Path, channels: int) -> list[Recording]:
    """All below the folder, in order of names. Raises `UnreadableError` where there is none."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise UnreadableError(f"{folder}: no {', '.join(sorted(SUFFIXES))} files below it")
    pairs = dict(_pairs(files)) if channels == 2 else {}
    seconds = set(pairs.values())
    return [
        Recording(
            path.relative_to(folder).as_posix(), (path, pairs[path]) if path in pairs else (path,)
        )
        for path in files
        if path not in seconds
    ]


def _pairs(files: list[Path]) -> Iterator[tuple[Path, Path]]:
    """The files of one channel whose names make them partners."""
    tagged: dict[tuple[Path, str, str], dict[str, Path]] = {}
    for path in files:
        match = TAGGED.fullmatch(path.stem)
        if match and any(match[2].lower() in pair for pair in PARTNERS) and _channels(path) == 1:
            same = tagged.setdefault((path.parent, match[1], path.suffix), {})
            same[match[2].lower()] = path
    for named in tagged.values():
        for first, second in PARTNERS:
            if first in named and second in named:
                yield named.pop(first), named.pop(second)


def _channels(path: Path) -> int:
    """0 where it can't be read; reading it says why."""
    try:
        return int(soundfile.info(path).channels)
    except soundfile.LibsndfileError:
        return 0


def read(
    recording: Recording, channels: int, rate_hz: int, limits: Limits
) -> tuple[Samples, Finding]:
    """[C, N] at `rate_hz`, nothing trimmed, and what was found. Raises `RecordingError`s."""
    parts = [_read_file(path) for path in recording.files]
    name, rate = recording.name, parts[0][1]
    if len(parts) == 2:
        samples = _joined(name, parts, limits.pad)
    else:
        samples = parts[0][0]
    if len(samples) != channels:
        hint = "pairs need two channels, or a partner file such as x_a and x_b"
        if channels == 1:
            hint = "single-channel data need one"
        raise ChannelsError(f"{name}: {len(samples)} channel(s); {hint}")
    if not samples.size:
        raise UnreadableError(f"{name}: no samples")
    clipped = [clipped_share(channel) for channel in samples]
    if max(clipped) > limits.max_clipped_share:
        raise ClippedError(f"{name}: {max(clipped):.2%} of a channel is clipped")
    for number, channel in enumerate(samples):
        if not limits.allow_silent and loudest_dbfs(channel, rate) < SILENT_DBFS:
            raise SilentChannelError(f"{name}: channel {number} is silent")
    bleeds: list[float | None] = []
    if channels == 2:
        first, second = samples
        bleeds = [bleed_db(first, second, rate), bleed_db(second, first, rate)]
        worst = max((b for b in bleeds if b is not None), default=None)
        if limits.max_bleed_db is not None and worst is not None and worst > limits.max_bleed_db:
            raise BleedError(f"{name}: one channel is heard in the other at {worst:.0f} dB")
    finding = Finding(samples.shape[1] / rate, rate, rate <= NARROW_HZ, clipped, bleeds)
    if rate != rate_hz:
        samples = np.stack([soxr.resample(channel, rate, rate_hz) for channel in samples])
    return samples, finding


def _read_file(path: Path) -> tuple[Samples, int]:
    """[C, N] and its rate."""
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        if path.is_file() and b"shorten" in path.read_bytes()[:1024]:
            raise UnreadableError(f"{path}: SPHERE with Shorten: unpack by sph2pipe") from None
        raise UnreadableError(f"{path}: {error.error_string}") from None
    if not np.isfinite(samples).all():
        raise UnreadableError(f"{path}: samples that are no numbers")
    return np.ascontiguousarray(samples.T), int(rate)


def _joined(name: str, parts: list[tuple[Samples, int]], pad: bool) -> Samples:
    """Two files [1, N] -> [2, N]."""
    (first, rate), (second, other_rate) = parts
    if rate != other_rate:
        raise UnequalLengthError(f"{name}: its two files have {rate} and {other_rate} Hz")
    lengths = (first.shape[1], second.shape[1])
    apart_s = abs(lengths[0] - lengths[1]) / rate
    if apart_s > UNEQUAL_TOLERANCE_S and not pad:
        raise UnequalLengthError(
            f"{name}: its two files last {lengths[0] / rate:.2f} and {lengths[1] / rate:.2f} s"
        )
    joined = np.zeros((2, max(lengths)), np.float32)
    joined[0, : lengths[0]], joined[1, : lengths[1]] = first[0], second[0]
    return joined


def clipped_share(channel: Samples) -> float:
    """[N] -> how much of it lies in runs at full scale."""
    full = np.concatenate(([False], np.abs(channel) >= CLIPPED_AT, [False]))
    edges = np.flatnonzero(np.diff(full)).reshape(-1, 2)
    runs = edges[:, 1] - edges[:, 0]
    return float(runs[runs >= CLIPPED_RUN_SAMPLES].sum() / max(1, len(channel)))


def loudest_dbfs(channel: Samples, rate_hz: int) -> float:
    """[N] -> the level of its loudest 20 ms."""
    return float(_levels_db(channel, rate_hz // 50).max(initial=-120.0))


def bleed_db(source: Samples, into: Samples, rate_hz: int) -> float | None:
    """How loud `source` [N] is heard in `into` [N], against itself, up to 0.5 s later.

    Looked for where `source` is much louder than `into`, as a copy of one delay: of an echo with
    many, the strongest. None where there is no such stretch or nothing in common.
    """
    step = rate_hz // 50
    louder = _levels_db(source, step) > _levels_db(into, step) + DOMINATES_DB
    louder &= _levels_db(source, step) > SILENT_DBFS
    mask = np.repeat(louder, step)
    heard = np.where(mask, into[: len(mask)], 0)
    cross = np.zeros(int(BLEED_LAG_S * rate_hz))  # by the lag
    for begin in range(0, len(mask), BLEED_BLOCK):
        block = slice(begin, begin + BLEED_BLOCK)
        size = 2 * BLEED_BLOCK
        spectrum = np.conj(np.fft.rfft(source[block], size)) * np.fft.rfft(heard[block], size)
        cross += np.fft.irfft(spectrum, size)[: len(cross)]
    lag = int(np.abs(cross).argmax())
    late = np.concatenate((np.zeros(lag, np.float32), source))[: len(mask)][mask]
    shared = abs(float(late @ heard[mask]))
    energy = float(np.square(late).sum())
    if shared <= BLEED_CORRELATION * np.sqrt(energy * float(np.square(heard).sum())):
        return None
    return float(20 * np.log10(shared / energy))


def _levels_db(channel: Samples, step: int) -> NDArray[np.float64]:
    """The level of each whole `step` samples. [N] -> [N // step]"""
    frames = channel[: len(channel) // step * step].reshape(-1, step).astype(np.float64)
    levels: NDArray[np.float64] = 10 * np.log10(np.square(frames).mean(axis=1) + 1e-12)
    return levels
