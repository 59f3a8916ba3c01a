"""WAV files: any integer or float PCM in, 16-bit out with a header that is always valid."""

from __future__ import annotations

import struct
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
import soxr

from handlers.audio import to_pcm16
from handlers.messages import RATE_HZ, Samples

PCM, FLOAT, EXTENSIBLE = 0x0001, 0x0003, 0xFFFE
HEADER_BYTES = 44


class WavError(Exception):
    """The file is not a WAV file that can be read. The text names the file and the reason."""


def read_wav(path: Path) -> Samples:
    """The whole file as [T] at 24 kHz, channels averaged. Raises `WavError`.

    8, 16, 24 and 32-bit PCM and 32 and 64-bit float, plain or WAVE_FORMAT_EXTENSIBLE, any rate.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WavError(f"{path}: {error.strerror}") from error
    try:
        samples, rate_hz = parse_wav(data)
    except ValueError as error:
        raise WavError(f"{path}: {error}") from error
    if rate_hz == RATE_HZ:
        return samples
    resampled: Samples = soxr.resample(samples, rate_hz, RATE_HZ, quality="HQ")
    return resampled


def parse_wav(data: bytes) -> tuple[Samples, int]:
    """A file's bytes → mono [T] at its own rate, and that rate in Hz. Raises `ValueError`.

    A `data` chunk that claims more than there is (a stream that was cut off, or whose writer
    could not seek back) is read as far as it goes.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise ValueError("not a WAV file")
    layout: tuple[int, int, int, int] | None = None
    at = 12
    while at + 8 <= len(data):
        kind, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        body = data[at + 8 : at + 8 + size]
        if kind == b"fmt ":
            layout = _layout(body)
        elif kind == b"data":
            if layout is None:
                break
            return _mono(body, *layout), layout[2]
        at += 8 + size + size % 2
    raise ValueError("no audio in the file")


def _layout(body: bytes) -> tuple[int, int, int, int]:
    """A `fmt ` chunk → encoding, channels, rate in Hz, bits per sample."""
    try:
        encoding, channels, rate_hz, _, _, bits = struct.unpack_from("<HHIIHH", body)
        if encoding == EXTENSIBLE:
            (encoding,) = struct.unpack_from("<H", body, 24)
    except struct.error:
        raise ValueError("the format chunk is cut short") from None
    return encoding, channels, rate_hz, bits


def _mono(body: bytes, encoding: int, channels: int, rate_hz: int, bits: int) -> Samples:
    if not channels or not rate_hz:
        raise ValueError(f"{channels} channels at {rate_hz} Hz")
    width = bits // 8
    frame = width * channels
    body = body[: len(body) // frame * frame] if frame else b""
    values: npt.NDArray[np.floating]
    if encoding == FLOAT and bits in (32, 64):
        values = np.nan_to_num(np.frombuffer(body, f"<f{width}"), posinf=0.0, neginf=0.0)
    elif encoding == PCM and bits == 8:  # the one unsigned width
        values = (np.frombuffer(body, np.uint8).astype(np.float32) - 128) / 128
    elif encoding == PCM and bits in (16, 24, 32):
        padded = np.zeros((len(body) // width, 4), np.uint8)  # left-justified in 32 bits
        padded[:, 4 - width :] = np.frombuffer(body, np.uint8).reshape(-1, width)
        values = padded.view("<i4")[:, 0] / np.float64(2**31)
    else:
        raise ValueError(f"encoding {encoding:#06x} with {bits} bits is not supported")
    mono: Samples = values.reshape(-1, channels).mean(axis=1).astype(np.float32)
    return mono


class WavWriter:
    """Writes 16-bit PCM at 24 kHz as it comes; use as a context manager.

    The header is brought up to date every second, so the file is whole even if the process is
    killed. Raises `OSError` from the constructor when the file cannot be made.
    """

    def __init__(self, path: Path, channels: int = 1) -> None:
        self._channels = channels
        self._file = path.open("wb")
        self._data_bytes = 0
        self._stated_bytes = -1
        self._state_length()

    def write(self, samples: npt.NDArray[np.float32]) -> None:
        """Append [T], or [T, channels] if there are several."""
        data = to_pcm16(samples)
        self._file.write(data)
        self._data_bytes += len(data)
        if self._data_bytes - self._stated_bytes >= 2 * self._channels * RATE_HZ:
            self._state_length()

    def close(self) -> None:
        self._state_length()
        self._file.close()

    def __enter__(self) -> WavWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def _state_length(self) -> None:
        frame = 2 * self._channels
        layout = struct.pack("<HHIIHH", PCM, self._channels, RATE_HZ, RATE_HZ * frame, frame, 16)
        self._file.flush()  # the samples first: a header never promises what is not there
        self._file.seek(0)
        self._file.write(
            struct.pack("<4sI4s", b"RIFF", HEADER_BYTES - 8 + self._data_bytes, b"WAVE")
        )
        self._file.write(struct.pack("<4sI", b"fmt ", len(layout)) + layout)
        self._file.write(struct.pack("<4sI", b"data", self._data_bytes))
        self._file.flush()
        self._file.seek(0, 2)
        self._stated_bytes = self._data_bytes
