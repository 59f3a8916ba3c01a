"""What every benchmark prints and writes: what ran, how spread, tables, JSON."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from client.wav import WavWriter
from handlers.messages import Samples

PACKAGES = (
    "numpy",
    "onnxruntime",
    "pocketsphinx",
    "moonshine-voice",
    "espeakng-loader",
    "uvicorn",
    "websockets",
)
Cell: TypeAlias = str | float | int | None


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentiles by linear interpolation; all NaN-free, `None` when nothing was measured."""

    count: int
    p50: float | None
    p95: float | None
    max: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if not values:
            return cls(0, None, None, None)
        p50, p95 = np.percentile(values, (50, 95))
        return cls(len(values), float(p50), float(p95), float(max(values)))

    def row(self, name: str) -> list[Cell]:
        return [name, self.count, self.p50, self.p95, self.max]


SPREAD_HEADERS = ("", "n", "p50", "p95", "max")


def environment(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Commit, versions, machine and the settings of this run."""
    root = Path(__file__).resolve().parent.parent
    return {
        "commit": _commit(root),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.release()}",
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "settings": {name: value for name, value in settings.items() if name != "api_key"},
    }


def environment_lines(facts: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    settings = " ".join(
        f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in facts["settings"].items()
        if value is not None and value is not False and value != []
    )
    return (
        f"commit {facts['commit']} · Python {facts['python']} · {versions}\n"
        f"{facts['cpu']}, {facts['cores']} cores · {facts['system']}\n"
        f"{settings}"
    ).rstrip()


def table(headers: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Aligned text; numbers to the right, `None` as a dash."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        first = row[0].ljust(widths[0])
        rest = (text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))
        return "  ".join((first, *rest)).rstrip()

    return "\n".join([line(headers), line(["─" * width for width in widths]), *map(line, cells)])


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2, default=_plain) + "\n", encoding="utf-8")


LATE_MS = 100.0
BUSY_CORES = 0.1


def doubts(lateness_max_ms: float | None, other_cores: float | None) -> list[str]:
    """Reasons not to trust a measurement: this program was held up, or was not alone."""
    found = []
    if lateness_max_ms is not None and lateness_max_ms > LATE_MS:
        found.append(f"Beware: this program was late by up to {lateness_max_ms:.0f} ms.")
    if other_cores is not None and other_cores > BUSY_CORES:
        found.append(f"Beware: other processes used {other_cores:.2f} cores meanwhile.")
    return found


def two_places(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}"


def write_recording(path: Path, recording: Samples) -> None:
    """Two channels [2, T] as 16-bit WAV: left the person, right what was heard."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with WavWriter(path, channels=2) as file:
        file.write(recording.T)


def _plain(value: Any) -> Any:
    """What `json` cannot write by itself: slotted dataclasses, paths, numpy scalars."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    return asdict(value)


def _cell(value: Cell) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}"
    return str(value)


def _commit(root: Path) -> str:
    try:
        head = _git(root, "rev-parse", "--short", "HEAD")
        changed = " with uncommitted changes" if _git(root, "status", "--porcelain") else ""
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + changed


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
