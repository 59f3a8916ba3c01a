"""The unit vocoder: published names and weights, whole and as it comes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="models need torch")

import torch
import torch.nn.functional as nnf
from torch import Tensor

from models.common.errors import ArchitectureError, ConfigError, VocabularyError
from models.common.tokens import RowState
from models.common.vocoder import CodeHiFiGAN, fold_weight_norm
from tests.models.streams import measured_latency, streamed

torch.set_num_threads(1)

UNITS = 40
CONFIG: dict[str, Any] = {
    "resblock": "1",
    "upsample_rates": [5, 4],
    "upsample_kernel_sizes": [11, 8],
    "upsample_initial_channel": 16,
    "resblock_kernel_sizes": [3, 7],
    "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5]],
    "num_embeddings": UNITS,
    "embedding_dim": 8,
    "model_in_dim": 8,
    "f0": False,
    "sampling_rate": 16000,
    "dur_predictor_params": {
        "encoder_embed_dim": 8,
        "var_pred_hidden_dim": 8,
        "var_pred_kernel_size": 3,
        "var_pred_dropout": 0.5,
    },
}
PUBLISHED = {
    **CONFIG,
    "upsample_rates": [5, 4, 4, 2, 2],
    "upsample_kernel_sizes": [11, 8, 8, 4, 4],
    "resblock_kernel_sizes": [3, 7, 11],
    "resblock_dilation_sizes": [[1, 3, 5]] * 3,
    "upsample_initial_channel": 64,
}
"""The released unit vocoders' rates and kernels, fewer channels."""
SPEAKERS = {**CONFIG, "model_in_dim": 16, "multispkr": "from_input_file", "num_speakers": 3}
RELATIVE = 1e-5
"""fp32, sums of other order, of the largest sample."""


def published(config: dict[str, Any]) -> dict[str, Tensor]:
    """A checkpoint's state dict as released: every convolution of the generator as g and v."""
    torch.manual_seed(2)
    weights = {}
    for name, value in CodeHiFiGAN(config).state_dict().items():
        if value.dim() == 1:
            value = torch.randn_like(value) / 10
        if name.endswith("weight") and name.split(".")[0] in (
            "conv_pre",
            "ups",
            "resblocks",
            "conv_post",
        ):
            weights[f"{name}_v"] = value
            weights[f"{name}_g"] = 0.64 + torch.rand(len(value), 1, 1)
        else:
            weights[name] = value
    return weights


def make(folder: Path, config: dict[str, Any] = CONFIG) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({"generator": published(config)}, folder / "g_00500000")
    return folder


def plain(weights: dict[str, Tensor], config: dict[str, Any], x: Tensor) -> Tensor:
    """HiFi-GAN V1 as its paper draws it, from a released state dict. [R, C, F] -> [R, N]"""

    def layer(name: str) -> tuple[Tensor, Tensor]:
        v, g = weights[f"{name}.weight_v"], weights[f"{name}.weight_g"]
        return g * v / v.flatten(1).norm(dim=1)[:, None, None], weights[f"{name}.bias"]

    def conv(name: str, x: Tensor, dilation: int = 1) -> Tensor:
        weight, bias = layer(name)
        pad = dilation * (weight.shape[2] - 1) // 2
        return nnf.conv1d(x, weight, bias, padding=pad, dilation=dilation)

    x = conv("conv_pre", x)
    kernels = len(config["resblock_kernel_sizes"])
    for i, rate in enumerate(config["upsample_rates"]):
        weight, bias = layer(f"ups.{i}")
        pad = (weight.shape[2] - rate) // 2
        x = nnf.conv_transpose1d(nnf.leaky_relu(x, 0.1), weight, bias, stride=rate, padding=pad)
        total = torch.zeros_like(x)
        for j, dilations in enumerate(config["resblock_dilation_sizes"]):
            y = x
            for k, dilation in enumerate(dilations):
                name = f"resblocks.{i * kernels + j}"
                z = conv(f"{name}.convs1.{k}", nnf.leaky_relu(y, 0.1), dilation)
                y = y + conv(f"{name}.convs2.{k}", nnf.leaky_relu(z, 0.1))
            total = total + y
        x = total / kernels
    return conv("conv_post", nnf.leaky_relu(x, 0.01)).tanh()[:, 0]


def units(rows: int = 3, frames: int = 60, seed: int = 0) -> Tensor:
    return torch.randint(UNITS, (rows, frames), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=["small", "published"])
def vocoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    config = {"small": CONFIG, "published": PUBLISHED}[request.param]
    return CodeHiFiGAN.from_pretrained(make(tmp_path_factory.mktemp("vocoder"), config))


def test_released_weights_sound_as_the_paper_says(vocoder: CodeHiFiGAN) -> None:
    config = PUBLISHED if len(vocoder.ups) == 5 else CONFIG
    weights = published(config)
    u = units()
    expected = plain(weights, config, weights["dict.weight"][u].transpose(1, 2))
    sound = vocoder.decode(u)
    assert sound.shape == (3, 60 * vocoder.hop_samples)
    assert expected.std() > 0.05
    assert (sound - expected).abs().max() < RELATIVE


