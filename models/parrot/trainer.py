"""Transformers' Trainer with what two channels need: schedules that may run on the clock, and the
loss of each channel in training and validation.

C = 2 channels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from models.common.errors import ConfigError
from models.parrot.config import CHANNELS, DualChannelConfig
from models.parrot.data import counted
from models.parrot.modeling import DualChannelModel
from models.parrot.recipe import TrainRecipe

HINTS = ("hint_user", "hint_before", "hint_agent")


class Schedule:
    """The share of the learning rate at a step, on steps or on the clock.

    Called by `LambdaLR`, which keeps what is in an object's `__dict__` in the checkpoint: a resumed
    run goes on with the time that it had used, by the recipe that it is given now.
    """

    __slots__ = ("__dict__", "end_share", "kind", "max_s", "max_steps", "warmup_steps")

    def __init__(self, recipe: TrainRecipe, max_steps: int) -> None:
        self.kind = recipe.schedule
        self.end_share = recipe.end_learning_rate / recipe.learning_rate
        self.warmup_steps = recipe.warmup_steps
        self.max_steps, self.max_s = max_steps, recipe.max_minutes * 60
        self.used_s = 0.0
        self.looked_s: float | None = None

    def tick(self, now_s: float) -> None:
        """Counts the time since the last tick; the first one of a run counts none."""
        if self.looked_s is not None:
            self.used_s += now_s - self.looked_s
        self.looked_s = now_s

    def progress(self, step: int) -> float:
        """0 at the start, 1 at the end."""
        on_clock = self.used_s / self.max_s if self.max_s else 0.0
        return min(1.0, max(step / self.max_steps, on_clock))

    def __call__(self, step: int) -> float:
        warm = min(1.0, (step + 1) / (self.warmup_steps + 1))
        done = self.progress(step)
        if self.kind == "constant":
            left = 1.0
        elif self.kind == "linear":
            left = 1.0 - done
        else:
            left = (1.0 + math.cos(math.pi * done)) / 2
        return warm * (self.end_share + (1.0 - self.end_share) * left)


class StopOnTime(TrainerCallback):
    """Ends the run when the schedule's clock has run out, with a checkpoint."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._schedule.looked_s = None
        self._schedule.tick(self._now_s(args))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._schedule.tick(self._now_s(args))
        if self._schedule.progress(state.global_step) >= 1.0:
            control.should_training_stop = True
            control.should_save = True
            control.should_evaluate = args.eval_strategy != "no"

    def _now_s(self, args: TrainingArguments) -> float:
        """Where several processes stop by the clock, it is the first one's."""
        if args.world_size == 1 or not self._schedule.max_s:
            return time.monotonic()
        now_s = torch.tensor(time.monotonic(), dtype=torch.float64, device=args.device)
        torch.distributed.broadcast(now_s, 0)
        return float(now_s)


