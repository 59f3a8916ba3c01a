"""The two steps against transformers' own `forward`, alone and batched, whole and in pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.common.errors import ArchitectureError, ModelError
from models.vits.synthesis import Clause, Latents, Vits
from tests.models import vits_tiny

ROUNDING = {"rtol": 0.0, "atol": 2e-5}
TOKENS = [0, 3, 0, 5, 0, 27, 0, 4, 0, 9, 0]
KINDS: dict[str, dict[str, Any]] = {
    "one-speaker": {},
    "speakers": {"num_speakers": 3, "speaker_embedding_size": 6},
    "plain-durations": {"use_stochastic_duration_prediction": False},
}


@pytest.fixture(params=KINDS, scope="module")
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    return KINDS[request.param]


def whole(vits: Vits, latents: Latents) -> Tensor:
    return vits.sound([(latents, 0, latents.length)])[0]


def test_it_sounds_as_transformers_does(kind: dict[str, Any]) -> None:
    ids = torch.tensor([TOKENS])
    speaker = 2 if "num_speakers" in kind else None
    model = vits_tiny.model(**kind)
    torch.manual_seed(11)
    with torch.no_grad():
        theirs = model(ids, speaker_id=speaker, speaking_rate=1.3 * model.speaking_rate).waveform[0]
    vits = Vits(vits_tiny.model(**kind))
    (latents,) = vits.plan([Clause(TOKENS, speaker or 0, 1.3, seed=11)])
    ours = whole(vits, latents)
    assert 0.005 < theirs.abs().median() < 0.8  # neither silent nor saturated
    torch.testing.assert_close(ours, theirs, **ROUNDING)
    assert len(theirs) == latents.length * vits.hop_samples == latents.ends[-1] * vits.hop_samples


def test_a_row_is_the_same_in_any_batch(kind: dict[str, Any]) -> None:
    vits = Vits(vits_tiny.model(**kind))
    speakers = (0, 2, 1) if "num_speakers" in kind else (0, 0, 0)
    clauses = [
        Clause(TOKENS, speakers[0], 1.0, seed=1),
        Clause(TOKENS[:3], speakers[1], 0.6, seed=2),
        Clause(TOKENS * 3, speakers[2], 1.5, seed=1),
    ]
    for together, clause in zip(vits.plan(clauses), clauses, strict=True):
        (alone,) = vits.plan([clause])
        assert together.ends == alone.ends
        torch.testing.assert_close(together.frames, alone.frames, **ROUNDING)


def test_windows_of_many_rows_sound_as_each_alone(kind: dict[str, Any]) -> None:
    vits = Vits(vits_tiny.model(**kind))
    speakers = (0, 2) if "num_speakers" in kind else (0, 0)
    rows = vits.plan([Clause(TOKENS, speakers[0]), Clause(TOKENS * 2, speakers[1])])
    windows = [(rows[0], 0, 40), (rows[1], 20, 60)]
    both = vits.sound(windows)
    for window, sound in zip(windows, both, strict=True):
        torch.testing.assert_close(sound, vits.sound([window])[0], **ROUNDING)


@pytest.mark.parametrize("least", [0, 70])
@pytest.mark.parametrize("step", [1, 7, 50])
def test_in_pieces_it_sounds_as_the_whole(step: int, least: int) -> None:
    vits = Vits(vits_tiny.model())
    (latents,) = vits.plan([Clause(TOKENS)])
    assert latents.length > 2 * step + 2 * vits.context_frames
    hop, pieces = vits.hop_samples, []
    for begin in range(0, latents.length, step):
        end = min(begin + step, latents.length)
        first, last = vits.window(latents, begin, end, least)
        assert last - first >= min(least, last)
        sound = vits.sound([(latents, first, last)])[0]
        pieces.append(sound[(begin - first) * hop : (end - first) * hop])
    torch.testing.assert_close(torch.cat(pieces), whole(vits, latents), **ROUNDING)


def test_less_context_would_not_do() -> None:
    """That the test above can fail."""
    vits = Vits(vits_tiny.model())
    (latents,) = vits.plan([Clause(TOKENS)])
    begin, hop = 60, vits.hop_samples
    sound = vits.sound([(latents, begin - vits.context_frames // 2, latents.length)])[0]
    piece = sound[vits.context_frames // 2 * hop :]
    assert (piece - whole(vits, latents)[begin * hop :]).abs().max() > 1e-3


def test_the_noise_is_the_seeds() -> None:
    vits = Vits(vits_tiny.model())
    a, b, c = vits.plan([Clause(TOKENS, seed=1), Clause(TOKENS, seed=1), Clause(TOKENS, seed=2)])
    assert torch.equal(a.frames, b.frames)
    assert a.frames.shape != c.frames.shape or not torch.equal(a.frames, c.frames)


def test_speed() -> None:
    vits = Vits(vits_tiny.model())
    slow, fast = vits.plan([Clause(TOKENS, speed=0.5), Clause(TOKENS, speed=1.5)])
    assert slow.length == pytest.approx(3 * fast.length, rel=0.2)


def test_a_checkpoint_is_loaded_with_weight_norms_of_either_name(tmp_path: Path) -> None:
    vits_tiny.save(tmp_path)
    (latents,) = Vits.load(str(tmp_path)).plan([Clause(TOKENS)])
    weights = load_file(tmp_path / "model.safetensors")
    renamed = {}
    for name, tensor in weights.items():
        name = name.replace("parametrizations.weight.original0", "weight_g")
        renamed[name.replace("parametrizations.weight.original1", "weight_v")] = tensor
    assert renamed.keys() != weights.keys()
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    (again,) = Vits.load(str(tmp_path)).plan([Clause(TOKENS)])
    torch.testing.assert_close(again.frames, latents.frames, **ROUNDING)


def test_keys_that_do_not_fit_are_named(tmp_path: Path) -> None:
    vits_tiny.save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["decoder.conv_two.weight"] = weights.pop("decoder.conv_pre.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArchitectureError) as caught:
        Vits.load(str(tmp_path))
    assert "missing: decoder.conv_pre.weight" in str(caught.value)
    assert "unexpected: decoder.conv_two.weight" in str(caught.value)


def test_endless_durations_are_refused() -> None:
    vits = Vits(vits_tiny.model())
    with pytest.raises(ModelError, match="durations"):
        vits.plan([Clause(TOKENS, speed=1e-4)])
