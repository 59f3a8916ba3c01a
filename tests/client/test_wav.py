from __future__ import annotations

import io
import struct
import wave
from pathlib import Path

import numpy as np
import pytest

from client.recording import MAX_SKEW_SAMPLES, Recording
from client.wav import WavError, WavWriter, parse_wav, read_wav
from handlers.messages import RATE_HZ
from tests.client.fakes import tone


def riff(encoding: int, channels: int, rate_hz: int, bits: int, body: bytes) -> bytes:
    frame = channels * bits // 8
    layout = struct.pack("<HHIIHH", encoding, channels, rate_hz, rate_hz * frame, frame, bits)
    chunks = b"LIST\x03\0\0\0abc\0" + b"fmt " + struct.pack("<I", len(layout)) + layout
    chunks += b"data" + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def stdlib(channels: int, width: int, body: bytes) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as wav:
        wav.setnchannels(channels)
        wav.setsampwidth(width)
        wav.setframerate(16_000)
        wav.writeframes(body)
    return file.getvalue()


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_every_integer_width(width: int) -> None:
    values = np.array([0.0, 0.5, -0.5, 0.25], np.float64)
    whole = (values * 2 ** (8 * width - 1)).astype(np.int64) + (128 if width == 1 else 0)
    body = b"".join(int(v).to_bytes(width, "little", signed=width > 1) for v in whole)
    samples, rate_hz = parse_wav(stdlib(1, width, body))
    assert rate_hz == 16_000
    np.testing.assert_array_equal(samples, values.astype(np.float32))


def test_float_extensible_and_stereo() -> None:
    stereo = np.array([[0.5, 0.0], [-1.0, 1.0]], "<f4")
    samples, rate_hz = parse_wav(riff(3, 2, 48_000, 32, stereo.tobytes()))
    assert rate_hz == 48_000
    np.testing.assert_array_equal(samples, np.array([0.25, 0.0], np.float32))

    plain = riff(0xFFFE, 1, 8_000, 16, b"\x00\x40")
    layout = struct.pack("<HHIIHH", 0xFFFE, 1, 8_000, 16_000, 2, 16)
    tail = struct.pack("<HHI", 22, 16, 4) + b"\x01\x00" + bytes(14)
    extensible = plain.replace(
        struct.pack("<I", 16) + layout, struct.pack("<I", 40) + layout + tail
    )
    np.testing.assert_array_equal(parse_wav(extensible)[0], np.array([0.5], np.float32))


def test_a_stream_with_no_stated_length_is_read_to_its_end() -> None:
    whole = riff(1, 1, 24_000, 16, b"\x00\x40" * 5)
    unstated = whole.replace(b"data" + struct.pack("<I", 10), b"data\xff\xff\xff\xff") + b"\x01"
    assert len(parse_wav(unstated)[0]) == 5


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a WAV"),
        (b"RIFF\0\0\0\0WAVE", "no audio"),
        (riff(1, 1, 8_000, 16, b"")[:40], "cut short"),
        (riff(1, 0, 8_000, 16, b"ab"), "0 channels"),
        (riff(6, 1, 8_000, 8, b"ab"), "encoding 0x0006 with 8 bits"),
        (riff(3, 1, 8_000, 16, b"ab"), "encoding 0x0003 with 16 bits"),
    ],
)
def test_other_files_are_named_with_the_reason(data: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "in.wav"
    path.write_bytes(data)
    with pytest.raises(WavError, match=reason) as error:
        read_wav(path)
    assert str(path) in str(error.value)
    with pytest.raises(WavError, match="No such file"):
        read_wav(tmp_path / "none.wav")


def test_reading_gives_24_khz(tmp_path: Path) -> None:
    path = tmp_path / "in.wav"
    tone_8k = (0.5 * np.sin(2 * np.pi * 440 * np.arange(8000) / 8000) * 2**15).astype("<i2")
    path.write_bytes(riff(1, 1, 8_000, 16, tone_8k.tobytes()))
    samples = read_wav(path)
    assert len(samples) == RATE_HZ
    np.testing.assert_allclose(samples[2400:-2400], tone(RATE_HZ)[2400:-2400], atol=0.01)


def test_written_file_is_valid_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "out.wav"
    with WavWriter(path) as writer:
        writer.write(tone(100))
        assert len(parse_wav(path.read_bytes())[0]) == 0
        writer.write(tone(2 * RATE_HZ))
        samples, rate_hz = parse_wav(path.read_bytes())
        assert len(samples) == 100 + 2 * RATE_HZ
        writer.write(tone(50))
    samples, rate_hz = parse_wav(path.read_bytes())
    assert rate_hz == RATE_HZ
    np.testing.assert_allclose(samples[:100], tone(100), atol=1 / 32768)
    with wave.open(str(path)) as wav:
        assert wav.getnframes() == 150 + 2 * RATE_HZ


def sides(path: Path) -> tuple[list[int], list[int]]:
    with wave.open(str(path)) as wav:
        assert (wav.getnchannels(), wav.getframerate()) == (2, RATE_HZ)
        frames = np.frombuffer(wav.readframes(wav.getnframes()), "<i2").reshape(-1, 2)
    return frames[:, 0].tolist(), frames[:, 1].tolist()


def test_recording_pairs_the_two_sides_sample_for_sample(tmp_path: Path) -> None:
    unit = np.float32(1 / 32768)
    left, right = np.arange(2000, dtype=np.float32), -np.arange(2000, dtype=np.float32)
    with Recording(tmp_path / "r.wav") as recording:
        recording.person(left[:480] * unit)
        recording.parley(right[:100] * unit)
        recording.parley(right[100:900] * unit)
        recording.person(left[480:] * unit)
        recording.parley(right[900:] * unit)
    got_left, got_right = sides(tmp_path / "r.wav")
    assert got_left == list(range(2000))
    assert got_right == [-n for n in range(2000)]


def test_a_side_that_stops_is_filled_with_silence(tmp_path: Path) -> None:
    with Recording(tmp_path / "r.wav") as recording:
        recording.person(np.full(10, 0.5, np.float32))
        recording.parley(np.full(3 * MAX_SKEW_SAMPLES, 0.5, np.float32))
        recording.person(np.full(10, 0.5, np.float32))
    left, right = sides(tmp_path / "r.wav")
    assert len(left) == len(right) == 3 * MAX_SKEW_SAMPLES
    assert np.flatnonzero(left).tolist() == [
        *range(10),
        *range(2 * MAX_SKEW_SAMPLES, 2 * MAX_SKEW_SAMPLES + 10),
    ]
