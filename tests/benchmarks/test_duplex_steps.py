"""The step benchmark counts right, and runs."""

import pytest

pytest.importorskip("torch", reason="models need torch")
pytest.importorskip("transformers", reason="models need transformers")

import json
from pathlib import Path

import torch

from benchmarks import duplex_steps
from benchmarks.duplex_steps import EngineSteps, Point, Reading, Times, sessions_inside
from models.parrot.engine import Memory, TorchEngine
from tests.models import tiny


@pytest.mark.parametrize("true", [0, 1, 2, 3, 5, 16, 31, 32])
def test_the_sessions_that_fit_are_found(true: int) -> None:
    asked: list[int] = []

    def p99_ms(rows: int) -> float:
        asked.append(rows)
        return 40.0 if rows <= true else 41.0

    count, p99 = sessions_inside(p99_ms, 40.0, most=32)
    assert true - true // 8 <= count <= true
    assert p99 == (40.0 if true else None)
    assert len(asked) == len(set(asked)), "none measured twice"
    assert max(asked) <= 32


def test_the_floor_reads_the_weights_and_the_cache() -> None:
    model = tiny.model(join="pair", num_codebooks=3)
    weights = sum(p.numel() for n, p in model.named_parameters() if "embed_tokens" not in n)
    cached = (
        3 * 10 * 6 * 2 * 2 * 2 * 8
    )  # rows, frames, tokens, keys and values, layers, heads, width
    assert Reading(model, rows=3, context=10).bytes == (weights + cached) * 4


def test_a_step_sees_the_whole_context_every_time() -> None:
    engine = TorchEngine(tiny.model(), 2, memory=Memory(frames=11))
    work = EngineSteps(engine, 2, context=10)
    for _ in range(25):
        work.run()
        assert ((engine._ring.stamps[:2] >= 0).sum(-1) == 11).all(), "ten and its own"
    work.end()
    EngineSteps(engine, 2, context=10)


def test_ratios_are_frames_per_second_against_one_by_one() -> None:
    point = Point("torch", 16, 64, Times(2.0, 3.0, 1.0), Times(1.0, 2.0, 0.75), Times(0.5, 1, 1))
    assert point.times_plain == 8
    assert point.times_plain_cpu == 12
    assert point.times_floor == 4


def test_it_runs_and_writes_what_ran(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, threads = tmp_path / "steps.json", torch.get_num_threads()
    short = "--steps 1 --rows 1 2 --contexts 8 --most_sessions 2".split()
    duplex_steps.main([*short, "--json", str(path)])
    torch.set_num_threads(threads)
    printed, written = capsys.readouterr().out, json.loads(path.read_text())
    assert "torch, 2 rows" in printed
    assert "--shape trial" in printed
    assert [p["rows"] for p in written["points"]] == [1, 2]
    assert written["environment"]["packages"]["torch"] == torch.__version__
    assert written["sessions"]["count"] in (0, 1, 2)
    assert torch.get_default_dtype() == torch.float32
