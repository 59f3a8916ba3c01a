"""`tiny`: a small causal codec that hears every voice and speaks in one, the agent's.

Its codes say what was spoken and how it was intoned, not by whom: in training the decoder's target
for any speaker is the agent saying the same at the same times (see `models.parrot.train_codec`).

R rows, F frames of 40 ms, M = 4 F mel frames of 10 ms, W width, Q quantised numbers per frame.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from models.common.causal import CausalConv, History, Residual
from models.common.errors import ArchitectureError
from models.common.harmonic import HarmonicVocoder
from models.common.mel import LogMel
from models.common.pitch import PitchMotion
from models.common.tokens import RowState, TokenizerBase

CONFIG, WEIGHTS = "codec.json", "codec.safetensors"
MEL_MEAN, MEL_SCALE = -7.0, 2.5
"""Of log-mel frames of speech, roughly."""
VOCODER_HOPS = 2
"""How much later than its mel frame's last hop a sound is: a frame tells little of its last hop,
which its window fades out."""


@dataclass(frozen=True)
class CodecConfig:
    levels: tuple[int, ...] = (4, 4, 4, 4, 2, 2)  # of each quantised number
    width: int = 160  # at the rate of frames
    fast_width: int = 96  # at the rate of hops
    mel_bands: int = 80
    phonemes: int = 0  # classes of the training-time head; 0: none
    rate_hz: int = 16_000
    hop_samples: int = 160
    hops_per_frame: int = 4
    encode_latency_frames: int = 1
    decode_latency_frames: int = 1


@dataclass(frozen=True)
class Spoken:
    """What the decoder says of each mel frame, before the vocoder."""

    mel: Tensor  # [R, M, bands] natural logarithm of magnitudes
    pitch_hz: Tensor  # [R, M]
    voicing: Tensor  # [R, M] logits
    hidden: Tensor  # [R, W', M]


class Quantiser(nn.Module):
    """Finite scalar quantisation (Mentzer et al., 2023) after a normalisation without weights.

    The normalisation keeps the numbers spread over the levels from the first step on; without it
    training got stuck.
    """

    sizes: Tensor
    powers: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(len(levels), affine=False)
        powers = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("sizes", torch.tensor(levels), persistent=False)
        self.register_buffer("powers", torch.tensor(powers), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of what `norm` gave: [R, Q, F] -> values in -1..1 [R, Q, F], gradient passed straight,
        and codes [R, F]"""
        half = (self.sizes[:, None] - 1) / 2
        place = (torch.tanh(x * 0.8) + 1) * half  # 0..size - 1
        digits = place.round()
        values = (place + (digits - place).detach()) / half - 1
        return values, (digits.long() * self.powers[:, None]).sum(1)

    def values(self, codes: Tensor) -> Tensor:
        """[R, F] -> [R, Q, F]"""
        digits = codes[:, None] // self.powers[:, None] % self.sizes[:, None]
        return digits.float() / ((self.sizes[:, None] - 1) / 2) - 1


