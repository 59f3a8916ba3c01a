"""CodeHiFiGAN: speech units to sound, with the published unit vocoders' names and weights.

Architecture and key names as in arXiv 2104.00355 (speech resynthesis) and the checkpoints of
textless-lib and fairseq: a `config.json`, and one state dict under `generator` whose convolutions
are weight-normalised (folded here). 50 units a second at 16 kHz: 320 samples each.

Letters: R rows, F frames (units), C channels, E width of an embedding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models.common.errors import ArchitectureError, ConfigError, VocabularyError
from models.common.hifigan import Generator, StreamPass, WholePass
from models.common.tokens import RowState

CHECKPOINT_NAMES = ("model.safetensors", "model.pt", "g_*")
"""Where a vocoder's weights are looked for in its folder, in this order."""


class DurationPredictor(nn.Module):
    """How many frames each of a sequence of units without repetitions lasts. [R, F, E] -> [R, F]"""

    def __init__(self, width: int, hidden: int, kernel: int) -> None:
        super().__init__()
        pad = (kernel - 1) // 2
        self.conv1 = nn.Sequential(nn.Conv1d(width, hidden, kernel, padding=pad), nn.ReLU())
        self.ln1 = nn.LayerNorm(hidden)
        self.conv2 = nn.Sequential(nn.Conv1d(hidden, hidden, kernel, padding=1), nn.ReLU())
        self.ln2 = nn.LayerNorm(hidden)
        self.proj = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln1(self.conv1(x.transpose(1, 2)).transpose(1, 2))
        x = self.ln2(self.conv2(x.transpose(1, 2)).transpose(1, 2))
        log_durations = self.proj(x)[..., 0]
        return (log_durations.exp() - 1).round().long().clamp(min=1)


class CodeHiFiGAN(Generator):
    """Units [R, F] to samples [R, F * hop_samples], whole or as they come."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """`config` as in the published config.json. Raises ConfigError."""
        speakers = config.get("num_speakers", 200) if config.get("multispkr") else 0
        width = config["embedding_dim"]
        _require_supported(config, in_channels=width * (2 if speakers else 1))
        super().__init__(config, in_channels=width * (2 if speakers else 1))
        self.sample_rate_hz: int = config["sampling_rate"]
        self.num_units: int = config["num_embeddings"]
        self.num_speakers: int = speakers
        self.dict = nn.Embedding(self.num_units, width)
        self.spkr = nn.Embedding(speakers, width) if speakers else None
        durations = config.get("dur_predictor_params")
        self.dur_predictor = durations and DurationPredictor(
            durations["encoder_embed_dim"],
            durations["var_pred_hidden_dim"],
            durations["var_pred_kernel_size"],
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str = "cpu") -> CodeHiFiGAN:
        """Raises ConfigError, ArchitectureError, OSError."""
        config = json.loads((Path(folder) / "config.json").read_text())
        model = cls(config)
        load_generator(model, Path(folder))
        model.eval().requires_grad_(False).to(device)
        return model

    @property
    def latency_frames(self) -> int:
        """By how many units a stream of sound is late: the look-ahead, in whole frames."""
        return -(-self.late_samples // self.hop_samples)

    @torch.no_grad()
    def durations(self, units: Tensor) -> Tensor:
        """Frames that each unit of a sequence without repetitions lasts. [R, F] -> [R, F]

        Raises ArchitectureError where the checkpoint has no duration predictor.
        """
        if self.dur_predictor is None:
            raise ArchitectureError("this vocoder has no duration predictor")
        durations: Tensor = self.dur_predictor(self.dict(units))
        return durations

    @torch.no_grad()
    def decode(
        self,
        units: Tensor,
        state: RowState | None = None,
        active: Tensor | None = None,
        speaker: int = 0,
    ) -> Tensor:
        """[R, F] -> [R, F * hop_samples]; with a state, `latency_frames` late."""
        x = self._embed(units, speaker)
        if state is None:
            return self(x, WholePass()).x[:, 0]
        run = StreamPass(state, active, units.shape[1], x)
        sound = run.delay(self, self(x, run), self.latency_frames * self.hop_samples)
        return sound.x[:, 0]

    def _embed(self, units: Tensor, speaker: int) -> Tensor:
        """[R, F] -> [R, C, F]"""
        x: Tensor = self.dict(units)
        if self.spkr is not None:
            if not 0 <= speaker < self.num_speakers:
                raise VocabularyError(f"speaker {speaker} of {self.num_speakers}")
            voice = self.spkr.weight[speaker].expand_as(x)
            x = torch.cat((x, voice), dim=-1)
        return x.transpose(1, 2)


def _require_supported(config: Mapping[str, Any], in_channels: int) -> None:
    if str(config.get("resblock", "1")) != "1":
        raise ConfigError("only vocoders with residual blocks of type 1 are supported")
    for name in ("f0", "embedder_params"):
        if config.get(name):
            raise ConfigError(f"vocoders with {name!r} are not supported")
    if config.get("model_in_dim", in_channels) != in_channels:
        raise ConfigError(
            f"model_in_dim is {config['model_in_dim']}, the embeddings make {in_channels}"
        )
    for rate, kernel in zip(
        config["upsample_rates"], config["upsample_kernel_sizes"], strict=False
    ):
        if kernel < rate or (kernel - rate) % 2:
            raise ConfigError(f"an upsampling kernel of {kernel} does not fit the rate {rate}")


def load_generator(model: nn.Module, folder: Path) -> None:
    """The weights of a published vocoder into `model`. Raises ArchitectureError, OSError."""
    found = [path for name in CHECKPOINT_NAMES for path in sorted(folder.glob(name))]
    if not found:
        raise FileNotFoundError(f"{folder} has none of {', '.join(CHECKPOINT_NAMES)}")
    if found[0].suffix == ".safetensors":
        weights = load_file(found[0])
    else:
        weights = torch.load(found[0], map_location="cpu", weights_only=True)
    weights = fold_weight_norm(weights.get("generator", weights))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ArchitectureError(f"{found[0]}: {error}") from None


def fold_weight_norm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every `X.weight_g` and `X.weight_v` (or their parametrized names) as one `X.weight`."""
    folded = dict(weights)
    for gain, direction in (
        (".weight_g", ".weight_v"),
        (".parametrizations.weight.original0", ".parametrizations.weight.original1"),
    ):
        for key in [key for key in weights if key.endswith(gain)]:
            layer = key.removesuffix(gain)
            g, v = folded.pop(key), folded.pop(layer + direction)
            folded[f"{layer}.weight"] = torch._weight_norm(v, g, 0)
    return folded
