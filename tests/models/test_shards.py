"""Shards on disk, and the rows that are packed from them."""

import pytest

pytest.importorskip("torch", reason="models need torch")
pytest.importorskip("transformers", reason="models need transformers")

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.common.errors import VocabularyError
from models.parrot.data import (
    Layout,
    TrainingRows,
    ValidationRows,
    build_row,
    check_vocabulary,
    collate,
    hold_out,
    one_digit_of,
    plan,
    warped,
)
from models.parrot.loss import IGNORE
from models.parrot.shards import ShardError, Shards, ShardWriter, Vocabulary, verify
from tests.models import tiny

PAIRS = Vocabulary("fake", tiny.CODES, 1, 25.0, 2)
START = tiny.CODES


def recording(frames: int, seed: int = 0, channels: int = 2, depth: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(tiny.CODES, (frames, channels, depth), generator=generator)


def written(folder: Path, *frames: int, shard_frames: int = 20) -> list[Tensor]:
    recordings = [recording(count, seed) for seed, count in enumerate(frames)]
    with ShardWriter(folder, PAIRS, shard_frames) as writer:
        for index, codes in enumerate(recordings):
            writer.append(codes, f"{index}.wav")
    return recordings


def layout(row_frames: int = 16, **changes: Any) -> Layout:
    return Layout.of(tiny.model().config, row_frames, **changes)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    recordings = written(tmp_path, 12, 9, 5, 30, 3)
    shards = Shards([tmp_path])
    assert shards.lengths == [12, 9, 5, 30, 3]
    assert all(torch.equal(shards[i], r) for i, r in enumerate(recordings))
    assert shards[0].dtype == torch.int16
    assert len(json.loads((tmp_path / "manifest.json").read_text())["files"]) == 3
    verify(tmp_path)


def test_labels_are_read_as_they_were_written_and_go_with_their_frames(tmp_path: Path) -> None:
    vocabulary = replace(PAIRS, labels=100)
    with ShardWriter(tmp_path, vocabulary, shard_frames=20) as writer:
        for index, frames in enumerate((30, 12)):
            labels = torch.stack((torch.arange(frames), torch.arange(frames) + 50), 1)
            writer.append(recording(frames, index), labels=labels)
        with pytest.raises(VocabularyError, match="every frame needs a label"):
            writer.append(recording(5), "x.wav")
        with pytest.raises(VocabularyError, match=r"x\.wav: label 100; there are 100"):
            writer.append(recording(5), "x.wav", torch.full((5, 2), 100))
    shards = Shards([tmp_path])
    found = shards.labels(1)
    assert found is not None
    assert found[:, 1].tolist() == list(range(50, 62))
    made = layout(48, user_delay_frames=2)
    row = build_row(shards, [(0, 0, 31), (1, 0, 13)], made, generator())
    hints, codes = row["hints"], row["input_ids"].view(48, 2)
    assert hints[:6, 0].tolist() == [IGNORE, IGNORE, IGNORE, 0, 1, 2]  # the start, the delay
    assert hints[:4, 1].tolist() == [IGNORE, 50, 51, 52]
    assert codes[4, 0] == shards[0][1, 0, 0]
    assert hints[34:36, 0].tolist() == [0, 1]
    assert (hints[44:] == IGNORE).all()
    with pytest.raises(VocabularyError, match="labels 100, not 0"):
        ShardWriter(tmp_path, PAIRS)


def test_labels_are_warped_with_their_frames(tmp_path: Path) -> None:
    codes = torch.full((200, 2, 1), 3)
    codes[:, 0, 0] = torch.arange(200) % tiny.CODES
    labels = torch.stack((codes[:, 0, 0], torch.full((200,), -1)), 1)
    with ShardWriter(tmp_path, replace(PAIRS, labels=tiny.CODES)) as writer:
        writer.append(codes, labels=labels)
    row = build_row(Shards([tmp_path]), [(0, 0, 201)], layout(201, user_warp=0.3), generator())
    ids, hints = row["input_ids"].view(201, 2), row["hints"]
    assert torch.equal(ids[1:, 0], hints[1:, 0])
    assert not torch.equal(ids[1:, 0], codes[:, 0, 0])
    assert (hints[:, 1] == IGNORE).all()


def test_a_large_codebook_takes_wider_numbers(tmp_path: Path) -> None:
    codes = torch.full((4, 2, 1), 65535)
    with ShardWriter(tmp_path, Vocabulary("fake", 65536, 1, 25.0, 2)) as writer:
        writer.append(codes)
    assert torch.equal(Shards([tmp_path])[0].long(), codes)


def test_a_writer_goes_on_where_the_last_one_was_cut_off(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, PAIRS, shard_frames=10)
    writer.append(recording(10, 1), "a.wav")
    writer.append(recording(4, 2), "lost.wav")  # never closed
    (tmp_path / "shard-00001.safetensors.part").write_bytes(b"half a file")
    again = ShardWriter(tmp_path, PAIRS, shard_frames=10)
    assert again.sources == {"a.wav"}
    again.append(recording(11, 3), "b.wav")
    shards = Shards([tmp_path])
    assert shards.lengths == [10, 11]
    verify(tmp_path)
    with pytest.raises(VocabularyError, match="codebook_size 11, not 12"):
        ShardWriter(tmp_path, Vocabulary("fake", 12, 1, 25.0, 2))


def test_codes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, PAIRS)
    for codes in (recording(4, channels=1), recording(0), recording(4) + 1000, recording(4) - 20):
        with pytest.raises(VocabularyError, match=r"x\.wav"):
            writer.append(codes, "x.wav")


