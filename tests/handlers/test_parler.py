"""Parler-TTS as a stage, with a small random checkpoint, driven step by step."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="Parler-TTS needs torch")
pytest.importorskip("transformers", reason="Parler-TTS needs transformers")

from handlers.base import Handler, StageError
from handlers.messages import RATE_HZ, Failed, Message, Samples, Say, Speech, Spoken
from handlers.pipeline import backend
from handlers.ticket import Ticket
from handlers.tts import parler
from handlers.tts.parler import ParlerOptions, ParlerTTS, _faded
from server.options import parse
from tests.handlers.endpoint import ticket
from tests.models import parler_tiny as tiny

HOP_S = 32 / 44_100
"""Of the small codec."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parler")
    tiny.save(folder, endless=True, max_position_embeddings=1024)
    tiny.save_tokenizer(folder)
    return folder


class Bench:
    """The stage without its thread, and all that it emitted."""

    def __init__(self, checkpoint: Path, **options: Any) -> None:
        chosen: dict[str, Any] = {
            "play_steps_s": 24 * HOP_S,
            "max_new_tokens": 159,
            "rows": 2,
        } | options
        self.emitted: list[Message] = []
        self.stage = ParlerTTS(
            ParlerOptions(model_name=str(checkpoint), **chosen), emit=self.emitted.append
        )
        self.stage.setup()

    def serve(self, *says: Say) -> None:
        """As the stage's thread does, once."""
        for message in self.stage.process(says):
            self.stage.emit(message)
        self.stage._bury()

    def speak(self, *says: Say) -> list[Message]:
        self.emitted.clear()
        self.serve(*says)
        while self.stage.busy:
            self.serve()
        return list(self.emitted)

    def sound(self, *says: Say) -> Samples:
        return joined(self.speak(*says))


def joined(messages: list[Message], owner: Ticket | None = None) -> Samples:
    spoken = [m for m in messages if isinstance(m, Speech) and owner in (None, m.ticket)]
    return np.concatenate([np.zeros(0, np.float32), *(m.samples for m in spoken)])


@pytest.fixture(scope="module")
def shared(checkpoint: Path) -> Bench:
    return Bench(checkpoint)


def test_clauses_come_in_order_and_in_pieces(shared: Bench) -> None:
    owner = ticket()
    messages = shared.speak(Say(owner, "Hello there.", 0), Say(owner, "How are you?", 1))
    kinds = [(type(m), m.index) for m in messages if isinstance(m, Speech | Spoken)]
    assert len(kinds) == len(messages) >= 6
    assert kinds == sorted(kinds, key=lambda kind: kind[1])
    assert [kind for kind in kinds if kind[0] is Spoken] == [(Spoken, 0), (Spoken, 1)]
    assert kinds[-1] == (Spoken, 1)
    assert np.abs(joined(messages)).max() > 1e-3


def test_pieces_are_the_whole_resampled(
    checkpoint: Path, shared: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parler, "FADE_S", 0)  # longer than the small codec's last piece
    whole = Bench(checkpoint, play_steps_s=1.0).sound(Say(ticket(), "Good morning.", 0))
    pieces = shared.sound(Say(ticket(), "Good morning.", 0))
    assert abs(len(whole) - len(pieces)) <= 1
    n = min(len(whole), len(pieces))
    np.testing.assert_allclose(pieces[:n], whole[:n], atol=1e-5)
    assert len(whole) == pytest.approx((159 - 2) * HOP_S * RATE_HZ, abs=2)


def test_replies_share_the_rows(shared: Bench) -> None:
    texts = ["One of them.", "Another one.", "A third.", "And a fourth."]
    alone = [shared.sound(Say(ticket(), text, 0)) for text in texts]
    owners = [ticket() for _ in texts]
    says = [Say(owner, text, 0) for owner, text in zip(owners, texts, strict=True)]
    messages = shared.speak(*says)
    for owner, want in zip(owners, alone, strict=True):
        np.testing.assert_allclose(joined(messages, owner), want, atol=1e-5)
    first = [m.ticket for m in messages if isinstance(m, Speech)][:2]
    assert set(first) == set(owners[:2])  # two rows: side by side


