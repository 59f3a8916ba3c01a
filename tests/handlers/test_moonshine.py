"""Moonshine with the weights of its package, on eSpeak's speech."""

from __future__ import annotations

import queue
import shutil
from pathlib import Path

import numpy as np
import pytest

from handlers.base import StageError
from handlers.messages import EAR_RATE_HZ, Conclude, Heard, Message, Transcript
from handlers.stt import moonshine
from handlers.stt.moonshine import MoonshineOptions, MoonshineSTT, packaged, read_tokens
from handlers.stt.streaming import Row
from tests.handlers.endpoint import ticket
from tests.handlers.speech import heard, room

PATIENCE_S = 60.0
MARKET = "she went to the market to buy some bread"
TIME = "what time is it"


@pytest.fixture(scope="module")
def stt() -> MoonshineSTT:
    found = MoonshineSTT(MoonshineOptions(), emit=print)
    found.setup()
    return found


def row(text: str) -> Row:
    return Row(heard(text), None)


def nobody_leaves() -> list[bool]:
    return [False] * 9


def test_words_and_marks_of_each_row(stt: MoonshineSTT) -> None:
    found = stt.recognise([row(TIME), row(MARKET)], nobody_leaves)
    assert [each.language for each in found] == ["en", "en"]
    assert found[0].text == "What time is it?"
    assert "market" in found[1].text
    assert found == [stt.recognise([row(text)], nobody_leaves)[0] for text in (TIME, MARKET)]


def test_it_streams(stt: MoonshineSTT) -> None:
    """A partial text for every half second, then the whole one, with its cues."""
    told: queue.Queue[Message] = queue.Queue()
    streaming = MoonshineSTT(MoonshineOptions(), emit=told.put)
    streaming.start()
    owner = ticket()
    try:
        streaming.wait_ready(PATIENCE_S)
        for part in np.array_split(heard(MARKET), 60):
            streaming.put(Heard(owner, part))
        streaming.put(Conclude(owner, 3, None))
        while True:
            message = told.get(timeout=PATIENCE_S)
            assert isinstance(message, Transcript)
            if message.revision is not None:
                break
    finally:
        streaming.stop()
    assert message.revision == 3
    assert message.text == stt.recognise([row(MARKET)], nobody_leaves)[0].text
    assert message.heard == message.text.lower().strip(".")
    assert message.end_probability is not None


def test_what_nobody_wants_is_broken_off(stt: MoonshineSTT) -> None:
    asked = 0

    def left() -> list[bool]:
        nonlocal asked
        asked += 1
        return [asked > 4]

    whole = stt.recognise([row(MARKET)], nobody_leaves)[0].text
    begun = stt.recognise([row(MARKET)], left)[0].text
    assert begun
    assert whole.startswith(begun)
    assert len(begun.split()) < len(whole.split())
    assert stt.recognise([row(MARKET)], lambda: [True])[0].text == ""


def test_no_more_is_written_than_can_be_said(
    stt: MoonshineSTT, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moonshine, "END", -1)  # it never ends by itself
    written = stt.recognise([Row(room(2.0, EAR_RATE_HZ), None)], nobody_leaves)[0]
    assert 0 < len(written.text.split()) <= 13 + moonshine.SPARE_TOKENS


def test_a_long_utterance_is_heard_in_pieces(stt: MoonshineSTT) -> None:
    window = stt.open(ticket()).window
    window.push(np.zeros(13 * EAR_RATE_HZ, np.float32))
    assert len(window.unheard()) == 2


def test_it_knows_english_only(stt: MoonshineSTT) -> None:
    stt.check_language("en")
    with pytest.raises(StageError, match="'fr'; it knows English only"):
        stt.check_language("fr")


def test_a_folder_of_ones_own(tmp_path: Path) -> None:
    shutil.copytree(packaged(), tmp_path / "own")
    MoonshineSTT(MoonshineOptions(str(tmp_path / "own")), emit=print).load()


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ("tokenizer.bin", "tokenizer.bin"),
        ("encoder_model.ort", "there is no encoder_model.ort or encoder_model.onnx"),
    ],
)
def test_a_folder_that_lacks_something_is_named(tmp_path: Path, missing: str, told: str) -> None:
    for path in packaged().iterdir():
        if path.name != missing:
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(StageError, match=f"{tmp_path}.*{told}"):
        MoonshineSTT(MoonshineOptions(str(tmp_path)), emit=print).load()


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(StageError, match="--stt_gen_num_beams"):
        MoonshineSTT(MoonshineOptions(gen={"num_beams": 2}), emit=print).load()


def test_weights_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moonshine, "PACKAGE", "a_package_that_is_not_there")
    with pytest.raises(StageError, match="requirements-nodeps"):
        MoonshineSTT(MoonshineOptions(), emit=print).load()


def test_tokens_longer_than_a_byte_counts() -> None:
    long = "▁" + 40 * "abc "
    data = bytes([3]) + b"abc" + bytes([len(long.encode()) % 128 + 128, 1]) + long.encode()
    assert read_tokens(data) == [b"abc", long.encode()]
