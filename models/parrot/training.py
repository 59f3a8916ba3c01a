"""A training run, from token shards to a checkpoint.

`output_dir` gets an ordinary checkpoint, `checkpoint-N/` to resume from, the recipe as it ran
(`recipe.yaml`), and what it ran with (`run.json`: versions, machine, data and their checksums).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from models.common.errors import ArchitectureError, ConfigError, ModelError, VocabularyError
from models.parrot.backbones import BACKBONES, load
from models.parrot.config import CHANNELS
from models.parrot.data import (
    Layout,
    TrainingRows,
    ValidationRows,
    check_vocabulary,
    collate,
    hold_out,
)
from models.parrot.hints import Hints
from models.parrot.modeling import DualChannelModel
from models.parrot.recipe import Recipe, TrainRecipe
from models.parrot.shards import Shards, Vocabulary, read_manifest
from models.parrot.trainer import AdditiveCodes, DualTrainer, Schedule

log = logging.getLogger(__name__)

NO_LIMIT_STEPS = 2**40
OVERRIDE = re.compile(r"\w+(\.\w+)+=.*", re.DOTALL)
RECIPE_FILE, RUN_FILE = "recipe.yaml", "run.json"
PACKAGES = ("torch", "transformers", "accelerate", "peft", "safetensors", "numpy")


class ChannelCountError(ConfigError):
    """Single-channel data where pairs are needed, or pairs where single channels are."""


@dataclass(frozen=True, slots=True)
class Run:
    """What a training run is given."""

    recipe: Recipe
    input_data: Sequence[Path]
    output_dir: Path
    validation_data: Sequence[Path] = ()
    resume: bool = False
    stage: str = "finetune"


def train(run: Run) -> dict[str, float]:
    """Trains, and leaves an ordinary checkpoint in `output_dir`, `checkpoint-N/` beside it.

    Returns the last validation's losses. Raises `ConfigError`, `VocabularyError`,
    `ArchitectureError`, `ShardError`.
    """
    shards = Shards(run.input_data)
    _check_channels(run.stage, shards.vocabulary)
    run = replace(run, recipe=_possible(run.recipe, shards.vocabulary))
    recipe = run.recipe
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    last = get_last_checkpoint(run.output_dir) if run.output_dir.is_dir() else None
    if last is not None and not run.resume:
        raise ConfigError(
            f"{run.output_dir} holds checkpoints of a run: resume it, or go elsewhere"
        )
    torch.manual_seed(recipe.train.seed)
    model = make_model(recipe, shards.vocabulary)
    layout = Layout.of(
        model.config,
        recipe.data.row_frames,
        recipe.data.user_delay_frames,
        recipe.data.user_token_noise,
        recipe.data.code_digits,
        recipe.data.user_warp,
        recipe.data.new_phrases,
        recipe.data.new_interruptions,
        recipe.data.without_echo,
    )
    held_out = frozenset[str]()
    if not run.validation_data:
        held_out = hold_out(shards, recipe.data.validation_share)
    rows = TrainingRows(shards, held_out, layout, recipe.train.seed)
    validation = _validation(run, shards, held_out, layout)
    arguments = _arguments(run, model, validation is not None)
    _check_sharding(recipe, arguments.world_size)
    arguments.max_steps = _max_steps(recipe.train, len(rows.epoch(0)), arguments.world_size)
    schedule = Schedule(recipe.train, arguments.max_steps)
    trainer = DualTrainer(
        schedule,
        model.config,
        model=_with_lora(model, recipe),
        args=arguments,
        train_dataset=rows,
        eval_dataset=validation,
        data_collator=collate,
    )
    if recipe.train.fsdp and not trainer.is_fsdp_enabled:
        raise ConfigError("train.fsdp: accelerate shards over GPUs, and finds none here")
    if recipe.data.code_digits:
        trainer.add_callback(AdditiveCodes(model.config, recipe.data.code_digits))
    if last is not None:
        state = TrainerState.load_from_json(os.path.join(last, "trainer_state.json"))
        rows.skip_rows = (
            state.global_step * recipe.train.rows * recipe.train.accumulation * arguments.world_size
        )
    if trainer.is_world_process_zero():
        _write_run(run)
    trainer.train(resume_from_checkpoint=last)
    _save(trainer, run.output_dir)
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    return {k: v for k, v in evaluations[-1].items() if "loss" in k} if evaluations else {}


def make_model(recipe: Recipe, vocabulary: Vocabulary) -> DualChannelModel:
    """The checkpoint that the recipe names, or new weights, fitting the shards' vocabulary.

    Raises `VocabularyError`, `ArchitectureError`, `ConfigError`.
    """
    settings = recipe.model.settings | {
        "codebook_size": vocabulary.codebook_size,
        "num_codebooks": vocabulary.num_codebooks,
    }
    if recipe.model.checkpoint:
        model = load(recipe.model.checkpoint, dtype=torch.float32, **settings)
    else:
        by_name = {backbone.config_class.model_type: backbone for backbone in BACKBONES}
        if recipe.model.architecture not in by_name:
            raise ArchitectureError(
                f"model.architecture={recipe.model.architecture!r}: one of {', '.join(by_name)}"
            )
        backbone = by_name[recipe.model.architecture]
        try:
            config = backbone.config_class(**settings)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"model.settings: {error}") from error
        model = backbone(config)
    check_vocabulary(model.config, vocabulary)
    if recipe.train.hint_weight and vocabulary.labels:
        _add_hints(model, recipe, vocabulary.labels)
    return model


def _possible(recipe: Recipe, vocabulary: Vocabulary) -> Recipe:
    """Without what only labels make possible, where the shards have none, as recordings have."""
    data, train = recipe.data, recipe.train
    needs = (train.hint_weight, data.new_phrases, data.new_interruptions, data.without_echo)
    if vocabulary.labels or not any(needs):
        return recipe
    log.warning(
        "the shards don't say what is spoken in them: no hints, no new phrases or interruptions"
    )
    return replace(
        recipe,
        train=replace(train, hint_weight=0.0),
        data=replace(data, new_phrases=0.0, new_interruptions=0.0, without_echo=0.0),
    )


def _add_hints(model: DualChannelModel, recipe: Recipe, labels: int) -> None:
    if recipe.train.fsdp or recipe.lora.rank or model.config.join != "sum":
        raise ConfigError("train.hint_weight: not with train.fsdp, LoRA or join=pair")
    config = model.config
    model.hints = Hints(
        config.hidden_size,
        config.num_hidden_layers,
        labels,
        config.user_channel,
        recipe.train.hint_weight,
    )


def _check_channels(stage: str, vocabulary: Vocabulary) -> None:
    wanted = CHANNELS if stage == "finetune" else 1
    if vocabulary.channels != wanted:
        raise ChannelCountError(
            f"{stage} takes shards of {wanted} channel(s), these have {vocabulary.channels}: "
            f"prepare them with --channels {wanted}"
        )


def _validation(
    run: Run, shards: Shards, held_out: frozenset[str], layout: Layout
) -> ValidationRows | None:
    clean = replace(
        layout,
        user_token_noise=0.0,
        user_warp=0.0,
        new_phrases=0.0,
        new_interruptions=0.0,
        without_echo=0.0,
    )
    limit = run.recipe.data.validation_rows
    if run.validation_data:
        others = Shards(run.validation_data)
        _check_channels(run.stage, others.vocabulary)
        if others.vocabulary != shards.vocabulary:
            raise VocabularyError("the folders for training and validation differ in vocabulary")
        return ValidationRows(others, frozenset(others.names), clean, limit)
    return ValidationRows(shards, held_out, clean, limit) if held_out else None


def _check_sharding(recipe: Recipe, processes: int) -> None:
    if recipe.train.fsdp and processes == 1:
        raise ConfigError(
            "train.fsdp shards over processes: start them with torchrun or accelerate launch"
        )
    if recipe.train.fsdp and recipe.lora.rank:
        raise ConfigError("train.fsdp: adapters are merged whole, which sharded weights are not")


def _max_steps(recipe: TrainRecipe, rows: int, processes: int) -> int:
    """The limit in steps; where there is only one in minutes, more than will ever be made."""
    steps = recipe.max_steps or NO_LIMIT_STEPS
    if recipe.max_epochs:
        per_epoch = rows / (recipe.rows * recipe.accumulation * processes)
        steps = min(steps, max(1, round(recipe.max_epochs * per_epoch)))
    return steps


def _arguments(run: Run, model: DualChannelModel, validates: bool) -> TrainingArguments:
    recipe = run.recipe.train
    bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and _fast_in_bf16())
    fsdp: dict[str, Any] = {}
    if recipe.fsdp:
        fsdp = {
            "fsdp": True,
            "fsdp_config": {
                "transformer_layer_cls_to_wrap": [type(model.model.layers[0]).__name__],
                "activation_checkpointing": recipe.gradient_checkpointing,
            },
        }
    boards = ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    return TrainingArguments(
        output_dir=str(run.output_dir),
        max_steps=1,
        per_device_train_batch_size=recipe.rows,
        per_device_eval_batch_size=recipe.rows,
        gradient_accumulation_steps=recipe.accumulation,
        learning_rate=recipe.learning_rate,
        optim="adamw_torch_fused",
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.betas[0],
        adam_beta2=recipe.betas[1],
        max_grad_norm=recipe.max_grad_norm,
        bf16=bf16,
        accelerator_config={"dispatch_batches": False},
        use_cpu=not torch.accelerator.is_available(),
        gradient_checkpointing=recipe.gradient_checkpointing and not recipe.fsdp,
        torch_compile=recipe.compile,
        seed=recipe.seed,
        logging_steps=recipe.log_steps,
        eval_strategy="steps" if validates else "no",
        eval_steps=recipe.validate_steps,
        save_steps=recipe.save_steps,
        save_total_limit=recipe.keep_checkpoints,
        remove_unused_columns=False,
        label_names=["labels"],
        ignore_data_skip=True,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=recipe.max_steps == 0 and recipe.max_epochs == 0,  # no end to show
        report_to=boards,
        **fsdp,
    )


def _fast_in_bf16() -> bool:
    """On a processor, the instructions for it make a step of `tiny` 1.75 times as fast."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def _with_lora(model: DualChannelModel, recipe: Recipe) -> Any:
    """The model with adapters, and whole what is new or small: embedding, head, channels."""
    lora = recipe.lora
    if not lora.rank:
        return model
    try:
        from peft import LoraConfig, get_peft_model  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise ConfigError("lora.rank: LoRA needs the package peft") from None
    whole = ["embed_tokens", "lm_head"]
    whole += [name.split(".")[0] for name in model.new_parameters if hasattr(model, name[:-7])]
    return get_peft_model(
        model,
        LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=list(lora.targets),
            modules_to_save=whole,
        ),
    )


