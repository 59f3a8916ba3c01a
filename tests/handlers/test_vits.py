"""On tiny random checkpoints, driven step by step on the test's own thread."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="VITS needs torch")
pytest.importorskip("transformers", reason="VITS needs transformers")

import torch
from torch._dynamo.testing import CompileCounter

from handlers.audio import Resampler
from handlers.base import StageError
from handlers.messages import RATE_HZ, Failed, Message, Samples, Say, Speech, Spoken, WordMark
from handlers.ticket import Ticket
from handlers.tts.vits import FIRST_CHUNK_S, VitsOptions, VitsTTS
from models.vits.synthesis import Clause, Vits
from tests.models import vits_tiny

TEXT = "Hello there, Bob! It's a quick brown-ish fox; 7 of 9."


class Nowhere:
    def receive(self, message: Message) -> None: ...


class Bench:
    """The stage without its thread, and all that it emitted."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.emitted: list[Message] = []
        given = VitsOptions(model_name=str(folder), device="cpu")
        self.stage = VitsTTS(dataclasses.replace(given, **options), emit=self.emitted.append)
        self.stage.setup()

    def speak(self, *says: Say) -> list[Message]:
        self.emitted.clear()
        list(self.stage.process(says))
        while self.stage.busy:
            list(self.stage.process([]))
        return list(self.emitted)

    def count(self, name: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """The sizes of the batches that the model's method `name` gets from now on."""
        sizes: list[int] = []
        inner = getattr(self.stage._model, name)

        def counting(rows: Sequence[Any]) -> Any:
            sizes.append(len(rows))
            return inner(rows)

        monkeypatch.setattr(self.stage._model, name, counting)
        return sizes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vits_tiny.save(tmp_path_factory.mktemp("vits"))


@pytest.fixture(scope="module")
def choir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speakers")
    return vits_tiny.save(folder, num_speakers=3, speaker_embedding_size=6)


@pytest.fixture(scope="module")
def bench(folder: Path) -> Bench:
    return Bench(folder)


def ticket() -> Ticket:
    return Ticket(Nowhere())


def audio_of(messages: list[Message], of: Ticket) -> Samples:
    parts = [m.samples for m in messages if isinstance(m, Speech) and m.ticket is of]
    return np.concatenate([np.zeros(0, np.float32), *parts])


def failures(messages: list[Message]) -> list[Failed]:
    return [message for message in messages if isinstance(message, Failed)]


def test_streamed_it_is_the_whole_clause(bench: Bench, folder: Path) -> None:
    reply = ticket()
    *speech, last = bench.speak(Say(reply, TEXT, 4))
    assert last == Spoken(reply, 4)
    chunks = [m for m in speech if isinstance(m, Speech)]
    assert len(chunks) == len(speech) >= 3
    assert {chunk.index for chunk in chunks} == {4}
    assert 0 < len(chunks[0].samples) <= 1.05 * FIRST_CHUNK_S * RATE_HZ
    model = Vits.load(str(folder))
    tokens, _ = bench.stage._reader.read(TEXT)
    (latents,) = model.plan([Clause(tokens)])
    whole = model.sound([(latents, 0, latents.length)])[0].numpy()
    expected = Resampler(model.rate_hz, RATE_HZ).push(whole, last=True)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(audio_of(speech, reply), expected, atol=2e-5)


def test_words_end_where_their_tokens_do(bench: Bench) -> None:
    reply = ticket()
    speech = [m for m in bench.speak(Say(reply, TEXT, 0)) if isinstance(m, Speech)]
    ends = [m.char_end for chunk in speech for m in chunk.marks]
    assert [TEXT[:end].split()[-1] for end in ends] == TEXT.split()
    heard, last = 0, 0
    for chunk in speech:
        heard += len(chunk.samples)
        for mark in chunk.marks:
            assert last <= mark.end_sample <= heard
            last = mark.end_sample
    tokens, marks = bench.stage._reader.read("Hello there")
    assert (len(tokens), marks) == (23, [(5, 10), (11, 22)])
    (latents,) = bench.stage._model.plan([Clause(tokens)])
    chunks = [m for m in bench.speak(Say(ticket(), "Hello there", 0)) if isinstance(m, Speech)]
    hop = bench.stage._model.hop_samples * RATE_HZ / bench.stage._model.rate_hz
    expected = [
        WordMark(5, round(latents.ends[9] * hop)),
        WordMark(11, round(latents.ends[21] * hop)),
    ]
    assert [mark for chunk in chunks for mark in chunk.marks] == expected


@pytest.mark.parametrize("together", [1, 8])
def test_sessions_share_a_batch_and_sound_as_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    says = [Say(ticket(), text, 0) for text in ("Good day.", TEXT, "A bit longer than the first.")]
    alone = [audio_of(bench.speak(say), say.ticket) for say in says]
    monkeypatch.setattr(bench.stage, "_together", together)
    planned, sounded = (bench.count(name, monkeypatch) for name in ("plan", "sound"))
    messages = bench.speak(*says)
    assert planned == [3]
    assert max(sounded) == min(together, 3)
    for say, expected in zip(says, alone, strict=True):
        np.testing.assert_allclose(audio_of(messages, say.ticket), expected, atol=2e-5)
        assert Spoken(say.ticket, 0) in messages


def test_nobody_waits_for_the_end_of_somebody_elses_clause(bench: Bench) -> None:
    long, short = ticket(), ticket()
    messages = bench.speak(Say(long, TEXT * 3, 0), Say(short, "Yes.", 0))
    speech = [m for m in messages if isinstance(m, Speech)]
    at = [message.ticket for message in speech].index(short)
    assert sum(len(m.samples) for m in speech[:at]) <= 2 * FIRST_CHUNK_S * RATE_HZ
    assert messages.index(Spoken(short, 0)) < messages.index(Spoken(long, 0))


def test_clauses_of_a_reply_come_in_order(bench: Bench) -> None:
    reply = ticket()
    messages = bench.speak(*(Say(reply, f"clause {'abc'[i]}", i) for i in range(3)))
    indices = [m.index for m in messages if isinstance(m, Speech)]
    assert indices == sorted(indices)
    assert [m for m in messages if isinstance(m, Spoken)] == [Spoken(reply, i) for i in range(3)]


def test_a_cancelled_reply_is_dropped(bench: Bench) -> None:
    reply, other = ticket(), ticket()
    bench.emitted.clear()
    list(bench.stage.process([Say(reply, TEXT, 0), Say(other, "Yes.", 0)]))
    reply.cancel()
    before = len([m for m in bench.emitted if m.ticket is reply])
    while bench.stage.busy:
        list(bench.stage.process([]))
    bench.stage._bury()
    assert len([m for m in bench.emitted if m.ticket is reply]) == before
    assert Spoken(other, 0) in bench.emitted
    assert reply not in bench.stage._waiting


def test_the_seed_decides(bench: Bench, folder: Path) -> None:
    a, b, c = ticket(), ticket(), ticket()
    first, again = (audio_of(bench.speak(Say(t, TEXT, 0)), t) for t in (a, b))
    assert np.array_equal(first, again)
    other = audio_of(Bench(folder, seed=7).speak(Say(c, TEXT, 0)), c)
    assert len(other) != len(first) or not np.allclose(other, first, atol=1e-3)


def test_speed(bench: Bench) -> None:
    slow, fast = ticket(), ticket()
    messages = bench.speak(Say(slow, TEXT, 0, speed=0.5), Say(fast, TEXT, 0, speed=1.5))
    ratio = len(audio_of(messages, slow)) / len(audio_of(messages, fast))
    assert ratio == pytest.approx(3.0, rel=0.2)


def test_speakers_are_voices(choir: Path, bench: Bench) -> None:
    assert (bench.stage.voices, bench.stage.languages) == (("eng",), {"eng": "eng"})
    stage = Bench(choir, voice="speaker-2")
    assert stage.stage.voices == ("speaker-2", "speaker-0", "speaker-1")
    says = [Say(ticket(), "Hello.", 0, voice=v) for v in (None, "speaker-2", "speaker-1")]
    messages = stage.speak(*says)
    default, same, other = (audio_of(messages, say.ticket) for say in says)
    np.testing.assert_allclose(default, same, atol=2e-5)
    assert len(other) != len(same) or not np.allclose(other, same, atol=1e-3)


@pytest.mark.parametrize(
    ("text", "voice", "code"),
    [
        ("你好。", None, "unreadable_text"),
        ("- 42 -", None, "unreadable_text"),
        ("你好世界 ok", None, "unreadable_text"),
        ("Hello.", "alloy", "unknown_voice"),
    ],
)
def test_what_cannot_be_spoken_fails_alone(
    bench: Bench, text: str, voice: str | None, code: str
) -> None:
    bad, good = ticket(), ticket()
    messages = bench.speak(
        Say(bad, text, 0, voice=voice), Say(bad, "More.", 1), Say(good, "Yes.", 0)
    )
    (failed,) = failures(messages)
    assert (failed.ticket, failed.code) == (bad, code)
    assert text not in failed.message
    assert "eng" in failed.message or voice is None
    assert len(audio_of(messages, good)) > 0
    assert Spoken(good, 0) in messages
    assert Spoken(bad, 1) not in messages


@pytest.mark.parametrize("text", ["...", " ", "!?"])
def test_text_with_nothing_to_speak(bench: Bench, text: str) -> None:
    reply = ticket()
    assert bench.speak(Say(reply, text, 0)) == [Spoken(reply, 0)]


@pytest.mark.parametrize("step", ["plan", "sound"])
def test_without_memory_for_all_it_goes_on_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    import torch

    inner = getattr(bench.stage._model, step)
    says = [Say(ticket(), text, 0) for text in ("Good day.", "Good day.", "Good day.")]
    limit = 1

    def short_of_memory(rows: Sequence[Any]) -> Any:
        if len(rows) > limit:
            raise torch.OutOfMemoryError("no room")
        return inner(rows)

    monkeypatch.setattr(bench.stage, "_together", 8)
    monkeypatch.setattr(bench.stage._model, step, short_of_memory)
    messages = bench.speak(*says)
    assert [m for m in messages if isinstance(m, Spoken)] == [Spoken(s.ticket, 0) for s in says]
    limit = 0
    refused = failures(bench.speak(says[0]))
    assert [failed.code for failed in refused] == ["out_of_memory"]


# Setting up.


def unusable(**options: Any) -> str:
    stage = VitsTTS(VitsOptions(device="cpu", **options), emit=lambda message: None)
    with pytest.raises(StageError) as caught:
        stage.setup()
    assert caught.value.code == "tts_model_unusable"
    return str(caught.value)


def test_a_model_that_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(tmp_path / "nowhere") in unusable(model_name=str(tmp_path / "nowhere"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    told = unusable(model_name="facebook/mms-tts-nowhere")
    assert "--tts_model_name facebook/mms-tts-nowhere" in told
    assert "couldn't connect" in told.lower() or "offline" in told.lower()


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    folder = vits_tiny.save(tmp_path)
    (folder / "vocab.json").unlink()
    assert "vocab.json" in unusable(model_name=str(folder))


def test_options_that_cannot_be(folder: Path) -> None:
    name = str(folder)
    assert "there are: eng" in unusable(model_name=name, voice="alloy")
    assert "bfloat16" in unusable(model_name=name, torch_dtype="int8")
    assert "reduce-overhead" in unusable(model_name=name, compile_mode="fast")


def test_a_tokenizer_that_does_not_fit(tmp_path: Path) -> None:
    assert "does not fit its tokenizer" in unusable(
        model_name=str(vits_tiny.save(tmp_path, vocab_size=9))
    )


@pytest.mark.parametrize(
    ("wanted", "package"), [("is_uroman", "uroman"), ("phonemize", "phonemizer")]
)
def test_a_checkpoint_that_needs_a_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, package: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *of: None if name == package else find(name, *of)
    )
    folder = vits_tiny.save(tmp_path, tokenizer={wanted: True})
    assert f"pip install {package}" in unusable(model_name=str(folder))


def test_other_scripts_are_put_into_latin_letters(tmp_path: Path) -> None:
    pytest.importorskip("uroman", reason="uroman is not installed")
    stage, reply = Bench(vits_tiny.save(tmp_path, tokenizer={"is_uroman": True})), ticket()
    messages = stage.speak(Say(reply, "Привет, мир!", 0))
    assert Spoken(reply, 0) in messages
    spoken = [m for m in messages if isinstance(m, Speech)]
    assert [mark.char_end for chunk in spoken for mark in chunk.marks] == [7, 12]


def test_compiled_it_sounds_the_same_and_waits_for_no_compiler(
    folder: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, compile = CompileCounter(), torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda part, mode, dynamic: compile(part, backend=made, dynamic=dynamic)
    )
    torch.compiler.reset()
    compiled = Bench(folder, compile_mode="default")
    graphs = made.frame_count
    assert graphs > 0
    for text in ("Hi.", TEXT, 5 * TEXT):
        a, b = ticket(), ticket()
        want, found = bench.speak(Say(a, text, 0)), compiled.speak(Say(b, text, 0))
        np.testing.assert_allclose(audio_of(found, b), audio_of(want, a), atol=2e-5)
    assert made.frame_count == graphs


def test_half_precision_is_for_the_decoder(folder: Path, bench: Bench) -> None:
    half = Bench(folder, torch_dtype="bfloat16")
    a, b = ticket(), ticket()
    exact, rough = (
        audio_of(bench.speak(Say(a, TEXT, 0)), a),
        audio_of(half.speak(Say(b, TEXT, 0)), b),
    )
    assert len(exact) == len(rough)
    assert 0 < np.abs(exact - rough).max() < 0.1 * np.abs(exact).max()
