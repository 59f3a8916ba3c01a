"""What vLLM says is what plain PyTorch says. Runs where vLLM is: see requirements-vllm.txt."""

import pytest

pytest.importorskip("torch", reason="models need torch")
pytest.importorskip("transformers", reason="models need transformers")

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from models.common.errors import (
    ArchitectureError,
    ConfigError,
    FrameLengthError,
    PackedIdOverflowError,
    VocabularyError,
)
from models.common.sampling import Sampling
from models.parrot import vllm_plugin
from models.parrot.backbones import DualLlama, DualMistral, DualPhi, DualQwen2
from models.parrot.engine import DuplicateSession, Memory, NoFreeRow, UnknownSession
from models.parrot.modeling import DualChannelModel
from models.parrot.vllm_engine import LEAD_FRAMES, MARGIN_FRAMES, VllmEngine
from tests.models import tiny
from tests.models.test_engine import RESTING, Alone, user_frame

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="needs vLLM (requirements-vllm.txt)"
)
ROWS, KEEP = 3, 24
FRAMES = KEEP + LEAD_FRAMES + MARGIN_FRAMES + ROWS + 16
OPTIONS: dict[str, Any] = {"dtype": "float32", "enforce_eager": True}


def small(
    backbone: type[DualChannelModel] = DualLlama, join: str = "sum", **changes: Any
) -> DualChannelModel:
    """Heads as wide as vLLM's kernels want them."""
    return tiny.model(backbone, join=join, hidden_size=64, num_attention_heads=2, **changes)


@pytest.fixture(scope="module")
def live(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmEngine]:
    """With a `Sampling` of the test's, if it has one."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    folder = tmp_path_factory.mktemp("checkpoint")
    small().save_pretrained(folder)
    save_file({"coarse.0.weight": torch.zeros(1)}, folder / "codec.safetensors")  # as is shipped
    memory, sampling = Memory(frames=FRAMES, keep=KEEP), getattr(request, "param", None)
    engine = VllmEngine(folder, ROWS, memory=memory, sampling=sampling, **OPTIONS)
    yield engine
    engine.shutdown()


@needs_vllm
@pytest.mark.parametrize("live", [Sampling(), RESTING], indirect=True, ids=["likeliest", "resting"])
def test_sessions_equal_each_alone_and_outlive_the_longest_request(live: VllmEngine) -> None:
    """Token by token; at each handing over the past is a start and the newest frames."""
    model, sampling = small(), live._sampling
    prefix = tiny.codes(model, rows=1, frames=5)[0]
    live.open("a")
    live.open("b", prefix)
    alone = {"a": Alone(model, None, sampling), "b": Alone(model, prefix, sampling)}
    handed_over, last, quiet = 0, dict[str, torch.Tensor](), []
    for t in range(2 * FRAMES):
        if t == 6:
            live.open("c")
            alone["c"] = Alone(model, None, sampling)
        if t == 20:
            live.close("a")
            del alone["a"]
        users: dict[Any, torch.Tensor] = {
            n: user_frame(model, 5 * t + i) for i, n in enumerate(alone) if (t + i) % 5
        }
        held = {name: len(live._sessions[name].past) for name in users}
        said = {name: alone[name].next for name in users}
        answers = live.step(users)
        for name, user in users.items():
            session = live._sessions[name]
            if len(session.past) <= held[name]:
                handed_over += 1
                past = torch.tensor(session.past[1:-1])
                frames = torch.stack((past // 13, past % 13), dim=-1)[..., None]
                assert torch.equal(frames[-1], last[name])
                due, alone[name] = alone[name].due, Alone(model, frames, sampling)
                alone[name].next, alone[name].due = said[name], due
            assert len(session.past) <= FRAMES - MARGIN_FRAMES
            assert torch.equal(answers[name], alone[name].step(user)), (t, name)
            last[name] = torch.stack((user, said[name]))
            quiet.append(int(answers[name]) == RESTING.rest)
    assert handed_over >= 2
    assert sampling is not RESTING or 20 < sum(quiet) < len(quiet) - 20
    for name in list(alone):
        live.close(name)


@needs_vllm
def test_more_sessions_than_rows_are_refused_at_once(live: VllmEngine) -> None:
    for name in range(ROWS):
        live.open(name)
    with pytest.raises(NoFreeRow):
        live.open("one more")
    live.close(0)
    live.open("now")
    for session in (1, 2, "now"):
        live.close(session)


@needs_vllm
def test_misuse_is_named_and_harms_nobody(live: VllmEngine) -> None:
    live.open("a")
    with pytest.raises(DuplicateSession):
        live.open("a")
    with pytest.raises(UnknownSession):
        live.step({"b": torch.zeros(1)})
    with pytest.raises(VocabularyError):
        live.step({"a": torch.tensor([13])})
    with pytest.raises(FrameLengthError):
        live.step({"a": torch.tensor([1, 2])})
    alone = Alone(small())
    for t in range(3):
        user = user_frame(small(), t)
        assert torch.equal(live.step({"a": user})["a"], alone.step(user))
    live.close("a")


@needs_vllm
@pytest.mark.parametrize("backbone", [DualQwen2, DualMistral])
def test_other_backbones(backbone: type[DualChannelModel], tmp_path: Path) -> None:
    model = small(backbone, user_channel=1)
    model.save_pretrained(tmp_path)
    live = VllmEngine(tmp_path, 1, memory=Memory(frames=FRAMES, keep=KEEP), **OPTIONS)
    live.open("a")
    alone = Alone(model)
    for t in range(10):
        user = user_frame(model, t)
        assert torch.equal(live.step({"a": user})["a"], alone.step(user))
    live.shutdown()


@needs_vllm
def test_sampling_draws_from_the_likeliest(tmp_path: Path) -> None:
    model = small()
    model.save_pretrained(tmp_path)
    live = VllmEngine(
        tmp_path,
        2,
        memory=Memory(frames=FRAMES, keep=KEEP),
        sampling=Sampling(1.0, top_k=3),
        **OPTIONS,
    )
    live.open("a", seed=1)
    live.open("b", seed=2)
    codes = [live.step(dict.fromkeys("ab", user_frame(model, t))) for t in range(20)]
    assert [int(c["a"]) for c in codes] != [int(c["b"]) for c in codes]
    assert all(0 <= int(c[name]) < tiny.CODES for c in codes for name in "ab")
    live.shutdown()


@pytest.mark.parametrize(
    ("model", "error"),
    [
        (lambda: small(join="pair"), ConfigError),
        (lambda: small(num_codebooks=2), ConfigError),
        (lambda: small(DualPhi), ArchitectureError),
    ],
)
def test_what_cannot_be_served_is_refused(model, error, tmp_path: Path) -> None:  # type: ignore
    model().save_pretrained(tmp_path)
    with pytest.raises(error):
        vllm_plugin.served_config(tmp_path)


def test_a_vocabulary_too_large_for_packed_ids_is_refused(tmp_path: Path) -> None:
    DualLlama.config_class(**tiny.settings(codebook_size=46_341, join="sum")).save_pretrained(
        tmp_path
    )
    with pytest.raises(PackedIdOverflowError):
        vllm_plugin.served_config(tmp_path)


def test_a_child_process_finds_the_plugin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(sys, "path", list(sys.path))
    vllm_plugin.environment()
    code = (
        "from importlib.metadata import entry_points as e;"
        "print(*(p.value for p in e(group='vllm.general_plugins')));"
        "import importlib.util as u; assert u.find_spec('models.parrot.vllm_plugin')"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert "models.parrot.vllm_plugin:register" in found.stdout.split(), found.stderr
