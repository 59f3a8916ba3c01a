"""Conversations from files, and their turn-taking against the data's."""

import pytest

pytest.importorskip("torch", reason="models need torch")
pytest.importorskip("transformers", reason="models need transformers")

import json
import sys
from collections.abc import Hashable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.common.errors import VocabularyError
from models.parrot import evaluate, inference
from models.parrot.attention import FrameCache
from models.parrot.backbones import DualLlama
from models.parrot.data import Layout, ValidationRows, build_row, collate
from models.parrot.engine import TorchEngine
from models.parrot.evaluate import compare, generate, losses
from models.parrot.inference import answer, converse, open_model
from models.parrot.modeling import DualChannelModel
from models.parrot.shards import Shards, ShardWriter, Vocabulary
from tests.models import tiny
from tests.models.level import RATE_HZ, LevelTokenizer

SHIPPED = Path(inference.__file__).parent / "tiny"
LEVELS = LevelTokenizer.codebook_size
PAIRS = Vocabulary.of(LevelTokenizer(), channels=2)


def model() -> DualChannelModel:
    torch.manual_seed(5)
    settings = tiny.settings(join="sum", codebook_size=LEVELS)
    made: DualChannelModel = DualLlama(DualLlama.config_class(**settings)).eval()
    return made


def engine(rows: int = 1) -> TorchEngine:
    return TorchEngine(model(), rows)


def users(*frames: int) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {
        i: torch.randint(LEVELS, (count, 1), generator=generator) for i, count in enumerate(frames)
    }


def plainly(user: Tensor) -> Tensor:
    """[T, 1] -> [T, 1], by the plain model."""
    plain = model()
    cache, out = FrameCache(), []
    start = torch.full((1, 2, 1), plain.config.start_id)
    codes_only = slice(0, LEVELS)
    ours = plain.step(start, cache)[0, 1, :, codes_only].argmax(-1)
    for frame in user:
        logits = plain.step(torch.stack((frame, ours))[None], cache)
        ours = logits[0, 1, :, codes_only].argmax(-1)
        out.append(ours)
    return torch.stack(out)


def test_the_answer_is_the_models_frame_by_frame() -> None:
    (user,) = users(30).values()
    assert torch.equal(answer(engine(), user), plainly(user))


def test_a_file_as_it_would_have_been_live() -> None:
    tokenizer = LevelTokenizer()
    person = torch.randn(640 * 20 - 5, generator=torch.Generator().manual_seed(0)) / 10
    both = converse(engine(), tokenizer, person)
    assert both.shape == (2, 640 * 20)
    assert torch.equal(both[0, :-5], person)
    state = tokenizer.encoder_state(1)
    frames = both[0].split(640)
    user = torch.stack([tokenizer.encode(frame[None], state)[0, 0] for frame in frames])
    spoken = tokenizer.decode(plainly(user)[None])[0]
    assert torch.equal(both[1, 640:], spoken[:-640])
    assert not both[1, :640].any()


