"""What can be chosen about the duplex brain, and what its stages report of their work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from handlers.base import Observer
from handlers.options import option
from models.parrot.domain import OFFSET, ONSET

ENGINES = ("torch", "vllm")
SHIPPED = Path(__file__).parents[2] / "models" / "parrot" / "tiny"


@dataclass(frozen=True)
class ParrotOptions:
    model_path: str = option(
        str(SHIPPED), "checkpoint folder: LM and tokenizer", "parrot_model_path"
    )
    rows: int = option(16, "sessions at a time; one more is refused", "parrot_rows")
    temperature: float = option(0.0, "of sampling; 0: the likeliest token", "parrot_temperature")
    onset: float = option(
        ONSET,
        "probability of speech, of late in all, from which on it speaks, at temperature 0 (0-1)",
        "parrot_onset",
    )
    offset: float = option(
        OFFSET,
        "probability of silence above which it stops speaking, at temperature 0 (0-1)",
        "parrot_offset",
    )
    top_k: int = option(50, "likeliest tokens that are sampled from; 0: all", "parrot_top_k")
    top_p: float = option(
        1.0, "share of the probability that is sampled from (0-1)", "parrot_top_p"
    )
    seed: int = option(0, "of the sampling", "parrot_seed")
    window_frames: int = option(
        0,
        "what the LM remembers (frames); 0: the positions it was trained on",
        "parrot_window_frames",
    )
    engine: str = option("torch", f"what runs the LM: {' or '.join(ENGINES)}", "parrot_engine")
    device: str = option(
        "auto", "cpu, cuda, cuda:1 …; auto: cuda where there is one", "parrot_device"
    )
    threads: int = option(1, "CPU threads of the models, one after another", "parrot_threads")
    jitter_ms: float = option(
        20.0, "audio that waits before a person is heard (ms)", "parrot_jitter_ms"
    )
    max_late_ms: float = option(
        160.0, "audio that came late and waits; more is skipped (ms)", "parrot_max_late_ms"
    )
    max_tick_late_ms: float = option(
        400.0, "lateness of the ticks beyond which some are skipped (ms)", "parrot_max_tick_late_ms"
    )
    silence_db: float = option(
        -50.0,
        "level of the model's audio below which it is silent (dB full scale)",
        "parrot_silence_db",
    )
    response_end_ms: float = option(
        600.0,
        "silence of the model that ends a response on the wire (ms)",
        "parrot_response_end_ms",
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
