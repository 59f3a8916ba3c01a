"""Microphone and speaker through PortAudio (`sounddevice`, loaded when a device is used)."""

from __future__ import annotations

import asyncio
import contextlib
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np

from client.conversation import Conversation
from client.playback import MS, PlaybackBuffer
from handlers.audio import Resampler
from handlers.messages import RATE_HZ, Samples

BLOCK_S = 0.01
"""Audio per callback: each direction waits for one block before anything can happen."""
LATENCY_S = 0.03
"""Asked of both streams. PortAudio's own "low" (9 ms through PulseAudio) broke off now and then."""
PULL_SAMPLES = 5 * MS

T = TypeVar("T")
Direction: TypeAlias = Literal["input", "output"]
DeviceInfo: TypeAlias = Mapping[str, Any]
PERSON: Mapping[Direction, str] = {"input": "microphone", "output": "speaker"}


class DeviceError(Exception):
    """No PortAudio, no such device, or it cannot be opened. The text says what to do."""


@dataclass(frozen=True, slots=True)
class Device:
    index: int
    name: str
    rate_hz: int
    channels: int


class Speaker:
    """Turns playback at 24 kHz into blocks at the device's rate. Runs in the audio callback."""

    def __init__(
        self, playback: PlaybackBuffer, rate_hz: int, played: Callable[[Samples], object]
    ) -> None:
        self._playback = playback
        self._played = played
        self._resampler = Resampler(RATE_HZ, rate_hz)
        self._same_rate = rate_hz == RATE_HZ
        self._ready = np.zeros(0, np.float32)

    def fill(self, n_samples: int) -> Samples:
        """The next [n_samples] at the device's rate."""
        while len(self._ready) < n_samples:
            missing = n_samples - len(self._ready)
            pulled = self._playback.pull(missing if self._same_rate else PULL_SAMPLES)
            self._played(pulled)
            self._ready = np.concatenate([self._ready, self._resampler.push(pulled)])
        out, self._ready = self._ready[:n_samples], self._ready[n_samples:]
        return out


class DeviceAudio:
    """Two open streams. Raises `DeviceError` from `find`, and from `run` if a stream fails."""

    def __init__(self, microphone: Device, speaker: Device) -> None:
        self._microphone = microphone
        self._speaker = speaker

    @staticmethod
    def find(microphone: str | None, speaker: str | None) -> DeviceAudio:
        """Choose by index, name or part of the name; None: the system's default."""
        return DeviceAudio(_find(microphone, "input"), _find(speaker, "output"))

    def __str__(self) -> str:
        return f"microphone: {self._microphone.name}, speaker: {self._speaker.name}"

    async def run(self, conversation: Conversation) -> None:
        """Carry audio until cancelled."""
        sd = _sounddevice()
        link = _Link(conversation, self._microphone.rate_hz, self._speaker.rate_hz)

        def open_stream(make: Callable[..., Any], device: Device, **callbacks: Any) -> Any:
            return make(
                device=device.index,
                samplerate=device.rate_hz,
                blocksize=round(device.rate_hz * BLOCK_S),
                channels=device.channels,
                dtype="float32",
                latency=LATENCY_S,
                **callbacks,
            )

        with contextlib.ExitStack() as streams:
            try:
                for make, device, callback, stopped in (
                    (sd.InputStream, self._microphone, link.capture, link.microphone_stopped),
                    (sd.OutputStream, self._speaker, link.play, link.speaker_stopped),
                ):
                    stream = open_stream(make, device, callback=callback, finished_callback=stopped)
                    streams.callback(stream.close)
                    stream.start()
            except sd.PortAudioError as error:
                raise DeviceError(f"Cannot use {self}: {_reason(error)}") from error
            await link.stopped
            raise DeviceError(f"The {link.stopped.result()} has stopped: is it still connected?")


