"""Mimi streamed by rows, against transformers' own pass over the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="models need torch")
pytest.importorskip("transformers", reason="models need transformers")

import torch
import transformers
from torch import Tensor

from models.common.errors import (
    ArchitectureError,
    ConfigError,
    FrameLengthError,
    VocabularyError,
)
from models.common.mimi import PIECE_FRAMES, MimiTokenizer
from tests.models.streams import measured_latency, streamed

torch.set_num_threads(1)

FRAMES = 2 * PIECE_FRAMES + 7
CODEBOOKS = 4
RELATIVE = 2e-5
"""fp32, sums of other order, of the sound's largest sample."""


def make(folder: Path, **changes: Any) -> Path:
    """Small and random; windows of 9 steps, so that they slide; codebooks that are not zeros."""
    torch.manual_seed(3)
    settings = {
        "hidden_size": 32,
        "num_filters": 4,
        "upsampling_ratios": [4, 3, 2, 2],
        "codebook_size": 64,
        "codebook_dim": 16,
        "vector_quantization_hidden_dimension": 16,
        "num_quantizers": 6,
        "upsample_groups": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 9,
        "layer_scale_initial_scale": 0.7,
        "initializer_range": 0.4,
        "sampling_rate": 2400,
        **changes,
    }
    model = transformers.MimiModel(transformers.MimiConfig(**settings))
    for name, buffer in model.named_buffers():
        if name.endswith("embed_sum"):
            buffer.normal_()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mimi(tmp_path_factory: pytest.TempPathFactory) -> MimiTokenizer:
    return MimiTokenizer.from_pretrained(make(tmp_path_factory.mktemp("mimi")), CODEBOOKS)


@pytest.fixture(scope="module")
def sound(mimi: MimiTokenizer) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, FRAMES * mimi.frame_samples, generator=generator) / 2


@pytest.fixture(scope="module")
def codes(mimi: MimiTokenizer, sound: Tensor) -> Tensor:
    """What transformers makes of the whole. [R, F, D]"""
    with torch.no_grad():
        made = mimi.model.encode(sound[:, None], num_quantizers=CODEBOOKS).audio_codes
    assert made.unique().numel() > 32
    return made.transpose(1, 2)


@pytest.fixture(scope="module")
def decoded(mimi: MimiTokenizer, codes: Tensor) -> Tensor:
    with torch.no_grad():
        made: Tensor = mimi.model.decode(codes.transpose(1, 2)).audio_values[:, 0]
    return made


def same(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= RELATIVE * theirs.abs().max())


def test_states_what_it_is(mimi: MimiTokenizer) -> None:
    assert (mimi.frame_samples, mimi.frame_rate_hz) == (96, 25.0)
    assert (mimi.num_codebooks, mimi.codebook_size) == (CODEBOOKS, 64)


def test_whole_is_what_transformers_makes(
    mimi: MimiTokenizer, sound: Tensor, codes: Tensor, decoded: Tensor
) -> None:
    assert torch.equal(mimi.encode(sound), codes)
    assert same(mimi.decode(codes), decoded)


@pytest.mark.parametrize("frames", [1, 3, PIECE_FRAMES + 1])
def test_streamed_equals_whole(
    mimi: MimiTokenizer, sound: Tensor, codes: Tensor, decoded: Tensor, frames: int
) -> None:
    state = mimi.encoder_state(len(sound))
    heard = streamed(mimi.encode, sound, frames * mimi.frame_samples, state)
    assert torch.equal(heard, codes)
    said = streamed(mimi.decode, codes, frames, mimi.decoder_state(len(sound)))
    assert same(said, decoded)


def test_nothing_is_late(
    mimi: MimiTokenizer, sound: Tensor, codes: Tensor, decoded: Tensor
) -> None:
    heard = streamed(mimi.encode, sound, mimi.frame_samples, mimi.encoder_state(len(sound)))
    said = streamed(mimi.decode, codes, 1, mimi.decoder_state(len(sound)))
    assert measured_latency(heard, codes, 0) == mimi.encode_latency_frames
    frames = said.unflatten(1, (-1, mimi.frame_samples))
    whole = decoded.unflatten(1, (-1, mimi.frame_samples))
    tolerance = RELATIVE * float(decoded.abs().max())
    assert measured_latency(frames, whole, tolerance) == mimi.decode_latency_frames


