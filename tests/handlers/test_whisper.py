"""Whisper by transformers and by CTranslate2, on small random checkpoints as released ones are."""

from __future__ import annotations

import itertools
import json
import queue
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

pytest.importorskip("transformers", reason="the models' requirements are not installed")

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

from handlers.base import StageError
from handlers.messages import EAR_RATE_HZ, Conclude, Heard, Message, Samples, Transcript
from handlers.stt import whisper as module
from handlers.stt.faster_whisper import FasterWhisperOptions, FasterWhisperSTT
from handlers.stt.streaming import Row, StreamingSTT
from handlers.stt.whisper import WhisperOptions, WhisperSTT
from handlers.stt.window import without_loops
from handlers.ticket import Ticket
from tests.handlers import tiny_whisper
from tests.handlers.endpoint import ticket
from tests.handlers.speech import heard

PATIENCE_S = 60.0
Make: TypeAlias = Callable[..., StreamingSTT]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_whisper.whisper(tmp_path_factory.mktemp("multilingual"))


@pytest.fixture(scope="module")
def english(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_whisper.whisper(tmp_path_factory.mktemp("english"), multilingual=False)


@pytest.fixture(scope="module")
def converted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_whisper.converted(folder, tmp_path_factory.mktemp("converted"))


@pytest.fixture(scope="module")
def noise() -> list[Samples]:
    """Three utterances, of different lengths."""
    generator = np.random.default_rng(2)
    lengths = (9600, 24_000, 56_000)
    return [(0.1 * generator.standard_normal(n)).astype(np.float32) for n in lengths]


def by_transformers(name: str | Path, **options: Any) -> WhisperSTT:
    stt = WhisperSTT(WhisperOptions(str(name), device="cpu", **options), emit=print)
    stt.setup()
    return stt


def by_ctranslate2(name: str | Path, **options: Any) -> FasterWhisperSTT:
    chosen = FasterWhisperOptions(str(name), device="cpu", **options)
    stt = FasterWhisperSTT(chosen, emit=print)
    stt.setup()
    return stt


@pytest.fixture(params=["transformers", "ctranslate2"])
def stt(request: pytest.FixtureRequest, folder: Path) -> StreamingSTT:
    if request.param == "transformers":
        return by_transformers(folder)
    return by_ctranslate2(request.getfixturevalue("converted"))


def texts(stt: StreamingSTT, *rows: Row) -> list[str]:
    return [found.text for found in stt.recognise(rows, lambda: [False] * len(rows))]


def plain(folder: Path, samples: Samples, **settings: Any) -> str:
    """The plain way to do it."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder)
    inputs = processor(samples, sampling_rate=EAR_RATE_HZ, return_tensors="pt")
    ids = model.generate(**inputs, **settings)
    return str(processor.batch_decode(ids, skip_special_tokens=True)[0])


def test_a_text_is_that_of_plain_generate(folder: Path, noise: list[Samples]) -> None:
    stt = by_transformers(folder)
    expected = [plain(folder, samples, language="de") for samples in noise]
    assert len(set(expected)) == 3
    assert texts(stt, *[Row(samples, "de") for samples in noise]) == expected
    detected = plain(folder, noise[0], task="transcribe")
    assert texts(stt, Row(noise[0], None)) == [detected]


def test_an_english_checkpoint_is_asked_for_no_language(
    english: Path, noise: list[Samples]
) -> None:
    stt = by_transformers(english)
    (found,) = stt.recognise([Row(noise[0], None)], lambda: [False])
    assert (found.text, found.language) == (plain(english, noise[0]), "en")
    stt.check_language("en")
    with pytest.raises(StageError, match="English only"):
        stt.check_language("de")


def test_ctranslate2_gives_the_text_of_the_package(converted: Path, noise: list[Samples]) -> None:
    stt = by_ctranslate2(converted, compute_type="float32")
    segments, _ = stt._whisper.transcribe(
        noise[1], language="de", beam_size=1, temperature=0.0, without_timestamps=True,
        no_speech_threshold=None, log_prob_threshold=None, compression_ratio_threshold=None,
        max_new_tokens=40, suppress_tokens=tiny_whisper.specials_of(converted),
    )  # fmt: skip
    expected = next(iter(segments)).text
    assert expected
    assert texts(stt, Row(noise[1], "de"))[0][: len(expected)] == expected


def test_a_batch_gives_what_each_gives_alone(stt: StreamingSTT, noise: list[Samples]) -> None:
    languages = (None, "de", "en")
    rows = [Row(samples, code) for samples, code in zip(noise, languages, strict=True)]
    batch = stt.recognise(rows, lambda: [False] * 3)
    assert batch == [stt.recognise([row], lambda: [False])[0] for row in rows]
    assert [found.language for found in batch][1:] == ["de", "en"]
    assert batch[0].language in tiny_whisper.LANGUAGES
    assert all(found.text for found in batch)


def test_what_nobody_wants_is_broken_off(folder: Path, noise: list[Samples]) -> None:
    stt = by_transformers(folder)
    whole = texts(stt, *[Row(samples, "de") for samples in noise])
    steps = itertools.count()

    def abandoned() -> list[bool]:
        return [False, next(steps) > 2, False]

    found = stt.recognise([Row(samples, "de") for samples in noise], abandoned)
    assert (found[0].text, found[2].text) == (whole[0], whole[2])
    assert len(found[1].text) < len(whole[1])


def test_a_row_ends_when_nobody_could_have_said_so_much(
    folder: Path, noise: list[Samples], monkeypatch: pytest.MonkeyPatch
) -> None:
    stt = by_transformers(folder)
    whole = texts(stt, Row(noise[0], "de"), Row(noise[2], "de"))
    monkeypatch.setattr(module, "most_tokens", lambda row: 8 if len(row.samples) < 20_000 else 99)
    short, unhurt = texts(stt, Row(noise[0], "de"), Row(noise[2], "de"))
    assert unhurt == whole[1]
    assert len(short) < len(whole[0])
    assert whole[0].startswith(short.rstrip("\ufffd"))


def test_made_up_text_is_left_out(
    stt: StreamingSTT, noise: list[Samples], monkeypatch: Any
) -> None:
    seen: list[tuple[float, float]] = []

    def rule(no_speech: float, mean: float) -> bool:
        seen.append((no_speech, mean))
        return True

    name = f"{type(stt).__module__}.unspoken"
    monkeypatch.setattr(name, rule)
    assert texts(stt, Row(noise[0], "de")) == [""]
    no_speech, mean = seen[-1]
    assert 0.0 <= no_speech <= 1.0
    assert -12.0 < mean < 0.0


def test_options_for_generate_get_there(
    folder: Path, converted: Path, noise: list[Samples]
) -> None:
    row = Row(noise[2], "de")
    greedy, beams = by_transformers(folder), by_transformers(folder, gen={"num_beams": 3})
    assert texts(beams, row) == [plain(folder, noise[2], language="de", num_beams=3)]
    assert (
        texts(beams, row, Row(noise[0], "de"))[0] == texts(beams, row)[0] != texts(greedy, row)[0]
    )
    assert texts(by_ctranslate2(converted, gen={"beam_size": 5}), row) != texts(
        by_ctranslate2(converted), row
    )
    with pytest.raises(StageError, match="no_such_thing"):
        by_transformers(folder, gen={"no_such_thing": 1})
    with pytest.raises(StageError, match="does not run"):
        by_ctranslate2(converted, gen={"no_such_thing": 1})


@pytest.mark.parametrize("rows", [1, 3])
def test_a_static_cache_changes_no_text(folder: Path, noise: list[Samples], rows: int) -> None:
    plain_stt, static = by_transformers(folder), by_transformers(folder)
    static._model.generation_config.cache_implementation = "static"
    batch = [Row(samples, "de") for samples in noise[:rows]]
    assert texts(static, *batch) == texts(plain_stt, *batch)


def test_compiled_it_gives_the_same_and_compiles_nothing_while_it_serves(
    folder: Path, noise: list[Samples], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: real(f, **(how | {"backend": "eager"})))
    torch._dynamo.reset()
    counts = torch._dynamo.utils.counters["stats"]
    counts.clear()
    stt = by_transformers(folder, compile_mode="default", max_batch=2)
    graphs = counts["unique_graphs"]
    assert graphs == 4  # encoder and decoder, for 1 and 2 rows
    rows = [Row(samples, "de") for samples in noise]
    expected = by_transformers(folder)
    for some in (rows[:2], rows[1:2]):
        assert texts(stt, *some) == texts(expected, *some)
    assert counts["unique_graphs"] == graphs


def test_no_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", lambda f, **how: refuse)
    with pytest.raises(StageError, match=r"cannot be compiled here.*compiler"):
        by_transformers(folder, compile_mode="default")


def test_moonshine_is_recognised_too(tmp_path: Path, noise: list[Samples]) -> None:
    folder = tiny_whisper.moonshine(tmp_path)
    stt = by_transformers(folder)
    assert texts(stt, Row(noise[1], None)) == [plain(folder, noise[1])]
    assert len(texts(stt, *[Row(samples, None) for samples in noise])) == 3


# The whole stage, and what it cannot start with.


@pytest.fixture
def running(stt: StreamingSTT) -> Iterator[tuple[StreamingSTT, queue.Queue[Message]]]:
    emitted: queue.Queue[Message] = queue.Queue()
    stt._emit = emitted.put
    stt.start()
    stt.wait_ready(PATIENCE_S)
    yield stt, emitted
    stt.stop()


def final(emitted: queue.Queue[Message], owner: Ticket) -> Transcript:
    while True:
        message = emitted.get(timeout=PATIENCE_S)
        assert isinstance(message, Transcript)
        if message.ticket is owner and message.revision is not None:
            return message


def test_an_utterance_in_pieces(running: tuple[StreamingSTT, queue.Queue[Message]]) -> None:
    stt, emitted = running
    owner, audio = ticket(), heard("she went to the market")
    for at in range(0, len(audio), 512):
        stt.put(Heard(owner, audio[at : at + 512], "de"))
    stt.put(Conclude(owner, 1, None))
    found = final(emitted, owner)
    assert (found.revision, found.end_probability) == (1, None)  # it is not English
    (expected,) = texts(stt, Row(audio, "de"))
    assert found.text == without_loops(expected)


def test_no_such_model(tmp_path: Path) -> None:
    for make in (by_transformers, by_ctranslate2):
        with pytest.raises(StageError, match="nowhere"):
            make(tmp_path / "nowhere")


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target / "copy"))


def test_missing_and_extra_keys_are_named(folder: Path, tmp_path: Path) -> None:
    copy = copied(folder, tmp_path)
    weights = load_file(copy / "model.safetensors")
    del weights["model.decoder.layers.1.fc1.weight"]
    weights["model.decoder.layers.7.fc1.weight"] = torch.zeros(1)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(StageError) as raised:
        by_transformers(copy)
    assert "missing: model.decoder.layers.1.fc1.weight" in str(raised.value)
    assert "unexpected: model.decoder.layers.7.fc1.weight" in str(raised.value)


@pytest.mark.parametrize("lost", ["tokenizer.json", "preprocessor_config.json", "config.json"])
def test_missing_files(folder: Path, tmp_path: Path, lost: str) -> None:
    copy = copied(folder, tmp_path)
    (copy / lost).unlink()
    if lost.startswith("tokenizer"):
        (copy / "tokenizer_config.json").unlink()
    with pytest.raises(StageError, match=lost.split("_")[0].split(".")[0]):
        by_transformers(copy)


@pytest.mark.parametrize("lost", ["tokenizer.json", "model.bin"])
def test_missing_converted_files(converted: Path, tmp_path: Path, lost: str) -> None:
    copy = copied(converted, tmp_path)
    (copy / lost).unlink()
    with pytest.raises(StageError, match=lost):
        by_ctranslate2(copy)


def test_another_kind_of_model(folder: Path, tmp_path: Path) -> None:
    copy = copied(folder, tmp_path)
    config = json.loads((copy / "config.json").read_text())
    config["model_type"] = "llama"
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(StageError, match="cannot be loaded"):
        by_transformers(copy)


def test_choices_that_do_not_exist(folder: Path) -> None:
    with pytest.raises(StageError, match="compile_mode"):
        by_transformers(folder, compile_mode="fastest")
    with pytest.raises(StageError, match="torch_dtype"):
        by_transformers(folder, torch_dtype="float17")
    with pytest.raises(StageError, match="tlh"):
        by_transformers(folder, language="tlh")
