"""The real audio path: PulseAudio null sinks are the room, PortAudio is the client's own.

Runs where the Debian packages pulseaudio, pulseaudio-utils, libportaudio2 and
libasound2-plugins are installed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes.util
import os
import shutil
import signal
import subprocess
import sys
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from client.playback import MS
from client.wav import WavWriter
from handlers.audio import from_pcm16
from handlers.messages import RATE_HZ, Samples
from tests.client.fakes import Peer, realtime_server, tone

MISSING = [
    *(name for name in ("pulseaudio", "pactl", "paplay", "parecord") if not shutil.which(name)),
    *(() if ctypes.util.find_library("portaudio") else ("libportaudio2",)),
    *(() if list(Path("/usr/lib").glob("**/libasound_module_pcm_pulse.so")) else ("alsa-plugins",)),
]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

QUESTION_HZ, ANSWER_HZ = 440.0, 1000.0
WAIT_S = 20.0
MODULES = (
    "module-native-protocol-unix",
    f"module-null-sink sink_name=speaker rate={RATE_HZ} channels=1",
    f"module-null-sink sink_name=room rate={RATE_HZ} channels=1",
    "module-remap-source source_name=microphone master=room.monitor",
)
ALSA_CONFIG = "pcm.pulse { type pulse }\nctl.pulse { type pulse }\npcm.!default { type pulse }\n"


@pytest.fixture
def room(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A sound server of our own; yields the environment that leads to it."""
    run = tmp_path / "run"
    (run / "pulse").mkdir(parents=True, mode=0o700)
    run.chmod(0o700)
    (tmp_path / ".asoundrc").write_text(ALSA_CONFIG)
    environment = os.environ | {
        "HOME": str(tmp_path),
        "XDG_RUNTIME_DIR": str(run),
        "PULSE_RUNTIME_PATH": str(run / "pulse"),
        "PULSE_SERVER": f"unix:{run / 'pulse' / 'native'}",
        "PULSE_SINK": "speaker",
        "PULSE_SOURCE": "microphone",
    }
    environment.pop("DBUS_SESSION_BUS_ADDRESS", None)
    options = ("--system=false", "--exit-idle-time=-1", "--disable-shm=true", "--realtime=false")
    command = ["pulseaudio", "-n", "--daemonize=yes", *options]
    for module in MODULES:
        command += ["-L", module]
    started = subprocess.run(command, env=environment, capture_output=True, timeout=WAIT_S)
    assert started.returncode == 0, started.stderr.decode()
    yield environment
    subprocess.run(["pulseaudio", "--kill"], env=environment, check=True, timeout=WAIT_S)


def sounding_ms(samples: Samples, hz: float) -> int:
    """How many milliseconds of [T] hold mostly a tone of `hz`."""
    frames = samples[: len(samples) // (20 * MS) * 20 * MS].reshape(-1, 20 * MS)
    spectrum = np.abs(np.fft.rfft(frames * np.hanning(20 * MS), axis=1)) ** 2
    at = round(hz * 0.02)
    share = spectrum[:, at - 2 : at + 3].sum(axis=1) / (spectrum.sum(axis=1) + 1e-9)
    loud = np.sqrt((frames**2).mean(axis=1)) > 0.05
    return int((loud & (share > 0.9)).sum()) * 20


@pytest.mark.asyncio
async def test_sound_goes_both_ways_through_real_devices(
    room: dict[str, str], tmp_path: Path
) -> None:
    question, record, captured = (tmp_path / name for name in ("q.wav", "both.wav", "out.raw"))
    with WavWriter(question) as writer:
        writer.write(tone(1500 * MS, hz=QUESTION_HZ))  # 400 of it must get through
    hearing, answered = asyncio.Event(), asyncio.Event()
    positions: list[int] = []

    async def script(peer: Peer) -> None:
        await peer.greet()
        await peer.receive_audio(1)
        hearing.set()
        heard = np.zeros(0, np.float32)
        while sounding_ms(heard, QUESTION_HZ) < 400:
            heard = np.concatenate([heard, await peer.receive_audio(1)])
        answer = tone(1500 * MS, hz=ANSWER_HZ)
        for start in range(0, len(answer), 40 * MS):
            await peer.send_audio("a", start, answer[start : start + 40 * MS])
        while not positions or positions[-1] < 1000 * MS:
            report = await peer.receive_event("parley.playback")
            positions.append(report["played_samples"])
        await peer.send("input_audio_buffer.speech_started", item_id="u")
        report = await peer.receive_event("parley.playback")
        positions.append(report["played_samples"])
        answered.set()
        while True:
            await peer.receive()

    async with contextlib.AsyncExitStack() as stack, asyncio.timeout(WAIT_S):
        url = await stack.enter_async_context(realtime_server(script))

        async def start(*command: str) -> asyncio.subprocess.Process:
            process = await asyncio.create_subprocess_exec(
                *command, env=room, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            stack.callback(lambda: process.kill() if process.returncode is None else None)
            return process

        parecord = await start(
            "parecord", "--device=speaker.monitor", "--raw", "--channels=1",
            f"--rate={RATE_HZ}", "--format=s16le", "--latency-msec=20", str(captured),
        )  # fmt: skip
        client = await start(
            sys.executable, "-m", "client.listen_and_play", "--url", url,
            "--input_device", "pulse", "--output_device", "pulse", "--record", str(record),
        )  # fmt: skip
        waiting = [asyncio.create_task(client.wait()), asyncio.create_task(hearing.wait())]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if client.returncode is not None:
            output, _ = await client.communicate()
            pytest.fail(output.decode())
        await (await start("paplay", "--device=room", str(question))).wait()
        await answered.wait()
        client.send_signal(signal.SIGINT)
        output, _ = await client.communicate()
        assert client.returncode == 0, output.decode()
        parecord.send_signal(signal.SIGINT)
        await parecord.communicate()

    assert positions == sorted(positions)
    assert len(positions) >= 8  # about one in 100 ms
    speaker = from_pcm16(captured.read_bytes())
    # All that was reported came out, and after the flush nothing more of the 1.5 s.
    assert positions[-1] // MS - 100 <= sounding_ms(speaker, ANSWER_HZ) <= positions[-1] // MS + 40
    with wave.open(str(record)) as wav:
        data = wav.readframes(wav.getnframes())
    both = from_pcm16(data).reshape(-1, 2)
    assert sounding_ms(both[:, 0], QUESTION_HZ) > 400
    assert abs(sounding_ms(both[:, 1], ANSWER_HZ) - positions[-1] // MS) < 60
