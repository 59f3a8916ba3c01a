"""Training runs of a few seconds."""

import pytest

pytest.importorskip("torch", reason="models need torch")
pytest.importorskip("transformers", reason="models need transformers")
pytest.importorskip("accelerate", reason="training needs accelerate")

import dataclasses
import json
import math
import multiprocessing
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from models.common.errors import ArchitectureError, ConfigError, VocabularyError
from models.parrot.backbones import load
from models.parrot.hints import Hints, words_before
from models.parrot.loss import IGNORE
from models.parrot.recipe import DataRecipe, LoraRecipe, ModelRecipe, Recipe, TrainRecipe
from models.parrot.shards import ShardWriter, Vocabulary
from models.parrot.trainer import HINTS, Schedule
from models.parrot.training import ChannelCountError, Run, main, make_model, train
from tests.models import tiny

CONFIGS = Path(__file__).parents[2] / "models/parrot/configs"
PAIRS = Vocabulary("fake", tiny.CODES, 1, 25.0, 2)


def shards(
    folder: Path,
    count: int = 6,
    channels: int = 2,
    frames: int = 14,
    codes: int = tiny.CODES,
    labels: int = 0,
) -> Path:
    generator = torch.Generator().manual_seed(1)
    vocabulary = dataclasses.replace(PAIRS, channels=channels, codebook_size=codes, labels=labels)
    with ShardWriter(folder, vocabulary) as writer:
        for _ in range(count):
            made = torch.randint(codes, (frames, channels, 1), generator=generator)
            writer.append(made, labels=made[..., 0] % labels if labels else None)
    return folder


def recipe(train: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "join": "sum",
        "attention_dropout": 0.1,
    }
    steps: dict[str, Any] = {
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "max_steps": 6,
        "rows": 2,
        "precision": "fp32",
        "threads": 1,
        "log_steps": 1,
        "validate_steps": 1000,
        "save_steps": 1000,
    }
    return Recipe(
        model=sections.get("model", ModelRecipe(settings=small)),
        data=sections.get("data", DataRecipe(row_frames=32, validation_share=0.0)),
        lora=sections.get("lora", LoraRecipe()),
        train=TrainRecipe(**(steps | (train or {}))),
    )


def weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(folder / "model.safetensors")
    return found


def history(folder: Path, step: int) -> list[dict[str, float]]:
    state = json.loads((folder / f"checkpoint-{step}/trainer_state.json").read_text())
    found: list[dict[str, float]] = state["log_history"]
    return found


def test_a_small_model_learns_a_few_recordings_by_heart(tmp_path: Path) -> None:
    data = shards(tmp_path / "data")
    made = recipe(
        {"max_steps": 120, "rows": 3, "log_steps": 60, "validate_steps": 120, "weight_decay": 0.0},
        data=DataRecipe(row_frames=32),
    )
    losses = train(Run(made, [data], tmp_path / "out", validation_data=[data]))
    assert set(losses) == {"eval_loss", "eval_loss_user", "eval_loss_agent"}
    assert losses["eval_loss"] == pytest.approx(
        losses["eval_loss_user"] + losses["eval_loss_agent"]
    )
    # Only the first frame of each recording, one in fourteen, can't be known.
    assert losses["eval_loss"] < 0.4 < 2 * math.log(tiny.CODES)
    model = load(tmp_path / "out")
    assert model.config.codebook_size == tiny.CODES
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert run["versions"]["torch"] == torch.__version__
    assert run["data"]["data"]["files"][0]["recordings"] == 6
    assert Recipe.load(tmp_path / "out/recipe.yaml") == made


def test_hints_are_learnt_and_left_behind(tmp_path: Path) -> None:
    data = shards(tmp_path / "data", labels=9)
    made = recipe({"max_steps": 100, "log_steps": 50, "hint_weight": 0.5, "save_steps": 100})
    train(Run(made, [data], tmp_path / "out"))
    first, last = (entry for entry in history(tmp_path / "out", 100) if "loss" in entry)
    assert all(last[name] < 0.7 * first[name] for name in ("hint_user", "hint_agent"))
    hints = sum(last[name] for name in HINTS)
    assert last["loss"] == pytest.approx(
        last["loss_user"] + last["loss_agent"] + 0.5 * hints, rel=1e-3
    )
    assert not any("hints" in name for name in weights(tmp_path / "out"))
    assert load(tmp_path / "out").hints is None


