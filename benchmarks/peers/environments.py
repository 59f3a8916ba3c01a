"""The peers' own environments, made from their packages, and their servers in them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.server_process import HOST, STOP_TIMEOUT_S, Server, ServerFailed, free_port

HERE = Path(__file__).parent
START_TIMEOUT_S = 300.0
LOOK_EVERY_S = 0.1
SMART_TURN = "pipecat/audio/turn/smart_turn/data/smart-turn-v3.2-cpu.onnx"


def environment(folder: Path, requirements: Sequence[str]) -> Path:
    """The Python of the environment in `folder`, which is made where it is not there.

    `requirements` are files beside this one; one that ends in `_nodeps.txt` is installed so.
    Raises `ServerFailed` with pip's last words.
    """
    python, made = folder / "bin" / "python", folder / ".made"
    wanted = "\n".join((HERE / name).read_text(encoding="utf-8") for name in requirements)
    if made.exists() and made.read_text(encoding="utf-8") == wanted:
        return python
    venv.create(folder, with_pip=True)
    for name in requirements:
        alone = ["--no-deps"] if name.endswith("_nodeps.txt") else []
        command: list[str | Path] = [
            python,
            "-m",
            "pip",
            "install",
            "-q",
            *alone,
            "-r",
            HERE / name,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ServerFailed(f"{name} cannot be installed: {done.stderr.strip()[-500:]}")
    made.write_text(wanted, encoding="utf-8")
    return python


@contextlib.contextmanager
def pipecat(folder: Path, models: str, log: Path, sessions: int) -> Iterator[Server]:
    python = environment(folder / "pipecat", ["pipecat.txt"])
    with _serving([python, HERE / "pipecat_server.py"], models, log) as server:
        yield server


@contextlib.contextmanager
def speech_to_speech(folder: Path, models: str, log: Path, sessions: int) -> Iterator[Server]:
    names = ["speech_to_speech.txt", "speech_to_speech_nodeps.txt"]
    python = environment(folder / "speech_to_speech", names)
    environment(folder / "pipecat", ["pipecat.txt"])  # where the turn model's weights are
    (weights,) = (folder / "pipecat").glob(f"lib/*/site-packages/{SMART_TURN}")
    script = HERE / "speech_to_speech_server.py"
    # One more, because a session's pipeline is free only some time after its client has gone.
    flags: list[str | Path] = [
        "--data",
        folder / "data",
        "--num_pipelines",
        str(sessions + 1),
        "--smart_turn_model_path",
        weights,
    ]
    with _serving([python, script, *flags], models, log) as server:
        yield server


@contextlib.contextmanager
def _serving(command: Sequence[str | Path], models: str, log: Path) -> Iterator[Server]:
    """A peer's server on a free port, ready when that is open. Raises `ServerFailed`."""
    port = free_port()
    where = ["--host", HOST, "--port", str(port), "--models", models]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        begun = time.monotonic()
        process = subprocess.Popen(
            [str(part) for part in (*command, *where)],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while not _open(port):
                if process.poll() is not None or time.monotonic() - begun > START_TIMEOUT_S:
                    last = log.read_text(encoding="utf-8", errors="replace").strip()[-500:]
                    raise ServerFailed(f"{Path(command[1]).name} did not start: {last}")
                time.sleep(LOOK_EVERY_S)
            start_s = time.monotonic() - begun
            address = f"{HOST}:{port}"
            yield Server(f"ws://{address}/v1/realtime", f"http://{address}", process.pid, start_s)
        finally:
            _stop(process)


def _open(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1.0):
        return True
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
