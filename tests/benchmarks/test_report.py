"""Percentiles, tables, files."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import numpy as np
import pytest

from benchmarks.report import (
    SPREAD_HEADERS,
    Spread,
    doubts,
    environment,
    environment_lines,
    table,
    write_json,
    write_recording,
)


def test_percentiles() -> None:
    spread = Spread.of([float(n) for n in range(101)])
    assert (spread.count, spread.p50, spread.p95, spread.max) == (101, 50.0, 95.0, 100.0)
    assert Spread.of([7.0]) == Spread(1, 7.0, 7.0, 7.0)
    assert Spread.of([]) == Spread(0, None, None, None)


def test_a_table_is_aligned_and_shows_what_was_not_measured() -> None:
    rows = [Spread.of([1.0, 300.0]).row("first"), Spread.of([]).row("second one")]
    lines = table(SPREAD_HEADERS, rows).splitlines()
    assert len({len(line) for line in lines[1:]}) == 1
    assert lines[2].split() == ["first", "2", "150", "285", "300"]
    assert lines[3].split() == ["second", "one", "0", "–", "–", "–"]


def test_a_measurement_that_was_held_up_or_not_alone_is_doubted() -> None:
    assert doubts(20.0, 0.02) == []
    assert doubts(None, None) == []
    assert "late by up to 400 ms" in doubts(400.0, 0.0)[0]
    assert "1.50 cores" in doubts(1.0, 1.5)[0]


def test_the_environment_names_what_ran_and_keeps_the_key_to_itself(tmp_path: Path) -> None:
    facts = environment(
        {"seed": 0, "quick": False, "api_key": "secret", "out": tmp_path, "url": None}
    )
    text = environment_lines(facts)
    assert "--seed 0" in text
    assert "cores" in text
    assert "--url" not in text
    assert "--quick" not in text
    write_json(tmp_path / "deep" / "facts.json", facts | {"value": np.float32(0.5)})
    written = json.loads((tmp_path / "deep" / "facts.json").read_text())
    assert written["settings"] == {"seed": 0, "quick": False, "out": str(tmp_path), "url": None}
    assert written["value"] == pytest.approx(0.5)
    assert "secret" not in (tmp_path / "deep" / "facts.json").read_text()


def test_a_recording_has_the_person_left_and_parley_right(tmp_path: Path) -> None:
    recording = np.array([[0.5, 0.5, 0.5], [-0.25, -0.25, -0.25]], np.float32)
    write_recording(tmp_path / "both.wav", recording)
    with wave.open(str(tmp_path / "both.wav")) as file:
        assert (file.getnchannels(), file.getframerate()) == (2, 24_000)
        frames = np.frombuffer(file.readframes(3), "<i2").reshape(3, 2)
    assert frames[:, 0].tolist() == [16384] * 3
    assert frames[:, 1].tolist() == [-8192] * 3
