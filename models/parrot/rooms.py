"""What a microphone makes of a clean voice: noise, reverberation, echo of the far end, gain.

All of it is linear and steady, so one product of spectra does it for a whole recording. T samples
at `RATE_HZ`, S bins of a real spectrum.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.parrot.synthesis import RATE_HZ

Audio = NDArray[np.float32]
Spectrum = NDArray[np.complex64]
Range = tuple[float, float]
"""Drawn from uniformly."""

MAX_RT60_S = 0.5


@dataclass(frozen=True, slots=True)
class RoomOptions:
    snr_db: Range = (12.0, 45.0)
    """Speech over steady noise."""
    gain_db: Range = (-10.0, 10.0)
    slope_db_per_octave: Range = (-6.0, 0.0)
    """Colour of the noise, from brown to white."""
    hum_share: float = 0.3
    hum_below_noise_db: Range = (-6.0, 10.0)
    reverberation_share: float = 0.4
    rt60_s: Range = (0.1, MAX_RT60_S)
    direct_over_reverberant_db: Range = (0.0, 15.0)
    echo_share: float = 0.35
    """Of dialogues in which the person's loudspeaker is heard by the microphone."""
    echo_delay_s: Range = (0.02, 0.2)
    echo_db: Range = (-50.0, -20.0)
    echo_cutoff_hz: Range = (1500.0, 6000.0)
    telephone_share: float = 0.1
    """Of dialogues that pass the telephone band, 300-3400 Hz."""


@dataclass(frozen=True, slots=True)
class Room:
    """One recording's circumstances; None where there is no such thing."""

    snr_db: float
    gain_db: float
    slope_db_per_octave: float
    hum_hz: float | None
    hum_below_noise_db: float
    rt60_s: float | None
    direct_over_reverberant_db: float
    echo_delay_s: float | None
    echo_db: float
    echo_cutoff_hz: float
    telephone: bool


def draw_room(options: RoomOptions, source: random.Random) -> Room:
    def maybe(share: float, value: float) -> float | None:
        return value if source.random() < share else None

    return Room(
        snr_db=source.uniform(*options.snr_db),
        gain_db=source.uniform(*options.gain_db),
        slope_db_per_octave=source.uniform(*options.slope_db_per_octave),
        hum_hz=maybe(options.hum_share, source.choice((50.0, 60.0, 100.0, 120.0))),
        hum_below_noise_db=source.uniform(*options.hum_below_noise_db),
        rt60_s=maybe(options.reverberation_share, source.uniform(*options.rt60_s)),
        direct_over_reverberant_db=source.uniform(*options.direct_over_reverberant_db),
        echo_delay_s=maybe(options.echo_share, source.uniform(*options.echo_delay_s)),
        echo_db=source.uniform(*options.echo_db),
        echo_cutoff_hz=source.uniform(*options.echo_cutoff_hz),
        telephone=source.random() < options.telephone_share,
    )


def heard_in(
    room: Room, person: Audio, agent: Audio, speech_rms: float, source: np.random.Generator
) -> Audio:
    """Clean person [T] and agent [T] -> what the person's microphone takes up. [T]

    `speech_rms` is the person's level while speaking, to which the noise is set.
    """
    length = len(person)
    padded = _fast_length(length + int(RATE_HZ * MAX_RT60_S))
    hz = np.fft.rfftfreq(padded, 1 / RATE_HZ).astype(np.float32)  # [S]
    total = np.fft.rfft(person, padded)
    if room.rt60_s is not None:
        total *= np.fft.rfft(_reverberation(room, room.rt60_s, source), padded)
    if room.echo_delay_s is not None:
        delayed = np.zeros(padded, np.float32)
        start = int(room.echo_delay_s * RATE_HZ)
        delayed[start:length] = agent[: length - start]
        loss = _gain(room.echo_db) / np.sqrt(1 + (hz / room.echo_cutoff_hz) ** 4)
        total += np.fft.rfft(delayed) * loss
    total += _noise(room, hz, padded, speech_rms * _gain(-room.snr_db), source)
    if room.telephone:
        total /= np.sqrt(1 + (300 / np.maximum(hz, 1)) ** 8) * np.sqrt(1 + (hz / 3400) ** 16)
    heard = np.fft.irfft(total, padded)[:length] * _gain(room.gain_db)
    clipped: Audio = np.clip(heard, -1, 1).astype(np.float32)
    return clipped


