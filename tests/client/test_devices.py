from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from client.conversation import Conversation
from client.devices import DeviceAudio, DeviceError, Speaker, device_table, select
from client.listen_and_play import main
from client.playback import MS, PlaybackBuffer, PlaybackOptions
from client.transcript import Transcript
from handlers.messages import RATE_HZ, Samples
from tests.client.fakes import tone


def device(name: str, inputs: int, outputs: int, rate_hz: float = 48_000.0) -> dict[str, Any]:
    return {
        "name": name,
        "max_input_channels": inputs,
        "max_output_channels": outputs,
        "default_samplerate": rate_hz,
        "hostapi": 0,
    }


DEVICES = [
    device("HDMI 0", 0, 8),
    device("USB Audio", 1, 0),
    device("USB Audio", 0, 2),
    device("USB Audio Webcam", 2, 0),
    device("pulse", 32, 32),
]


class PortAudioError(Exception):
    pass


class Stream:
    """A device that works until it is unplugged, which is at once."""

    def __init__(self, finished_callback: Callable[[], None], **_: Any) -> None:
        self.start = finished_callback

    def close(self) -> None:
        pass


def use(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Put a stand-in for the sounddevice module in place."""

    def query_devices(index: int | None = None) -> Any:
        return DEVICES if index is None else DEVICES[index]

    def fine(**settings: Any) -> None:
        pass

    stand_in = {
        "PortAudioError": PortAudioError,
        "query_devices": query_devices,
        "query_hostapis": lambda: [{"name": "ALSA"}],
        "default": SimpleNamespace(device=[4, 0]),
        "check_input_settings": fine,
        "check_output_settings": fine,
        "InputStream": Stream,
        "OutputStream": Stream,
    }
    monkeypatch.setitem(sys.modules, "sounddevice", SimpleNamespace(**(stand_in | changes)))


def test_selection_by_index_name_and_part_of_a_name() -> None:
    assert select(DEVICES, "4", "output") == 4
    assert select(DEVICES, "usb audio", "input") == 1  # the whole name comes first
    assert select(DEVICES, "USB", "output") == 2
    assert select(DEVICES, "webcam", "input") == 3
    with pytest.raises(DeviceError, match="1: USB Audio, 3: USB Audio Webcam"):
        select(DEVICES, "usb", "input")
    for nothing in ("0", "99", "bluetooth"):
        with pytest.raises(DeviceError, match="no microphone"):
            select(DEVICES, nothing, "input")


def test_table_names_all_and_marks_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch)
    lines = device_table().splitlines()
    assert [line[0:2] for line in lines[1:6]] == [" <", "  ", "  ", "  ", "> "]
    assert "48000  USB Audio Webcam (ALSA)" in lines[4]
    use(monkeypatch, query_devices=list)
    with pytest.raises(DeviceError, match="No microphone was found"):
        device_table()


def test_a_device_is_used_at_24_khz_mono_or_as_near_to_it_as_it_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = []

    def stereo_48_khz(**settings: Any) -> None:
        tried.append((settings["samplerate"], settings["channels"]))
        if tried[-1] != (48_000, 2):
            raise PortAudioError("Invalid sample rate", -9997)

    def never(**settings: Any) -> None:
        raise PortAudioError("Device unavailable", -9985)

    use(monkeypatch, check_output_settings=stereo_48_khz)
    assert str(DeviceAudio.find("webcam", None)) == "microphone: USB Audio Webcam, speaker: HDMI 0"
    assert tried == [(24_000, 1), (48_000, 1), (24_000, 2), (48_000, 2)]
    use(monkeypatch, check_input_settings=never)
    with pytest.raises(DeviceError, match=r"'pulse': Device unavailable\. .*permission"):
        DeviceAudio.find(None, None)
    use(monkeypatch, default=SimpleNamespace(device=[-1, -1]))
    with pytest.raises(DeviceError, match="No microphone was found"):
        DeviceAudio.find(None, None)


def test_no_portaudio_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sounddevice.py").write_text("raise OSError('PortAudio library not found')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sounddevice", raising=False)
    assert main([]) == 2
    assert "apt install libportaudio2" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    assert main(["--list_devices"]) == 2
    assert "sounddevice is not installed" in capsys.readouterr().err


@pytest.mark.asyncio
async def test_a_device_that_stops_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch)
    talk = Conversation(Transcript(io.StringIO().write, live=False))
    with pytest.raises(DeviceError, match="microphone has stopped"):
        await DeviceAudio.find(None, None).run(talk)


@pytest.mark.parametrize("rate_hz", [RATE_HZ, 48_000, 44_100, 16_000])
def test_speaker_plays_everything_once_at_the_devices_rate(rate_hz: int) -> None:
    playback = PlaybackBuffer(PlaybackOptions(start_ms=0, min_start_ms=0))
    pulled: list[Samples] = []
    speaker = Speaker(playback, rate_hz, pulled.append)
    playback.push("a", 0, tone(1000 * MS))
    block = rate_hz // 100
    out = np.concatenate([speaker.fill(block) for _ in range(110)])
    assert out.shape == (110 * block,)
    np.testing.assert_array_equal(np.concatenate(pulled)[: 1000 * MS], tone(1000 * MS))
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate_hz) / rate_hz)
    # The resampler's filter may delay, but neither lose nor repeat.
    start = int(np.argmax(np.correlate(out, expected[: rate_hz // 10], "valid")[: rate_hz // 20]))
    middle = slice(rate_hz // 10, rate_hz // 2)
    difference = out[start:][middle] - expected[middle]
    assert np.abs(difference).max() < 0.05
