"""The tiny codec: in pieces as in one, its latencies, its files, and its training pairs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="models need torch")
pytest.importorskip("transformers", reason="models need transformers")

import numpy as np
import torch
from torch import Tensor

from models.common.errors import ArchitectureError, FrameLengthError, VocabularyError
from models.common.harmonic import HarmonicVocoder
from models.common.mel import LogMel
from models.common.pitch import track_pitch
from models.common.tokens import hushed, silent_frame
from models.parrot.codec import CodecConfig, TinyCodec
from models.parrot.tokenizers import load_tokenizer

FRAMES = 12


@pytest.fixture(scope="module")
def codec() -> TinyCodec:
    torch.manual_seed(0)
    made = TinyCodec(CodecConfig(width=16, fast_width=12, phonemes=4))
    made.eval()
    with torch.no_grad():
        made.vocoder.outlet.bias.fill_(-6.0)  # as quiet as speech
    return made


def sound(rows: int, frames: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(rows, frames * 640, generator=generator)


def in_pieces(
    step: Callable[[Tensor], Tensor], x: Tensor, size: int, cuts: list[int], latency: int
) -> Tensor:
    """`step` over pieces of x [R, F * size], the cuts in frames, then the latency in zeros."""
    pieces = torch.tensor_split(x, [size * cut for cut in cuts], dim=1)
    made = [step(piece) for piece in pieces]
    if latency:
        made.append(step(x.new_zeros((len(x), latency * size, *x.shape[2:]))))
    return torch.cat(made, dim=1)


@pytest.mark.parametrize("cuts", [list(range(1, FRAMES)), [5], [1, 2, 9]])
def test_streamed_codes_are_those_of_the_whole(codec: TinyCodec, cuts: list[int]) -> None:
    x = sound(3, FRAMES)
    state = codec.encoder_state(3)
    streamed = in_pieces(lambda piece: codec.encode(piece, state), x, 640, cuts, 1)
    assert torch.equal(streamed[:, 1:], codec.encode(x))


@pytest.mark.parametrize("cuts", [list(range(1, FRAMES)), [5], [1, 2, 9]])
def test_streamed_sound_is_that_of_the_whole(codec: TinyCodec, cuts: list[int]) -> None:
    codes = codec.encode(sound(2, FRAMES))
    state = codec.decoder_state(2)
    streamed = in_pieces(lambda piece: codec.decode(piece, state), codes, 1, cuts, 0)
    whole = codec.decode(codes)
    assert whole.abs().max() > 1e-3
    torch.testing.assert_close(streamed[:, 640:], whole[:, :-640], atol=1e-4, rtol=0)


def test_a_row_is_independent_of_the_others(codec: TinyCodec) -> None:
    x = sound(3, FRAMES)
    alone = torch.cat([codec.encode(row[None]) for row in x])
    assert torch.equal(codec.encode(x), alone)
    codes = codec.encode(x)
    alone = torch.cat([codec.decode(row[None]) for row in codes])
    torch.testing.assert_close(codec.decode(codes), alone, atol=1e-4, rtol=0)


def test_an_idle_row_keeps_its_place_and_a_reset_one_begins_anew(codec: TinyCodec) -> None:
    x, other = sound(2, FRAMES), sound(2, FRAMES, seed=1)
    state = codec.encoder_state(2)
    first = codec.encode(x[:, : 4 * 640], state)
    codec.encode(other, state, active=torch.tensor([False, True]))
    state.reset([1])
    rest = torch.cat((x[0, 4 * 640 :], x.new_zeros(4 * 640)))
    after = codec.encode(torch.stack((rest, x[1])), state)
    assert torch.equal(torch.cat((first[0], after[0]))[1 : FRAMES + 1], codec.encode(x)[0])
    assert torch.equal(after[1, 1:], codec.encode(x)[1, :-1])
    sounding = codec.decoder_state(2)
    codes = codec.encode(x)
    begun = codec.decode(codes[:, :4], sounding)
    codec.decode(codes, sounding, active=torch.tensor([False, True]))
    gone_on = codec.decode(codes[:, 4:], sounding)
    whole = codec.decode(codes)[0]
    torch.testing.assert_close(
        torch.cat((begun[0], gone_on[0]))[640:], whole[:-640], atol=1e-4, rtol=0
    )


def test_a_row_that_moves_goes_on_beside_fewer_others(codec: TinyCodec) -> None:
    x = sound(3, FRAMES)
    hearing, sounding = codec.encoder_state(3), codec.decoder_state(3)
    codes = codec.encode(x)
    begun = codec.encode(x[:, : 4 * 640], hearing)[[2, 1]]
    said = codec.decode(codes[:, :4], sounding)[[2, 1]]
    for state in (hearing, sounding):
        state.move(2, 0)
        state.rows = 2
    rest = codec.encode(x[[2, 1], 4 * 640 :], hearing)
    assert torch.equal(torch.cat((begun, rest), 1)[:, 1:], codes[[2, 1], :-1])
    sound_on = torch.cat((said, codec.decode(codes[[2, 1], 4:], sounding)), 1)
    whole = codec.decode(codes)[[2, 1]]
    torch.testing.assert_close(sound_on[:, 640:], whole[:, :-640], atol=1e-4, rtol=0)


def test_nothing_is_known_before_its_time(codec: TinyCodec) -> None:
    x = sound(1, FRAMES)
    changed = x.clone()
    changed[:, 8 * 640 :] = 0
    before, after = codec.encode(x)[0, :, 0], codec.encode(changed)[0, :, 0]
    late = codec.encode_latency_frames
    assert torch.equal(before[: 8 - late], after[: 8 - late])
    codes = codec.encode(x)
    other = codes.clone()
    other[:, 8:] = (other[:, 8:] + 1) % codec.codebook_size
    end = (8 - codec.decode_latency_frames) * 640
    assert torch.equal(codec.decode(codes)[:, :end], codec.decode(other)[:, :end])


def test_codes_number_all_combinations_of_levels(codec: TinyCodec) -> None:
    every = torch.arange(codec.codebook_size)[None]
    values = codec.quantiser.values(every)  # [1, Q, N]
    assert len(torch.unique(values[0].T, dim=0)) == codec.codebook_size
    assert values.min() == -1
    assert values.max() == 1


def test_where_a_voice_ends_by_itself_silent_codes_are_silent_anyway() -> None:
    said, shipped = spoken_by_the_agent("camera thunder")
    codes = shipped.encode(said[None])[0]
    sound, rest = shipped.decode(codes[None])[0], silent_frame(shipped)
    assert (codes == rest).sum() > 20
    hushed_sound = hushed(sound, codes, rest, shipped)
    off = hushed_sound[shipped.frame_samples :] - sound[shipped.frame_samples :]
    assert off.abs().max() < 1e-3


def test_where_a_voice_breaks_off_nothing_follows() -> None:
    said, shipped = spoken_by_the_agent("camera thunder")
    codes, rest = shipped.encode(said[None])[0], silent_frame(shipped)
    for broken in range(30, 40, 3):
        cut = torch.cat((codes[:broken], rest.expand(25, -1)))
        sound = shipped.decode(cut[None])[0]
        made = hushed(sound, cut, rest, shipped)
        at = broken * shipped.frame_samples
        assert sound[at : at + shipped.frame_samples].abs().max() > 0.01  # without it
        known = at - shipped.decode_latency_frames * shipped.frame_samples
        said_before = slice(shipped.frame_samples, known)
        torch.testing.assert_close(made[said_before], sound[said_before], rtol=0, atol=1e-3)
        assert not made[known + shipped.sample_rate_hz * 30 // 1000 :].any()


def spoken_by_the_agent(text: str) -> tuple[Tensor, TinyCodec]:
    """From the beginning of a frame, with a second of silence before and behind. [T]"""
    pytest.importorskip("espeakng_loader", reason="the agent is eSpeak NG")
    from models.parrot.speech import agent_clip

    shipped = load_tokenizer("tiny")
    assert isinstance(shipped, TinyCodec)
    pad, clip = shipped.sample_rate_hz, agent_clip(text)
    samples = np.pad(clip.samples, (pad - clip.first, pad))
    whole = len(samples) // shipped.frame_samples * shipped.frame_samples
    return torch.from_numpy(samples[:whole]), shipped


def test_bad_input_is_refused_by_name(codec: TinyCodec, tmp_path: Path) -> None:
    with pytest.raises(FrameLengthError):
        codec.encode(torch.zeros(1, 641))
    with pytest.raises(VocabularyError):
        codec.decode(torch.full((1, 2, 1), codec.codebook_size))
    with pytest.raises(ArchitectureError, match=r"codec\.json"):
        load_tokenizer(tmp_path)
    codec.save(tmp_path)
    (tmp_path / "codec.json").write_text('{"levels": [4, 4]}')
    with pytest.raises(ArchitectureError):
        load_tokenizer(tmp_path)


def test_saved_and_loaded_it_is_the_same(codec: TinyCodec, tmp_path: Path) -> None:
    codec.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    x = sound(1, FRAMES)
    codes = codec.encode(x)
    assert torch.equal(loaded.encode(x), codes)
    assert torch.equal(loaded.decode(codes), codec.decode(codes))
    assert loaded.frame_rate_hz == 25


def test_the_pitch_of_a_voice_is_found() -> None:
    time_s = torch.arange(16_000) / 16_000
    hz = 180 + 60 * time_s
    angle = 2 * torch.pi * torch.cumsum(hz, 0) / 16_000
    voice = sum(torch.sin(k * angle) / k for k in range(1, 20)) * 0.1
    pitch, voiced = track_pitch(voice, 16_000, 160, lowest_hz=150, highest_hz=400)
    middle = hz[160 * torch.arange(100) + 160 - 320]  # of the 40 ms that end with the hop
    assert voiced[4:].all()
    assert (pitch[4:] - middle[4:]).abs().max() < 2
    noise = 0.1 * torch.randn(16_000, generator=torch.Generator().manual_seed(0))
    assert track_pitch(noise, 16_000, 160, lowest_hz=150, highest_hz=400)[1].mean() < 0.05


def test_the_vocoder_sings_the_pitch_it_is_given() -> None:
    vocoder = HarmonicVocoder(16_000, 160, 80).eval()
    with torch.no_grad():
        vocoder.outlet.weight.zero_()
        vocoder.outlet.bias.fill_(-5.0)
        vocoder.outlet.bias[vocoder.bands :] = -14.0  # no noise
        made = vocoder(torch.zeros(1, 100, 80), torch.full((1, 100), 220.0), torch.ones(1, 100))[0]
    spectrum = torch.fft.rfft(made[3200:12800] * torch.hann_window(9600)).abs()
    strongest = spectrum.topk(40).indices * 16_000 / 9600
    away = (strongest / 220 - (strongest / 220).round()).abs() * 220
    assert away.max() < 4
    assert len(torch.unique((strongest / 220).round())) > 10


def test_mel_frames_are_those_of_the_plain_transform() -> None:
    mel = LogMel(16_000, 160, 400, 80)
    x = sound(1, 2)
    padded = np.concatenate([np.zeros(240), x[0].numpy()])
    for index in (0, 3, 7):
        frame = padded[160 * index :][:400] * mel.window.numpy()
        spectrum = np.abs(np.fft.rfft(frame, 512))
        plain = np.log(spectrum @ mel.bank.numpy() + 1e-5)
        np.testing.assert_allclose(mel(x)[0, index].numpy(), plain, atol=1e-4)
