"""Outcomes of the duplex trials as figures, against the bars and beside what was published."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

from benchmarks.duplex_judge import Understood
from benchmarks.duplex_score import Outcome
from benchmarks.report import SPREAD_HEADERS, Cell, Spread, table, two_places
from models.parrot.statistics import TurnTaking, mean_difference, mean_of

SILENT_WITHIN_MS = 400.0
NORMAL_95 = 1.96

PUBLISHED_V1 = (
    ("pause: takeover rate, real calls", "0.934", "0.985", "0.642", "0.255"),
    ("backchannel: takeover rate", "0.935", "0.980", "0.481", "0.310"),
    ("smooth turn-taking: latency (s)", "0.352", "0.265", "0.953", "1.301"),
    ("interruption: takeover rate", "0.917", "1.000", "0.867", "0.891"),
    ("interruption: latency (s)", "2.531", "0.257", "1.409", "1.183"),
)
"""Lin et al. 2025, Full-Duplex-Bench, arXiv 2503.04721."""
PUBLISHED_V1_HEADERS = ("", "dGSLM", "Moshi", "Freeze-Omni", "Gemini Live")
PUBLISHED_NTPP = (
    ("NTPP (t=0.9)", "1.3", "3.3", "2.3", "2.8", "1.5", "1.4", "0.9", "1.9"),
    ("dGSLM", "1.6", "4.6", "3.4", "3.6", "2.0", "1.8", "2.9", "1.9"),
    ("LSLM", "2.2", "4.1", "3.6", "3.4", "2.4", "1.5", "3.2", "2.3"),
    ("cascaded", "4.1", "4.3", "7.0", "5.5", "7.4", "0.9", "6.5", "3.6"),
)
"""Mean |Δ| per minute against telephone calls, as the NTPP paper reports it."""
NOTE = (
    "All speech here is synthetic (eSpeak NG), in a domain of its own: published figures, from "
    "other data, stand beside for orientation only."
)


@dataclass(frozen=True, slots=True)
class Share:
    """Of trials, with its 95 % interval (Wilson)."""

    hits: int
    of: int

    @property
    def rate(self) -> float | None:
        return self.hits / self.of if self.of else None

    @property
    def interval(self) -> tuple[float, float] | None:
        if not self.of:
            return None
        rate, z2 = self.hits / self.of, NORMAL_95**2
        middle = (rate + z2 / (2 * self.of)) / (1 + z2 / self.of)
        spread = math.sqrt(rate * (1 - rate) / self.of + z2 / (4 * self.of**2))
        half = NORMAL_95 * spread / (1 + z2 / self.of)
        return max(0.0, middle - half), min(1.0, middle + half)

    def described(self) -> dict[str, object]:
        return asdict(self) | {"rate": self.rate, "interval": self.interval}

    def __str__(self) -> str:
        if self.rate is None or self.interval is None:
            return "–"
        low, high = self.interval
        return f"{self.rate:.0%} ({self.hits}/{self.of}; {low:.0%}–{high:.0%})"


@dataclass(frozen=True, slots=True)
class Figures:
    pause_takeover: Share
    pause_takeover_v1: Share
    pause_sounds: Share
    pause_by_kind: dict[str, Share]
    pause_answered: Share
    turn_takeover: Share
    latency_ms: Spread
    negative_latencies: int
    words_right: float | None  # share of all words of the answers
    words_right_original: float | None  # the judge's, of the agent's original voice
    words: int
    questions_right: Share
    questions_right_original: Share | None  # of the same answers in the agent's original voice
    silent_in_time: Share
    stop_ms: Spread
    resumed: Share
    attended: Share
    interruptions_untested: int
    long_takeover: Share
    long_takeover_v1: Share
    backchannels_per_turn: float | None
    backchannels_per_turn_truth: float | None
    backchannel_hz: float | None
    timing_divergence: float | None
    false_replies_per_minute: float | None
    noise_minutes: float
    difference: TurnTaking | None
    live: TurnTaking | None
    truth: TurnTaking | None
    recorded_takeover: Share
    recorded_cut_in: Share
    recorded_latency_ms: Spread
    recorded_words_right: float | None
    unsettled: int
    not_held: int

    @property
    def understood_share(self) -> float | None:
        """Of what is understood of the original voice."""
        if self.words_right is None or not self.words_right_original:
            return None
        return self.words_right / self.words_right_original


def figures(
    outcomes: Sequence[Outcome],
    originals: Sequence[Understood],
    expected_backchannels: int,
    not_held: int,
    questions_right_original: Share | None = None,
) -> Figures:
    """`originals`: the answers of turns and questions in the original voice."""

    def of(*tasks: str) -> list[Outcome]:
        return [outcome for outcome in outcomes if outcome.task in tasks]

    pauses, turns, long, noises = (
        of("pause"),
        of("turn", "question"),
        of("backchannel"),
        of("noise"),
    )
    over = of("interruption")
    tested = [o for o in over if o.stop_ms is not None]
    dialogues = [o for o in outcomes if o.live is not None and o.truth is not None]
    live = [o.live for o in dialogues if o.live is not None]
    truth = [o.truth for o in dialogues if o.truth is not None]
    recorded = of("recorded")
    latencies = [o.latency_ms for o in turns if o.latency_ms is not None]
    heard = [o.understood for o in turns if o.understood is not None]
    counts = [o.backchannels for o in long if o.backchannels is not None]
    long_s = sum(o.seconds for o in long)
    timings = [o.divergence for o in long if o.divergence is not None]
    minutes = sum(o.seconds for o in noises) / 60
    false_replies = sum(o.false_replies or 0 for o in noises)
    return Figures(
        pause_takeover=_share(pauses, _took_over),
        pause_takeover_v1=_share(pauses, lambda o: bool(o.takeover_v1) or not o.settled),
        pause_sounds=_share(pauses, lambda o: o.sounds_before_end > 0),
        pause_by_kind={
            kind: _share([o for o in pauses if o.kind == kind], _took_over)
            for kind in sorted({o.kind for o in pauses})
        },
        pause_answered=_share(pauses, _answered),
        turn_takeover=_share(turns, _answered),
        latency_ms=Spread.of(latencies),
        negative_latencies=sum(latency < 0 for latency in latencies),
        words_right=_right(heard),
        words_right_original=_right(originals),
        words=sum(u.words for u in heard),
        questions_right=_share(of("question"), lambda o: bool(o.right)),
        questions_right_original=questions_right_original,
        silent_in_time=_share(tested, lambda o: (o.stop_ms or 0.0) <= SILENT_WITHIN_MS),
        stop_ms=Spread.of([o.stop_ms for o in tested if o.stop_ms is not None]),
        resumed=_share(tested, lambda o: bool(o.resumed)),
        attended=_share([o for o in tested if o.right is not None], lambda o: bool(o.right)),
        interruptions_untested=len(over) - len(tested),
        long_takeover=_share(long, _took_over),
        long_takeover_v1=_share(long, lambda o: bool(o.takeover_v1) or not o.settled),
        backchannels_per_turn=_mean(counts),
        backchannels_per_turn_truth=expected_backchannels / len(long) if timings else None,
        backchannel_hz=sum(counts) / long_s if long_s else None,
        timing_divergence=_mean(timings),
        false_replies_per_minute=false_replies / minutes if minutes else None,
        noise_minutes=minutes,
        difference=mean_difference(live, truth) if live else None,
        live=mean_of(live) if live else None,
        truth=mean_of(truth) if truth else None,
        recorded_takeover=_share(recorded, _answered),
        recorded_cut_in=_share(recorded, _took_over),
        recorded_latency_ms=Spread.of([o.latency_ms for o in recorded if o.latency_ms is not None]),
        recorded_words_right=_right([o.understood for o in recorded if o.understood is not None]),
        unsettled=sum(not o.settled for o in outcomes),
        not_held=not_held,
    )


def _answered(outcome: Outcome) -> bool:
    return bool(outcome.answered) and outcome.settled


def _took_over(outcome: Outcome) -> bool:
    return bool(outcome.takeover) or not outcome.settled


def _share(outcomes: Sequence[Outcome], hit: Callable[[Outcome], bool]) -> Share:
    return Share(sum(map(hit, outcomes)), len(outcomes))


def _right(found: Sequence[Understood]) -> float | None:
    words = sum(u.words for u in found)
    return sum(u.right for u in found) / words if words else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def bars(f: Figures, partner: str) -> list[dict[str, Any]]:
    """What was asked of the shipped model, what was found; `holds` is None where nothing was."""

    def bar(name: str, value: float | None, shown: str, limit: float, at_most: bool) -> None:
        holds = None if value is None else (value <= limit if at_most else value >= limit)
        sign = "≤" if at_most else "≥"
        unit = f"{limit:.0f} ms" if limit > 1 else f"{limit:.0%}"
        rows.append({"bar": name, "found": shown, "limit": f"{sign} {unit}", "holds": holds})

    rows: list[dict[str, Any]] = []
    pause, turn, silent = f.pause_takeover, f.turn_takeover, f.silent_in_time
    bar("takeover in a pause of 300–700 ms inside a turn", pause.rate, str(pause), 0.10, True)
    bar("takeover after a finished turn", turn.rate, str(turn), 0.95, False)
    p50 = f.latency_ms.p50
    shown = "–" if p50 is None else f"{p50:.0f} ms ({f.negative_latencies} negative)"
    bar("median from the end of speech to an audible reply", p50, shown, 500.0, True)
    bar("spoken over: silent within 400 ms", silent.rate, str(silent), 0.90, False)
    share = f.understood_share
    shown = "–"
    if share is not None:
        shown = f"{share:.0%} ({f.words_right:.0%} of {f.words} words, original "
        shown += f"{f.words_right_original:.0%})"
    bar("words understood, of the original voice's", share, shown, 0.90, False)
    questions = f.questions_right
    shown = str(questions)
    if f.questions_right_original is not None:
        shown += f", original voice {f.questions_right_original}"
    bar("closed questions right", questions.rate, shown, 0.80, False)
    if partner == "assistant":  # its own voice, and a server that may hear other words
        rows[-2]["bar"] += ' ("repeat after me", sums)'
        rows[-1]["bar"] += " (sums)"
    return rows


def print_report(f: Figures, found_bars: Sequence[dict[str, Any]]) -> None:
    verdicts = {True: "holds", False: "MISSED", None: "not measured"}
    rows: list[list[Cell]] = [
        [row["bar"], row["found"], row["limit"], verdicts[row["holds"]]] for row in found_bars
    ]
    print("\n" + table(("bar", "found", "limit", ""), rows))
    others = (
        ("pause: takeover by the rule of Full-Duplex-Bench v1", str(f.pause_takeover_v1)),
        ("pause: any sound at all", str(f.pause_sounds)),
        *((f"pause: takeover, {kind}", str(share)) for kind, share in f.pause_by_kind.items()),
        ("pause: answered when the turn was over", str(f.pause_answered)),
        ("interruption: attended to, the right words", str(f.attended)),
        ("interruption: the old reply came back", str(f.resumed)),
        ("interruption: not tested, no reply sounding", str(f.interruptions_untested)),
        ("long turn: takeover", str(f.long_takeover)),
        ("long turn: takeover by the rule of v1", str(f.long_takeover_v1)),
        ("long turn: backchannels per turn", two_places(f.backchannels_per_turn)),
        ("long turn: the same in the data", two_places(f.backchannels_per_turn_truth)),
        ("long turn: backchannels per second", two_places(f.backchannel_hz)),
        ("long turn: divergence of their timing (0–1)", two_places(f.timing_divergence)),
        ("noise only: false replies per minute", two_places(f.false_replies_per_minute)),
        ("noise only: minutes", two_places(f.noise_minutes)),
        ("partner talked on before a trial", str(f.unsettled)),
        ("trials never held: their session broke off", str(f.not_held)),
    )
    print("\n" + table(("other figures", ""), [list(row) for row in others]))
    spreads: list[list[Cell]] = [
        f.latency_ms.row("last voiced → reply"),
        f.stop_ms.row("spoken over → silent"),
    ]
    if f.recorded_takeover.of:
        spreads.append(f.recorded_latency_ms.row("recorded speech: last voiced → reply"))
    print("\nms at the listener's ear:\n" + table(SPREAD_HEADERS, spreads))
    if f.recorded_takeover.of:
        words = "–" if f.recorded_words_right is None else f"{f.recorded_words_right:.0%}"
        print(
            f"\nrecorded human speech: answered {f.recorded_takeover}, "
            f"cut in {f.recorded_cut_in}, words right {words}"
        )
    print_turn_taking(f)
    print(f"\n{NOTE}")
    print(table(PUBLISHED_V1_HEADERS, [list(row) for row in PUBLISHED_V1]))


def print_turn_taking(f: Figures) -> None:
    if f.live is None or f.truth is None or f.difference is None:
        return
    headers = ("", "IPU", "s", "pause", "s", "gap", "s", "overlap", "s")
    named = (("truth of the data", f.truth), ("live", f.live), ("mean |Δ|", f.difference))
    rows: list[list[Cell]] = []
    for name, found in named:
        values = [value for rate in astuple(found) for value in rate]
        rows.append([name, *(f"{value:.1f}" for value in values)])
    rows += [[f"published mean |Δ|, {name}", *values] for name, *values in PUBLISHED_NTPP]
    print("\nTurn-taking, number and seconds per minute:\n" + table(headers, rows))
