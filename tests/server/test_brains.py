"""What the chosen parts mean for the sessions."""

from types import SimpleNamespace
from typing import Any

import pytest

from server.brains import build_hub
from server.metrics import Metrics
from server.options import parse


@pytest.mark.parametrize(("stt", "soft_end_ms"), [("pocketsphinx", 96.0), ("openai", 64.0)])
def test_a_remote_recogniser_is_asked_a_window_sooner(stt: str, soft_end_ms: float) -> None:
    options, choice = parse(["--stt", stt])
    pipeline: Any = SimpleNamespace(voices=("someone",))
    loop: Any = SimpleNamespace(time=lambda: 0.0)
    hub = build_hub(options, choice, pipeline, Metrics(), loop)
    assert hub.turns.soft_end_ms == soft_end_ms