def test_a_dead_ticket_gives_its_row_back(shared: Bench) -> None:
    shared.emitted.clear()
    owner, other = ticket(), ticket()
    shared.serve(Say(owner, "Never mind this.", 0), Say(other, "But this.", 0))
    while not any(isinstance(m, Speech) and m.ticket is owner for m in shared.emitted):
        shared.serve()
    owner.cancel()
    before = len([m for m in shared.emitted if m.ticket is owner])
    shared.serve()
    assert shared.stage._engine.free_rows == 1
    while shared.stage.busy:
        shared.serve()
    assert len([m for m in shared.emitted if m.ticket is owner]) == before
    assert shared.emitted[-1] == Spoken(other, 0)


def test_one_that_dies_while_it_waits_is_passed_over(shared: Bench) -> None:
    shared.emitted.clear()
    owners = [ticket() for _ in range(4)]
    shared.serve(*(Say(owner, "Who is next?", 0) for owner in owners))
    owners[2].cancel()
    while shared.stage.busy:
        shared.serve()
    ends = [m.ticket for m in shared.emitted if isinstance(m, Spoken)]
    assert set(ends) == {owners[0], owners[1], owners[3]}


def test_nothing_to_speak_is_spoken_at_once(shared: Bench) -> None:
    owner = ticket()
    assert shared.speak(Say(owner, " … ", 0)) == [Spoken(owner, 0)]
    messages = shared.speak(Say(owner, "...", 0), Say(owner, "Yes.", 1))
    assert messages[0] == Spoken(owner, 0)
    assert messages[-1] == Spoken(owner, 1)


@pytest.mark.parametrize(
    ("say", "code", "words"),
    [
        ({"text": "こんにちは"}, "unreadable_text", "script"),
        ({"text": "a" * 400}, "text_too_long", "long"),
        ({"text": "Hello.", "voice": "Nobody"}, "unknown_voice", "Laura, Gary"),
    ],
)
def test_what_cannot_be_spoken_fails_alone(
    shared: Bench, say: dict[str, Any], code: str, words: str
) -> None:
    owner, other = ticket(), ticket()
    messages = shared.speak(Say(owner, index=0, **say), Say(other, "Still here.", 0))
    (failed,) = [m for m in messages if isinstance(m, Failed)]
    assert (failed.ticket, failed.stage, failed.code) == (owner, "tts", code)
    assert words in failed.message
    assert messages[-1] == Spoken(other, 0)
    assert shared.speak(Say(owner, "Again.", 1))[-1] == Spoken(owner, 1)


@pytest.mark.parametrize(
    ("error", "code"),
    [(RuntimeError("can't allocate memory"), "tts_out_of_memory"), (ValueError(), "tts_error")],
)
def test_a_failing_step_fails_those_in_rows(
    shared: Bench, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str
) -> None:
    owners = [ticket() for _ in range(3)]
    steps = itertools.count()
    step = shared.stage._engine.step

    def failing() -> Any:
        if next(steps) == 5:
            raise error
        return step()

    monkeypatch.setattr(shared.stage._engine, "step", failing)
    messages = shared.speak(*(Say(owner, "What now?", 0) for owner in owners))
    failed = [(m.ticket, m.code) for m in messages if isinstance(m, Failed)]
    assert failed == [(owners[0], code), (owners[1], code)]
    assert messages[-1] == Spoken(owners[2], 0)


