from __future__ import annotations

import asyncio
import contextlib
import io
import signal
import socket
import sys
import wave
from pathlib import Path

import numpy as np
import pytest

from client import listen_and_play
from client.conversation import Conversation
from client.listen_and_play import Backoff, Link, converse, main
from client.playback import MS
from client.realtime import Disconnected, Refused, ServerUnavailable
from client.transcript import Transcript
from client.wav import WavWriter, read_wav
from handlers.messages import RATE_HZ
from tests.client.fakes import Peer, realtime_server, tone

pytestmark = pytest.mark.asyncio

SHORT = Backoff(first_s=0.001, longest_s=0.002, attempts=3)


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


async def answer(peer: Peer) -> None:
    """Hear 60 ms, then answer with 200 ms."""
    await peer.greet()
    await peer.send("response.created", response={"id": "r"})  # busy until done
    heard = await peer.receive_audio(60 * MS)
    assert np.abs(heard).max() > 0.2
    await peer.send("response.output_audio_transcript.delta", item_id="a", delta="Well heard.")
    await peer.send_audio("a", 0, tone(200 * MS))
    await peer.send("response.output_audio.done", item_id="a")
    await peer.send("response.done", response={"id": "r", "status": "completed"})
    while True:
        await peer.receive()


async def test_files_in_place_of_the_devices(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    question, reply, record = (tmp_path / f"{name}.wav" for name in ("in", "out", "both"))
    with WavWriter(question) as writer:
        writer.write(tone(60 * MS))
    async with realtime_server(answer) as url:
        files = ["--input", str(question), "--output", str(reply), "--record", str(record)]
        status = await asyncio.to_thread(main, ["--url", url, "--quiet_s", "0.04", *files])
    assert status == 0
    assert capsys.readouterr().out == "parley: Well heard.\n"
    heard = read_wav(reply)
    assert int((np.abs(heard) > 0.01).sum()) > 0.9 * 200 * MS
    assert np.flatnonzero(heard)[0] >= 60 * MS
    with wave.open(str(record)) as wav:
        both = np.frombuffer(wav.readframes(wav.getnframes()), "<i2").reshape(-1, 2) / 32768
    np.testing.assert_allclose(both[: len(heard), 1], heard, atol=1 / 32768)
    np.testing.assert_allclose(both[: 60 * MS, 0], tone(60 * MS), atol=2 / 32768)


async def test_interrupt_from_the_keyboard_ends_cleanly(tmp_path: Path) -> None:
    question, record = tmp_path / "in.wav", tmp_path / "both.wav"
    with WavWriter(question) as writer:
        writer.write(tone(60 * RATE_HZ))
    async with realtime_server(answer) as url:
        command = [sys.executable, "-m", "client.listen_and_play", "--url", url]
        process = await asyncio.create_subprocess_exec(
            *command, "--input", str(question), "--record", str(record),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        assert await process.stdout.readline() == b"parley: Well heard.\n"
        process.send_signal(signal.SIGINT)
        _, errors = await process.communicate()
    assert (process.returncode, errors) == (0, b"")
    with wave.open(str(record)) as wav:
        assert wav.getnframes() * 4 + 44 == record.stat().st_size
        assert wav.getnframes() > 60 * MS


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--port", str(closed_port()), "--input", "in.wav"], 1, "python -m server"),
        (["--input", "none.wav"], 2, "none.wav: No such file"),
        (["--input", "text.wav"], 2, "text.wav: not a WAV file"),
        (["--input", "in.wav", "--output", "no/such/out.wav"], 2, "no/such/out.wav"),
    ],
)
async def test_what_cannot_work_says_why(
    arguments: list[str],
    status: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.wav").write_text("hello")
    with WavWriter(tmp_path / "in.wav") as writer:
        writer.write(tone(10))
    assert await asyncio.to_thread(main, arguments) == status
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


async def test_output_alone_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        listen_and_play.parse_arguments(["--output", "x.wav"])
    assert stop.value.code == 2
    assert "--output needs --input" in capsys.readouterr().err


async def test_settings_hold_only_what_was_given() -> None:
    plain = listen_and_play.session_settings(listen_and_play.parse_arguments([]))
    assert plain["audio"]["output"] == {}
    assert "instructions" not in plain
    given = ["--voice", "en-gb", "--speed", "1.2", "--instructions", ""]
    settings = listen_and_play.session_settings(listen_and_play.parse_arguments(given))
    assert settings["audio"]["output"] == {"voice": "en-gb", "speed": 1.2}
    assert settings["instructions"] == ""


class Microphone:
    """Speaks a block whenever the connection has been opened, until `enough`."""

    def __init__(self) -> None:
        self.enough = asyncio.Event()

    async def run(self, conversation: Conversation) -> None:
        while not self.enough.is_set():
            conversation.microphone(tone(20 * MS))
            await asyncio.sleep(0)


def fresh() -> tuple[Conversation, io.StringIO]:
    out = io.StringIO()
    return Conversation(Transcript(out.write, live=False)), out


async def test_a_lost_connection_is_taken_up_again() -> None:
    microphone = Microphone()

    async def vanish(peer: Peer) -> None:
        await peer.greet()
        await peer.receive_audio(1)
        peer.socket.transport.abort()

    async def stay(peer: Peer) -> None:
        await peer.greet()
        await peer.receive_event("session.update")
        await peer.receive_audio(1)
        microphone.enough.set()
        with contextlib.suppress(Exception):
            await peer.socket.wait_closed()

    talk, out = fresh()
    async with realtime_server(vanish, vanish, stay) as url:
        await converse(Link(url, None, {"type": "realtime"}, SHORT), talk, microphone)
    lines = out.getvalue().splitlines()
    assert [line.split(";")[0] for line in lines if "trying again" in line] == [
        "[connection closed: connection lost (1006)"
    ] * 2
    assert lines.count("[connected again: a new conversation]") == 2


async def test_attempts_are_bounded() -> None:
    connections = 0

    async def vanish(peer: Peer) -> None:
        nonlocal connections
        connections += 1
        await peer.greet()

    talk, _ = fresh()
    async with realtime_server(vanish) as url:
        with pytest.raises(Disconnected):
            await converse(Link(url, None, {"type": "realtime"}, SHORT), talk, Microphone())
    assert connections == 1 + SHORT.attempts


async def test_the_first_attempt_is_the_only_one_when_it_fails() -> None:
    talk, out = fresh()
    url = f"ws://127.0.0.1:{closed_port()}/v1/realtime"
    with pytest.raises(ServerUnavailable):
        await converse(Link(url, None, {}, SHORT), talk, Microphone())
    async with realtime_server(Peer.greet, api_key="right") as url:
        with pytest.raises(Refused):
            await converse(Link(url, "wrong", {}, SHORT), talk, Microphone())
    assert out.getvalue() == ""


async def test_waits_double_up_to_a_bound() -> None:
    backoff = Backoff(first_s=0.5, longest_s=8.0)
    for attempt, longest in enumerate([0.5, 1, 2, 4, 8, 8, 8]):
        waits = [backoff.wait_s(attempt) for _ in range(50)]
        assert longest / 2 <= min(waits) < max(waits) <= longest
