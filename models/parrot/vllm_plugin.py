"""Dual-channel models for vLLM: a `vllm.general_plugins` plugin.

vLLM loads it in each of its processes by the entry point in `vllm_entry/`, which `environment`
puts where they look. The models are `sum` models with one codebook: a position is a frame, its id
both channels' codes packed into one (`frames.pack`), and what comes out is our code alone.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from models.common.checkpoint import saved_config
from models.common.errors import ArchitectureError, ConfigError
from models.parrot.config import DualChannelConfig

ROOT = Path(__file__).resolve().parents[2]
ENTRY = Path(__file__).resolve().parent / "vllm_entry"
SERVED = ("DualLlama", "DualQwen2", "DualMistral")


def environment() -> None:
    """Lets this process and those that it starts find the plugin and the models."""
    wanted = [str(ROOT), str(ENTRY)]
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([*wanted, *filter(None, inherited)]))
    sys.path[:0] = [path for path in wanted if path not in sys.path]


def register() -> None:
    """Called by vLLM, maybe more than once."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from models.parrot import backbones

    for name in SERVED:
        config = getattr(backbones, name).config_class
        AutoConfig.register(config.model_type, config, exist_ok=True)
        ModelRegistry.register_model(name, f"models.parrot.vllm_models:{name}")


def served_config(path: str | os.PathLike[str]) -> DualChannelConfig:
    """The checkpoint's. Raises `ArchitectureError`, `ConfigError`, `PackedIdOverflowError` where
    vLLM can't serve it."""
    from models.parrot import backbones

    model_type = saved_config(path)["model_type"]
    classes = {getattr(backbones, name).config_class.model_type: name for name in SERVED}
    if model_type not in classes:
        raise ArchitectureError(f"{path} holds a {model_type!r} model; vLLM serves {list(classes)}")
    loaded = getattr(backbones, classes[model_type]).config_class.from_pretrained(path)
    config: DualChannelConfig = loaded
    if config.join != "sum":
        raise ConfigError(f"join={config.join!r}: vLLM takes one id per position, so only 'sum'")
    if config.num_codebooks != 1:
        raise ConfigError(
            f"num_codebooks={config.num_codebooks}: vLLM gives one id per position, so only 1"
        )
    assert config.packed_ids  # raises where they overflow
    return config