def test_a_codec_that_fails_at_the_end_fails_the_clause(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(checkpoint, play_steps_s=1.0, max_new_tokens=39)

    def failing(windows: Any) -> Any:
        raise RuntimeError

    with monkeypatch.context() as patched:
        patched.setattr(bench.stage._engine._decoder, "decode", failing)
        (failed,) = bench.speak(Say(ticket(), "Hm?", 0))
    assert isinstance(failed, Failed)
    owner = ticket()
    assert bench.speak(Say(owner, "Hm?", 0))[-1] == Spoken(owner, 0)


def test_voice_and_pace_are_words_of_the_description(
    shared: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    described: list[str] = []
    tokenizer = shared.stage._descriptions

    def listening(text: str) -> Any:
        described.append(text)
        return tokenizer(text)

    monkeypatch.setattr(shared.stage, "_descriptions", listening)
    for voice, speed in ((None, 1.0), ("Jon", 0.25), ("Lea", 1.5)):
        shared.speak(Say(ticket(), "Hi.", 0, voice=voice, speed=speed))
    starts = ["Laura speaks at a moderate pace", "Jon speaks very slowly", "Lea speaks very fast"]
    assert [text.startswith(start) for text, start in zip(described, starts, strict=True)] == [
        True
    ] * 3


def test_a_description_without_names_is_one_voice(checkpoint: Path) -> None:
    options = ParlerOptions(model_name=str(checkpoint), description="A calm man.", voice="calm")
    assert ParlerTTS(options, emit=lambda message: None).voices == ("calm",)


def test_the_description_may_have_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    """As mini-multilingual has: the text encoder's, by the name that the checkpoint gives."""
    folder = tiny.save(tmp_path / "model", **tiny.LAYOUTS["mini-multilingual-v1.1"])
    tiny.save_tokenizer(folder)
    tiny.save_tokenizer(tmp_path / "encoder")
    saved = json.loads((folder / "config.json").read_text())
    saved["text_encoder"]["_name_or_path"] = str(tmp_path / "encoder")
    (folder / "config.json").write_text(json.dumps(saved))
    bench = Bench(folder, max_new_tokens=39, play_steps_s=1.0)
    assert bench.stage._descriptions is not bench.stage._prompts
    owner = ticket()
    assert bench.speak(Say(owner, "Hello.", 0))[-1] == Spoken(owner, 0)
    with pytest.raises(StageError, match="/nowhere"):
        Bench(folder, max_new_tokens=39, tokenizer_name="/nowhere")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model_name": "/nowhere/at/all"}, "--tts_model_name /nowhere/at/all"),
        ({"torch_dtype": "int3"}, "float32, bfloat16"),
        ({"play_steps_s": 0.0}, "--play_steps_s 0.0"),
        ({"compile_mode": "quick"}, "compile mode quick"),
        ({"device": "toaster"}, "device toaster"),
        ({"temperature": -1.0, "do_sample": True}, "temperature=-1.0"),
    ],
)
def test_what_cannot_be_served_says_why(
    checkpoint: Path, options: dict[str, Any], words: str
) -> None:
    chosen: dict[str, Any] = {"model_name": str(checkpoint), "max_new_tokens": 79} | options
    with pytest.raises(StageError, match=words):
        ParlerTTS(ParlerOptions(**chosen), emit=lambda message: None).setup()


def test_the_flags_people_know(checkpoint: Path) -> None:
    flags = ["--tts", "parler", "--tts_model_name", str(checkpoint), "--play_steps_s", "0.25"]
    flags += [
        "--description",
        "Low and calm.",
        "--tts_gen_temperature",
        "0.7",
        "--tts_device",
        "cpu",
    ]
    flags += [
        "--tts_gen_do_sample",
        "--tts_torch_dtype",
        "bfloat16",
        "--tts_compile_mode",
        "default",
    ]
    _, pipeline = parse(flags)
    options = pipeline.options["tts"]
    assert options == ParlerOptions(
        model_name=str(checkpoint),
        play_steps_s=0.25,
        description="Low and calm.",
        temperature=0.7,
        do_sample=True,
        torch_dtype="bfloat16",
        compile_mode="default",
    )
    found: type[Handler[Any]] = backend("tts", "parler")
    assert found is ParlerTTS


def test_the_end_of_a_clause_fades() -> None:
    samples = np.ones(10, np.float32)
    np.testing.assert_allclose(_faded(samples, 4), [1] * 6 + [1, 2 / 3, 1 / 3, 0], atol=1e-6)
    assert len(_faded(np.zeros(0, np.float32), 4)) == 0
    assert _faded(np.ones(2, np.float32), 4).tolist() == [1, 0]
