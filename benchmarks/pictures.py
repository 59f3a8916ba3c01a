"""The benchmarks' pictures, one look for all."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from handlers.messages import RATE_HZ, Samples

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from benchmarks.duplex_report import Figures
    from benchmarks.listener import Trace
    from benchmarks.load import Point
    from benchmarks.score import Scores

PERSON, PARLEY, ALERT, INK, FAINT = "#3b6ea8", "#d9822b", "#b8324f", "#2b2b33", "#c9c9d1"
KIND_COLOURS = {
    "plain": "#3b6ea8",
    "phrase": "#4a9c8c",
    "hesitation": "#d9822b",
    "parts": "#8d5fb0",
    "recorded": "#7a7a86",
}
LONGEST_ROW_S = 16.0
"""Seconds of conversation per row of a picture."""
BEFORE_TURN_S = 0.4
"""A row begins so long before a turn's onset."""
CHARACTERS_PER_S = 12.0
"""How much text fits into one of them."""


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
    pyplot.rcParams.update(style)
    size = (width_in, height_in)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
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
            label = "none" if kind == "plain" else kind
            axes.scatter(latencies, share[chosen], s=26, color=colour, label=label, zorder=3)
    spread = document["figures"]["latency_ms"]
    _percentile_lines(axes, spread.p50, spread.p95)
    axes.set_title("Last voiced sample → audible reply")
    axes.set_xlabel("ms at the listener's ear")
    axes.set_ylabel("share of turns")
    axes.set_xlim(0, 1.15 * (spread.max or 1.0))
    axes.set_ylim(0, 1.12)
    axes.legend(loc="lower right", title="pause inside the turn", frameon=True, framealpha=0.9)


def _draw_stops(axes: Axes, document: Mapping[str, Any]) -> None:
    stops = sorted(score.stop_ms for score in document["barge_ins"] if score.tested)
    axes.barh(range(len(stops)), stops, color=PARLEY, height=0.7)
    spread = document["figures"]["barge_in_ms"]
    _percentile_lines(axes, spread.p50, spread.p95, top=len(stops) - 0.3)
    axes.set_title("Barge-in: onset → silence")
    axes.set_xlabel("ms at the listener's ear")
    axes.set_ylabel("barge-ins")
    axes.set_yticks([])
    axes.set_xlim(0, 1.15 * (spread.max or 1.0))
    axes.set_ylim(-0.8, max(1, len(stops)) + 0.4)


def _percentile_lines(axes: Axes, p50: float | None, p95: float | None, top: float = 1.03) -> None:
    for name, value, style, side in (("p50", p50, "--", "right"), ("p95", p95, ":", "left")):
        if value is not None:
            axes.axvline(value, color=INK, linewidth=1.0, linestyle=style, zorder=2)
            axes.text(value, top, f" {name} {value:.0f} ", ha=side, va="bottom", fontsize=9)


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
        text = "1.5 × p95 of the first"
        latency.text(sessions[-1], 1.5 * bar_ms, text, color=ALERT, ha="right", va="bottom")
    latency.set_title("Last voiced → audible reply")
    latency.set_ylabel("ms at the ear")
    line(lag, [p.loop_lag_ms.p50 for p in points], "p50", PERSON)
    line(lag, [p.loop_lag_p99_ms for p in points], "p99", PARLEY)
    lag.axhline(20.0, color=ALERT, linewidth=1, linestyle="--")
    lag.set_title("Event loop lag of the server")
    lag.set_ylabel("ms")
    line(cpu, [p.cpu_cores.server for p in points], "server", PARLEY)
    line(cpu, [p.cpu_cores.others for p in points], "anything else on the machine", ALERT)
    line(cpu, [p.cpu_cores.generator for p in points], "load generator", FAINT)
    cpu.set_title("CPU")
    cpu.set_ylabel("cores")
    line(memory, [p.server_pss_mb for p in points], "server and its children", PARLEY)
    memory.set_title("Memory (PSS)")
    memory.set_ylabel("MB")
    for each in axes.reshape(-1):
        each.set_xlabel("sessions streaming")
        each.set_ylim(bottom=0)
        if each.get_legend_handles_labels()[0]:
            each.legend(loc="upper left")
    save(figure, path)


def draw_duplex(document: Mapping[str, Any], path: Path) -> None:
    """The report of `benchmarks.duplex`: rates, latencies, turn-taking against the data."""
    figure, axes = new_figure(1, 3, 14.0, 4.4)
    _draw_rates(axes[0, 0], document["figures"])
    latencies = [
        o.latency_ms
        for o in document["outcomes"]
        if o.task in ("turn", "question") and o.latency_ms is not None
    ]
    _draw_latencies(axes[0, 1], sorted(latencies))
    _draw_turn_taking(axes[0, 2], document["figures"])
    save(figure, path)


