"""HuBERT units by sliding windows, k-means, and the vocoder behind them."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="models need torch")
pytest.importorskip("transformers", reason="models need transformers")

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.common import kmeans
from models.common.errors import (
    ArchitectureError,
    ConfigError,
    FrameLengthError,
    VocabularyError,
)
from models.common.units import (
    FRAME_SAMPLES,
    RATE_HZ,
    HubertFeatures,
    UnitTokenizer,
    Window,
    load_centroids,
    nearest,
)
from models.common.vocoder import CodeHiFiGAN
from tests.models.streams import measured_latency, streamed

torch.set_num_threads(1)

LAYER = 2
UNITS = 12
WINDOW = Window(lookback_frames=9, block_frames=4, lookahead_frames=3)
FRAMES = 30
VOCODER = {
    "upsample_rates": [20, 16],
    "upsample_kernel_sizes": [40, 32],
    "upsample_initial_channel": 8,
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1, 3]],
    "num_embeddings": UNITS,
    "embedding_dim": 8,
    "sampling_rate": RATE_HZ,
}


def hubert(**changes: Any) -> Any:
    """Small and random, HuBERT's own kernels and strides."""
    torch.manual_seed(4)
    settings = {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "conv_dim": [8] * 7,
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 4,
        "initializer_range": 0.4,
        **changes,
    }
    return transformers.HubertModel(transformers.HubertConfig(**settings)).eval()


def recordings(rows: int = 3, frames: int = FRAMES) -> Tensor:
    """Gliding tones in noise."""
    generator = torch.Generator().manual_seed(6)
    at = torch.arange(frames * FRAME_SAMPLES) / RATE_HZ
    pitch_hz = 150 * (1 + torch.arange(rows))[:, None] * (1 + torch.sin(20 * at) / 2)
    noise = torch.randn(rows, len(at), generator=generator) / 20
    return torch.sin(2 * torch.pi * pitch_hz.cumsum(1) / RATE_HZ) / 3 + noise


def centroids(width: int = 16) -> Tensor:
    return torch.randn(UNITS, width, generator=torch.Generator().manual_seed(7)) * 2


@pytest.fixture(scope="module")
def features() -> HubertFeatures:
    return HubertFeatures(hubert(), LAYER, WINDOW, normalize=True)


@pytest.fixture(scope="module")
def tokenizer(features: HubertFeatures) -> UnitTokenizer:
    """Centroids from among the features, so that the units are many."""
    some = features.of_recordings(recordings(4)).flatten(0, 1)
    torch.manual_seed(8)
    vocoder = CodeHiFiGAN(VOCODER).eval().requires_grad_(False)
    return UnitTokenizer(features, some[torch.randperm(len(some))[:UNITS]], vocoder)


