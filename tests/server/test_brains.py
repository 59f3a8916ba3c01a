"""What the chosen parts mean for the sessions."""

from types import SimpleNamespace
from typing import Any

import pytest

from server.brains import build_hub
from server.hub import Hub
from server.metrics import Metrics
from server.options import parse


def hub_of(*flags: str) -> Hub:
    options, choice = parse(flags)
    pipeline: Any = SimpleNamespace(voices=("someone",))
    loop: Any = SimpleNamespace(time=lambda: 0.0)
    return build_hub(options, choice, pipeline, Metrics(), loop)


@pytest.mark.parametrize(("stt", "soft_end_ms"), [("pocketsphinx", 96.0), ("openai", 64.0)])
def test_a_remote_recogniser_is_asked_a_window_sooner(stt: str, soft_end_ms: float) -> None:
    assert hub_of("--stt", stt).turns.soft_end_ms == soft_end_ms


@pytest.mark.parametrize(
    ("flags", "hold_ms"),
    [
        ([], 300),
        (["--stt", "openai"], 300),
        (["--lm", "openai"], 300),
        (["--stt", "openai", "--lm", "openai"], 384),
        (["--profile", "remote"], 384),
        (["--profile", "remote", "--min_silence_ms", "200"], 200),
        (["--profile", "remote", "--min_silence_ms", "500"], 500),
    ],
)
def test_the_wait_fills_the_time_that_endpoints_take(flags: list[str], hold_ms: int) -> None:
    detection = hub_of(*flags).default_config.server_vad
    assert detection.silence_duration_ms == hold_ms