class AdditiveCodes(TrainerCallback):
    """Keeps the embedding of a person's code the sum of what each of its numbers adds.

    Codes that differ in one number sound alike, from voice to voice and in noise. As symbols, a
    model learns what each of them means by itself, and which recording a rare one comes from.
    Raises `ConfigError` where `sizes` aren't the model's.
    """

    def __init__(self, config: DualChannelConfig, sizes: Sequence[int]) -> None:
        if config.num_codebooks != 1 or math.prod(sizes) != config.codebook_size:
            raise ConfigError(
                f"data.code_digits={list(sizes)}: the model has {config.num_codebooks} codebook(s) "
                f"of {config.codebook_size} codes"
            )
        first = config.base_vocab_size + config.user_channel * config.slot_size
        self._rows = slice(first, first + config.codebook_size)
        codes = torch.arange(config.codebook_size)
        powers = [math.prod(sizes[:i]) for i in range(len(sizes))]
        digits = zip(sizes, powers, strict=True)
        ones = torch.cat([torch.eye(size)[codes // power % size] for size, power in digits], 1)
        basis, values, _ = torch.linalg.svd(ones, full_matrices=False)
        self._basis = basis[:, values > 1e-3]  # [codes, sum(sizes) - len(sizes) + 1]

    def on_train_begin(self, *_: Any, model: DualChannelModel, **others: Any) -> None:
        self._basis = self._basis.to(model.device)
        self._project(model)

    def on_step_end(self, *_: Any, model: DualChannelModel, **others: Any) -> None:
        self._project(model)

    @torch.no_grad()
    def _project(self, model: DualChannelModel) -> None:
        rows = model.get_input_embeddings().weight[self._rows]
        rows.copy_(self._basis @ (self._basis.T @ rows))


class DualTrainer(Trainer):
    """Reports the loss of each channel, in training and in validation."""

    lr_scheduler: Any
    control: Any

    def __init__(self, schedule: Schedule, config: DualChannelConfig, **kwargs: Any) -> None:
        super().__init__(callbacks=[StopOnTime(schedule)], **kwargs)
        self._schedule = schedule
        self._user_channel = config.user_channel
        self._user_weight = config.user_loss_weight
        self._num_codebooks = config.num_codebooks
        self._sums = torch.zeros(CHANNELS, device=self.args.device)
        self._hint_sums = torch.zeros(len(HINTS), device=self.args.device)
        self._batches = 0

    def get_train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """With a generator of its own: a loader that begins would draw from the one that is
        restored with a checkpoint, and a resumed run would drop out other units."""
        loader: DataLoader[dict[str, Tensor]] = DataLoader(
            self.train_dataset,
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
            generator=torch.Generator(),
        )
        prepared: DataLoader[dict[str, Tensor]] = self.accelerator.prepare(loader)
        return prepared

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, self._schedule
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Any:
        output = model(**inputs)
        self._sums += output.channel_losses.detach()
        if output.hint_losses is not None:
            self._hint_sums += output.hint_losses.detach()
        self._batches += 1
        return (output.loss, output) if return_outputs else output.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._batches:
            means = self.accelerator.reduce(self._sums / self._batches, reduction="mean")
            logs |= self._named("loss", means.tolist())
            if self._hint_sums.any():
                means = self.accelerator.reduce(self._hint_sums / self._batches, reduction="mean")
                logs |= dict(zip(HINTS, means.tolist(), strict=True))
            self._sums.zero_()
            self._hint_sums.zero_()
            self._batches = 0
        logs["progress"] = self._schedule.progress(self.state.global_step)
        logs["minutes"] = self._schedule.used_s / 60
        self.state.epoch = None  # of an endless set it says nothing
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The mean cross-entropy over all that counts, of each channel and as it is trained."""
        model = self.model_wrapped if self.is_in_train else self._wrap_model(self.model, False)
        model.eval()
        sums = torch.zeros(2, CHANNELS, dtype=torch.float64, device=self.args.device)
        for batch in self.get_eval_dataloader(eval_dataset):
            inputs = self._prepare_inputs(batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                losses = model(**inputs).channel_losses.double()  # [C]
            counts = counted(inputs, self._num_codebooks)
            sums += torch.stack((losses * counts, counts))
        total, counts = self.accelerator.reduce(sums, reduction="sum")
        losses = (total / counts.clamp(min=1)).tolist()
        weights = [1.0] * CHANNELS
        weights[self._user_channel] = self._user_weight
        whole = sum(loss * weight for loss, weight in zip(losses, weights, strict=True))
        metrics = {f"{metric_key_prefix}_loss": whole}
        metrics |= self._named(f"{metric_key_prefix}_loss", losses)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        model.train()
        return metrics

    def _named(self, prefix: str, losses: Sequence[float]) -> dict[str, float]:
        """[C] -> by who speaks in the channel."""
        return {
            f"{prefix}_{'user' if channel == self._user_channel else 'agent'}": loss
            for channel, loss in enumerate(losses)
        }

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: it costs a walk over the weights in every step."""
        return 0
