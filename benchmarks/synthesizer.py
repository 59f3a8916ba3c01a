"""eSpeak NG in this process, for test speech: any voice, rate, pitch, intonation and phonemes.

The server speaks through `handlers.tts.espeak_voice`, which has no need of the last two.
"""

from __future__ import annotations

import ctypes
import shutil
import tempfile
from dataclasses import dataclass

import numpy as np

from handlers.audio import Resampler, from_pcm16
from handlers.messages import RATE_HZ, Samples

AUDIO_SYNCHRONOUS = 2
RATE, PITCH, RANGE = 1, 3, 4  # espeak_PARAMETER
WORD_EVENT = 1
POSITION_CHARACTER = 1
CHARS_UTF8, PHONEMES = 1, 0x100


@dataclass(frozen=True, slots=True)
class Speaker:
    voice: str  # eSpeak name, language+variant
    speed_wpm: int
    pitch: int  # eSpeak's 0-100
    intonation: int  # eSpeak's pitch range, 0-100


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    )


_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


class Synthesizer:
    """A context with a library of its own: the same calls in it give the same audio.

    eSpeak keeps global state from one text to the next, and through its own termination; hence
    a fresh copy of the library each time. Raises ModuleNotFoundError without espeakng-loader.
    """

    def __enter__(self) -> Synthesizer:
        import espeakng_loader

        with tempfile.TemporaryDirectory() as folder:
            library = shutil.copy(espeakng_loader.get_library_path(), folder)
            self._lib = ctypes.CDLL(library)
        data = espeakng_loader.get_data_path().encode()
        self._rate_hz: int = self._lib.espeak_Initialize(AUDIO_SYNCHRONOUS, 0, data, 0)
        self._lib.espeak_ng_SetRandSeed(ctypes.c_long(0))
        self._lib.srand(0)  # libc's: the Klatt voices
        self._chunks: list[Samples] = []
        self._starts: list[int] = []
        self._callback = _CALLBACK(self._take)
        self._lib.espeak_SetSynthCallback(self._callback)
        return self

    def __exit__(self, *_: object) -> None:
        self._lib.espeak_Terminate()

    def _take(
        self, wav: ctypes._Pointer[ctypes.c_short], count: int, events: ctypes._Pointer[_Event]
    ) -> int:
        index = 0
        while events[index].type:
            if events[index].type == WORD_EVENT:
                self._starts.append(events[index].sample)
            index += 1
        if wav and count:
            self._chunks.append(from_pcm16(ctypes.string_at(wav, 2 * count)))
        return 0

    def say(self, speaker: Speaker, text: str) -> tuple[Samples, list[int]]:
        """Audio [T] at `RATE_HZ` and the sample at which each word starts."""
        self._chunks, self._starts = [], []
        self._lib.espeak_SetVoiceByName(speaker.voice.encode())
        self._lib.espeak_SetParameter(RATE, speaker.speed_wpm, 0)
        self._lib.espeak_SetParameter(PITCH, speaker.pitch, 0)
        self._lib.espeak_SetParameter(RANGE, speaker.intonation, 0)
        raw = text.encode()
        flags = CHARS_UTF8 | PHONEMES
        self._lib.espeak_Synth(raw, len(raw) + 1, 0, POSITION_CHARACTER, 0, flags, None, None)
        resampler = Resampler(self._rate_hz, RATE_HZ, "HQ")
        speech = resampler.push(np.concatenate(self._chunks), last=True)
        scale = RATE_HZ / self._rate_hz
        return speech, [int(start * scale) for start in self._starts]