def test_the_shipped_model_answers_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("espeakng_loader", reason="the person is eSpeak NG")
    soundfile = pytest.importorskip("soundfile", reason="files are read by soundfile")
    from models.parrot.synthesis import RATE_HZ, Speaker, Synthesizer

    with Synthesizer() as synthesizer:
        said = synthesizer.say(Speaker("en-us+Annie", 150, 50, 60), "lemon garden.").samples
    said *= 0.05 / np.sqrt(np.square(said).mean())
    end = RATE_HZ + len(said)
    given, made = tmp_path / "person.wav", tmp_path / "both.wav"
    soundfile.write(given, np.pad(said, (RATE_HZ, 2 * RATE_HZ)), RATE_HZ)
    argv = ["inference", "--model", str(SHIPPED), "--input_audio", str(given)]
    monkeypatch.setattr(sys, "argv", [*argv, "--output_audio", str(made), "--threads", "1"])
    inference.main()
    both, rate_hz = soundfile.read(made)
    assert rate_hz == RATE_HZ
    assert not both[: end - RATE_HZ // 2, 1].any()
    reply = both[end : end + 3 * RATE_HZ // 2, 1]
    assert (np.abs(reply) > 0.01).mean() > 0.3


def test_many_conversations_at_once_are_each_by_itself() -> None:
    heard = users(7, 12, 3)
    together = generate(engine(3), heard)
    assert {name: len(frames) for name, frames in together.items()} == {0: 7, 1: 12, 2: 3}
    for name, user in heard.items():
        assert torch.equal(together[name], answer(engine(), user))


class Knows:
    """A `DuplexLM` that says what it was told to."""

    def __init__(self, says: Mapping[int, Tensor]) -> None:
        self._says, self.heard = says, dict[Hashable, list[Tensor]]()

    def open(self, session: Hashable, prefix: Tensor | None = None, *, seed: int = 0) -> None:
        self.heard[session] = []

    def step(self, user: Mapping[Hashable, Tensor]) -> dict[Hashable, Tensor]:
        said: dict[Hashable, Tensor] = {}
        for session, frame in user.items():
            assert isinstance(session, int)
            self.heard[session].append(frame)
            following = min(len(self.heard[session]), len(self._says[session]) - 1)
            said[session] = self._says[session][following]
        return said

    def close(self, session: Hashable) -> None: ...


def turns(*lengths: int) -> Tensor:
    """Silence and speech by turns. [T, 1]"""
    return torch.cat([torch.full((n, 1), 60 * (i % 2)) for i, n in enumerate(lengths)])


def test_who_says_what_the_data_say_differs_in_nothing() -> None:
    tokenizer = LevelTokenizer()
    person, agent = turns(2, 20, 60), turns(40, 20, 22)
    truth = torch.stack((person, agent), dim=1)  # [T, C, D]
    knows = Knows({0: agent, 1: agent})
    found = compare(knows, tokenizer, [truth, truth], rows=1, user_delay_frames=3)
    assert found.difference.ipu.count == found.difference.gap.seconds == 0
    minutes = len(person) / 25 / 60
    assert found.generated == found.data
    assert found.data.ipu.count == pytest.approx(2 / minutes)
    assert found.data.gap.seconds == pytest.approx(18 / 25 / minutes)
    heard = torch.stack(knows.heard[0])
    assert torch.equal(heard[3:], person[:-3])
    silent = compare(Knows({0: agent * 0}), tokenizer, [truth], rows=1)
    assert silent.generated.gap.count == 0
    assert silent.difference.gap.count == pytest.approx(1 / minutes)


def written(folder: Path) -> Path:
    generator = torch.Generator().manual_seed(1)
    with ShardWriter(folder, PAIRS) as writer:
        for frames in (20, 30, 25):
            writer.append(torch.randint(LEVELS, (frames, 2, 1), generator=generator))
    return folder


def test_losses_are_means_over_all_codes(tmp_path: Path) -> None:
    shards = Shards([written(tmp_path)])
    plain = model()
    layout = Layout.of(plain.config, 40)
    found = losses(plain, ValidationRows(shards, frozenset(shards.names), layout, 99), batch_rows=2)
    wanted = torch.zeros(2)
    for i, frames in enumerate((20, 30, 25)):
        row = build_row(shards, [(i, 0, frames + 1)], layout, torch.Generator())
        with torch.no_grad():
            wanted += plain(**collate([row])).channel_losses * frames / 75
    assert found == pytest.approx(wanted.tolist(), rel=1e-5)


def test_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    soundfile = pytest.importorskip("soundfile", reason="audio files need soundfile")
    folder = str(tmp_path / "model")
    model().save_pretrained(folder)
    monkeypatch.setattr(inference, "load_tokenizer", lambda name: LevelTokenizer())
    person = np.random.default_rng(0).normal(0, 0.1, RATE_HZ // 2).astype(np.float32)
    soundfile.write(tmp_path / "person.wav", person, RATE_HZ)
    options = ["--model", folder, "--temperature", "0.9", "--top_p", "0.8", "--seed", "3"]
    files = ["--input_audio", str(tmp_path / "person.wav")]
    files += ["--output_audio", str(tmp_path / "both.wav")]
    monkeypatch.setattr(sys, "argv", ["inference", *options, *files])
    inference.main()
    both, rate_hz = soundfile.read(tmp_path / "both.wav")
    assert (both.shape, rate_hz) == ((13 * 640, 2), RATE_HZ)
    np.testing.assert_allclose(both[: RATE_HZ // 2, 0], person, atol=1e-3)

    data = ["--input_data", str(written(tmp_path / "data")), "--row_frames", "64"]
    data += ["--output", str(tmp_path / "figures.json")]
    monkeypatch.setattr(sys, "argv", ["evaluate", *options, *data])
    evaluate.main()
    assert "per minute" in capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["loss_agent"] > 0
    assert set(figures["turn_taking_per_minute"]) == {"data", "generated", "difference"}

    monkeypatch.setattr(sys, "argv", ["inference", *options, *files[:1], "none.wav", *files[2:]])
    with pytest.raises(SystemExit, match=r"inference: none\.wav"):
        inference.main()


def test_a_model_and_a_tokenizer_that_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.model(join="sum").save_pretrained(tmp_path)
    monkeypatch.setattr(inference, "load_tokenizer", lambda name: LevelTokenizer())
    with pytest.raises(VocabularyError, match="codebook_size 64, the model 11"):
        open_model(str(tmp_path), "level")