def _draw_rates(axes: Axes, figures: Figures) -> None:
    rows = [
        ("pause: takeover", figures.pause_takeover, 0.10),
        ("turn: takeover", figures.turn_takeover, 0.95),
        ("interrupted: silent in 400 ms", figures.silent_in_time, 0.90),
        ("interrupted: attended to", figures.attended, None),
        ("questions right", figures.questions_right, 0.80),
        ("long turn: takeover", figures.long_takeover, None),
    ]
    for place, (_, share, bar) in enumerate(reversed(rows)):
        if share.rate is not None and share.interval is not None:
            axes.barh(place, share.rate, color=PARLEY, height=0.6)
            axes.plot(share.interval, (place, place), color=INK, linewidth=1.2)
        if bar is not None:
            axes.plot((bar, bar), (place - 0.4, place + 0.4), color=ALERT, linewidth=2)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in reversed(rows)])
    axes.set_xlim(0, 1.02)
    axes.set_title("Share of trials, 95 % interval; red: the bar")


def _draw_latencies(axes: Axes, latencies: Sequence[float]) -> None:
    share = (np.arange(len(latencies)) + 1) / max(1, len(latencies))
    axes.scatter(latencies, share, s=20, color=PERSON, zorder=3)
    axes.axvline(500.0, color=ALERT, linewidth=1, linestyle="--")
    axes.axvline(0.0, color=FAINT, linewidth=1)
    axes.set_title("Last voiced sample → reply")
    axes.set_xlabel("ms at the listener's ear")
    axes.set_ylabel("share of turns")
    axes.set_ylim(0, 1.05)


def _draw_turn_taking(axes: Axes, figures: Figures) -> None:
    names = ("ipu", "pause", "gap", "overlap")
    both = (("data", figures.truth, FAINT), ("live", figures.live, PARLEY))
    for offset, (label, found, colour) in zip((-0.2, 0.2), both, strict=True):
        if found is not None:
            counts = [getattr(found, name).count for name in names]
            axes.bar(np.arange(len(names)) + offset, counts, 0.4, color=colour, label=label)
    axes.set_xticks(range(len(names)), [name.upper() if name == "ipu" else name for name in names])
    axes.set_title("Per minute, in the data's dialogues")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper right")


def draw_conversation(trace: Trace, scores: Scores, path: Path) -> None:
    """Both sides of a recording in rows: the person above, what was heard below."""
    recording = trace.recording()
    stretches = _stretches(trace, recording.shape[1] / RATE_HZ)
    rows, longest_s = len(stretches), max(end_s - begin_s for begin_s, end_s in stretches)
    figure, axes = new_figure(rows, 1, 13.0, 2.6 * rows + 0.7)
    figure.suptitle(
        "A conversation with Parley, as it sounded at the listener's ear",
        x=0.01, ha="left", fontsize=14, fontweight="bold",
    )  # fmt: skip
    for where, (begin_s, end_s) in zip(axes[:, 0], stretches, strict=True):
        shown = Row(where, begin_s, end_s)
        _draw_row(shown, recording)
        _mark_turns(shown, trace, scores)
        _mark_interruptions(shown, trace, scores)
        _mark_replies(shown, trace)
        where.set_xlim(begin_s, begin_s + longest_s)
    axes[0, 0].legend(
        handles=_legend(), loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=4, fontsize=9
    )
    axes[-1, 0].set_xlabel("seconds")
    save(figure, path)


def _stretches(trace: Trace, duration_s: float) -> list[tuple[float, float]]:
    """Where each row begins and ends: shortly before a turn, unless it gets too long so."""
    turns = [said for said in trace.said if said.kind in ("turn", "prompt")]
    breaks = [said.onset / RATE_HZ - BEFORE_TURN_S for said in turns[1:]] + [duration_s]
    stretches, begin_s, end_s = [], 0.0, 0.0
    for next_s in breaks:
        if next_s - begin_s > LONGEST_ROW_S and end_s > begin_s:
            stretches.append((begin_s, end_s))
            begin_s = end_s
        while next_s - begin_s > LONGEST_ROW_S:
            stretches.append((begin_s, begin_s + LONGEST_ROW_S))
            begin_s += LONGEST_ROW_S
        end_s = next_s
    return [*stretches, (begin_s, end_s)]


@dataclass(frozen=True)
class Row:
    """A stretch of the conversation and the axes that show it."""

    axes: Axes
    begin_s: float
    end_s: float

    def shows(self, time_s: float) -> bool:
        return self.begin_s <= time_s < self.end_s


