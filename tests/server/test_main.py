"""Start-up: what cannot be is said in one line; a fault of ours keeps its traceback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from handlers import pipeline
from handlers.base import CannotServe, Emit, Handler, Observer, StageError
from handlers.pipeline import PipelineOptions
from server import downloads
from server.__main__ import main

ROOT = Path(__file__).parents[2]
NOWHERE = "http://127.0.0.1:9"
PATIENCE_S = 60.0


@dataclass(frozen=True)
class NoOptions:
    pass


class Broken(Handler[None]):
    stage: ClassVar[str] = "stt"
    Options: ClassVar[type[NoOptions]] = NoOptions
    in_setup: ClassVar[Exception | None] = None
    in_init: ClassVar[Exception | None] = None

    def __init__(self, options: NoOptions, *, emit: Emit, observer: Observer | None = None) -> None:
        super().__init__(emit, observer=observer)
        if self.in_init is not None:
            raise self.in_init

    def setup(self) -> None:
        if self.in_setup is not None:
            raise self.in_setup


class Endless(Broken):
    leave: ClassVar[threading.Event] = threading.Event()

    def setup(self) -> None:
        if not self.leave.wait(PATIENCE_S):
            raise ValueError("nobody stopped it")


class Signalled(Broken):
    """While it loads, the process is told to stop; what loads does not notice by itself."""

    def setup(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        if not self._ready.wait(PATIENCE_S):
            raise ValueError("nobody stopped it")


@pytest.fixture(autouse=True)
def stages(monkeypatch: pytest.MonkeyPatch) -> Mapping[str, Mapping[str, str]]:
    here = {"broken": f"{__name__}:Broken", "endless": f"{__name__}:Endless"}
    here["signalled"] = f"{__name__}:Signalled"
    found = pipeline.STAGES | {"stt": pipeline.STAGES["stt"] | here}
    monkeypatch.setattr("server.options.STAGES", found)
    monkeypatch.setattr(pipeline, "STAGES", found)
    return found


@pytest.mark.parametrize("where", ["in_init", "in_setup"])
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("--stt_x 7: must be less\nthan 3"), "stt: --stt_x 7: must be less"),
        (FileNotFoundError("there is no such file"), "stt: there is no such file"),
        (OSError(), "stt: OSError"),
        (StageError("stt_model_unusable", "x cannot be loaded"), "stt: x cannot be loaded"),
        (CannotServe("not here"), "not here"),
        (ImportError("y needs z"), "stt: y needs z"),
        (
            ModuleNotFoundError("No module", name="torch.nn"),
            "stt: the package torch is missing: python -m pip install -r requirements.txt",
        ),
        (
            ModuleNotFoundError("No module", name="vllm"),
            "stt: the package vllm is missing: python -m pip install -r requirements-vllm.txt",
        ),
    ],
)
def test_what_a_stage_says_is_one_line(
    error: Exception,
    told: str,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Broken, where, error)
    assert main(["--stt", "broken", "--port", "0"]) == 2
    hint = "python -m server --profile embedded needs no model"
    assert capsys.readouterr().err == f"python -m server: {told}; {hint}\n"


@pytest.mark.parametrize(
    "error", [RuntimeError("a fault"), ModuleNotFoundError("No module", name="handlers.gone")]
)
def test_a_fault_of_ours_keeps_its_traceback(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Broken, "in_setup", error)
    with pytest.raises(type(error), match=str(error)):
        main(["--stt", "broken", "--port", "0"])


def test_a_stage_that_does_not_get_ready_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Endless, "leave", threading.Event())
    original = Handler.stop
    monkeypatch.setattr(Endless, "stop", lambda self: (self.leave.set(), original(self)))
    assert main(["--stt", "endless", "--port", "0", "--load_timeout_s", "0.01"]) == 2
    assert "server: stt was not ready after 0 s" in capsys.readouterr().err


def test_a_port_that_is_taken_is_said_before_anything_loads(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--stt", "endless", "--port", str(port)]) == 2
    told = f"python -m server: --host 127.0.0.1 --port {port}: Address already in use\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("address", ["--port 65536", "--host nowhere.invalid --api_key x"])
def test_an_address_that_is_none_is_named(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--stt", "endless", *address.split()]) == 2
    assert capsys.readouterr().err.startswith("python -m server: --host ")


def test_stopping_ends_the_wait_for_what_still_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Endless, "leave", threading.Event())
    stage = Endless(NoOptions(), emit=print)
    stage.start()
    stage.stop(timeout_s=0.0)
    with pytest.raises(CannotServe, match="stt was stopped while it loaded"):
        stage.wait_ready(PATIENCE_S)
    Endless.leave.set()


def test_a_signal_ends_loading(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--port", "0", "--stt", "signalled"]) == 0
    out, err = capfd.readouterr()
    assert "Parley answers" not in out
    assert "never retrieved" not in err


def test_stages_load_one_after_another(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two loads of transformers at a time spoil each other."""
    begun: list[str] = []
    start = Handler.start

    def noted(self: Handler[Any]) -> None:
        begun.append(self.stage)
        start(self)

    monkeypatch.setattr(Handler, "start", noted)
    monkeypatch.setattr(Broken, "in_setup", ValueError("not this one"))
    assert main(["--stt", "broken", "--port", "0"]) == 2
    assert begun == ["stt"]


# Without a hub.


def chosen(**model: str) -> PipelineOptions:
    @dataclass(frozen=True)
    class Options:
        model_name: str = ""

    @dataclass(frozen=True)
    class Remote(Options):
        base_url: str = ""

    parts: dict[str, Any] = {"lm": Options(**model), "tts": Remote("there"), "vad": NoOptions()}
    return PipelineOptions(options=parts)


def test_folders_and_remote_models_need_no_hub(tmp_path: Path) -> None:
    assert downloads.hub_models(chosen(model_name="a/b")) == ["a/b"]
    assert downloads.hub_models(chosen(model_name=str(tmp_path))) == []
    assert downloads.hub_models(chosen()) == []
    assert downloads.prepare(chosen()) == ""


@pytest.mark.parametrize("address", [NOWHERE, "no address"])
def test_without_a_hub_the_loaders_do_not_ask_for_it(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(downloads.OFFLINE, "")  # so that it is put back
    monkeypatch.delenv(downloads.OFFLINE)
    monkeypatch.setenv("HF_ENDPOINT", address)
    assert "cache: a/b" in downloads.prepare(chosen(model_name="a/b"))
    assert os.environ[downloads.OFFLINE] == "1"
    monkeypatch.setenv(downloads.OFFLINE, "0")  # whoever starts the server knows better
    assert downloads.prepare(chosen(model_name="a/b")) == ""


def test_a_profile_without_its_models_says_so_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("faster_whisper", reason="part of requirements.txt")
    environment = {**os.environ, "HF_ENDPOINT": NOWHERE, "HF_HOME": str(tmp_path)}
    environment.pop(downloads.OFFLINE, None)
    done = subprocess.run(
        [sys.executable, "-m", "server", "--port", "0", "--profile", "cpu"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if " INFO " not in line]
    assert len(said) == 1, done.stderr
    for told in ("stt: base cannot be loaded", "Qwen/Qwen2.5-0.5B-Instruct", "--profile embedded"):
        assert told in said[0]