def test_a_frame_hears_its_own_samples_and_none_behind(mimi: MimiTokenizer, sound: Tensor) -> None:
    other = sound.clone()
    at = 5
    other[:, at * mimi.frame_samples :] *= -1
    differs = (mimi.encode(other) != mimi.encode(sound)).any(2).any(0)
    assert int(differs.nonzero()[0]) == at


def test_rows_join_idle_and_leave_alone(
    mimi: MimiTokenizer, sound: Tensor, codes: Tensor, decoded: Tensor
) -> None:
    """Row r takes part in every (r + 1)-th call only; row 1 is begun anew halfway."""
    encoder, decoder = mimi.encoder_state(3), mimi.decoder_state(3)
    at = [0, 0, 0]
    for tick in range(30):
        if tick == 15:
            encoder.reset([1])
            decoder.reset(torch.tensor([False, True, False]))
            at[1] = 0
        active = torch.tensor([tick % (row + 1) == 0 for row in range(3)])
        size = mimi.frame_samples
        frame = torch.stack([sound[r, at[r] * size : (at[r] + 1) * size] for r in range(3)])
        frame[~active] = torch.nan
        heard = mimi.encode(frame, encoder, active)
        given = torch.stack([codes[r, at[r]] for r in range(3)])[:, None]
        given[~active] = 0
        said = mimi.decode(given, decoder, active)
        for row in active.nonzero()[:, 0].tolist():
            where = slice(at[row] * size, (at[row] + 1) * size)
            assert torch.equal(heard[row, 0], codes[row, at[row]])
            assert (said[row] - decoded[row, where]).abs().max() <= RELATIVE * decoded.abs().max()
            at[row] += 1


def test_what_an_idle_row_is_given_leaves_no_trace(
    mimi: MimiTokenizer, sound: Tensor, codes: Tensor, decoded: Tensor
) -> None:
    encoder, decoder = mimi.encoder_state(3), mimi.decoder_state(3)
    idle = torch.tensor([False, True, True])
    at, size = 20, mimi.frame_samples
    mimi.encode(sound[:, : at * size], encoder)
    mimi.decode(codes[:, :at], decoder)
    mimi.encode(torch.full((3, 5 * size), torch.nan), encoder, ~idle)
    mimi.decode(codes[:, :5], decoder, ~idle)
    heard = mimi.encode(sound[:, at * size : (at + 1) * size], encoder)
    said = mimi.decode(codes[:, at : at + 1], decoder)
    assert torch.equal(heard[idle], codes[idle, at : at + 1])
    assert same(said[idle], decoded[idle, at * size : (at + 1) * size])


def test_late_steps_turn_as_exactly_as_early_ones(
    mimi: MimiTokenizer, sound: Tensor, codes: Tensor
) -> None:
    """After 18 days at 25 steps a second a float32 angle is up to 2 rad off."""
    state, counter = mimi.encoder_state(3), mimi.model.encoder_transformer
    early, late = sound.split([10 * mimi.frame_samples, (FRAMES - 10) * mimi.frame_samples], 1)
    mimi.encode(early, state)
    whole_rings = 40 * 10**6  # of 40 slots: what stands in them is now that much later
    state.keep(counter, state.kept(counter, (), codes) + whole_rings, None)
    heard = streamed(mimi.encode, late, mimi.frame_samples, state)
    settled = 9  # frames: two layers' windows hold nothing that was turned before
    assert torch.equal(heard[:, settled:], codes[:, 10 + settled :])


def test_what_does_not_fit_is_named(mimi: MimiTokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="9 codebooks asked of a Mimi that has 6"):
        MimiTokenizer(mimi.model, 9)
    with pytest.raises(ArchitectureError, match="cannot be streamed"):
        MimiTokenizer.from_pretrained(make(tmp_path, use_causal_conv=False), CODEBOOKS)
    with pytest.raises(FrameLengthError, match="not whole frames of 96"):
        mimi.encode(torch.zeros(1, 100))
    with pytest.raises(FrameLengthError, match="2 rows given to a state of 3"):
        mimi.encode(torch.zeros(2, 96), mimi.encoder_state(3))
    with pytest.raises(VocabularyError, match="0 … 63"):
        mimi.decode(torch.full((1, 1, CODEBOOKS), 64))