def _draw_row(row: Row, recording: Samples) -> None:
    """Envelopes of [2, T] samples: the lowest and highest sample of every 5 ms."""
    axes, step = row.axes, RATE_HZ // 200
    first, last = int(row.begin_s * RATE_HZ), int(row.end_s * RATE_HZ)
    for channel, middle, colour in zip(recording, (1.0, -1.0), (PERSON, PARLEY), strict=True):
        piece = channel[first:last]
        blocks = piece[: len(piece) // step * step].reshape(-1, step)
        scale = 0.8 / max(0.05, float(np.abs(channel).max()))
        time_s = row.begin_s + (np.arange(len(blocks)) + 0.5) * step / RATE_HZ
        low, high = middle + scale * blocks.min(axis=1), middle + scale * blocks.max(axis=1)
        axes.fill_between(time_s, low, high, color=colour, linewidth=0.4)
    axes.set_ylim(-2.75, 2.75)
    axes.set_yticks([1.0, -1.0], ["person", "Parley"])
    axes.grid(visible=False)
    axes.axhline(0, color=FAINT, linewidth=0.6)


def _mark_turns(row: Row, trace: Trace, scores: Scores) -> None:
    """Speech shaded, its words, the endpoint, and the way to the first audible sample."""
    axes = row.axes
    for said in trace.said:
        onset_s, voiced_s = said.onset / RATE_HZ, said.last_voiced / RATE_HZ
        first_s, last_s = max(onset_s, row.begin_s), min(voiced_s, row.end_s)
        if first_s < last_s:
            axes.axvspan(first_s, last_s, ymin=0.5, color=PERSON, alpha=0.12, linewidth=0)
        if row.shows(onset_s):
            axes.text(onset_s, 2.08, f"“{said.clip.text}”", color=PERSON, fontsize=9)
    turns = [said for said in trace.said if said.kind != "noise"]
    for said, score in zip(turns, scores.turns, strict=True):
        voiced_s = said.last_voiced / RATE_HZ
        if score.latency_ms is None or not row.shows(voiced_s):
            continue
        if "endpoint" in score.stages_ms:
            endpoint_s = voiced_s + score.stages_ms["endpoint"] / 1000.0
            axes.plot([endpoint_s] * 2, [-0.35, 1.9], ":", color=INK, linewidth=1.0)
        audible_s = voiced_s + score.latency_ms / 1000.0
        axes.plot([voiced_s, audible_s], [0, 0], color=INK, linewidth=3.5, zorder=4)
        axes.plot([audible_s] * 2, [-1.9, 0], "-", color=INK, linewidth=1.0)
        text = f"{score.latency_ms:.0f} ms"
        axes.text(audible_s + 0.08, 0.1, text, fontsize=9, fontweight="bold")


def _mark_interruptions(row: Row, trace: Trace, scores: Scores) -> None:
    barge_ins = [said for said in trace.said if said.kind == "barge_in"]
    for said, score in zip(barge_ins, scores.barge_ins, strict=True):
        onset_s = said.onset / RATE_HZ
        if row.shows(onset_s):
            silent_s = onset_s + score.stop_ms / 1000.0
            row.axes.axvspan(onset_s, silent_s, color=ALERT, alpha=0.45, linewidth=0)
            text = f"silent after {score.stop_ms:.0f} ms"
            row.axes.text(silent_s + 0.08, 2.42, text, color=ALERT, fontsize=9, fontweight="bold")


def _mark_replies(row: Row, trace: Trace) -> None:
    """What Parley says, where it begins to sound."""
    texts: dict[str, str] = {}
    for happened in trace.named("response.output_audio_transcript.delta"):
        item_id = str(happened.event["item_id"])
        texts[item_id] = texts.get(item_id, "") + str(happened.event["delta"])
    for item_id, text in texts.items():
        stretches = [h for h in trace.heard if h.item_id == item_id]
        if not stretches or not row.shows(stretches[0].start / RATE_HZ):
            continue
        start_s = stretches[0].start / RATE_HZ
        end_s = min(stretches[-1].end / RATE_HZ, row.end_s)
        width = max(20, int((end_s - start_s) * CHARACTERS_PER_S))
        lines = textwrap.wrap(" ".join(text.split()), width, max_lines=2, placeholder=" …")
        place = "left" if start_s + width / CHARACTERS_PER_S < row.end_s else "right"
        x_s = start_s if place == "left" else row.end_s
        row.axes.text(x_s, -2.0, "\n".join(lines), color=PARLEY, fontsize=9, ha=place, va="top")


def _legend() -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    return [
        Patch(color=PERSON, alpha=0.2, label="person speaks"),
        Line2D([], [], color=INK, linestyle=":", label="end of turn decided"),
        Line2D([], [], color=INK, linewidth=3.5, label="last voiced → first audible"),
        Patch(color=ALERT, alpha=0.45, label="interruption → silence"),
    ]
