"""Talk to Parley: microphone to server, server to speaker, both sides' words in the terminal.

python -m client.listen_and_play --host 127.0.0.1 --port 8765
python -m client.listen_and_play --input question.wav --output answer.wav
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from client.conversation import Conversation
from client.devices import DeviceAudio, DeviceError, device_table
from client.files import FileAudio
from client.realtime import Disconnected, Realtime, RealtimeError, Refused, ServerUnavailable
from client.recording import Recording
from client.transcript import Transcript
from client.wav import WavError, WavWriter, read_wav
from server.wire import Event

EXIT_OK, EXIT_CONNECTION, EXIT_USAGE = 0, 1, 2
API_KEY_VARIABLE = "PARLEY_API_KEY"


@dataclass(frozen=True)
class Backoff:
    """Waits between attempts to connect again: doubling, shortened at random by up to half."""

    first_s: float = 0.5
    longest_s: float = 8.0
    attempts: int = 8
    stable_s: float = 10.0
    """A connection that lasted this long starts the count anew."""

    def wait_s(self, attempt: int) -> float:
        return min(self.longest_s, self.first_s * 2.0**attempt) * random.uniform(0.5, 1.0)


class AudioEnds(Protocol):
    async def run(self, conversation: Conversation) -> None:
        """Carry audio until it is over."""


@dataclass(frozen=True)
class Link:
    """Where and how to connect, and what to ask of the session."""

    url: str
    api_key: str | None
    session: Event
    backoff: Backoff = Backoff()


async def stay_connected(link: Link, conversation: Conversation, up: asyncio.Event) -> None:
    """Hold the conversation, connecting again when the connection is lost; sets `up` at first.

    Raises `RealtimeError` if the first attempt fails, if the server says no for good (HTTP 4xx),
    or after the last attempt.
    """
    clock = asyncio.get_running_loop().time
    attempt = 0
    while True:
        connected_s: float | None = None
        try:
            async with Realtime.connect(link.url, link.api_key) as client:
                connected_s = clock()
                if up.is_set():
                    conversation.transcript.notice("connected again: a new conversation")
                up.set()
                await conversation.hold(client, link.session)
        except (ServerUnavailable, Refused, Disconnected) as error:
            if connected_s is not None and clock() - connected_s >= link.backoff.stable_s:
                attempt = 0
            if not up.is_set() or _final(error) or attempt >= link.backoff.attempts:
                raise
            wait_s = link.backoff.wait_s(attempt)
            attempt += 1
            conversation.transcript.notice(f"{error}; trying again in {wait_s:.1f} s")
            await asyncio.sleep(wait_s)


def _final(error: RealtimeError) -> bool:
    return isinstance(error, Refused) and 400 <= (error.http_status or 0) < 500


async def converse(link: Link, conversation: Conversation, audio: AudioEnds) -> None:
    """Connect, then carry audio until it is over. Raises `RealtimeError` or `DeviceError`."""
    up = asyncio.Event()

    async def carry() -> None:
        await up.wait()
        await audio.run(conversation)

    tasks = {
        asyncio.create_task(stay_connected(link, conversation, up)),
        asyncio.create_task(carry()),
    }
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def session_settings(arguments: argparse.Namespace) -> Event:
    """What `session.update` asks for: only what was given, and the person's transcript."""
    output = {"voice": arguments.voice, "speed": arguments.speed}
    session: Event = {
        "type": "realtime",
        "audio": {
            "input": {"transcription": {"model": "whisper-1"}},
            "output": {name: value for name, value in output.items() if value is not None},
        },
    }
    if arguments.instructions is not None:
        session["instructions"] = arguments.instructions
    return session


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m client.listen_and_play",
        description="Talk to Parley, or to any Realtime server. Headphones keep it from hearing "
        "itself.",
    )
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="host name (default: %(default)s)")
    server.add_argument("--port", type=int, default=8765, help="TCP port (default: %(default)s)")
    server.add_argument("--url", help="whole address, ws:// or wss://, instead of host and port")
    server.add_argument("--api_key", help=f"API key (default: environment, {API_KEY_VARIABLE})")
    reply = parser.add_argument_group("reply")
    reply.add_argument("--instructions", help="what Parley is told to be (default: the server's)")
    reply.add_argument("--voice", help="voice name (default: the server's)")
    reply.add_argument(
        "--speed", type=float, help="speaking speed, times normal, 0.25 to 1.5 (default: 1)"
    )
    devices = parser.add_argument_group("devices")
    devices.add_argument("--list_devices", action="store_true", help="list audio devices and exit")
    for name in ("input", "output"):
        devices.add_argument(
            f"--{name}_device",
            metavar="DEVICE",
            help=f"{name} device: index, name or part of it (default: the system's)",
        )
    files = parser.add_argument_group("files")
    files.add_argument(
        "--input",
        type=Path,
        metavar="FILE.wav",
        help="speak this file, at real-time pace, instead of using any device",
    )
    files.add_argument(
        "--output",
        type=Path,
        metavar="FILE.wav",
        help="with --input: write what would be heard, starting with the input",
    )
    files.add_argument(
        "--quiet_s",
        type=float,
        default=3.0,
        help="with --input: end after so much time in which nothing happens (s, default: "
        "%(default)s)",
    )
    files.add_argument(
        "--record",
        type=Path,
        metavar="FILE.wav",
        help="record the conversation in stereo: left the person, right Parley as heard",
    )
    arguments = parser.parse_args(argv)
    if arguments.output is not None and arguments.input is None:
        parser.error("--output needs --input")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status: 0, 1 (connection) or 2 (devices, files, usage)."""
    arguments = parse_arguments(argv)
    columns = shutil.get_terminal_size().columns
    transcript = Transcript(_write, live=sys.stdout.isatty(), columns=columns)
    try:
        if arguments.list_devices:
            print(device_table())
            return EXIT_OK
        return _talk(arguments, transcript)
    except KeyboardInterrupt:
        return EXIT_OK
    except (DeviceError, WavError) as error:
        return _fail(str(error), EXIT_USAGE)
    except OSError as error:
        return _fail(str(error), EXIT_USAGE)
    except RealtimeError as error:
        return _fail(_advice(error), EXIT_CONNECTION)
    finally:
        transcript.close()


def _talk(arguments: argparse.Namespace, transcript: Transcript) -> int:
    link = Link(
        arguments.url or f"ws://{arguments.host}:{arguments.port}/v1/realtime",
        arguments.api_key or os.environ.get(API_KEY_VARIABLE),
        session_settings(arguments),
    )
    with contextlib.ExitStack() as files:
        audio: AudioEnds
        if arguments.input is not None:
            samples = read_wav(arguments.input)
            output = files.enter_context(WavWriter(arguments.output)) if arguments.output else None
            audio = FileAudio(samples, output, arguments.quiet_s)
        else:
            audio = DeviceAudio.find(arguments.input_device, arguments.output_device)
            transcript.notice(f"{audio}; Ctrl-C ends")
        recording = files.enter_context(Recording(arguments.record)) if arguments.record else None

        async def run() -> None:
            await converse(link, Conversation(transcript, recording), audio)

        asyncio.run(run())
    return EXIT_OK


def _advice(error: RealtimeError) -> str:
    if isinstance(error, ServerUnavailable):
        return f"{error}. Start one with: python -m server"
    if isinstance(error, Refused) and error.http_status == 401:
        return f"{error}. Give the key with --api_key or {API_KEY_VARIABLE}."
    return str(error)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _fail(message: str, status: int) -> int:
    print(f"listen_and_play: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
