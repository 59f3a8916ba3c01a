"""eSpeak NG as a source of training and test speech: any voice, the times of words and phonemes.

eSpeak keeps global state from one text to the next, and through its own termination; hence each
`Synthesizer` loads a copy of the library, and the same calls in it give the same audio.
"""

from __future__ import annotations

import _ctypes
import ctypes
import shutil
import tempfile
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import soxr

RATE_HZ = 16_000

AUDIO_SYNCHRONOUS = 2
PHONEME_EVENTS = 1  # espeak_Initialize
RATE, PITCH, RANGE = 1, 3, 4  # espeak_PARAMETER
WORD_EVENT, PHONEME_EVENT = 1, 7
POSITION_CHARACTER = 1
CHARS_UTF8, PHONEMES = 1, 0x100  # and phonemes in [[ ]]


@dataclass(frozen=True, slots=True)
class Speaker:
    voice: str  # eSpeak name, language+variant
    speed_wpm: int
    pitch: int  # eSpeak's 0-100
    intonation: int  # eSpeak's pitch range, 0-100
    height: float = 1.0
    """All of its frequencies are so many times higher, as a smaller body's: a voice that eSpeak
    hasn't. The speed stays."""


@dataclass(frozen=True, slots=True)
class Utterance:
    """Speech with the sample at which each word and each phoneme starts, in order."""

    samples: npt.NDArray[np.float32]  # [T] at the synthesizer's rate
    words: tuple[int, ...]
    phonemes: tuple[tuple[str, int], ...]  # eSpeak's names; "_:" and "" are silence


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
    """A context. Raises ModuleNotFoundError without espeakng-loader, ValueError at no voice."""

    def __init__(self, rate_hz: int = RATE_HZ) -> None:
        self._made_hz = rate_hz

    def __enter__(self) -> Synthesizer:
        import espeakng_loader

        with tempfile.TemporaryDirectory() as folder:
            self._lib = ctypes.CDLL(shutil.copy(espeakng_loader.get_library_path(), folder))
        data = espeakng_loader.get_data_path().encode()
        self._spoken_hz: int = self._lib.espeak_Initialize(
            AUDIO_SYNCHRONOUS, 0, data, PHONEME_EVENTS
        )
        self._lib.espeak_ng_SetRandSeed(ctypes.c_long(0))
        self._chunks: list[npt.NDArray[np.int16]] = []
        self._words: list[int] = []
        self._phonemes: list[tuple[str, int]] = []
        self._callback = _CALLBACK(self._take)
        self._lib.espeak_SetSynthCallback(self._callback)
        return self

    def __exit__(self, *_: object) -> None:
        self._lib.espeak_Terminate()
        _ctypes.dlclose(self._lib._handle)

    def say(self, speaker: Speaker, text: str) -> Utterance:
        self._chunks, self._words, self._phonemes = [], [], []
        if self._lib.espeak_SetVoiceByName(speaker.voice.encode()):
            raise ValueError(f"eSpeak has no voice {speaker.voice!r}")
        for parameter, value in (
            (RATE, round(speaker.speed_wpm / speaker.height)),
            (PITCH, speaker.pitch),
            (RANGE, speaker.intonation),
        ):
            self._lib.espeak_SetParameter(parameter, value, 0)
        self._lib.srand(0)  # libc's, which other instances draw from too: the Klatt voices
        raw = text.encode()
        flags = CHARS_UTF8 | PHONEMES
        self._lib.espeak_Synth(raw, len(raw) + 1, 0, POSITION_CHARACTER, 0, flags, None, None)
        pcm = np.concatenate([*self._chunks, np.zeros(0, np.int16)])
        played_hz = self._spoken_hz * speaker.height
        scale = self._made_hz / played_hz
        return Utterance(
            soxr.resample(pcm.astype(np.float32) / 32768, played_hz, self._made_hz),
            tuple(int(start * scale) for start in self._words),
            tuple((name, int(start * scale)) for name, start in self._phonemes),
        )

    def _take(
        self, wav: ctypes._Pointer[ctypes.c_short], count: int, events: ctypes._Pointer[_Event]
    ) -> int:
        index = 0
        while events[index].type:
            event = events[index]
            if event.type == WORD_EVENT:
                self._words.append(event.sample)
            elif event.type == PHONEME_EVENT:
                self._phonemes.append((event.id.decode(errors="replace"), event.sample))
            index += 1
        if wav and count:
            self._chunks.append(np.frombuffer(ctypes.string_at(wav, 2 * count), np.int16))
        return 0
