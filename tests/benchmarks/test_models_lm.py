"""The chat engine's benchmark, with a model that is next to nothing."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs requirements.txt")

from benchmarks import models_lm
from tests.models.chat_model import SHAPE


def test_every_way_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"num_hidden_layers": 1, "vocab_size": 40}
    shape: dict[str, Any] = {key: SHAPE[key] for key in models_lm.SHAPE} | small
    monkeypatch.setattr(models_lm, "SHAPE", shape)
    parser = argparse.ArgumentParser()
    models_lm.add_flags(parser.add_argument_group("lm"))
    flags = "--lm --lm_rounds 2 --lm_sessions 1,3 --lm_prompt_tokens 40"
    result = models_lm.section(parser.parse_args(flags.split()))
    engine = [("engine", 1), ("products alone", 1), ("engine", 3), ("products alone", 3)]
    plain = (models_lm.PLAIN, 1)
    assert [(each["way"], each["sessions"]) for each in result["speeds"]] == [*engine, plain]
    assert [(each["way"], each["sessions"]) for each in result["first_tokens"]] == [
        plain,
        *((way, count) for count in (1, 3) for way in ("engine", "engine, next turn")),
    ]
    assert all(each["wall"] > 0 and each["cpu"] > 0 for each in result["speeds"])
    assert all(each["wall_ms"] > 0 for each in result["first_tokens"])
    assert "x one session" in capsys.readouterr().out