def _reverberation(room: Room, rt60_s: float, source: np.random.Generator) -> Audio:
    """An impulse response: the direct sound, then noise that falls by 60 dB in `rt60_s`."""
    count = int(rt60_s * RATE_HZ)
    decay = np.exp(-math.log(1000) / count * np.arange(count, dtype=np.float32))
    response: Audio = source.standard_normal(count, dtype=np.float32) * decay
    response[: RATE_HZ * 3 // 1000] = 0
    response *= _gain(-room.direct_over_reverberant_db) / np.sqrt(np.square(response).sum())
    response[0] = 1
    return response


def _noise(
    room: Room, hz: NDArray[np.float32], padded: int, rms: float, source: np.random.Generator
) -> Spectrum:
    """The spectrum [S] of noise that has `rms` in time, with its hum."""
    noise: Spectrum = source.standard_normal(2 * len(hz), dtype=np.float32).view(np.complex64)
    noise *= np.exp(np.log(np.maximum(hz, 60) / 1000) * (room.slope_db_per_octave / 6.02))
    parts = noise.view(np.float32)
    noise *= rms * padded / math.sqrt(2 * float(parts @ parts))
    if room.hum_hz is not None:
        for harmonic in range(1, 5):
            bin_index = round(harmonic * room.hum_hz * padded / RATE_HZ)
            level = rms * _gain(-room.hum_below_noise_db) / harmonic
            noise[bin_index] += level * padded / math.sqrt(2)
    return noise


def _cough(source: np.random.Generator) -> Audio:
    bursts: list[Audio] = []
    for _ in range(source.integers(1, 4)):
        count = int(source.uniform(0.12, 0.3) * RATE_HZ)
        time = np.arange(count, dtype=np.float32) / count
        burst = _coloured(count, source.uniform(500, 1500), source)
        burst *= time**0.1 * (1 - time) ** 2
        bursts += [burst, np.zeros(int(source.uniform(0.05, 0.25) * RATE_HZ), np.float32)]
    return np.concatenate(bursts)


def _knocks(source: np.random.Generator) -> Audio:
    step = int(source.uniform(0.12, 0.3) * RATE_HZ)
    time = np.arange(step, dtype=np.float32) / RATE_HZ
    ring = np.sin(2 * np.pi * source.uniform(80, 400) * time) + 0.3 * _coloured(step, 800, source)
    return np.tile(ring * np.exp(-time * source.uniform(25, 80)), source.integers(1, 5))


def _clicks(source: np.random.Generator) -> Audio:
    clicks = np.zeros(int(source.uniform(0.3, 1.5) * RATE_HZ), np.float32)
    for start in source.integers(0, len(clicks) - 80, source.integers(1, 8)):
        clicks[start : start + 80] += _coloured(80, 3000, source) * np.linspace(1, 0, 80)
    return clicks


def _rustle(source: np.random.Generator) -> Audio:
    count = int(source.uniform(0.3, 1.5) * RATE_HZ)
    swell = np.sin(np.pi * np.arange(count) / count) ** 2
    flutter = 1 + 0.5 * np.sin(2 * np.pi * source.uniform(3, 12) * np.arange(count) / RATE_HZ)
    return np.asarray(_coloured(count, source.uniform(800, 5000), source) * swell * flutter)


def _beep(source: np.random.Generator) -> Audio:
    count = int(source.uniform(0.1, 0.6) * RATE_HZ)
    tone = np.sin(2 * np.pi * source.uniform(300, 2500) * np.arange(count) / RATE_HZ)
    return tone * np.minimum(1, np.minimum(np.arange(count), np.arange(count)[::-1]) / 160)


EVENTS: dict[str, Callable[[np.random.Generator], Audio]] = {
    "cough": _cough,
    "knocks": _knocks,
    "clicks": _clicks,
    "rustle": _rustle,
    "beep": _beep,
}


def sound(kind: str, rms: float, source: np.random.Generator) -> Audio:
    """One of `EVENTS` at a level. [T]"""
    samples = EVENTS[kind](source).astype(np.float32)
    louder: Audio = samples * np.float32(rms / np.sqrt(np.square(samples).mean()))
    return louder


def _coloured(count: int, centre_hz: float, source: np.random.Generator) -> Audio:
    """Noise about one octave and a half around a frequency. [count]"""
    spectrum = np.fft.rfft(source.standard_normal(count, dtype=np.float32))
    octaves = np.log2(np.maximum(np.fft.rfftfreq(count, 1 / RATE_HZ), 20) / centre_hz)
    shaped = np.fft.irfft(spectrum * np.exp(-np.square(octaves)), count)
    return np.asarray(shaped / np.abs(shaped).max(), np.float32)


def _gain(db: float) -> float:
    return float(10 ** (db / 20))


def _fast_length(length: int) -> int:
    """The next 2^a 3^b, b at most 2, for the FFT."""
    return min(factor << max(0, math.ceil(math.log2(length / factor))) for factor in (1, 3, 9))
