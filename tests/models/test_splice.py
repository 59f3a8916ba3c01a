"""New phrases made of words from other recordings."""

import pytest

pytest.importorskip("torch", reason="models need torch")
pytest.importorskip("espeakng_loader", reason="dialogues are spoken by eSpeak NG")

from pathlib import Path

import torch
from torch import Tensor

from models.parrot import domain
from models.parrot.backbones import DualLlamaConfig
from models.parrot.data import Layout, TrainingRows
from models.parrot.dialogues import LABELS
from models.parrot.labels import FIRST_WORD, NOT_SPEAKING, PAUSING
from models.parrot.shards import Shards, ShardWriter, Vocabulary
from models.parrot.splice import PHRASE_LABELS, Splicer, echoes, runs

VOCABULARY = Vocabulary("fake", 1000, 1, 25.0, 2, LABELS)
WORDS = 12  # so few that each stands behind each other one


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def turn(
    words: list[int], chance: torch.Generator, *, said: int | None = None, paused: bool = False
) -> Tensor:
    """Labels of a phrase of words, numbered, and of as much of the reply as is said. [T, 2]"""

    def spoken(numbers: list[int], low: int, high: int) -> list[int]:
        counts = torch.randint(low, high, (len(numbers),), generator=chance).tolist()
        return [FIRST_WORD + n for n, c in zip(numbers, counts, strict=True) for _ in range(c)]

    person = spoken(words, 3, 9)
    if paused:
        cut = person.index(FIRST_WORD + words[1])
        person[cut:cut] = [PAUSING] * 5
    agent = spoken(words if said is None else words[:said], 4, 6)
    rest = [NOT_SPEAKING] * 4
    labels = torch.tensor([[*rest, *person, *rest, *rest[:1] * len(agent), *rest]]).T.repeat(1, 2)
    labels[:, 1] = NOT_SPEAKING
    start = len(person) + 8
    labels[start : start + len(agent), 1] = torch.tensor(agent)
    return labels


def codes_of(labels: Tensor) -> Tensor:
    """Which say the label and the channel. [T, 2] -> [T, 2, 1]"""
    return (labels * 2 + torch.tensor([0, 1]))[..., None]


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    chance = generator(7)
    with ShardWriter(tmp_path, VOCABULARY) as writer:
        for number in range(400):
            count = 1 + number % 3
            words = torch.randperm(WORDS, generator=chance)[:count].tolist()
            cut = 1 if number % 10 == 9 and count > 1 else None
            labels = turn(words, chance, said=cut, paused=number % 4 == 3 and count > 1)
            writer.append(codes_of(labels), labels=labels)
    return Shards([tmp_path])


@pytest.fixture(autouse=True)
def few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    few = range(FIRST_WORD, FIRST_WORD + WORDS)
    monkeypatch.setattr("models.parrot.splice.PHRASE_LABELS", few)


def words_of(labels: Tensor, channel: int) -> list[int]:
    return [run.label for run in runs(labels[:, channel]) if run.label >= FIRST_WORD]


def test_the_words_of_phrases_come_first() -> None:
    assert [domain.SAYABLE[label - FIRST_WORD] for label in PHRASE_LABELS] == list(domain.WORDS)


def test_a_new_phrase_is_repeated_as_the_old_one_was(shards: Shards) -> None:
    splicer, made = Splicer(shards, user_channel=0), 0
    for index in range(len(shards)):
        old = shards.labels(index)
        assert old is not None
        codes, labels = splicer(index, generator(index))
        assert torch.equal(codes, codes_of(labels.long()).to(codes.dtype))
        if not echoes(old, 0):
            assert torch.equal(labels, old)
            continue
        (echo,) = echoes(labels, 0)
        made += words_of(labels, 0) != words_of(old, 0)
        assert len(echo.phrase) == len(words_of(old, 0))
        phrase = " ".join(domain.SAYABLE[run.label - FIRST_WORD] for run in echo.phrase)
        assert not domain.held_out(phrase) or words_of(labels, 0) == words_of(old, 0)
        gap = echo.reply[0].start - echo.phrase[-1].end
        assert gap == 4
        assert (labels == PAUSING).sum() == (old == PAUSING).sum()
    assert made > 250
    again = splicer(5, generator(5)), splicer(5, generator(5))
    assert torch.equal(again[0][0], again[1][0])


def test_a_reply_that_was_broken_off_is_neither_changed_nor_used(tmp_path: Path) -> None:
    chance = generator()
    with ShardWriter(tmp_path, VOCABULARY) as writer:
        labels = turn([1, 2], chance, said=1)
        writer.append(codes_of(labels), labels=labels)
        whole = turn([3], chance)
        writer.append(codes_of(whole), labels=whole)
    splicer = Splicer(Shards([tmp_path]), user_channel=0)
    for seed in range(20):
        assert torch.equal(splicer(0, generator(seed))[1], labels.short())
        assert torch.equal(splicer(1, generator(seed))[1], whole.short())  # no other word stands so


def test_rows_get_new_phrases_in_their_share(shards: Shards) -> None:
    config = DualLlamaConfig(codebook_size=1000, join="sum")

    def first_epoch(share: float) -> list[Tensor]:
        rows = TrainingRows(shards, frozenset(), Layout.of(config, 96, new_phrases=share), seed=1)
        stream = iter(rows)
        return [next(stream)["input_ids"] for _ in range(len(rows.epoch(0)))]

    plain, half, all_new = (first_epoch(share) for share in (0.0, 0.5, 0.99))
    changed = [
        sum(not torch.equal(a, b) for a, b in zip(plain, other, strict=True)) / len(plain)
        for other in (half, all_new)
    ]
    assert changed[0] < changed[1]
    assert changed[1] > 0.75