def by_windows(tokenizer: UnitTokenizer, samples: Tensor) -> Tensor:
    """One recording [N], block by block, each from its own audio and transformers' own pass."""
    features, window = tokenizer.features, tokenizer.features.window
    units = []
    for begin in range(0, len(samples) // FRAME_SAMPLES, window.block_frames):
        audio = torch.zeros(window.frames * FRAME_SAMPLES)
        for at in range(len(audio)):
            source = (begin - window.lookback_frames) * FRAME_SAMPLES + at
            if 0 <= source < len(samples):
                audio[at] = samples[source]
        extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)
        given = extractor(audio.numpy(), sampling_rate=RATE_HZ, return_tensors="pt").input_values
        with torch.no_grad():
            hidden = features.model(given).last_hidden_state[0]
        for i in range(window.block_frames):
            frame = hidden[window.lookback_frames + i]
            distances = [float((frame - centroid).norm()) for centroid in tokenizer.centroids]
            units.append(int(np.argmin(distances)))
    return torch.tensor(units[: len(samples) // FRAME_SAMPLES])


def test_whole_is_every_block_from_its_own_window(tokenizer: UnitTokenizer) -> None:
    samples = recordings()
    units = tokenizer.encode(samples)
    assert units.shape == (3, FRAMES, 1)
    assert units.unique().numel() > UNITS // 2
    for row in range(3):
        assert torch.equal(units[row, :, 0], by_windows(tokenizer, samples[row]))


@pytest.mark.parametrize("at_once", [1, 3, FRAMES])
def test_streamed_equals_whole_as_late_as_it_says(tokenizer: UnitTokenizer, at_once: int) -> None:
    samples = recordings()
    whole = tokenizer.encode(samples)
    state = tokenizer.encoder_state(len(samples))
    late = streamed(tokenizer.encode, samples, at_once * FRAME_SAMPLES, state)
    assert measured_latency(late, whole, 0) == tokenizer.encode_latency_frames == 6


def test_decoding_is_as_late_as_it_says(tokenizer: UnitTokenizer) -> None:
    codes = tokenizer.encode(recordings())
    whole = tokenizer.decode(codes)
    late = streamed(tokenizer.decode, codes, 1, tokenizer.decoder_state(3))
    frames = (-1, FRAME_SAMPLES)
    tolerance = 1e-5 * float(whole.abs().max())
    measured = measured_latency(late.unflatten(1, frames), whole.unflatten(1, frames), tolerance)
    assert measured == tokenizer.decode_latency_frames > 0


def test_rows_join_idle_and_leave_alone(tokenizer: UnitTokenizer) -> None:
    """Row r takes part in every (r + 1)-th call only; row 1 is begun anew halfway."""
    samples = recordings(frames=60)
    whole, state = tokenizer.encode(samples), tokenizer.encoder_state(3)
    at, compared = [0, 0, 0], 0
    for tick in range(50):
        if tick == 20:
            state.reset([1])
            at[1] = 0
        active = torch.tensor([tick % (row + 1) == 0 for row in range(3)])
        frame = torch.stack([samples[r].view(-1, FRAME_SAMPLES)[at[r]] for r in range(3)])
        frame[~active] = torch.nan
        units = tokenizer.encode(frame, state, active)
        for row in active.nonzero()[:, 0].tolist():
            stands_for = at[row] - tokenizer.encode_latency_frames
            if stands_for >= 0:
                assert int(units[row, 0, 0]) == int(whole[row, stands_for, 0])
                compared += 1
            at[row] += 1
    assert compared > 60


def test_a_unit_hears_to_the_end_of_its_window_and_no_further(tokenizer: UnitTokenizer) -> None:
    samples = recordings(1)
    features, window = tokenizer.features, tokenizer.features.window
    before = features.of_recordings(samples)
    for changed in (10, 15, 20):
        other = samples.clone()
        other[:, changed * FRAME_SAMPLES : (changed + 1) * FRAME_SAMPLES] *= -1
        differs = (features.of_recordings(other) != before).any(2)[0].nonzero()[:, 0].tolist()
        blocks = [
            block
            for block in range(-(-FRAMES // window.block_frames))
            if -window.lookback_frames
            <= changed - block * window.block_frames
            < window.block_frames + window.lookahead_frames
        ]
        expected = [
            block * window.block_frames + i for block in blocks for i in range(window.block_frames)
        ]
        assert differs == [frame for frame in expected if frame < FRAMES]


def test_a_wider_window_agrees_more_with_the_pass_over_everything() -> None:
    """The stated difference from the usual, non-streaming units, on a random model: its features
    depend on far frames more than a trained one's."""
    samples, model = recordings(frames=120), hubert()
    with torch.no_grad():
        full = model(samples, output_hidden_states=True).hidden_states[LAYER]
    table = full.flatten(0, 1)[:: len(full.flatten(0, 1)) // UNITS][:UNITS]
    agreement = []
    for lookback, lookahead in ((2, 1), (10, 5), (60, 30)):
        window = Window(lookback, 10, lookahead)
        windowed = HubertFeatures(hubert(), LAYER, window).of_recordings(samples)
        same = nearest(windowed[:, : full.shape[1]], table) == nearest(full, table)
        agreement.append(float(same.float().mean()))
    assert agreement == sorted(agreement)
    assert agreement[-1] > agreement[0]


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("layer", [1, 3])
def test_a_layer_is_transformers_hidden_state(layer: int, stable: bool) -> None:
    model = hubert(do_stable_layer_norm=stable, feat_extract_norm="layer" if stable else "group")
    audio = recordings(2, WINDOW.frames)
    with torch.no_grad():
        hidden = model(audio, output_hidden_states=True).hidden_states[layer]
    ours = HubertFeatures(model, layer, WINDOW).of_windows(audio)
    assert torch.allclose(ours, hidden[:, 9:13], atol=1e-5)


def save(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder / "hubert")
    transformers.Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(folder / "hubert")
    return folder / "hubert"


def test_from_a_folder(tmp_path: Path) -> None:
    save(tmp_path, hubert())
    save_file({"centroids": centroids()}, tmp_path / "km.safetensors")
    (tmp_path / "vocoder").mkdir()
    (tmp_path / "vocoder" / "config.json").write_text(json.dumps(VOCODER))
    save_file(CodeHiFiGAN(VOCODER).state_dict(), tmp_path / "vocoder" / "model.safetensors")
    settings = {
        "hubert": "hubert",
        "layer": LAYER,
        "centroids": "km.safetensors",
        "vocoder": "vocoder",
        "window": {"lookback_frames": 5, "block_frames": 2, "lookahead_frames": 1},
    }
    (tmp_path / "units.json").write_text(json.dumps(settings))
    made = UnitTokenizer.from_pretrained(tmp_path)
    assert (made.frame_rate_hz, made.codebook_size, made.encode_latency_frames) == (50.0, UNITS, 2)
    assert made.decode(made.encode(recordings())).shape == recordings().shape


def test_centroids_from_an_array(tmp_path: Path) -> None:
    np.save(tmp_path / "km.npy", centroids().numpy())
    assert torch.equal(load_centroids(tmp_path / "km.npy"), centroids())


def test_what_does_not_fit_is_named(features: HubertFeatures) -> None:
    with pytest.raises(ConfigError, match="look 1 frame ahead"):
        Window(lookahead_frames=0)
    with pytest.raises(ConfigError, match="layer 4 of a model that has 3"):
        HubertFeatures(hubert(), 4, WINDOW)
    with pytest.raises(ArchitectureError, match="not 320 samples"):
        HubertFeatures(hubert(conv_stride=[5, 2, 2, 2, 2, 2, 1]), 1, WINDOW)
    with pytest.raises(ArchitectureError, match="for features of 16"):
        UnitTokenizer(features, centroids(8))
    with pytest.raises(VocabularyError, match="13 centroids for a vocoder of 12"):
        UnitTokenizer(features, torch.zeros(13, 16), CodeHiFiGAN(VOCODER))
    short = {**VOCODER, "upsample_rates": [10, 16], "upsample_kernel_sizes": [20, 32]}
    with pytest.raises(ArchitectureError, match="320 at 16000"):
        UnitTokenizer(features, centroids(), CodeHiFiGAN(short))
    silent = UnitTokenizer(features, centroids())
    with pytest.raises(ArchitectureError, match="without a vocoder"):
        silent.decode(torch.zeros(1, 1, 1, dtype=torch.long))
    with pytest.raises(FrameLengthError, match="not whole frames of 320"):
        silent.encode(torch.zeros(1, 319))


def blobs(count: int, clusters: int, seed: int, spread: float = 0.05) -> Tensor:
    """Points around corners that are as far from each other. [N, clusters]"""
    generator = torch.Generator().manual_seed(seed)
    corners = 5 * torch.eye(clusters)[torch.arange(count) % clusters]
    return corners + spread * torch.randn(count, clusters, generator=generator)


def test_a_batch_updates_as_the_running_mean_one_by_one() -> None:
    """Sculley's rule, point after point, assignments fixed at the beginning of a batch."""
    generator = torch.Generator().manual_seed(0)
    ours = kmeans.Clusters(torch.randn(5, 3, generator=generator), torch.zeros(5).long())
    centers = [centroid.double().clone() for centroid in ours.centroids]
    counts = [0] * 5
    for _ in range(4):
        batch = torch.randn(50, 3, generator=generator)
        owners = [
            int(np.argmin([float((point - center).norm()) for center in centers]))
            for point in batch
        ]
        error = np.mean([float((batch[i] - centers[o]).norm() ** 2) for i, o in enumerate(owners)])
        for point, owner in zip(batch, owners, strict=True):
            counts[owner] += 1
            centers[owner] += (point - centers[owner]) / counts[owner]
        assert ours.update(batch) == pytest.approx(error, rel=1e-4)
    assert ours.counts.tolist() == counts
    assert torch.allclose(ours.centroids.double(), torch.stack(centers), atol=1e-5)


def test_seeding_takes_a_point_of_every_cluster() -> None:
    seeds = kmeans.seeded(blobs(400, 8, 0), 8, torch.Generator().manual_seed(1))
    assert sorted(seeds.centroids.argmax(1).tolist()) == list(range(8))


def files_of(count: int) -> list[Path]:
    return [Path(f"{number:02}") for number in range(count)]


def test_a_run_broken_off_ends_where_an_unbroken_one_does(tmp_path: Path) -> None:
    recipe = kmeans.Recipe(model="m", features=1, clusters=8, epochs=2, batch_files=3, seed=5)

    def read(path: Path) -> Tensor:
        return blobs(40, 8, int(path.name), spread=0.3)

    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    steps = list(kmeans.fit(files_of(10), read, recipe, whole))
    assert [done for done, _, _ in steps] == list(range(1, 9))
    for _ in range(3):  # three batches, then killed
        next(kmeans.fit(files_of(10), read, recipe, broken))
    assert len(list(kmeans.fit(files_of(10), read, recipe, broken))) == 5
    ours, theirs = load_file(whole), load_file(broken)
    assert torch.equal(ours["centroids"], theirs["centroids"])
    assert ours["counts"].sum() == 2 * 10 * 40
    found = ours["centroids"][ours["centroids"].argmax(1).argsort()]
    assert torch.allclose(found, blobs(8, 8, 0, spread=0), atol=0.2)
    with pytest.raises(ConfigError, match="choose another file"):
        next(kmeans.fit(files_of(10), read, kmeans.Recipe("m", 2, clusters=8), broken))


def test_too_little_speech_is_named(tmp_path: Path) -> None:
    with pytest.raises(FrameLengthError, match="4 frames are too few for 8"):
        kmeans.seeded(blobs(4, 4, 0), 8, torch.Generator())
    with pytest.raises(FrameLengthError, match="only 4 different frames for 8"):
        kmeans.seeded(blobs(40, 4, 0, spread=0), 8, torch.Generator())
    (tmp_path / "no.wav").write_bytes(b"RIFF")
    with pytest.raises(FrameLengthError, match=r"no\.wav"):
        kmeans.read_speech(tmp_path / "no.wav")


def test_the_tool_makes_what_the_tokenizer_takes(tmp_path: Path) -> None:
    (tmp_path / "speech").mkdir()
    for number, samples in enumerate(recordings(4)):
        with wave.open(str(tmp_path / "speech" / f"{number}.wav"), "wb") as file:
            file.setparams((1, 2, RATE_HZ, 0, "NONE", ""))
            file.writeframes((samples * 32767).to(torch.int16).numpy().tobytes())
    output = tmp_path / "km.safetensors"
    settings = {
        "--input_data": tmp_path / "speech",
        "--output": output,
        "--model": save(tmp_path, hubert()),
        "--features": LAYER,
        "--clusters": UNITS,
        "--batch_files": 2,
        "--lookback_frames": 9,
    }
    kmeans.main([str(part) for pair in settings.items() for part in pair])
    made = load_centroids(output)
    assert made.shape == (UNITS, 16)
    features = HubertFeatures.from_pretrained(tmp_path / "hubert", LAYER, Window(9))
    units = UnitTokenizer(features, made).encode(recordings(4))
    assert units.unique().numel() > UNITS // 2
