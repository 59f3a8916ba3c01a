"""A server under test: started on a free loopback port, watched through /proc and /metrics."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import urllib.response
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.report import Spread

HOST = "127.0.0.1"
READY_TIMEOUT_S = 60.0
READY_STEP_S = 0.01
STOP_TIMEOUT_S = 20.0
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class ServerFailed(Exception):
    """The server did not start, or ended by itself; the message holds its last output."""


@dataclass(frozen=True, slots=True)
class Usage:
    """A process and its descendants at one moment."""

    cpu_s: float
    pss_bytes: int
    own_bytes: int  # of it what no file stands behind: other programs' coming and going leave it
    threads: int
    processes: int


Starting = Callable[[Sequence[str], Path | None], AbstractContextManager["Server"]]
"""As `running`: flags, log file → a server for the time of the context."""


@dataclass(frozen=True)
class Server:
    """A running server; `pid` is None when somebody else started it."""

    url: str
    http_url: str
    pid: int | None = None
    start_s: float | None = None  # start of the process to the first good /healthz
    arguments: tuple[str, ...] = ()

    def usage(self) -> Usage | None:
        return tree_usage(self.pid) if self.pid is not None else None

    def metrics(self) -> Metrics | None:
        """None when the server has no Prometheus page."""
        try:
            with _open(f"{self.http_url}/metrics", timeout_s=5.0) as response:
                return Metrics.parse(response.read().decode("utf-8"))
        except (OSError, ValueError):
            return None


@contextlib.contextmanager
def running(
    arguments: Sequence[str] = (), log: Path | None = None, module: str = "server"
) -> Iterator[Server]:
    """`python -m server` with `arguments`, ready; stopped by SIGTERM at the end.

    Another `module` takes `--host` and `--port` and answers at `/healthz` likewise.

    Raises `ServerFailed` when it is not ready in time.
    """
    port = free_port()
    command = [sys.executable, "-m", module, "--host", HOST, "--port", str(port), *arguments]
    log_path = log or Path(os.devnull)
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("wb") as output:
        begun = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=Path(__file__).resolve().parent.parent,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            http_url = f"http://{HOST}:{port}"
            _wait_ready(process, http_url, log)
            start_s = time.monotonic() - begun
            url = f"ws://{HOST}:{port}/v1/realtime"
            yield Server(url, http_url, process.pid, start_s, tuple(arguments))
        finally:
            _stop(process)


@contextlib.contextmanager
def chosen(
    url: str | None, arguments: Sequence[str], log: Path | None, start: Starting = running
) -> Iterator[Server]:
    """The one at `url`, which goes on; without one, a server of our own. Raises `ServerFailed`."""
    if url:
        yield server_at(url)
        return
    with start(arguments, log) as server:
        yield server


def server_at(url: str) -> Server:
    """A server that somebody else runs; its HTTP pages are looked for beside its websocket."""
    parts = urlsplit(url)
    scheme = "https" if parts.scheme == "wss" else "http"
    return Server(url, f"{scheme}://{parts.netloc}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_ready(process: subprocess.Popen[bytes], http_url: str, log: Path | None) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerFailed(f"the server ended with code {process.returncode}{_tail(log)}")
        with contextlib.suppress(OSError), _open(f"{http_url}/healthz", timeout_s=1.0):
            return
        time.sleep(READY_STEP_S)
    raise ServerFailed(f"the server was not ready after {READY_TIMEOUT_S:.0f} s{_tail(log)}")


def _open(
    url: str, timeout_s: float
) -> contextlib.AbstractContextManager[urllib.response.addinfourl]:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    opened: urllib.response.addinfourl = direct.open(url, timeout=timeout_s)
    return opened


def _tail(log: Path | None) -> str:
    if log is None:
        return ""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
    return ":\n" + "\n".join(lines)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def tree_usage(pid: int) -> Usage:
    """CPU time since start, proportional memory and threads of `pid` and its descendants."""
    cpu_ticks = pss = own = threads = processes = 0
    for one in _tree(pid):
        try:
            stat = Path(f"/proc/{one}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            rollup = Path(f"/proc/{one}/smaps_rollup").read_text(encoding="utf-8")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it ended meanwhile
        cpu_ticks += int(stat[11]) + int(stat[12])  # utime, stime: fields 14 and 15 of proc(5)
        threads += int(stat[17])
        kb = {name: int(size) for name, size in re.findall(r"^(\w+): +(\d+) kB", rollup, re.M)}
        pss, own = pss + kb["Pss"] * 1024, own + kb["Pss_Anon"] * 1024
        processes += 1
    return Usage(cpu_ticks / TICKS_PER_S, pss, own, threads, processes)


@dataclass(frozen=True, slots=True)
class Cpu:
    """Cores in use over a stretch of time."""

    server: float | None  # None: not our process
    generator: float  # this process
    others: float | None  # the rest of the machine, time stolen by a hypervisor included


class CpuMeter:
    """Runs from its making to `read`."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._before = self._snapshot()

    def read(self) -> Cpu:
        pairs = zip(self._snapshot(), self._before, strict=True)
        wall_s, busy_s, own_s, server_s = (now - then for now, then in pairs)
        own = own_s / wall_s
        if self._server.pid is None:
            return Cpu(None, own, None)
        server = server_s / wall_s
        return Cpu(server, own, max(0.0, busy_s / wall_s - own - server))

    def _snapshot(self) -> tuple[float, float, float, float]:
        fields = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:]
        user, nice, system, _idle, _waiting, irq, soft_irq, stolen = map(int, fields[:8])
        busy = user + nice + system + irq + soft_irq + stolen
        usage = self._server.usage()
        server_s = usage.cpu_s if usage is not None else 0.0
        return time.monotonic(), busy / TICKS_PER_S, time.process_time(), server_s


