"""Moonshine with the weights of its package, on eSpeak's speech."""

from __future__ import annotations

import os
import queue
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from handlers.base import StageError
from handlers.messages import EAR_RATE_HZ, Conclude, Heard, Message, Samples, Transcript
from handlers.stt import moonshine
from handlers.stt.moonshine import (
    Moonshine,
    MoonshineOptions,
    MoonshineSTT,
    packaged,
    read_tokens,
)
from handlers.stt.streaming import Row, unusable
from tests.handlers.endpoint import ticket
from tests.handlers.speech import heard, room

PATIENCE_S = 60.0
MARKET = "she went to the market to buy some bread"
TIME = "what time is it"


@pytest.fixture(scope="module")
def stt() -> Iterator[MoonshineSTT]:
    found = MoonshineSTT(MoonshineOptions(), emit=print)
    found.setup()
    yield found
    found.teardown()


@pytest.fixture(scope="module")
def model() -> Moonshine:
    return Moonshine(packaged(), threads=1)


def always() -> bool:
    return True


def said(model: Moonshine, samples: Samples, draft: Sequence[int] = ()) -> str:
    return model.text(model.write(samples, draft, always))


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


def test_it_streams(model: Moonshine) -> None:
    """Partial texts, then the whole one, with its cues."""
    told: queue.Queue[Message] = queue.Queue()
    streaming = MoonshineSTT(MoonshineOptions(), emit=told.put)
    streaming.start()
    owner = ticket()
    try:
        streaming.wait_ready(PATIENCE_S)
        for part in np.array_split(heard(TIME), 40):
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
    assert message.text == said(model, heard(TIME)) == "What time is it?"
    assert message.heard == "what time is it"
    assert message.end_probability is not None


@pytest.mark.parametrize("changed", [None, 0, 2, -1])
def test_a_draft_saves_steps_and_decides_nothing(
    model: Moonshine, monkeypatch: pytest.MonkeyPatch, changed: int | None
) -> None:
    """Neither a right one nor one with another token at that place."""
    steps, read = [], moonshine._Decoding.read

    def counted(self: Any, draft: Sequence[int], last: int = moonshine.BEGIN) -> list[int]:
        steps.append(len(draft))
        return read(self, draft, last)

    monkeypatch.setattr(moonshine._Decoding, "read", counted)
    samples = heard(TIME)
    whole = model.write(samples, (), always)
    plain, draft = len(steps), list(whole)
    if changed is not None:
        draft[changed] = draft[changed - 1]
    steps.clear()
    assert model.write(samples, draft, always) == whole
    assert steps[0] >= len(whole) - 1  # but for the mark
    assert len(steps) <= (3 if changed in (None, -1) else plain)


def test_what_nobody_wants_is_broken_off(model: Moonshine) -> None:
    whole = said(model, heard(MARKET))
    asked = iter([True] * 4 + [False])
    begun = model.text(model.write(heard(MARKET), (), lambda: next(asked)))
    assert begun
    assert whole.startswith(begun)
    assert len(begun.split()) < len(whole.split())


def test_a_partial_text_gives_way_to_a_final_one(stt: MoonshineSTT) -> None:
    """It is broken off where it is, which its process reads at each token; a final one never is."""
    owner = ticket()
    whole = stt.recognise([row(MARKET)], nobody_leaves)[0].text

    def left_at_once() -> list[bool]:
        stt.put(Conclude(owner, 1, None))  # asked for just before the audio goes over
        return [False]

    for at_partial in (True, False):
        stt.at_partial = at_partial
        assert (stt.recognise([row(MARKET)], left_at_once)[0].text == whole) is not at_partial
    stt.at_partial = False
    assert stt.recognise([row(MARKET)], lambda: [True])[0].text == ""
    owner.cancel()


def test_a_process_that_dies_fails_one_and_is_started_anew(stt: MoonshineSTT) -> None:
    before = stt._child
    assert before is not None
    os.kill(before.pid, signal.SIGKILL)
    with pytest.raises(StageError, match="ended unexpectedly") as failed:
        stt.recognise([row(TIME)], nobody_leaves)
    assert failed.value.code == "stt_unavailable"
    assert stt.recognise([row(TIME)], nobody_leaves)[0].text == "What time is it?"
    assert stt._child is not None
    assert stt._child.pid != before.pid


def test_one_that_cannot_be_started_anew_is_no_news_of_the_servers_folders(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stt = MoonshineSTT(MoonshineOptions("/a/folder"), emit=print)
    monkeypatch.setattr(stt, "_started", lambda: (_ for _ in ()).throw(unusable("/a/folder")))
    with pytest.raises(StageError) as failed:
        stt.recognise([row(TIME)], nobody_leaves)
    assert failed.value.code == "stt_unavailable"
    assert "folder" not in str(failed.value)


def test_no_more_is_written_than_can_be_said(
    model: Moonshine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moonshine, "END", -1)  # it never ends by itself
    written = model.write(room(2.0, EAR_RATE_HZ), (), always)
    assert 0 < len(written) <= 13 + moonshine.SPARE_TOKENS


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
    stt = MoonshineSTT(MoonshineOptions(str(tmp_path / "own")), emit=print)
    stt.load()
    stt.teardown()


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
