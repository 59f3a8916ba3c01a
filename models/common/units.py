"""Speech units: the nearest of k centroids to each 20 ms frame of a HuBERT layer, repetitions kept.

HuBERT attends to the whole of what it is given, so its features of a frame depend on everything
around it. Here they are those of a sliding window, whole and streamed alike: frames come in blocks
of `block_frames`, and each block is computed from its own audio, `lookback_frames` before it and
`lookahead_frames` behind it, silence where there is none. So streamed equals whole exactly; what
differs is the pass over a whole recording, and by how much depends on the window and the model.

Letters: R rows, F frames, B blocks, N samples, K centroids, E width of a feature.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoFeatureExtractor, AutoModel

from models.common.errors import ArchitectureError, ConfigError, VocabularyError
from models.common.tokens import RowState, TokenizerBase
from models.common.vocoder import CodeHiFiGAN

RATE_HZ = 16_000
FRAME_SAMPLES = 320
SETTINGS = "units.json"
WINDOWS_AT_ONCE = 16
"""Of a whole recording, in one forward pass: bounds the memory."""


@dataclass(frozen=True, slots=True)
class Window:
    """What a block of frames is computed from. The defaults see 2 s before and 0.3 s behind, and
    are 0.38 s late; a block of 5 costs a pass over 2.4 s of audio every 0.1 s.
    """

    lookback_frames: int = 100
    block_frames: int = 5
    lookahead_frames: int = 15

    def __post_init__(self) -> None:
        if self.lookback_frames < 0 or self.block_frames < 1 or self.lookahead_frames < 1:
            raise ConfigError(
                "a window needs a block of 1 frame or more, and to look 1 frame ahead or more: "
                "a HuBERT frame hears 5 ms of the next one"
            )

    @property
    def frames(self) -> int:
        return self.lookback_frames + self.block_frames + self.lookahead_frames

    @property
    def latency_frames(self) -> int:
        """How long the first frame of a block waits for the block, and that for what follows."""
        return self.block_frames - 1 + self.lookahead_frames


class HubertFeatures:
    """Features of one layer by windows; `layer` counts from 1, the first transformer layer."""

    def __init__(self, model: Any, layer: int, window: Window, *, normalize: bool = False) -> None:
        """`model`: a HubertModel or Wav2Vec2Model of transformers; loses the layers behind.
        `normalize`: each window to zero mean and unit variance, as its feature extractor asks.

        Raises ArchitectureError, ConfigError.
        """
        config = model.config
        if np.prod(config.conv_stride) != FRAME_SAMPLES:
            raise ArchitectureError(f"this model's frames are not {FRAME_SAMPLES} samples")
        if not 1 <= layer <= config.num_hidden_layers:
            raise ConfigError(f"layer {layer} of a model that has {config.num_hidden_layers}")
        model.encoder.layers = model.encoder.layers[:layer]
        if config.do_stable_layer_norm:  # a norm behind the last layer, no part of any
            model.encoder.layer_norm = torch.nn.Identity()
        self.model = model.eval().requires_grad_(False)
        self.window = window
        self.normalize = normalize
        self.width: int = config.hidden_size

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        layer: int,
        window: Window | None = None,
        device: str = "cpu",
    ) -> HubertFeatures:
        extractor = AutoFeatureExtractor.from_pretrained(name_or_folder)
        model = AutoModel.from_pretrained(name_or_folder).to(device)
        return cls(model, layer, window or Window(), normalize=extractor.do_normalize)

    @torch.no_grad()
    def of_windows(self, audio: Tensor) -> Tensor:
        """[B, window.frames * FRAME_SAMPLES] -> [B, block_frames, E]"""
        if self.normalize:
            mean, variance = audio.mean(1, keepdim=True), audio.var(1, keepdim=True, correction=0)
            audio = (audio - mean) / (variance + 1e-7).sqrt()
        features: Tensor = self.model(audio).last_hidden_state
        before = self.window.lookback_frames
        return features[:, before : before + self.window.block_frames]

    def of_recordings(self, samples: Tensor) -> Tensor:
        """[R, F * FRAME_SAMPLES] -> [R, F, E], every block by its window."""
        window = self.window
        frames = samples.shape[1] // FRAME_SAMPLES
        blocks = -(-frames // window.block_frames)
        behind = blocks * window.block_frames - frames + window.lookahead_frames
        padded = nnf.pad(samples, (window.lookback_frames * FRAME_SAMPLES, behind * FRAME_SAMPLES))
        audio = padded.unfold(
            1, window.frames * FRAME_SAMPLES, window.block_frames * FRAME_SAMPLES
        )  # [R, B, N]
        pieces = audio.flatten(0, 1).split(WINDOWS_AT_ONCE)
        features = torch.cat([self.of_windows(piece) for piece in pieces])
        return features.view(len(samples), -1, self.width)[:, :frames]


class UnitTokenizer(TokenizerBase):
    """A SpeechTokenizer of one codebook at 50 Hz. Without a vocoder it only encodes."""

    name = "units"
    sample_rate_hz = RATE_HZ
    frame_samples = FRAME_SAMPLES
    num_codebooks = 1

    def __init__(
        self,
        features: HubertFeatures,
        centroids: Tensor,
        vocoder: CodeHiFiGAN | None = None,
        speaker: int = 0,
    ) -> None:
        """`centroids` [K, E]. Raises VocabularyError, ArchitectureError if parts don't fit."""
        if centroids.dim() != 2 or centroids.shape[1] != features.width:
            raise ArchitectureError(
                f"centroids {list(centroids.shape)} for features of {features.width}"
            )
        if vocoder is not None:
            _require_fit(vocoder, len(centroids))
        self.features = features
        self.centroids = centroids
        self.vocoder = vocoder
        self.speaker = speaker
        self.codebook_size = len(centroids)
        self.encode_latency_frames = features.window.latency_frames
        self.decode_latency_frames = vocoder.latency_frames if vocoder else 0

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str = "cpu") -> UnitTokenizer:
        """From a folder with `units.json`: `hubert` (a name, or a folder inside), `layer`,
        `centroids` (a file inside), and optionally `vocoder` (a folder inside), `speaker` and
        `window` (lookback_frames, block_frames, lookahead_frames).
        """
        folder = Path(folder)
        settings = json.loads((folder / SETTINGS).read_text())
        inside = folder / settings["hubert"]
        features = HubertFeatures.from_pretrained(
            inside if inside.is_dir() else settings["hubert"],
            settings["layer"],
            Window(**settings.get("window", {})),
            device,
        )
        vocoder = settings.get("vocoder")
        return cls(
            features,
            load_centroids(folder / settings["centroids"]).to(device),
            CodeHiFiGAN.from_pretrained(folder / vocoder, device) if vocoder else None,
            settings.get("speaker", 0),
        )

    @torch.no_grad()
    def encode(
        self, samples: Tensor, state: RowState | None = None, active: Tensor | None = None
    ) -> Tensor:
        """[R, F * 320] -> [R, F, 1]"""
        self.check_samples(samples, state)
        if state is None:
            return nearest(self.features.of_recordings(samples), self.centroids)[..., None]
        if active is None:
            active = torch.ones(len(samples), dtype=torch.bool, device=samples.device)
        frames = samples.split(FRAME_SAMPLES, dim=1)
        units = [self._encode_frame(frame, state, active) for frame in frames]
        return torch.stack(units, dim=1)

    def _encode_frame(self, frame: Tensor, state: RowState, active: Tensor) -> Tensor:
        """One frame more. A block is computed when all that its window needs is there, and its
        units are given one a frame from then on. [R, 320] -> [R, 1]
        """
        window = self.features.window
        past = (window.frames - 1) * FRAME_SAMPLES
        audio = state.extend("audio", frame, past, active)  # [R, N]
        had = state.count("frames", 1, active, frame)
        ready = had + 1 - window.block_frames - window.lookahead_frames
        turn = ready % window.block_frames
        block = state.kept("block", (window.block_frames,), had)
        due = ((ready >= 0) & (turn == 0) & active).nonzero()[:, 0]
        if len(due):
            block[due] = nearest(self.features.of_windows(audio[due]), self.centroids)
        return block.gather(1, turn[:, None])

    def decode(
        self, codes: Tensor, state: RowState | None = None, active: Tensor | None = None
    ) -> Tensor:
        """[R, F, 1] -> [R, F * 320]. Raises ArchitectureError where there is no vocoder."""
        if self.vocoder is None:
            raise ArchitectureError("units without a vocoder cannot be made into sound")
        self.check_codes(codes, state)
        return self.vocoder.decode(codes[..., 0], state, active, self.speaker)


def nearest(features: Tensor, centroids: Tensor) -> Tensor:
    """The number of the nearest centroid, by the Euclidean distance. [..., E], [K, E] -> [...]"""
    return (centroids.square().sum(1) - 2 * features @ centroids.T).argmin(-1)


def load_centroids(path: str | Path) -> Tensor:
    """[K, E] float32 from our own k-means' safetensors file, or from a .npy array."""
    if Path(path).suffix == ".npy":
        return torch.from_numpy(np.load(path, allow_pickle=False)).float()
    return load_file(path)["centroids"].float()


def _require_fit(vocoder: CodeHiFiGAN, units: int) -> None:
    if vocoder.num_units != units:
        raise VocabularyError(f"{units} centroids for a vocoder of {vocoder.num_units} units")
    if (vocoder.sample_rate_hz, vocoder.hop_samples) != (RATE_HZ, FRAME_SAMPLES):
        raise ArchitectureError(
            f"a vocoder of {vocoder.hop_samples} samples a unit at {vocoder.sample_rate_hz} Hz; "
            f"units are {FRAME_SAMPLES} at {RATE_HZ}"
        )