def _save(trainer: DualTrainer, folder: Path) -> None:
    """An ordinary checkpoint, adapters merged."""
    trainer.accelerator.wait_for_everyone()
    if hasattr(trainer.accelerator.unwrap_model(trainer.model), "merge_and_unload"):
        if trainer.is_world_process_zero():
            merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
            merged.save_pretrained(folder)
        return
    trainer.accelerator.unwrap_model(trainer.model).hints = None
    trainer.save_model(str(folder))
    (folder / "training_args.bin").unlink(missing_ok=True)


def _write_run(run: Run) -> None:
    run.output_dir.mkdir(parents=True, exist_ok=True)
    (run.output_dir / RECIPE_FILE).write_text(run.recipe.dump())
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    data = {}
    for folder in (*run.input_data, *run.validation_data):
        vocabulary, files = read_manifest(folder)
        data[folder.name] = asdict(vocabulary) | {"files": [asdict(file) for file in files]}
    content = {
        "stage": run.stage,
        "python": platform.python_version(),
        "versions": versions,
        "device": device or platform.machine(),
        "threads": torch.get_num_threads(),
        "data": data,
    }
    (run.output_dir / RUN_FILE).write_text(json.dumps(content, indent=1) + "\n")


def main(stage: str, default_recipe: str, description: str) -> None:
    """The command line that `pretrain` and `finetune` have in common."""
    configs = Path(__file__).parent / "configs"
    parser = argparse.ArgumentParser(
        prog=f"python -m models.parrot.{stage}", description=description
    )
    parser.add_argument("--input_data", type=Path, nargs="+", required=True, metavar="DIR")
    parser.add_argument("--validation_data", type=Path, nargs="+", default=[], metavar="DIR")
    parser.add_argument("--output_dir", type=Path, required=True, metavar="DIR")
    shipped = ", ".join(sorted(path.stem for path in configs.glob("*.yaml")))
    parser.add_argument(
        "--config", default=default_recipe, help=f"a recipe file, or one of {shipped}"
    )
    parser.add_argument("--resume", action="store_true", help="go on as it ran")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.name=value", help="on top of the recipe"
    )
    # Sorted out first: behind `--input_data DIR ...` they would be taken for folders.
    overrides = [given for given in sys.argv[1:] if OVERRIDE.fullmatch(given)]
    arguments = parser.parse_intermixed_args([g for g in sys.argv[1:] if g not in overrides])
    named = configs / f"{arguments.config}.yaml"
    path = named if named.exists() else Path(arguments.config)
    if arguments.resume and (arguments.output_dir / RECIPE_FILE).exists():
        path = arguments.output_dir / RECIPE_FILE
    try:
        recipe = Recipe.load(path, [*overrides, *arguments.overrides])
        train(
            Run(
                recipe,
                arguments.input_data,
                arguments.output_dir,
                arguments.validation_data,
                arguments.resume,
                stage,
            )
        )
    except ModelError as error:
        sys.exit(f"{stage}: {error}")