def test_recordings_without_labels_are_trained_on_without_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = recipe({"hint_weight": 0.5, "max_steps": 2})
    made = dataclasses.replace(made, data=dataclasses.replace(made.data, new_phrases=0.5))
    train(Run(made, [shards(tmp_path / "data")], tmp_path / "out"))
    assert "no hints, no new phrases or interruptions" in caplog.text
    ran = Recipe.load(tmp_path / "out/recipe.yaml")
    assert ran.train.hint_weight == ran.data.new_phrases == 0


def test_hints_that_cannot_be_given_are_named(tmp_path: Path) -> None:
    data = shards(tmp_path / "data", labels=9)
    with pytest.raises(ConfigError, match=r"train\.hint_weight: not with"):
        train(Run(recipe({"hint_weight": 0.5}, lora=LoraRecipe(rank=2)), [data], tmp_path / "out"))


def test_a_hint_asks_what_was_said_before_and_will_be_said_soon() -> None:
    torch.manual_seed(0)
    hints, frames, width = Hints(8, 2, 5, user_channel=0, weight=1.0), 12, 8
    middle, later, last = torch.randn(3, 1, frames, width)
    labels = torch.randint(5, (1, frames, 3))
    labels[0, 3] = IGNORE
    segments = torch.tensor([[1] * 5 + [2] * 6 + [0]])
    with torch.no_grad():
        found = hints(middle, later, last, labels, segments)
        answers = (
            hints.person(hints.norms[0](middle)),
            hints.before(hints.norms[1](later)),
            hints.agent(last),
        )
    asked = ((0, (-2, -6)), (2, (-2, -6)), (1, (1, 6)))
    for loss, answer, (column, moves) in zip(found, answers, asked, strict=True):
        scores = answer[0].unflatten(-1, (2, 5)).log_softmax(-1)  # [T, N, K]
        counted = [
            -scores[t, n, labels[0, t + move, column]]
            for n, move in enumerate(moves)
            for t in range(11)
            if 0 <= t + move < 11
            and segments[0, t] == segments[0, t + move]
            and labels[0, t + move, column] != IGNORE
        ]
        assert len(counted) > 5
        assert loss.item() == pytest.approx(torch.stack(counted).mean().item())


def test_the_word_before_is_that_of_the_same_turn() -> None:
    labels = torch.tensor([0, 5, 5, 7, 1, 1, 8, 8, 0, 0, 9, -1, 6, 0])
    assert words_before(labels).tolist() == [0, 0, 0, 5, -1, -1, 7, 7, 0, 0, 0, -1, -1, 0]


@pytest.mark.parametrize("hint_weight", [0.0, 0.5])
def test_resumed_equals_uninterrupted(tmp_path: Path, hint_weight: float) -> None:
    data = shards(tmp_path / "data", labels=9)
    steps = {"max_steps": 8, "save_steps": 5, "accumulation": 2, "hint_weight": hint_weight}
    whole = recipe(steps)
    train(Run(whole, [data], tmp_path / "whole"))
    broken = tmp_path / "broken"
    (tmp_path / "whole/checkpoint-5").rename(tmp_path / "kept")
    broken.mkdir()
    (tmp_path / "kept").rename(broken / "checkpoint-5")
    train(Run(whole, [data], broken, resume=True))
    one, other = weights(tmp_path / "whole"), weights(broken)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [entry["loss"] for entry in history(broken, 8) if "loss" in entry] == [
        entry["loss"] for entry in history(tmp_path / "whole", 8) if "loss" in entry
    ]


def test_a_folder_with_checkpoints_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "out/checkpoint-3").mkdir(parents=True)
    with pytest.raises(ConfigError, match="resume"):
        train(Run(recipe(), [shards(tmp_path / "data")], tmp_path / "out"))


def test_pretraining_goes_before_fine_tuning(tmp_path: Path) -> None:
    single, pairs = shards(tmp_path / "single", channels=1), shards(tmp_path / "pairs")
    train(Run(recipe(), [single], tmp_path / "first", stage="pretrain"))
    model = ModelRecipe(checkpoint=str(tmp_path / "first"), settings={"user_loss_weight": 0.5})
    train(Run(recipe({"max_steps": 1}, model=model), [pairs], tmp_path / "second"))
    assert load(tmp_path / "second").config.user_loss_weight == 0.5
    with pytest.raises(ChannelCountError, match="--channels 2"):
        train(Run(recipe(), [single], tmp_path / "third"))
    with pytest.raises(ChannelCountError, match="--channels 1"):
        train(Run(recipe(), [pairs], tmp_path / "third", stage="pretrain"))


