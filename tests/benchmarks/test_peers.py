"""What can be said of the comparison without its peers."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from benchmarks import latency
from benchmarks.peers.__main__ import HEADERS, SERVERS, SETTINGS, parse, row
from benchmarks.peers.environments import HERE, _serving
from benchmarks.peers.speech_to_speech_server import PUNKT_FILES, prepare
from benchmarks.score import Scores, TurnScore
from benchmarks.server_process import Cpu, ServerFailed

SERVER = """
import socket, sys
with socket.create_server(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1]))) as server:
    print(sys.argv, flush=True)
    while True:
        server.accept()
"""


def test_a_server_is_ready_when_its_port_is_open(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with _serving([sys.executable, "-c", SERVER, "--data", tmp_path], "http://m/v1", log) as server:
        assert server.url.startswith("ws://127.0.0.1:")
        assert server.pid is not None
        assert f"'--data', '{tmp_path}'" in log.read_text()
        assert "'--models', 'http://m/v1'" in log.read_text()
    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)


def test_one_that_does_not_start_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no weights here')"]
    with (
        pytest.raises(ServerFailed, match="no weights here"),
        _serving(command, "http://m/v1", tmp_path / "log"),
    ):
        pass


def test_a_row_of_the_table() -> None:
    turns = [
        TurnScore("a", "plain", "turn", 0.0, 400.0, None, False),
        TurnScore("b", "plain", "turn", 0.0, None, 900.0, False),
        TurnScore("c", "plain", "turn", 0.0, None, None, True),
    ]
    figures = latency.summary(Scores(turns=turns), planned=3)
    found = row("x", {"figures": figures, "cpu_cores": Cpu(0.25, 0.1, 0.0)})
    assert dict(zip(HEADERS, found, strict=False))["missed"] == 1
    assert found == ["x", 3, 400.0, 400.0, 1, 1, None, None, 0, "0 of 0", "0.25"]
    assert len(found) == len(HEADERS)


def test_every_server_is_compared_unless_some_are_named() -> None:
    assert parse([]).servers == list(SERVERS)
    assert parse(["--servers", "pipecat"]).servers == ["pipecat"]
    assert list(SETTINGS) == list(SERVERS)


def test_every_package_is_pinned() -> None:
    for path in HERE.glob("*.txt"):
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        assert lines
        assert all("==" in line for line in lines), path


def test_the_settings_name_the_pinned_versions() -> None:
    pins = " ".join(path.read_text() for path in HERE.glob("*.txt"))
    for package in ("pipecat-ai[openai,silero,websocket]", "speech-to-speech"):
        version = pins.partition(f"{package}==")[2].split()[0]
        assert SETTINGS[package.partition("-ai")[0]].startswith(f"{version}, ")


def test_what_speech_to_speech_would_fetch_is_there(tmp_path: Path) -> None:
    prepare(tmp_path)
    prepare(tmp_path)
    hubconf = tmp_path / "torch/hub/snakers4_silero-vad_master/hubconf.py"
    compile(hubconf.read_text(), "hubconf.py", "exec")
    punkt = tmp_path / "nltk/tokenizers/punkt_tab/english"
    assert {path.name for path in punkt.iterdir()} == set(PUNKT_FILES)
