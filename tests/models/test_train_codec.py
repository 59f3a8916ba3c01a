"""The training of the tiny codec, for a second."""

import pytest

pytest.importorskip("torch", reason="models need torch")
pytest.importorskip("espeakng_loader", reason="the training speech is eSpeak NG's")

import json
from pathlib import Path

import torch

from models.common.errors import ConfigError
from models.parrot.codec import CodecConfig, TinyCodec
from models.parrot.train_codec import Settings, train

SECOND = Settings(minutes=1 / 60, pairs=2, batch=2, frames=32, vocoder_batch=1, clips=2)


def test_a_run_goes_on_from_another_one_and_says_what_it_ran_with(tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = TinyCodec(CodecConfig()).eval()
    before.save(tmp_path / "before")
    train(tmp_path / "after", SECOND, start=tmp_path / "before")
    after = TinyCodec.load(tmp_path / "after")
    sound = 0.1 * torch.randn(1, 40 * before.frame_samples)
    codes = before.encode(sound)
    assert not torch.allclose(after.decode(codes), before.decode(codes))
    weights = [codec.to_code.state_dict() for codec in (before, after)]
    for name, weight in weights[0].items():  # not far from where it began
        assert 0 < (weights[1][name] - weight).abs().max() < 0.2
    ran = json.loads((tmp_path / "after/codec_training.json").read_text())
    assert ran["settings"]["clips"] == 2
    assert ran["steps"] >= 1
    assert "step 0 at" in (tmp_path / "after/codec_training.log").read_text()


def test_codes_that_are_kept_stay_and_sound_otherwise(tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = TinyCodec(CodecConfig()).eval()
    before.save(tmp_path / "before")
    train(tmp_path / "after", SECOND, start=tmp_path / "before", keep_codes=True)
    after = TinyCodec.load(tmp_path / "after")
    sound = 0.1 * torch.randn(1, 40 * before.frame_samples)
    codes = before.encode(sound)
    assert torch.equal(after.encode(sound), codes)
    assert not torch.allclose(after.decode(codes), before.decode(codes))
    assert json.loads((tmp_path / "after/codec_training.json").read_text())["keep_codes"] is True


def test_codes_of_no_codec_cannot_be_kept(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--start_from"):
        train(tmp_path / "after", SECOND, keep_codes=True)
