"""Speech for the tests, made by eSpeak NG, with a little room noise around and below it."""

from __future__ import annotations

import functools

import numpy as np

from handlers.audio import Resampler
from handlers.messages import EAR_RATE_HZ, RATE_HZ, Samples
from handlers.tts.espeak_voice import EspeakVoice, Manner


@functools.cache
def spoken(text: str, voice: str = "en-us", hz: int = RATE_HZ) -> Samples:
    """[T] at `hz`: 300 ms of room, the text, 300 ms of room."""
    speaker = EspeakVoice()
    try:
        speech = speaker.speak(text, Manner(voice))
    finally:
        speaker.close()
    pad = np.zeros(3 * RATE_HZ // 10, np.float32)
    speech = Resampler(RATE_HZ, hz).push(np.concatenate([pad, speech, pad]), last=True)
    return speech + room(len(speech) / hz, hz)


def room(seconds: float, hz: int = RATE_HZ) -> Samples:
    """Noise at -62 dB, the same every time."""
    noise = np.random.default_rng(1).standard_normal(round(seconds * hz))
    return (0.0008 * noise).astype(np.float32)


def heard(text: str) -> Samples:
    return spoken(text, hz=EAR_RATE_HZ)
