"""What the server measures, in Prometheus form; every name begins with `parley_`."""

from __future__ import annotations

import asyncio

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from handlers.messages import RATE_HZ

_FAST_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5)
_TURN_S = (0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.2, 1.5, 2, 3, 5)
_TICK_S = (
    *(0.002, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.045, 0.05, 0.06, 0.08, 0.1),
    *(0.12, 0.16, 0.2, 0.3, 0.4, 1),
)
LAG_INTERVAL_S = 0.05


class Metrics:
    """One server's registry. Implements `handlers.duplex.options.DuplexObserver`.

    Called from stage threads.
    """

    def __init__(self) -> None:
        r = self.registry = CollectorRegistry()
        self.sessions = Gauge("parley_sessions", "Sessions connected now", registry=r)
        self.refused = Counter("parley_refused", "Connections refused", ["code"], registry=r)
        self.errors = Counter("parley_errors", "Errors told to a client", ["code"], registry=r)
        self.interruptions = Counter(
            "parley_interruptions", "Speech over a reply", ["outcome"], registry=r
        )
        self.turns = Counter("parley_turns", "Turns of the person", ["outcome"], registry=r)
        self.withdrawn = Counter(
            "parley_withdrawn_replies", "Replies prepared and never heard", registry=r
        )
        self.endpoint_to_audio = Histogram(
            "parley_endpoint_to_audio_seconds",
            "Last voiced sample to first reply audio sent",
            buckets=_TURN_S,
            registry=r,
        )
        self.hold = Histogram(
            "parley_hold_seconds", "Silence waited before a turn ended", buckets=_TURN_S, registry=r
        )
        self.loop_lag = Histogram(
            "parley_loop_lag_seconds", "Lateness of the event loop", buckets=_FAST_S, registry=r
        )
        self._wait = Histogram(
            "parley_queue_wait_seconds", "Time in a stage's inbox", ["stage"],
            buckets=_FAST_S, registry=r,
        )  # fmt: skip
        self._service = Histogram(
            "parley_service_seconds", "Time to serve a batch", ["stage"],
            buckets=_FAST_S, registry=r,
        )  # fmt: skip
        self._batch = Histogram(
            "parley_batch_messages", "Messages served together", ["stage"],
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256), registry=r,
        )  # fmt: skip
        self._first = Histogram(
            "parley_first_output_seconds", "Request to a stage's first output", ["stage"],
            buckets=_FAST_S, registry=r,
        )  # fmt: skip
        self._failed = Counter("parley_stage_failures", "Failed requests", ["stage"], registry=r)
        self._tick_late = Histogram(
            "parley_tick_lateness_seconds", "Start of a duplex tick after it was due",
            buckets=_TICK_S, registry=r,
        )  # fmt: skip
        self._tick = Histogram(
            "parley_tick_seconds", "A duplex tick, from its start to the decoded audio",
            buckets=_TICK_S, registry=r,
        )  # fmt: skip
        self._ticks_skipped = Counter("parley_ticks_skipped", "Duplex ticks left out", registry=r)
        self._rows = Gauge("parley_rows_in_use", "Rows of the duplex model in use", registry=r)
        self._heard_late = Histogram(
            "parley_heard_late_seconds", "Age of what the duplex model hears: the oldest of a tick",
            buckets=_TICK_S, registry=r,
        )  # fmt: skip
        self._substituted = Counter(
            "parley_silence_frames", "Frames of silence in place of audio that had not come",
            registry=r,
        )  # fmt: skip
        self._skipped = Counter(
            "parley_audio_skipped_seconds", "Audio passed over to stay on time", ["reason"],
            registry=r,
        )  # fmt: skip

    def waited(self, stage: str, seconds: float) -> None:
        self._wait.labels(stage).observe(seconds)

    def served(self, stage: str, seconds: float, batch: int) -> None:
        self._service.labels(stage).observe(seconds)
        self._batch.labels(stage).observe(batch)

    def first_output(self, stage: str, seconds: float) -> None:
        self._first.labels(stage).observe(seconds)

    def failed(self, stage: str) -> None:
        self._failed.labels(stage).inc()

    def ticked(self, late_s: float) -> None:
        self._tick_late.observe(late_s)

    def tick_done(self, seconds: float) -> None:
        self._tick.observe(seconds)

    def ticks_skipped(self, ticks: int) -> None:
        self._ticks_skipped.inc(ticks)

    def rows_in_use(self, rows: int) -> None:
        self._rows.set(rows)

    def heard_late(self, seconds: float) -> None:
        self._heard_late.observe(seconds)

    def silence_substituted(self, frames: int) -> None:
        self._substituted.inc(frames)

    def audio_skipped(self, reason: str, samples: int) -> None:
        self._skipped.labels(reason).inc(samples / RATE_HZ)

    def exposition(self) -> bytes:
        return generate_latest(self.registry)

    async def watch_loop(self) -> None:
        """Sample the event loop's lateness for as long as the server runs."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LAG_INTERVAL_S
            await asyncio.sleep(LAG_INTERVAL_S)
            self.loop_lag.observe(max(0.0, loop.time() - due))
