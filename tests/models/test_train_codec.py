"""The training of the tiny codec, for a second."""

import pytest

pytest.importorskip("torch", reason="models need torch")
pytest.importorskip("espeakng_loader", reason="the training speech is eSpeak NG's")

from pathlib import Path

import torch

from models.parrot.codec import CodecConfig, TinyCodec
from models.parrot.train_codec import Settings, train

SECOND = Settings(minutes=1 / 60, pairs=2, batch=2, frames=16, vocoder_batch=1, clips=2)


@pytest.mark.parametrize("decoder_only", [False, True])
def test_a_decoder_can_be_trained_on_codes_that_stay(tmp_path: Path, decoder_only: bool) -> None:
    torch.manual_seed(0)
    before = TinyCodec(CodecConfig()).eval()
    before.save(tmp_path / "before")
    settings = Settings(**(vars(SECOND) | {"decoder_only": decoder_only}))
    train(tmp_path / "after", settings, start=tmp_path / "before")
    after = TinyCodec.load(tmp_path / "after")
    sound = 0.1 * torch.randn(1, 40 * before.frame_samples)
    codes = before.encode(sound)
    assert torch.equal(after.encode(sound), codes) == decoder_only
    assert not torch.allclose(after.decode(codes), before.decode(codes))