@pytest.mark.parametrize("at_once", [1, 7])
def test_streamed_equals_whole_as_late_as_it_says(vocoder: CodeHiFiGAN, at_once: int) -> None:
    u = units()
    size = vocoder.hop_samples
    whole = vocoder.decode(u).unflatten(1, (-1, size))
    state = RowState(len(u))
    late = streamed(vocoder.decode, u, at_once, state).unflatten(1, (-1, size))
    assert measured_latency(late, whole, RELATIVE) == vocoder.latency_frames


def test_the_look_ahead_is_what_it_must_be(vocoder: CodeHiFiGAN) -> None:
    """A sample changes with units up to `late_samples` behind it, and with none further."""
    exact = copy.deepcopy(vocoder).double()  # a far unit's share is lost in float32
    u = units(1)
    other, at = u.clone(), 40
    other[:, at] = (other[:, at] + 1) % UNITS
    first = int((exact.decode(other) != exact.decode(u))[0].nonzero()[0])
    ahead = at * vocoder.hop_samples - first
    assert vocoder.late_samples - vocoder.hop_samples < ahead <= vocoder.late_samples
    assert vocoder.latency_frames == -(-vocoder.late_samples // vocoder.hop_samples)


def test_the_published_look_ahead() -> None:
    vocoder = CodeHiFiGAN(PUBLISHED)
    assert (vocoder.hop_samples, vocoder.late_samples, vocoder.latency_frames) == (320, 6418, 21)


def test_rows_join_idle_and_leave_alone(vocoder: CodeHiFiGAN) -> None:
    """Row r takes part in every (r + 1)-th call only; row 1 is begun anew halfway."""
    u, state = units(frames=80), RowState(3)
    whole = vocoder.decode(u)
    size, latency = vocoder.hop_samples, vocoder.latency_frames
    at, compared = [0, 0, 0], 0
    for tick in range(70):
        if tick == 20:
            state.reset([1])
            at[1] = 0
        active = torch.tensor([tick % (row + 1) == 0 for row in range(3)])
        given = torch.stack([u[r, at[r] : at[r] + 1] for r in range(3)])
        said = vocoder.decode(given, state, active)
        for row in active.nonzero()[:, 0].tolist():
            stands_for = at[row] - latency
            if stands_for >= 0:
                expected = whole[row, stands_for * size : (stands_for + 1) * size]
                assert (said[row] - expected).abs().max() < RELATIVE
                compared += 1
            at[row] += 1
    assert compared > 50


def test_speakers_and_durations(tmp_path: Path) -> None:
    vocoder = CodeHiFiGAN.from_pretrained(make(tmp_path, SPEAKERS))
    weights, u = published(SPEAKERS), units(1)
    voice = weights["spkr.weight"][2].expand(1, u.shape[1], -1)
    x = torch.cat((weights["dict.weight"][u], voice), dim=-1).transpose(1, 2)
    assert torch.allclose(vocoder.decode(u, speaker=2), plain(weights, SPEAKERS, x), atol=RELATIVE)
    durations = vocoder.durations(u)
    assert durations.shape == u.shape
    assert int(durations.min()) >= 1
    with pytest.raises(VocabularyError, match="speaker 3 of 3"):
        vocoder.decode(u, speaker=3)


def test_parametrized_names_fold_to_the_same() -> None:
    v, g = torch.randn(4, 3, 5), torch.rand(4, 1, 1)
    old = fold_weight_norm({"ups.0.weight_v": v, "ups.0.weight_g": g})
    name = "ups.0.parametrizations.weight.original"
    new = fold_weight_norm({f"{name}1": v, f"{name}0": g})
    assert list(old) == list(new) == ["ups.0.weight"]
    assert torch.equal(old["ups.0.weight"], new["ups.0.weight"])
    assert torch.allclose(old["ups.0.weight"], g * v / v.flatten(1).norm(dim=1)[:, None, None])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"resblock": "2"}, "type 1"),
        ({"f0": True}, "'f0'"),
        ({"embedder_params": {"x": 1}}, "'embedder_params'"),
        ({"model_in_dim": 80}, "model_in_dim is 80, the embeddings make 8"),
        ({"upsample_kernel_sizes": [10, 8]}, "kernel of 10 does not fit the rate 5"),
    ],
)
def test_a_config_that_is_not_supported_is_named(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        CodeHiFiGAN({**CONFIG, **change})


def test_weights_of_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(FileNotFoundError, match="g_"):
        CodeHiFiGAN.from_pretrained(tmp_path)
    torch.save({"generator": {"conv_pre.bias": torch.zeros(3)}}, tmp_path / "model.pt")
    with pytest.raises(ArchitectureError, match=r"model\.pt"):
        CodeHiFiGAN.from_pretrained(tmp_path)
    without = CodeHiFiGAN({**CONFIG, "dur_predictor_params": None})
    with pytest.raises(ArchitectureError, match="no duration predictor"):
        without.durations(units())
