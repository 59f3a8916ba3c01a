"""The process that eSpeak NG runs in: its C code can crash on odd text, and it holds one global
voice. Run as a script with the number of a connected socket; ends when that closes.

Out comes first a hello (u32 length, JSON: rate_hz, languages, variants). Then, for every request
(u32 length, JSON: text, voice, wpm, pitch, volume), frames of audio as it is made and at last one
of kind `END`. A length of zero stops the text that is being spoken. All integers little-endian.

The C interface is described in `speak_lib.h` of eSpeak NG 1.52.
"""

from __future__ import annotations

import ctypes
import json
import select
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LENGTH = struct.Struct("<I")
FRAME = struct.Struct("<BHI")  # kind, words, bytes of pcm16; then the words, then the pcm16
WORD = struct.Struct("<ii")  # where a word starts: character of the text, sample
AUDIO, END = 1, 2

_AUDIO_SYNCHRONOUS = 2
_DONT_EXIT = 0x8000
_POSITION_CHARACTER = 1
_CHARS_UTF8 = 1  # no SSML, no phoneme mnemonics: plain text
_PARAMETER_RATE, _PARAMETER_VOLUME, _PARAMETER_PITCH = 1, 2, 3
_EVENT_END_OF_LIST, _EVENT_WORD = 0, 1


class _EventId(ctypes.Union):
    _fields_ = [
        ("number", ctypes.c_int),
        ("name", ctypes.c_char_p),
        ("string", ctypes.c_char * 8),
    ]


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),  # from 1
        ("length", ctypes.c_int),
        ("audio_position_ms", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    ]


class _VoiceEntry(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("languages", ctypes.POINTER(ctypes.c_char)),  # (priority byte, code, NUL)*, NUL
        ("identifier", ctypes.c_char_p),  # the voice's file
        ("gender", ctypes.c_ubyte),
        ("age", ctypes.c_ubyte),
        ("variant", ctypes.c_ubyte),
        ("xx1", ctypes.c_ubyte),
        ("score", ctypes.c_int),
        ("spare", ctypes.c_void_p),
    ]


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


class _Worker:
    """Raises OSError where the library or its data cannot be loaded."""

    def __init__(self, connection: socket.socket) -> None:
        import espeakng_loader

        self._connection = connection
        self._c: Any = ctypes.CDLL(espeakng_loader.get_library_path())
        self._c.espeak_ListVoices.restype = ctypes.POINTER(ctypes.POINTER(_VoiceEntry))
        self._data = Path(espeakng_loader.get_data_path())
        path = str(self._data).encode()
        self._rate_hz = self._c.espeak_Initialize(_AUDIO_SYNCHRONOUS, 0, path, _DONT_EXIT)
        if self._rate_hz <= 0:
            raise OSError("eSpeak NG could not read its data")
        self._callback = _Callback(self._on_audio)  # kept: C holds only its address
        self._c.espeak_SetSynthCallback(self._callback)

    def run(self) -> None:
        hello = {
            "rate_hz": self._rate_hz,
            "languages": self._languages(),
            "variants": self._variants(),
        }
        data = json.dumps(hello).encode()
        self._connection.sendall(LENGTH.pack(len(data)) + data)
        with self._connection.makefile("rb", buffering=0) as requests:
            # Unbuffered: `_on_audio` asks the socket whether more has come.
            while header := requests.read(LENGTH.size):
                (left,) = LENGTH.unpack(header)
                if left == 0:
                    continue  # a stop that came after the end
                data = b""
                while len(data) < left and (part := requests.read(left - len(data))):
                    data += part
                self._speak(**json.loads(data))
                self._connection.sendall(FRAME.pack(END, 0, 0))

    def _speak(self, text: str, voice: str, wpm: int, pitch: int, volume: int) -> None:
        self._c.espeak_SetVoiceByName(voice.encode())
        self._c.espeak_SetParameter(_PARAMETER_RATE, wpm, 0)
        self._c.espeak_SetParameter(_PARAMETER_PITCH, pitch, 0)
        self._c.espeak_SetParameter(_PARAMETER_VOLUME, volume, 0)
        data = text.encode()
        size = ctypes.c_size_t(len(data) + 1)
        self._c.espeak_Synth(data, size, 0, _POSITION_CHARACTER, 0, _CHARS_UTF8, None, None)

    def _on_audio(self, wav: Any, count: int, events: Any) -> int:
        """Called for every ~60 ms of audio; 1 stops it. Nothing may be raised into C."""
        try:
            words = []
            index = 0
            while (event := events[index]).type != _EVENT_END_OF_LIST:
                if event.type == _EVENT_WORD:
                    words.append(WORD.pack(event.text_position - 1, event.sample))
                index += 1
            pcm = ctypes.string_at(wav, count * 2) if wav and count else b""
            frame = FRAME.pack(AUDIO, len(words), len(pcm))
            self._connection.sendall(b"".join((frame, *words, pcm)))
            stop, _, _ = select.select([self._connection], [], [], 0)
            return 1 if stop else 0
        except OSError:
            return 1  # nobody listens; the next read ends the process

    def _languages(self) -> list[str]:
        """Without its dictionary, a language is noise, and in the end a crash: left out."""
        found = []
        for entry in self._list(None):
            codes = _codes(entry)
            if any((self._data / f"{code.partition('-')[0]}_dict").exists() for code in codes):
                found.extend(codes)
        return sorted(set(found))

    def _variants(self) -> list[str]:
        code = ctypes.create_string_buffer(b"variant")
        wanted = _VoiceEntry(languages=ctypes.cast(code, ctypes.POINTER(ctypes.c_char)))
        files = [entry.identifier.decode() for entry in self._list(wanted)]
        return sorted(file.rpartition("/")[2] for file in files)

    def _list(self, wanted: _VoiceEntry | None) -> Iterator[_VoiceEntry]:
        found = self._c.espeak_ListVoices(None if wanted is None else ctypes.byref(wanted))
        count = 0
        while found[count]:
            yield found[count].contents
            count += 1


def _codes(entry: _VoiceEntry) -> list[str]:
    codes, at = [], 0
    while entry.languages[at] != b"\0":
        code = ctypes.string_at(ctypes.addressof(entry.languages.contents) + at + 1)
        codes.append(code.decode("ascii", "replace"))
        at += len(code) + 2
    return codes


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the server, which may yet drain
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        _Worker(connection).run()