def _tree(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                children = (task / "children").read_text(encoding="utf-8").split()
                found.extend(int(child) for child in children)
    return found


Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Histogram:
    """Cumulative counts by upper bound, in the metric's unit (seconds)."""

    bounds: tuple[float, ...]
    counts: tuple[float, ...]

    def minus(self, earlier: Histogram | None) -> Histogram:
        if earlier is None:
            return self
        pairs = zip(self.counts, earlier.counts, strict=True)
        return Histogram(self.bounds, tuple(now - then for now, then in pairs))

    @property
    def count(self) -> float:
        return self.counts[-1] if self.counts else 0.0

    def quantile(self, q: float) -> float | None:
        """Linear within a bucket; the last finite bound when it lies beyond; None when empty."""
        if self.count <= 0:
            return None
        rank, below, start = q * self.count, 0.0, 0.0
        for bound, upto in zip(self.bounds, self.counts, strict=True):
            if upto >= rank and upto > below:
                if bound == float("inf"):
                    return start
                return start + (bound - start) * (rank - below) / (upto - below)
            below, start = upto, bound
        return start

    def spread_ms(self) -> Spread:
        """Of seconds; `max` is the upper bound of the last bucket in use."""
        quantiles = [self.quantile(q) for q in (0.5, 0.95, 1.0)]
        p50, p95, most = (None if q is None else q * 1000.0 for q in quantiles)
        return Spread(round(self.count), p50, p95, most)


@dataclass(frozen=True)
class Metrics:
    """One reading of a Prometheus page: plain values and histograms by name and labels."""

    values: Mapping[tuple[str, Labels], float] = field(default_factory=dict)
    histograms: Mapping[tuple[str, Labels], Histogram] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Metrics:
        values: dict[tuple[str, Labels], float] = {}
        buckets: dict[tuple[str, Labels], list[tuple[float, float]]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = dict(sample.labels)
                if family.type == "histogram" and sample.name.endswith("_bucket"):
                    bound = float(labels.pop("le"))
                    key = (family.name, frozenset(labels.items()))
                    buckets.setdefault(key, []).append((bound, sample.value))
                else:
                    values[(sample.name, frozenset(labels.items()))] = sample.value
        histograms = {}
        for key, pairs in buckets.items():
            bounds, counts = zip(*sorted(pairs), strict=True)
            histograms[key] = Histogram(bounds, counts)
        return cls(values, histograms)

    def histograms_since(self, earlier: Metrics) -> dict[str, Histogram]:
        """What was observed between two readings, by `name{labels}`; empty ones left out."""
        found = {}
        for key, histogram in sorted(self.histograms.items(), key=lambda item: _title(*item[0])):
            since = histogram.minus(earlier.histograms.get(key))
            if since.count > 0:
                found[_title(*key)] = since
        return found


def _title(name: str, labels: Labels) -> str:
    inside = ",".join(f'{key}="{value}"' for key, value in sorted(labels))
    return f"{name}{{{inside}}}" if inside else name
