"""The synthesizers' benchmark, with models that are next to nothing."""

from __future__ import annotations

import argparse

import pytest

pytest.importorskip("transformers", reason="the models' requirements are not installed")

from benchmarks import models_tts


def test_every_way_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    models_tts.add_flags(parser)
    flags = "--tts --tts_size small --tts_sessions 1,2 --tts_steps 60 --tts_play_steps 30"
    results = models_tts.section(parser.parse_args(flags.split()))
    assert [(one["way"], one["rows"]) for one in results] == [
        ("vits, forward of the whole", 1),
        ("vits, streamed", 1),
        ("vits, streamed", 2),
        ("parler, whole clause", 1),
        ("parler, streamed", 1),
        ("parler, streamed", 2),
    ]
    for one in results:
        assert one["first_s"]["count"] == one["rows"]
        assert one["first_s"]["max"] > 0
        assert one["real_time_factor"] > 0
        assert one["cpu_factor"] > 0
    vits, parler = ({one["sound_s"] for one in results[i : i + 3]} for i in (0, 3))
    assert max(vits) == pytest.approx(min(vits), rel=1e-3)
    assert parler == {(60 - models_tts.BOOKS + 1) * 512 / 44_100}
    assert "parler, streamed" in capsys.readouterr().out
