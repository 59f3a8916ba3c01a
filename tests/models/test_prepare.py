"""Recordings into shards, and what is said of those that can't be used."""

import pytest

pytest.importorskip("torch", reason="models need torch")
pytest.importorskip("safetensors", reason="shards need safetensors")
pytest.importorskip("soundfile", reason="reading recordings needs soundfile")

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray

from models.parrot import prepare as prepare_module
from models.parrot import recordings
from models.parrot.prepare import Job, encode, prepare, summary
from models.parrot.recordings import (
    BleedError,
    ChannelsError,
    ClippedError,
    Limits,
    RecordingError,
    SilentChannelError,
    UnequalLengthError,
    UnreadableError,
    find,
    read,
)
from models.parrot.shards import Shards
from tests.models.level import RATE_HZ, LevelTokenizer


def voice(seconds: float, seed: int = 0, rate_hz: int = RATE_HZ) -> NDArray[np.float32]:
    """Bursts of noise with silence between them."""
    chance = np.random.default_rng(seed)
    samples = chance.normal(0, 0.1, round(seconds * rate_hz)).astype(np.float32)
    talking = np.repeat(chance.random(len(samples) // 4000 + 1) < 0.5, 4000)[: len(samples)]
    talking[:4000] = True
    quiet: NDArray[np.float32] = np.where(talking, samples, np.float32(0)).clip(-0.9, 0.9)
    return quiet


def save(path: Path, *channels: NDArray[np.float32], rate_hz: int = RATE_HZ, **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.stack(channels, axis=1), rate_hz, **more)
    return path


def job(tmp_path: Path, **changes: Any) -> Job:
    return Job(tmp_path / "in", tmp_path / "out", LevelTokenizer, **changes)


def read_one(folder: Path, channels: int = 2, **limits: Any) -> Any:
    (recording,) = find(folder, channels)
    return read(recording, channels, RATE_HZ, Limits(**limits))


def test_conversations_of_every_layout_are_found(tmp_path: Path) -> None:
    one, other = voice(0.3, 1), voice(0.3, 2)
    save(tmp_path / "stereo.wav", one, other)
    save(tmp_path / "d1/000/fe_03_00001.sph", one, other, format="NIST", subtype="ULAW")
    for first, second in (("x_a", "x_b"), ("y.A", "y.B"), ("z-0", "z-1"), ("w-left", "w-right")):
        save(tmp_path / f"{first}.wav", one)
        save(tmp_path / f"{second}.wav", other)
    for number in (1, 2):  # numbered conversations, no partners
        save(tmp_path / f"call-{number}.flac", one, other)
    found = {r.name: [path.name for path in r.files] for r in find(tmp_path, 2)}
    assert found == {
        "stereo.wav": ["stereo.wav"],
        "d1/000/fe_03_00001.sph": ["fe_03_00001.sph"],
        "x_a.wav": ["x_a.wav", "x_b.wav"],
        "y.A.wav": ["y.A.wav", "y.B.wav"],
        "z-0.wav": ["z-0.wav", "z-1.wav"],
        "w-left.wav": ["w-left.wav", "w-right.wav"],
        "call-1.flac": ["call-1.flac"],
        "call-2.flac": ["call-2.flac"],
    }
    for recording in find(tmp_path, 2):
        samples, _ = read(recording, 2, RATE_HZ, Limits())
        np.testing.assert_allclose(samples[0], one, atol=0.02)
        np.testing.assert_allclose(samples[1], other, atol=0.02)
    assert len(find(tmp_path, 1)) == 12


def test_nothing_to_prepare(tmp_path: Path) -> None:
    with pytest.raises(UnreadableError, match=r"no .*\.wav"):
        find(tmp_path, 2)


def test_8_khz_is_taken_and_noted(tmp_path: Path) -> None:
    save(tmp_path / "a.wav", voice(1, 1, 8000), voice(1, 2, 8000), rate_hz=8000)
    samples, finding = read_one(tmp_path)
    assert samples.shape == (2, RATE_HZ)
    assert finding.narrow_band
    assert (finding.seconds, finding.rate_hz) == (1.0, 8000)


def test_one_channel_where_two_are_needed_and_the_other_way_round(tmp_path: Path) -> None:
    path = save(tmp_path / "a.wav", voice(0.2))
    with pytest.raises(ChannelsError, match=r"a\.wav: 1 channel.*pairs need two"):
        read_one(tmp_path)
    save(path, voice(0.2), voice(0.2))
    with pytest.raises(ChannelsError, match=r"2 channel.*single-channel"):
        read_one(tmp_path, channels=1)


def test_files_of_unequal_length_are_refused_or_filled_up(tmp_path: Path) -> None:
    save(tmp_path / "x_a.wav", voice(1.0))
    save(tmp_path / "x_b.wav", voice(0.5, 1))
    with pytest.raises(UnequalLengthError, match=r"1\.00 and 0\.50 s"):
        read_one(tmp_path)
    samples, _ = read_one(tmp_path, pad=True)
    assert samples.shape == (2, RATE_HZ)
    assert not samples[1, 8000:].any()
    save(tmp_path / "x_b.wav", voice(0.95, 1))
    assert read_one(tmp_path)[0].shape == (2, RATE_HZ)
    save(tmp_path / "x_b.wav", voice(1.0, 1, 8000), rate_hz=8000)
    with pytest.raises(UnequalLengthError, match="16000 and 8000 Hz"):
        read_one(tmp_path)


def test_a_silent_channel(tmp_path: Path) -> None:
    hiss = np.random.default_rng(0).normal(0, 1e-4, 8000).astype(np.float32)
    save(tmp_path / "a.wav", voice(0.5), hiss)
    with pytest.raises(SilentChannelError, match="channel 1 is silent"):
        read_one(tmp_path)
    assert read_one(tmp_path, allow_silent=True)[0].shape == (2, 8000)


def test_clipped_audio(tmp_path: Path) -> None:
    loud = (voice(0.5) * 20).clip(-1, 1)
    save(tmp_path / "a.wav", loud, voice(0.5, 1))
    with pytest.raises(ClippedError, match=r"a\.wav: .*% of a channel is clipped"):
        read_one(tmp_path)
    _, finding = read_one(tmp_path, max_clipped_share=1.0)
    assert finding.clipped_share[0] > 0.01
    assert finding.clipped_share[1] == 0


def test_bleed_is_measured_and_refused_where_asked(tmp_path: Path) -> None:
    person, parley = voice(6, 1), voice(6, 2)
    lag = RATE_HZ // 8
    echo = np.concatenate((np.zeros(lag, np.float32), parley[:-lag] * np.float32(0.05)))  # -26 dB
    save(tmp_path / "a.wav", person + echo, parley)
    _, finding = read_one(tmp_path)
    assert finding.bleed_db[0] is None
    assert finding.bleed_db[1] == pytest.approx(-26, abs=1.5)
    with pytest.raises(BleedError, match="-26 dB"):
        read_one(tmp_path, max_bleed_db=-30.0)


def test_files_that_are_no_audio(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"not at all")
    with pytest.raises(UnreadableError, match=r"a\.wav"):
        read_one(tmp_path)
    (tmp_path / "a.wav").unlink()
    header = b"NIST_1A\n   1024\nsample_coding -s26 ulaw,embedded-shorten-v2.00\nend_head\n"
    (tmp_path / "b.sph").write_bytes(header.ljust(1024) + b"ajkg" * 99)
    with pytest.raises(UnreadableError, match="sph2pipe"):
        read_one(tmp_path)


def test_encoding_in_pieces_is_encoding_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "CHUNK_FRAMES", 7)
    tokenizer = LevelTokenizer()
    samples = torch.from_numpy(np.stack((voice(2), voice(2, 1))))[:, : 640 * 50 - 100]
    whole = torch.nn.functional.pad(samples, (0, 100))
    assert torch.equal(encode(tokenizer, samples), tokenizer.encode(whole).transpose(0, 1))


def test_a_folder_becomes_shards_and_a_report(tmp_path: Path) -> None:
    for number in range(5):
        save(tmp_path / f"in/{number}.wav", voice(1, number), voice(1, number + 10))
    save(tmp_path / "in/bad.wav", voice(1))
    report = prepare(job(tmp_path, processes=2))
    shards = Shards([tmp_path / "out"])
    assert shards.lengths == [25] * 5
    both = torch.from_numpy(np.stack((voice(1, 3), voice(1, 13))))
    wanted = LevelTokenizer().encode(both).transpose(0, 1)
    assert (shards[3] - wanted).abs().max() <= 1  # 16 bits on disk
    assert report == json.loads((tmp_path / "out/report.json").read_text())
    assert report["bad.wav"]["refused"].startswith("ChannelsError")
    assert summary(report).splitlines()[-1] == "refused 1: ChannelsError"


def test_a_run_that_was_broken_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        save(tmp_path / f"in/{number}.wav", voice(1, number), voice(1, number + 10))
    done: list[str] = []
    original = recordings.read

    def counted(recording: Any, *rest: Any) -> Any:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(recording.name)
        return original(recording, *rest)

    monkeypatch.setattr(prepare_module, "read", counted)
    with pytest.raises(KeyboardInterrupt):
        prepare(job(tmp_path, shard_frames=25))
    assert len(Shards([tmp_path / "out"])) == 3
    done.clear()
    report = prepare(job(tmp_path, shard_frames=25))
    assert done == ["3.wav"]
    assert list(report) == [f"{number}.wav" for number in range(4)]
    assert len(Shards([tmp_path / "out"])) == 4


def test_a_folder_of_which_nothing_can_be_used(tmp_path: Path) -> None:
    save(tmp_path / "in/a.wav", voice(1))
    with pytest.raises(RecordingError, match=r"none of 1 recordings.*ChannelsError"):
        prepare(job(tmp_path))


def test_single_channels(tmp_path: Path) -> None:
    save(tmp_path / "in/x_a.wav", voice(1))
    prepare(job(tmp_path, channels=1))
    shards = Shards([tmp_path / "out"])
    assert (shards.vocabulary.channels, shards[0].shape) == (1, (25, 1, 1))