def test_broken_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="No such file"):
        Shards([tmp_path])
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(ShardError, match="no manifest"):
        Shards([tmp_path])
    folder = tmp_path / "good"
    written(folder, 12, 9)
    shard = folder / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ShardError, match="changed"):
        verify(folder)
    shard.write_bytes(b"nothing")
    with pytest.raises(ShardError, match="shard-00000"):
        Shards([folder])


def test_folders_of_other_vocabularies_do_not_mix(tmp_path: Path) -> None:
    written(tmp_path / "a", 12)
    with ShardWriter(tmp_path / "b", Vocabulary("other", tiny.CODES, 1, 25.0, 2)) as writer:
        writer.append(recording(4))
    with pytest.raises(VocabularyError, match="tokenizer other, not fake"):
        Shards([tmp_path / "a", tmp_path / "b"])


def test_a_model_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(VocabularyError, match="codebook_size 12, the model 11"):
        check_vocabulary(tiny.model().config, Vocabulary("fake", 12, 1, 25.0, 2))


def test_shards_that_come_later_are_taken_in_and_nobody_changes_sides(tmp_path: Path) -> None:
    written(tmp_path, *[6] * 40)
    shards = Shards([tmp_path])
    held_out = hold_out(shards, 0.2)
    assert 2 <= len(held_out) <= 16
    with ShardWriter(tmp_path, PAIRS) as writer:
        for seed in range(40):
            writer.append(recording(6, seed))
    shards.refresh()
    assert len(shards) == 80
    assert held_out < hold_out(shards, 0.2)


def test_holding_out_takes_one_at_least_and_never_all(tmp_path: Path) -> None:
    written(tmp_path, 6, 6)
    shards = Shards([tmp_path])
    assert len(hold_out(shards, 0.001)) == 1
    assert hold_out(shards, 0.0) == frozenset()
    with pytest.raises(VocabularyError, match="too few"):
        hold_out(shards, 0.999999)


@pytest.mark.parametrize("seed", range(5))
def test_a_plan_has_every_frame_once_and_cuts_only_what_is_too_long(seed: int) -> None:
    chance = random.Random(seed)
    recordings = {i: chance.choice((2, 5, 7, 10, 16, 17, 40, 90)) for i in range(50)}
    rows = plan(recordings, 16, chance)
    frames = Counter(
        (index, frame) for row in rows for index, begin, end in row for frame in range(begin, end)
    )
    assert set(frames.values()) == {1}
    for row in rows:
        assert sum(end - begin for _, begin, end in row) <= 16
        assert all(end - begin == recordings[i] for i, begin, end in row if recordings[i] <= 16)
    missing = sum(recordings.values()) - len(frames)
    assert missing <= 2 * sum(length > 16 for length in recordings.values())  # single frames
    assert len(rows) <= 1.2 * sum(recordings.values()) / 16 + 1