class TinyCodec(nn.Module, TokenizerBase):
    """A `models.common.tokens.SpeechTokenizer`."""

    name = "tiny"
    num_codebooks = 1
    traceable = True

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        self.sample_rate_hz = config.rate_hz
        self.frame_samples = config.hop_samples * config.hops_per_frame
        self.codebook_size = math.prod(config.levels)
        self.encode_latency_frames = config.encode_latency_frames
        self.decode_latency_frames = config.decode_latency_frames
        per_frame, bands = config.hops_per_frame, config.mel_bands
        wide, slim = config.width, config.fast_width
        self.log_mel = LogMel(config.rate_hz, config.hop_samples, 400, bands)
        self.motion = PitchMotion(config.rate_hz, config.hop_samples)
        self.inlet = CausalConv(bands + self.motion.features, slim, 5)
        self.fast = nn.ModuleList(Residual(slim, dilation) for dilation in (1, 2, 4))
        self.down = CausalConv(slim, wide, per_frame, stride=per_frame)
        self.slow = nn.ModuleList(Residual(wide, dilation) for dilation in (1, 2, 4))
        self.to_code = CausalConv(wide, len(config.levels), 1)
        self.quantiser = Quantiser(config.levels)
        self.from_code = CausalConv(len(config.levels), wide, 3)
        self.coarse = nn.ModuleList(Residual(wide, dilation) for dilation in (1, 2, 4))
        self.up = CausalConv(wide, slim * per_frame, 1)
        self.fine = nn.ModuleList(Residual(slim, dilation) for dilation in (1, 2))
        self.to_mel = CausalConv(slim, bands + 2, 1)
        self.to_phoneme = nn.Conv1d(slim, config.phonemes, 1) if config.phonemes else None
        self.vocoder = HarmonicVocoder(config.rate_hz, config.hop_samples, bands)

    # Training goes through these.

    def numbers(self, samples: Tensor, history: History | None = None) -> Tensor:
        """[R, T] -> what is to be quantised, [R, Q, F]

        The last one is taught to tell, where a stretch of speech ends, whether its tone falls.
        """
        mel = (self.log_mel(samples, history) - MEL_MEAN) / MEL_SCALE  # [R, M, bands]
        heard = torch.cat((mel, self.motion(samples, history)), dim=-1)
        x = self.inlet(heard.mT, history)
        for layer in self.fast:
            x = layer(x, history)
        x = self.down(nn.functional.gelu(x), history)  # [R, W', M] -> [R, W, F]
        for layer in self.slow:
            x = layer(x, history)
        normed: Tensor = self.quantiser.norm(self.to_code(nn.functional.gelu(x), history))
        return normed

    def quantise(self, samples: Tensor, history: History | None = None) -> tuple[Tensor, Tensor]:
        """[R, T] -> values [R, Q, F] and codes [R, F]"""
        values, codes = self.quantiser(self.numbers(samples, history))
        return values, codes

    def speak(self, values: Tensor, history: History | None = None) -> Spoken:
        """[R, Q, F] -> what stands in the agent's voice at each mel frame, latency included."""
        x = self.from_code(values, history)
        for layer in self.coarse:
            x = layer(x, history)
        x = self.up(nn.functional.gelu(x), history).mT  # [R, F, 4 W']
        x = x.unflatten(-1, (-1, self.config.hops_per_frame)).mT.flatten(1, 2).mT  # [R, W', M]
        for layer in self.fine:
            x = layer(x, history)
        x = nn.functional.gelu(x)
        mel, pitch, voicing = self.to_mel(x, history).mT.split(
            [self.config.mel_bands, 1, 1], dim=-1
        )
        pitch_hz = torch.exp(pitch[..., 0] * 0.2 + 5.3)  # near 200 Hz
        return Spoken(mel * MEL_SCALE + MEL_MEAN, pitch_hz, voicing[..., 0], x)

    # The tokenizer's interface.

    @torch.no_grad()
    def encode(
        self, samples: Tensor, state: RowState | None = None, active: Tensor | None = None
    ) -> Tensor:
        """[R, F * frame_samples] -> [R, F, 1]"""
        self.check_samples(samples, state)
        if state is None:
            late = self.encode_latency_frames
            padded = nn.functional.pad(samples, (0, late * self.frame_samples))
            codes: Tensor = self.quantise(padded)[1][:, late:]
        else:
            assert isinstance(state, History)
            state.active = active
            codes = self.quantise(samples, state)[1]
        return codes[..., None]

    @torch.no_grad()
    def decode(
        self, codes: Tensor, state: RowState | None = None, active: Tensor | None = None
    ) -> Tensor:
        """[R, F, 1] -> [R, F * frame_samples]. Raises `VocabularyError`."""
        self.check_codes(codes, state)
        if state is None:
            late = self.decode_latency_frames
            padded = nn.functional.pad(codes[..., 0], (0, late), mode="replicate")
            return self._sound(padded, None)[:, late * self.frame_samples :]
        assert isinstance(state, History)
        state.active = active
        return self._sound(codes[..., 0], state)

    def _sound(self, codes: Tensor, state: History | None) -> Tensor:
        spoken = self.speak(self.quantiser.values(codes), state)
        voiced = torch.sigmoid(spoken.voicing)
        samples: Tensor = self.vocoder(spoken.mel, spoken.pitch_hz, voiced, state)
        return samples.clamp(-1, 1)

    def encoder_state(self, rows: int) -> History:
        return History(rows)

    def decoder_state(self, rows: int) -> History:
        return History(rows)

    # Files.

    def save(self, folder: str | os.PathLike[str]) -> None:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / CONFIG).write_text(json.dumps(asdict(self.config), indent=2) + "\n")
        save_model(self, str(path / WEIGHTS))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> TinyCodec:
        """Raises FileNotFoundError, `ArchitectureError` where the weights don't fit."""
        path = Path(folder)
        fields = json.loads((path / CONFIG).read_text())
        codec = cls(CodecConfig(**{**fields, "levels": tuple(fields["levels"])}))
        try:
            load_model(codec, str(path / WEIGHTS))
        except RuntimeError as error:
            raise ArchitectureError(f"{path / WEIGHTS}: {error}") from None
        codec.eval()
        return codec
