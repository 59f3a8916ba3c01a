"""Readings of /metrics and /proc."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from benchmarks.server_process import CpuMeter, Metrics, Server, ServerFailed, running, tree_usage


def reading(registry: CollectorRegistry) -> Metrics:
    return Metrics.parse(generate_latest(registry).decode())


def test_histograms_between_two_readings() -> None:
    registry = CollectorRegistry()
    lag = Histogram("lag_seconds", "", buckets=(0.01, 0.02, 0.05), registry=registry)
    quiet = Histogram("quiet_seconds", "", buckets=(1,), registry=registry)
    quiet.observe(0.5)
    lag.observe(10.0)
    before = reading(registry)
    for _ in range(98):
        lag.observe(0.005)
    lag.observe(0.015)
    lag.observe(0.04)
    since = reading(registry).histograms_since(before)
    assert set(since) == {"lag_seconds"}
    assert since["lag_seconds"].count == 100
    assert since["lag_seconds"].quantile(0.49) == pytest.approx(0.005)
    assert since["lag_seconds"].quantile(0.99) == pytest.approx(0.02)
    assert since["lag_seconds"].spread_ms().max == pytest.approx(50.0)


def test_labels_tell_histograms_apart() -> None:
    registry = CollectorRegistry()
    first = Histogram("first_seconds", "", ["stage"], buckets=(1, 2), registry=registry)
    before = reading(registry)
    first.labels("lm").observe(0.5)
    first.labels("tts").observe(1.5)
    since = reading(registry).histograms_since(before)
    assert list(since) == ['first_seconds{stage="lm"}', 'first_seconds{stage="tts"}']
    assert since['first_seconds{stage="tts"}'].quantile(0.5) == pytest.approx(1.5)


def test_an_empty_histogram_has_no_quantile() -> None:
    registry = CollectorRegistry()
    Histogram("lag_seconds", "", registry=registry)
    assert reading(registry).histograms_since(Metrics()) == {}


def test_what_lies_beyond_the_last_bound_counts_as_that_bound() -> None:
    registry = CollectorRegistry()
    Histogram("lag_seconds", "", buckets=(0.01,), registry=registry).observe(3.0)
    assert reading(registry).histograms_since(Metrics())["lag_seconds"].quantile(0.5) == 0.01


def test_counters_of_a_page_are_no_histograms() -> None:
    registry = CollectorRegistry()
    Counter("errors", "", registry=registry).inc()
    assert reading(registry).histograms_since(Metrics()) == {}


def test_usage_counts_the_children() -> None:
    alone = tree_usage(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        both = tree_usage(os.getpid())
    finally:
        child.communicate(b"\n")
    assert both.processes == alone.processes + 1
    assert both.threads > alone.threads
    assert alone.cpu_s > 0.0
    assert alone.pss_bytes > alone.own_bytes > 1_000_000


def test_cpu_is_split_between_the_server_this_process_and_the_rest() -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
    command = [sys.executable, "-c", burn]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        meter = CpuMeter(Server("", "", child.pid))
        assert child.stdout is not None
        child.stdout.readline()
        cpu = meter.read()
    finally:
        child.communicate(b"\n")
    assert cpu.server is not None
    assert cpu.others is not None
    assert cpu.server > 0.05
    assert cpu.generator < cpu.server
    assert CpuMeter(Server("", "")).read().server is None


def test_a_server_that_cannot_start_is_named() -> None:
    with pytest.raises(ServerFailed, match="ended with code"), running(["--no_such_flag"]):
        pytest.fail("it started")