def test_lora_trains_adapters_and_leaves_an_ordinary_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="LoRA needs peft")
    data = shards(tmp_path / "data")
    train(Run(recipe(), [data], tmp_path / "base"))
    made = recipe(
        {"max_steps": 3, "weight_decay": 0.0},
        model=ModelRecipe(checkpoint=str(tmp_path / "base")),
        lora=LoraRecipe(rank=2),
    )
    train(Run(made, [data], tmp_path / "adapted"))
    before, after = weights(tmp_path / "base"), weights(tmp_path / "adapted")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("q_proj" in name for name in changed)
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= changed
    assert not any("norm" in name for name in changed)
    load(tmp_path / "adapted")


def fsdp_process(rank: int, port: int, made: Recipe, data: Path, out: Path) -> None:
    """One of two as `torchrun` starts them. Accelerate shards over GPUs only; from where it is told
    otherwise, the weights are sharded over these processes."""
    from accelerate import state, utils  # type: ignore[import-untyped, unused-ignore]

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with pytest.raises(ConfigError, match="GPUs"):
        train(Run(made, [data], out))
    begin = state.AcceleratorState.__init__
    kind = utils.DistributedType.FSDP

    def sharding(self: Any, *given: Any, fsdp_plugin: Any = None, **named: Any) -> None:
        begin(self, *given, fsdp_plugin=fsdp_plugin, **named)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = kind, fsdp_plugin
            state.PartialState._shared_state["distributed_type"] = kind

    state.AcceleratorState.__init__ = sharding
    train(Run(made, [data], out))
    again = out.parent / "again"
    if rank == 0:
        again.mkdir()
        (out / "checkpoint-2").rename(again / "checkpoint-2")
    torch.distributed.barrier()
    train(Run(made, [data], again, resume=True))


def test_sharded_over_two_processes_equals_one(tmp_path: Path) -> None:
    data, sharded = shards(tmp_path / "data", count=8), tmp_path / "sharded"
    model = ModelRecipe(settings=recipe().model.settings | {"attention_dropout": 0.0})
    limits = {"max_steps": 4, "save_steps": 2}
    two = recipe({**limits, "rows": 2, "fsdp": True, "gradient_checkpointing": True}, model=model)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    given = (port, two, data, sharded)
    processes = [spawn.Process(target=fsdp_process, args=(rank, *given)) for rank in range(2)]
    for process in processes:
        process.start()
    train(Run(recipe({**limits, "rows": 4}, model=model), [data], tmp_path / "one"))
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    for name in ("loss", "loss_user", "loss_agent", "grad_norm"):
        losses = [
            [entry[name] for entry in history(folder, 4) if name in entry]
            for folder in (tmp_path / "one", tmp_path / "again")
        ]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    one = weights(tmp_path / "one")
    for folder in (sharded, tmp_path / "again"):
        other = weights(folder)
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-4)
    assert load(sharded).config.architectures == ["DualLlama"]


def test_sharding_needs_processes_and_whole_weights(tmp_path: Path) -> None:
    data = shards(tmp_path / "data")
    with pytest.raises(ConfigError, match="torchrun"):
        train(Run(recipe({"fsdp": True}), [data], tmp_path / "out"))


def test_a_checkpoint_of_another_vocabulary_or_architecture_is_refused(tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path / "dual")
    of = ModelRecipe(checkpoint=str(tmp_path / "dual"))
    with pytest.raises(VocabularyError, match="codebook_size is 11, not 12"):
        make_model(recipe(model=of), dataclasses.replace(PAIRS, codebook_size=12))
    with pytest.raises(ArchitectureError, match="dual_gpt"):
        make_model(recipe(model=ModelRecipe(architecture="dual_gpt")), PAIRS)
    with pytest.raises(ConfigError, match="join"):
        make_model(recipe(model=ModelRecipe(settings={"join": "glue"})), PAIRS)


