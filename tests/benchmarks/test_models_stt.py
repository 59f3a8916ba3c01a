"""The speech recognisers' benchmark, with models that are next to nothing."""

from __future__ import annotations

import argparse
from functools import partial

import pytest

pytest.importorskip("transformers", reason="the models' requirements are not installed")
pytest.importorskip("faster_whisper", reason="faster-whisper is not installed")

from benchmarks import models_stt, random_whisper


def test_every_way_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    size = {"d_model": 32, "layers": 1, "heads": 2}
    monkeypatch.setitem(random_whisper.SIZES, "tiny", size)
    monkeypatch.setattr(random_whisper, "save", partial(random_whisper.save, words=257))
    parser = argparse.ArgumentParser()
    models_stt.add_flags(parser)
    flags = "--stt --stt_seconds 0.6 --stt_rounds 1 --stt_sessions 1,2 --stt_compute_types float32"
    results = models_stt.section(parser.parse_args(flags.split()))
    assert [(one["backend"], one["rows"]) for one in results] == [
        (way, rows)
        for way in (
            "generate, one by one",
            "whisper",
            "faster-whisper, one by one",
            "faster-whisper, float32",
        )
        for rows in (1, 2)
    ]
    for one in results:
        assert one["real_time_factor"] > 0
        assert one["cpu_factor"] > 0
        assert one["at_once_s"]["count"] == one["rows"]
        live = one["live_s"]
        assert (live is None) == ("one by one" in one["backend"])
        assert live is None or live["count"] == one["rows"]
    assert "faster-whisper, float32" in capsys.readouterr().out