def test_a_row_as_it_should_be(tmp_path: Path) -> None:
    first, second = written(tmp_path, 4, 9)
    shards = Shards([tmp_path])
    row = build_row(shards, [(0, 0, 5), (1, 2, 8)], layout(), generator())
    ids, labels = (row[name].view(16, 2, 1) for name in ("input_ids", "labels"))
    assert torch.equal(row["segments"], torch.tensor([1] * 5 + [2] * 6 + [0] * 5))
    assert (ids[0] == START).all()
    assert torch.equal(ids[1:5], first)
    assert torch.equal(ids[5:11], second[1:7])
    assert (ids[11:] == START).all()
    assert (labels[0] == IGNORE).all()
    assert torch.equal(labels[1:11], ids[1:11])
    assert (labels[11:] == IGNORE).all()


def test_the_persons_codes_come_later_by_what_the_encoder_takes(tmp_path: Path) -> None:
    (codes,) = written(tmp_path, 6)
    row = build_row(Shards([tmp_path]), [(0, 0, 7)], layout(7, user_delay_frames=2), generator())
    ids, labels = (row[name].view(7, 2, 1) for name in ("input_ids", "labels"))
    assert torch.equal(ids[1:, 1], codes[:, 1])
    assert (ids[:3, 0] == START).all()
    assert (labels[:3, 0] == IGNORE).all()
    assert torch.equal(ids[3:, 0], codes[:4, 0])


def test_codebooks_are_delayed_as_the_model_was_told(tmp_path: Path) -> None:
    codes = recording(5, depth=2)
    with ShardWriter(tmp_path, Vocabulary("fake", tiny.CODES, 2, 25.0, 2)) as writer:
        writer.append(codes)
    config = tiny.model(num_codebooks=2, delays=[0, 2]).config
    made = Layout.of(config, 8)
    assert made.frames_of(5) == 8
    ids = build_row(Shards([tmp_path]), [(0, 0, 8)], made, generator())["input_ids"].view(8, 2, 2)
    assert torch.equal(ids[1:6, :, 0], codes[:, :, 0])
    assert torch.equal(ids[3:8, :, 1], codes[:, :, 1])
    assert (ids[:3, :, 1] == START).all()


def test_a_single_channel_stands_in_either_and_alone(tmp_path: Path) -> None:
    codes = recording(6, channels=1)
    with ShardWriter(tmp_path, Vocabulary("fake", tiny.CODES, 1, 25.0, 1)) as writer:
        writer.append(codes)
    shards, drawn, chance = Shards([tmp_path]), set(), generator()
    for _ in range(20):
        row = build_row(shards, [(0, 0, 7)], layout(7), chance)
        ids, labels = (row[name].view(7, 2) for name in ("input_ids", "labels"))
        channel = int((labels[1] != IGNORE).nonzero()[0])
        drawn.add(channel)
        assert torch.equal(labels[1:, channel], codes[:, 0, 0])
        assert (ids[:, 1 - channel] == START).all()
        assert (labels[:, 1 - channel] == IGNORE).all()
    assert drawn == {0, 1}


def test_noise_touches_only_what_the_person_is_heard_to_say(tmp_path: Path) -> None:
    written(tmp_path, 400)
    shards = Shards([tmp_path])
    config = tiny.model().config
    clean = build_row(shards, [(0, 0, 401)], Layout.of(config, 410), generator())
    noisy_layout = Layout.of(config, 410, user_token_noise=0.3)
    noisy = build_row(shards, [(0, 0, 401)], noisy_layout, generator())
    assert torch.equal(noisy["labels"], clean["labels"])
    before, after = (row["input_ids"].view(410, 2) for row in (clean, noisy))
    assert torch.equal(before[:, 1], after[:, 1])
    changed = (before[:, 0] != after[:, 0]).nonzero()
    assert 0.2 < len(changed) / 400 < 0.35  # one in eleven becomes itself
    assert 1 <= int(changed.min()) <= int(changed.max()) <= 400
    assert int(after[1:401].max()) < START