def test_shipped_recipes_are_read() -> None:
    tiny_recipe = Recipe.load(CONFIGS / "tiny.yaml", ["train.rows=3", "train.max_minutes=1e-1"])
    assert (tiny_recipe.train.rows, tiny_recipe.train.max_minutes) == (3, 0.1)
    assert make_model(tiny_recipe, PAIRS).config.join == "sum"
    published = Recipe.load(CONFIGS / "ntpp-8b.yaml")
    assert (published.train.learning_rate, published.train.end_learning_rate) == (4e-4, 4e-6)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("train.rows", "section.name=value"),
        ("train.colour=3", "there is no train.colour"),
        ("train.rows=many", "train.rows='many'"),
        ("train.rows=0", "at least 1"),
        ("train.schedule=sine", "cosine"),
        ("train.max_minutes=0", "max_steps, max_epochs or max_minutes"),
        ("data.user_token_noise=1.5", "a share"),
        ("colours.red=1", "there is no colours"),
        ("train.betas=[0.9]", "two numbers"),
    ],
)
def test_mistakes_in_a_recipe_are_named(override: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        Recipe.load(CONFIGS / "tiny.yaml", [override])


def test_schedules() -> None:
    def of(kind: str, **limits: Any) -> Schedule:
        made = TrainRecipe(
            learning_rate=1.0,
            end_learning_rate=0.1,
            schedule=kind,
            warmup_steps=4,
            **limits,
        )
        return Schedule(made, limits.get("max_steps", 2**40))

    cosine = of("cosine", max_steps=100)
    assert cosine(0) == pytest.approx(0.2, abs=1e-3)
    assert cosine(50) == pytest.approx(0.55)
    assert cosine(100) == pytest.approx(0.1)
    assert of("linear", max_steps=100)(25) == pytest.approx(0.775)
    assert of("constant", max_steps=100)(99) == 1.0

    on_clock = of("linear", max_minutes=1.0)
    for now_s in (1000.0, 1015.0, 1030.0):
        on_clock.tick(now_s)
    assert on_clock(9) == pytest.approx(0.55)
    again = of("linear", max_minutes=2.0)  # the new recipe's
    again.__dict__.update(on_clock.__dict__)  # as LambdaLR does when a run is resumed
    again.looked_s = None
    for now_s in (5.0, 20.0):
        again.tick(now_s)
    assert again.progress(10) == pytest.approx(0.375)


def test_a_code_means_what_its_numbers_mean(tmp_path: Path) -> None:
    data = shards(tmp_path / "data", codes=16)
    numbers = DataRecipe(32, 0.0, code_digits=(4, 2, 2), user_token_noise=0.2)
    made = recipe({"max_steps": 3}, data=numbers)
    train(Run(made, [data], tmp_path / "out"))
    model = load(tmp_path / "out")
    first = model.config.base_vocab_size + model.config.user_channel * model.config.slot_size
    codes = model.get_input_embeddings().weight[first : first + 16].view(2, 2, 4, -1)
    for axis in range(3):  # what a number adds is the same, whatever the others are
        steps = codes.diff(dim=axis)
        others = tuple(other for other in range(3) if other != axis)
        torch.testing.assert_close(steps, steps.mean(others, keepdim=True).expand_as(steps))
    assert codes.diff(dim=0).abs().max() > 1e-3
    wrong = recipe({"max_steps": 1}, data=dataclasses.replace(numbers, code_digits=(4, 4, 4)))
    with pytest.raises(ConfigError, match="code_digits"):
        train(Run(wrong, [data], tmp_path / "wrong"))


def test_a_run_on_the_clock_ends_with_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(range(0, 1000, 20))
    monkeypatch.setattr("models.parrot.trainer.time.monotonic", lambda: float(next(ticks)))
    made = recipe({"max_steps": 0, "max_minutes": 1.0})
    train(Run(made, [shards(tmp_path / "data")], tmp_path / "out"))
    assert [p.name for p in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]
    last = history(tmp_path / "out", 3)[-1]
    assert (last["progress"], last["minutes"]) == (1.0, 1.0)


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = shards(tmp_path / "data"), tmp_path / "out"
    path = tmp_path / "small.yaml"
    path.write_text(recipe({"max_steps": 1}).dump())
    common = ["finetune", "--input_data", str(data), "--output_dir", str(out)]
    monkeypatch.setattr(sys, "argv", [*common, "--config", str(path), "train.rows=3"])
    main("finetune", "tiny", "")
    monkeypatch.setattr(sys, "argv", [*common, "--resume", "train.max_steps=2"])
    main("finetune", "tiny", "")
    assert Recipe.load(out / "recipe.yaml") == recipe({"max_steps": 2, "rows": 3})
    assert (out / "checkpoint-2").is_dir()
    monkeypatch.setattr(sys, "argv", [*common, "--config", "nowhere.yaml"])
    with pytest.raises(SystemExit, match=r"finetune: nowhere\.yaml"):
        main("finetune", "tiny", "")
