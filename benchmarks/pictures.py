"""The benchmarks' pictures, one look for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from benchmarks.load import Point

PERSON, PARLEY, ALERT, INK, FAINT = "#3b6ea8", "#d9822b", "#b8324f", "#2b2b33", "#c9c9d1"
KIND_COLOURS = {
    "plain": "#3b6ea8",
    "phrase": "#4a9c8c",
    "hesitation": "#d9822b",
    "parts": "#8d5fb0",
    "recorded": "#7a7a86",
}
ROW_S = 20.0
"""Seconds of conversation per row of a picture."""


def new_figure(rows: int, columns: int, width_in: float, height_in: float) -> tuple[Figure, Any]:
    """A figure and its axes as an array [rows, columns]."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: dict[Any, Any] = {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": FAINT,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.grid": True,
        "grid.color": "#ececf1",
        "axes.axisbelow": True,
        "legend.frameon": False,
        "savefig.facecolor": "white",
    }
    with pyplot.rc_context(style):
        size = (width_in, height_in)
        figure, axes = pyplot.subplots(
            rows, columns, figsize=size, squeeze=False, layout="constrained"
        )
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw_latency(document: Mapping[str, Any], path: Path) -> None:
    """The report of `benchmarks.latency`: every turn, and every barge-in."""
    figure, axes = new_figure(1, 2, 11.0, 4.2)
    _draw_turns(axes[0, 0], document)
    _draw_stops(axes[0, 1], document)
    save(figure, path)


def _draw_turns(axes: Axes, document: Mapping[str, Any]) -> None:
    turns = [t for t in document["turns"] if t.after == "turn" and t.latency_ms is not None]
    turns.sort(key=lambda score: score.latency_ms)
    share = (np.arange(len(turns)) + 1) / max(1, len(turns))
    for kind, colour in KIND_COLOURS.items():
        chosen = [i for i, score in enumerate(turns) if score.kind == kind]
        if chosen:
            latencies = [turns[i].latency_ms for i in chosen]
            axes.scatter(latencies, share[chosen], s=26, color=colour, label=kind, zorder=3)
    spread = document["figures"]["latency_ms"]
    _percentile_lines(axes, spread.p50, spread.p95)
    axes.set_title("Last voiced sample → audible reply")
    axes.set_xlabel("ms at the listener's ear")
    axes.set_ylabel("share of turns")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.12)
    axes.legend(loc="lower right", title="pause inside the turn")


def _draw_stops(axes: Axes, document: Mapping[str, Any]) -> None:
    stops = sorted(score.stop_ms for score in document["barge_ins"] if score.tested)
    axes.barh(range(len(stops)), stops, color=PARLEY, height=0.7)
    spread = document["figures"]["barge_in_ms"]
    _percentile_lines(axes, spread.p50, spread.p95, top=len(stops) - 0.3)
    axes.set_title("Barge-in: onset → silence")
    axes.set_xlabel("ms at the listener's ear")
    axes.set_ylabel("barge-ins")
    axes.set_yticks([])
    axes.set_xlim(left=0)
    axes.set_ylim(-0.8, max(1, len(stops)) + 0.4)


def _percentile_lines(axes: Axes, p50: float | None, p95: float | None, top: float = 1.03) -> None:
    for name, value, style in (("p50", p50, "--"), ("p95", p95, ":")):
        if value is not None:
            axes.axvline(value, color=INK, linewidth=1.0, linestyle=style, zorder=2)
            axes.text(value, top, f" {name} {value:.0f}", ha="left", va="bottom", fontsize=9)


def draw_load(points: Sequence[Point], path: Path) -> None:
    """The report of `benchmarks.load`: latency, loop lag, CPU and memory against sessions."""
    figure, axes = new_figure(2, 2, 11.0, 7.0)
    sessions = [point.sessions for point in points]

    def line(where: Axes, values: Sequence[float | None], label: str, colour: str) -> None:
        known = [(n, v) for n, v in zip(sessions, values, strict=True) if v is not None]
        where.plot(*zip(*known, strict=True), "o-", color=colour, label=label) if known else None

    latency, lag, cpu, memory = axes.reshape(-1)
    line(latency, [p.latency_ms.p50 for p in points], "p50", PERSON)
    line(latency, [p.latency_ms.p95 for p in points], "p95", PARLEY)
    bar_ms = points[0].latency_ms.p95
    if bar_ms is not None:
        latency.axhline(1.5 * bar_ms, color=ALERT, linewidth=1, linestyle="--")
        latency.text(sessions[0], 1.5 * bar_ms, "1.5 × p95 of the first", color=ALERT, va="bottom")
    latency.set_title("Last voiced → audible reply")
    latency.set_ylabel("ms at the ear")
    line(lag, [p.loop_lag_ms.p50 for p in points], "p50", PERSON)
    line(lag, [p.loop_lag_p99_ms for p in points], "p99", PARLEY)
    lag.axhline(20.0, color=ALERT, linewidth=1, linestyle="--")
    lag.set_title("Event loop lag of the server")
    lag.set_ylabel("ms")
    line(cpu, [p.server_cpu_cores for p in points], "server", PARLEY)
    line(cpu, [p.generator_cpu_cores for p in points], "load generator", FAINT)
    cpu.set_title("CPU")
    cpu.set_ylabel("cores")
    line(memory, [p.server_pss_mb for p in points], "server and its children", PARLEY)
    memory.set_title("Memory (PSS)")
    memory.set_ylabel("MB")
    for each in axes.reshape(-1):
        each.set_xlabel("sessions streaming")
        each.set_ylim(bottom=0)
        each.legend(loc="upper left")
    save(figure, path)
