"""What the server measures, in Prometheus form; every name begins with `parley_`."""

from __future__ import annotations

import asyncio

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_FAST_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5)
_TURN_S = (0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.2, 1.5, 2, 3, 5)
LAG_INTERVAL_S = 0.05


class Metrics:
    """One server's registry. Implements `handlers.base.Observer` (called from stage threads)."""

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

    def waited(self, stage: str, seconds: float) -> None:
        self._wait.labels(stage).observe(seconds)

    def served(self, stage: str, seconds: float, batch: int) -> None:
        self._service.labels(stage).observe(seconds)
        self._batch.labels(stage).observe(batch)

    def first_output(self, stage: str, seconds: float) -> None:
        self._first.labels(stage).observe(seconds)

    def failed(self, stage: str) -> None:
        self._failed.labels(stage).inc()

    def exposition(self) -> bytes:
        return generate_latest(self.registry)

    async def watch_loop(self) -> None:
        """Sample the event loop's lateness for as long as the server runs."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LAG_INTERVAL_S
            await asyncio.sleep(LAG_INTERVAL_S)
            self.loop_lag.observe(max(0.0, loop.time() - due))
