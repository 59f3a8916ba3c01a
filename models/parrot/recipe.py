"""A training run as one YAML file: the model, how the data become rows, and the optimisation.

Any value can be overridden by `section.name=value` on the command line. An unknown name, or a
value of the wrong type, is a `ConfigError` that says which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import yaml

from models.common.errors import ConfigError
from models.common.settings import load_yaml, read

SCHEDULES = ("cosine", "linear", "constant")
SHARES = (
    "validation_share",
    "user_token_noise",
    "user_warp",
    "new_phrases",
    "new_interruptions",
    "without_echo",
)


@dataclass(frozen=True, slots=True)
class ModelRecipe:
    checkpoint: str = ""
    """A folder or name to start from, dual-channel or ordinary; empty: from scratch."""
    architecture: str = "dual_llama"
    """From scratch: which backbone."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Fields of the model's configuration. The codebook comes from the shards."""


@dataclass(frozen=True, slots=True)
class DataRecipe:
    row_frames: int = 400
    """The length of a row, hence the longest context that is trained."""
    validation_share: float = 0.02
    """Of the recordings, where no other folder is given for validation."""
    validation_rows: int = 256
    """At most so many are measured each time."""
    user_token_noise: float = 0.0
    """Share of the person's input codes that are replaced by random ones."""
    code_digits: tuple[int, ...] = ()
    """Sizes of the numbers that a code is made of, lowest first (of FSQ). What the person's codes
    mean is then learnt number by number, and noise changes one of a code's numbers."""
    user_warp: float = 0.0
    """Share of the frames of a person's turn that are left out or doubled, half of it each."""
    new_phrases: float = 0.0
    """Share of the recordings whose repeated phrases are made new ones; see `splice.py`."""
    new_interruptions: float = 0.0
    """Share of the recordings in which a reply is newly spoken over; see `interrupt.py`."""
    without_echo: float = 0.0
    """Share of the recordings in which replies do not return to the person's channel; likewise."""
    user_delay_frames: int = 0
    """By how much the person's codes come later than their sound when the model runs live."""


@dataclass(frozen=True, slots=True)
class LoraRecipe:
    rank: int = 0
    """0: all weights are trained."""
    alpha: int = 16
    dropout: float = 0.0
    targets: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )


@dataclass(frozen=True, slots=True)
class TrainRecipe:
    learning_rate: float = 1.5e-3
    end_learning_rate: float = 0.0
    schedule: str = "cosine"
    """From the warm-up to the end, which is whichever comes first of the limits below."""
    warmup_steps: int = 100
    max_steps: int = 0
    max_epochs: float = 0.0
    """Counted from the shards that are there at the start."""
    max_minutes: float = 0.0
    rows: int = 16
    """Per device and step of accumulation."""
    accumulation: int = 1
    weight_decay: float = 0.1
    betas: tuple[float, ...] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    precision: str = "auto"
    """`bf16` (mixed, weights in fp32), `fp32`, or `auto`: bf16 where the device is fast in it."""
    hint_weight: float = 0.0
    """Of learning what is said beside the codes, where the shards have labels; see `hints.py`."""
    gradient_checkpointing: bool = False
    compile: bool = False
    fsdp: bool = False
    """Shards the weights over the GPUs that `torchrun` or `accelerate launch` started on."""
    threads: int = 0
    """Of torch on the CPU; 0: as torch chooses."""
    seed: int = 0
    log_steps: int = 50
    validate_steps: int = 500
    save_steps: int = 1000
    keep_checkpoints: int = 2


@dataclass(frozen=True, slots=True)
class Recipe:
    model: ModelRecipe = field(default_factory=ModelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    lora: LoraRecipe = field(default_factory=LoraRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)

    def __post_init__(self) -> None:
        train = self.train
        if train.schedule not in SCHEDULES:
            raise ConfigError(f"train.schedule={train.schedule!r}: one of {', '.join(SCHEDULES)}")
        if train.precision not in ("auto", "bf16", "fp32"):
            raise ConfigError(f"train.precision={train.precision!r}: auto, bf16 or fp32")
        if not (train.max_steps > 0 or train.max_epochs > 0 or train.max_minutes > 0):
            raise ConfigError("a run needs train.max_steps, max_epochs or max_minutes")
        if len(train.betas) != 2:
            raise ConfigError(f"train.betas={list(train.betas)}: two numbers")
        if self.data.row_frames < 2:
            raise ConfigError(f"data.row_frames={self.data.row_frames}: at least 2")
        for name in SHARES:
            if not 0 <= getattr(self.data, name) < 1:
                raise ConfigError(f"data.{name}={getattr(self.data, name)}: a share, from 0 to 1")
        for name in ("rows", "accumulation", "log_steps", "validate_steps", "save_steps"):
            if getattr(train, name) < 1:
                raise ConfigError(f"train.{name}={getattr(train, name)}: at least 1")

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str] = ()) -> Self:
        """A recipe file, and `section.name=value` on top. Raises `ConfigError`."""
        content = load_yaml(path)
        for override in overrides:
            _override(content, override)
        recipe: Self = read(cls, content, "")
        return recipe

    def dump(self) -> str:
        """As YAML that `load` takes."""
        text: str = yaml.safe_dump(_plain(asdict(self)), sort_keys=False)
        return text


def _override(content: dict[str, Any], override: str) -> None:
    name, equals, value = override.partition("=")
    *sections, last = name.split(".")
    if not equals or not sections:
        raise ConfigError(f"{override!r}: overrides are written section.name=value")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise ConfigError(f"{override!r}: {section} is no section")
    content[last] = yaml.safe_load(value)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value
