"""What can be chosen about the duplex brain, and what its stages report of their work."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from handlers.base import Observer

ENGINES = ("torch", "vllm")
SHIPPED = Path(__file__).parents[2] / "models" / "parrot" / "tiny"


def _flag(default: Any, name: str, help: str) -> Any:
    return field(default=default, metadata={"help": help, "flag": f"--parrot_{name}"})


@dataclass(frozen=True)
class ParrotOptions:
    model_path: str = _flag(str(SHIPPED), "model_path", "checkpoint folder: LM and tokenizer")
    rows: int = _flag(16, "rows", "sessions at a time; one more is refused")
    temperature: float = _flag(0.0, "temperature", "of sampling; 0: the likeliest token")
    onset: float = _flag(
        0.35, "onset", "probability of speech from which on it speaks, at temperature 0 (0-1)"
    )
    top_k: int = _flag(50, "top_k", "likeliest tokens that are sampled from; 0: all")
    top_p: float = _flag(1.0, "top_p", "share of the probability that is sampled from (0-1)")
    seed: int = _flag(0, "seed", "of the sampling")
    window_frames: int = _flag(
        0, "window_frames", "what the LM remembers (frames); 0: the positions it was trained on"
    )
    engine: str = _flag("torch", "engine", f"what runs the LM: {' or '.join(ENGINES)}")
    device: str = _flag("auto", "device", "cpu, cuda, cuda:1 …; auto: cuda where there is one")
    threads: int = _flag(1, "threads", "CPU threads of each of the three stages")
    jitter_ms: float = _flag(20.0, "jitter_ms", "audio that waits before a person is heard (ms)")
    max_late_ms: float = _flag(
        160.0, "max_late_ms", "audio that came late and waits; more is skipped (ms)"
    )
    max_tick_late_ms: float = _flag(
        400.0, "max_tick_late_ms", "lateness of the ticks beyond which some are skipped (ms)"
    )
    silence_db: float = _flag(
        -50.0, "silence_db", "level of the model's audio below which it is silent (dB full scale)"
    )
    response_end_ms: float = _flag(
        600.0, "response_end_ms", "silence of the model that ends a response on the wire (ms)"
    )


class DuplexObserver(Observer, Protocol):
    """Where the stages report their measurements; seconds, frames, samples at the wire's rate."""

    def ticked(self, late_s: float) -> None: ...
    def tick_done(self, seconds: float) -> None: ...
    def ticks_skipped(self, ticks: int) -> None: ...
    def rows_in_use(self, rows: int) -> None: ...
    def heard_late(self, seconds: float) -> None: ...
    def silence_substituted(self, frames: int) -> None: ...
    def audio_skipped(self, reason: str, samples: int) -> None: ...