def test_noise_may_change_one_number_of_a_code() -> None:
    codes, chance = torch.arange(24).repeat(200), generator()
    others = torch.randint(24, codes.shape, generator=chance)
    made = one_digit_of(others, codes, (4, 3, 2), chance)
    places = ((1, 4), (4, 3), (12, 2))
    digits = [(made // power % size, codes // power % size) for power, size in places]
    changed = torch.stack([new != old for new, old in digits]).sum(0)
    assert int(changed.max()) == 1
    for new, old in digits:
        assert 0.1 < float((new != old).float().mean()) < 0.3  # 1/3 of 3/4, 2/3, 1/2


def test_a_warped_person_leaves_our_channel_as_it_was() -> None:
    codes = torch.full((200, 2, 1), 9)
    codes[:, 0, 0] = torch.arange(200)
    codes[100:120, 1, 0] = torch.arange(20) + 20
    changed = codes[warped(codes, 0, 0.4, generator())]
    assert changed.shape == codes.shape
    start = int((changed[:, 1, 0] == 20).nonzero()[0])
    assert torch.equal(changed[start - 10 : start + 20], codes[90:120])
    assert (changed[: start - 10, 1] == 9).all()
    assert (changed[start + 20 :, 1] == 9).all()
    steps = changed[1:, 0, 0] - changed[:-1, 0, 0]
    assert int((steps == 0).sum()) == 34  # doubled: a fifth of the 168 that may be
    assert int((steps - 1).clamp(min=0).sum()) in (33, 34)  # left out, perhaps the last one
    assert torch.equal(warped(codes, 0, 0.0, generator()), torch.arange(len(codes)))


def test_packed_loss_is_the_loss_of_each_alone(tmp_path: Path) -> None:
    written(tmp_path, 4, 9, 6)
    shards, model, made = Shards([tmp_path]), tiny.model(), layout(24)
    packed = build_row(shards, [(0, 0, 5), (1, 0, 10), (2, 0, 7)], made, generator())
    with torch.no_grad():
        together = model(**collate([packed])).channel_losses
        alone = torch.zeros(2)
        for index, frames in enumerate((4, 9, 6)):
            row = build_row(shards, [(index, 0, frames + 1)], made, generator())
            batch = collate([row])
            assert "segments" not in batch
            alone += model(**batch).channel_losses * frames
    torch.testing.assert_close(together, alone / 19)


def test_training_rows_go_on_where_they_are_told(tmp_path: Path) -> None:
    written(tmp_path, *range(3, 40))
    shards = Shards([tmp_path])
    held_out = hold_out(shards, 0.1)

    def rows(skip: int, count: int) -> list[Tensor]:
        made = TrainingRows(shards, held_out, layout(), seed=3)
        made.skip_rows = skip
        stream = iter(made)
        return [next(stream)["input_ids"] for _ in range(count)]

    whole = rows(0, 130)  # about two and a half epochs
    per_epoch = len(TrainingRows(shards, held_out, layout(), seed=3).epoch(0))
    assert 45 < per_epoch < 65
    assert not all(torch.equal(a, b) for a, b in zip(whole, whole[per_epoch:], strict=False))
    for skip in (1, per_epoch - 1, per_epoch, per_epoch + 7):
        assert all(
            torch.equal(a, b) for a, b in zip(rows(skip, 20), whole[skip : skip + 20], strict=True)
        )


def test_validation_rows_hold_what_was_held_out(tmp_path: Path) -> None:
    recordings = written(tmp_path, *[7] * 20)
    shards = Shards([tmp_path])
    held_out = hold_out(shards, 0.3)
    rows = ValidationRows(shards, held_out, layout(), max_rows=99)
    found = sorted(
        tuple(ids[segments == number][1:].flatten().tolist())
        for row in (rows[i] for i in range(len(rows)))
        for ids, segments in [(row["input_ids"].view(16, 2), row["segments"])]
        for number in range(1, int(segments.max()) + 1)
    )
    wanted = [r for r, name in zip(recordings, shards.names, strict=True) if name in held_out]
    assert found == sorted(tuple(r.flatten().tolist()) for r in wanted)