class _Link:
    """Between PortAudio's threads and the event loop."""

    def __init__(self, conversation: Conversation, microphone_hz: int, speaker_hz: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._conversation = conversation
        self._resampler = Resampler(microphone_hz, RATE_HZ)
        self._speaker = Speaker(
            conversation.playback, speaker_hz, lambda samples: self._call(self._played, samples)
        )
        self._hearing = False
        self.stopped: asyncio.Future[str] = self._loop.create_future()

    def capture(self, data: Samples, frames: int, time: object, status: object) -> None:
        self._call(self._heard, data.mean(axis=1, dtype=np.float32))

    def play(self, data: Samples, frames: int, time: object, status: object) -> None:
        data[:] = self._speaker.fill(frames)[:, np.newaxis]

    def microphone_stopped(self) -> None:
        self._call(self._stop, PERSON["input"])

    def speaker_stopped(self) -> None:
        self._call(self._stop, PERSON["output"])

    def _heard(self, samples: Samples) -> None:
        self._hearing = True
        self._conversation.microphone(self._resampler.push(samples))

    def _played(self, samples: Samples) -> None:
        if self._hearing:  # the recording begins when both directions run
            self._conversation.played(samples)

    def _stop(self, which: str) -> None:
        if not self.stopped.done():
            self.stopped.set_result(which)

    def _call(self, function: Callable[[T], None], argument: T) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, argument)


def device_table() -> str:
    """All devices, one per line, the defaults marked. Raises `DeviceError`."""
    sd = _sounddevice()
    apis = sd.query_hostapis()
    defaults = tuple(sd.default.device)
    lines = ["  index  in  out  rate_hz  name"]
    for index, device in enumerate(sd.query_devices()):
        marks = "".join(
            mark if index == default else " " for mark, default in zip("><", defaults, strict=True)
        )
        lines.append(
            f"{marks} {index:4}  {device['max_input_channels']:3} {device['max_output_channels']:4}"
            f"  {device['default_samplerate']:7.0f}  {device['name']}"
            f" ({apis[device['hostapi']]['name']})"
        )
    if len(lines) == 1:
        raise DeviceError(_none_found("input"))
    return "\n".join([*lines, "> default microphone, < default speaker"])


def select(devices: Sequence[DeviceInfo], wanted: str, direction: Direction) -> int:
    """Index of the device that `wanted` names: its index, its name, or a part of one name only.

    Raises `DeviceError` when there is none, or more than one.
    """
    usable = [
        (index, str(device["name"]))
        for index, device in enumerate(devices)
        if device[f"max_{direction}_channels"] > 0
    ]
    if wanted.isdecimal():
        found = [(index, name) for index, name in usable if index == int(wanted)]
    else:
        low = wanted.lower()
        found = [(index, name) for index, name in usable if name.lower() == low]
        found = found or [(index, name) for index, name in usable if low in name.lower()]
    if len(found) == 1:
        return found[0][0]
    what = PERSON[direction]
    if found:
        names = ", ".join(f"{index}: {name}" for index, name in found)
        raise DeviceError(f"More than one {what} is named like {wanted!r}: {names}.")
    raise DeviceError(f"There is no {what} {wanted!r}; --list_devices shows what there is.")


def _find(wanted: str | None, direction: Direction) -> Device:
    sd = _sounddevice()
    if wanted is None:
        index = sd.default.device[0 if direction == "input" else 1]
        if index < 0:
            raise DeviceError(_none_found(direction))
    else:
        index = select(sd.query_devices(), wanted, direction)
    info = sd.query_devices(index)
    own_rate_hz = round(info["default_samplerate"])
    check = sd.check_input_settings if direction == "input" else sd.check_output_settings
    reason = ""
    for channels in (1, 2):
        for rate_hz in (RATE_HZ, own_rate_hz):
            try:
                check(device=index, channels=channels, dtype="float32", samplerate=rate_hz)
            except sd.PortAudioError as error:
                reason = _reason(error)
            else:
                return Device(index, info["name"], rate_hz, channels)
    raise DeviceError(
        f"Cannot open the {PERSON[direction]} {info['name']!r}: {reason}. It may be in use by "
        "another program, or this user may lack permission (on Linux: the group 'audio'; on "
        "macOS: Privacy & Security, Microphone)."
    )


def _sounddevice() -> types.ModuleType:
    try:
        import sounddevice
    except ImportError as error:
        raise DeviceError("The Python package sounddevice is not installed.") from error
    except OSError as error:
        raise DeviceError(
            f"The PortAudio library is not installed ({error}). On Debian and Ubuntu: "
            "apt install libportaudio2. Without it, --input FILE.wav --output FILE.wav works."
        ) from error
    module: types.ModuleType = sounddevice
    return module


def _none_found(direction: Direction) -> str:
    return (
        f"No {PERSON[direction]} was found. Is one connected, and may this user use it (on Linux: "
        "the group 'audio'; for PulseAudio and PipeWire also the package libasound2-plugins)? "
        "Without one, --input FILE.wav --output FILE.wav works."
    )


def _reason(error: Exception) -> str:
    return str(error.args[0]) if error.args else str(error)
