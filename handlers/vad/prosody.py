"""How a stretch of speech ended: pitch and level cues, gathered while it is heard.

A statement ends low in the speaker's range and fades; a speaker who goes on stays up, or is cut
off at full level. The cues are relative to the same utterance, so that they need neither a
speaker's history nor a language. Pitch is the first strong peak of the normalised
autocorrelation (Boersma 1993, without its path search), two values per 32 ms window.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

from handlers.messages import EAR_RATE_HZ, Prosody, Samples

HOP_SAMPLES = 256
HOP_S = HOP_SAMPLES / EAR_RATE_HZ
FRAME_SAMPLES = 640  # 40 ms: two and a half periods of the lowest pitch
FFT_SAMPLES = 2048
PITCH_HZ = (65.0, 420.0)
LAGS = slice(int(EAR_RATE_HZ / PITCH_HZ[1]), int(EAR_RATE_HZ / PITCH_HZ[0]))
LAG_COST = 0.0003  # per sample: prefers the octave above when two peaks are alike
VOICED_CORRELATION = 0.55
OCTAVE_SLIP_ST = 9.0  # further than this from the median: the tracker has slipped
SPEECH_BELOW_LOUD_DB = 18.0
FULL_BELOW_MEDIAN_DB = 6.0
TAIL_FRAMES = round(0.25 / HOP_S)
MEMORY_FRAMES = round(20.0 / HOP_S)
MIN_PITCHED_FRAMES = 5

_WINDOW = np.hanning(FRAME_SAMPLES).astype(np.float32)


def _autocorrelation(frame: Samples) -> npt.NDArray[np.float64]:
    spectrum = np.fft.rfft(frame, FFT_SAMPLES)
    power = spectrum.real**2 + spectrum.imag**2
    return np.fft.irfft(power)[: LAGS.stop]


_OWN = _autocorrelation(_WINDOW)
_OWN_CORRELATION = (_OWN / _OWN[0])[LAGS]
_COST = LAG_COST * np.arange(LAGS.stop - LAGS.start)


class ProsodyTracker:
    """One utterance: `push` its audio window by window, `describe` its end at any time.

    Keeps the last 20 s. About 0.1 ms per window of 512 samples.
    """

    def __init__(self) -> None:
        self._rest = np.zeros(0, np.float32)
        self._pitch_st: deque[float] = deque(maxlen=MEMORY_FRAMES)
        self._level_db: deque[float] = deque(maxlen=MEMORY_FRAMES)

    def push(self, samples: Samples, probability: float) -> None:
        """The next [T] samples at `EAR_RATE_HZ`, speech with `probability`."""
        audio = np.concatenate([self._rest, samples])
        start = 0
        while start + FRAME_SAMPLES <= len(audio):
            frame = audio[start : start + FRAME_SAMPLES]
            self._level_db.append(
                10 * float(np.log10(np.dot(frame, frame) / FRAME_SAMPLES + 1e-10))
            )
            self._pitch_st.append(_pitch_st(frame) if probability > 0.1 else np.nan)
            start += HOP_SAMPLES
        self._rest = audio[start:]

    def describe(self) -> Prosody | None:
        """The end of the speech so far; None if there was hardly any pitch in it."""
        level = np.array(self._level_db)
        if not level.size:
            return None
        loud = np.median(level[level >= np.quantile(level, 0.6)])
        speech = level > loud - SPEECH_BELOW_LOUD_DB
        pitch = np.array(self._pitch_st)
        pitched = np.flatnonzero(speech & ~np.isnan(pitch))
        if pitched.size:
            off = np.abs(pitch[pitched] - np.median(pitch[pitched]))
            pitched = pitched[off < OCTAVE_SLIP_ST]
        if len(pitched) < MIN_PITCHED_FRAMES:
            return None
        values = pitch[pitched]
        end = float(np.median(values[-3:]))
        tail = pitched > pitched[-1] - TAIL_FRAMES
        times, tail_values = pitched[tail] * HOP_S, values[tail]
        last = int(np.flatnonzero(speech)[-1])
        full = np.flatnonzero(level > np.median(level[speech]) - FULL_BELOW_MEDIAN_DB)
        return Prosody(
            pitch_end_st=end - float(np.median(values)),
            pitch_above_low_st=end - float(np.quantile(values, 0.1)),
            pitch_slope_st_s=_slope(times, tail_values),
            pitch_fall_st=float(np.max(tail_values[: max(1, len(tail_values) // 3)])) - end,
            fade_ms=1000 * HOP_S * (last - int(full[-1])),
        )


def _pitch_st(frame: Samples) -> float:
    """Semitones above 100 Hz; NaN where there is no pitch."""
    correlation = _autocorrelation((frame - frame.mean()) * _WINDOW)
    if correlation[0] < 1e-6:
        return np.nan
    normalised = correlation[LAGS] / correlation[0] / _OWN_CORRELATION
    best = int(np.argmax(normalised - _COST))
    if normalised[best] < VOICED_CORRELATION:
        return np.nan
    return 12 * float(np.log2(EAR_RATE_HZ / (LAGS.start + best) / 100.0))


def _slope(times: npt.NDArray[np.float64], values: npt.NDArray[np.float64]) -> float:
    """Least-squares slope; 0 for fewer than four points."""
    if len(values) < 4:
        return 0.0
    centred = times - times.mean()
    return float(np.dot(centred, values) / np.dot(centred, centred))
