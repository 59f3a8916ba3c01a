"""The backbones: each an ordinary Transformers causal LM made dual-channel."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from models.common.checkpoint import saved_config
from models.common.errors import ArchitectureError
from models.parrot.config import DualChannelConfig
from models.parrot.modeling import BuildMask, DualChannelModel


class DualLlamaConfig(LlamaConfig, DualChannelConfig):
    model_type = "dual_llama"


class DualPhiConfig(PhiConfig, DualChannelConfig):
    model_type = "dual_phi"


class DualQwen2Config(Qwen2Config, DualChannelConfig):
    model_type = "dual_qwen2"


class DualMistralConfig(MistralConfig, DualChannelConfig):
    model_type = "dual_mistral"


class DualLlama(DualChannelModel, LlamaForCausalLM):
    config_class = DualLlamaConfig
    backbone_config = LlamaConfig


class DualPhi(DualChannelModel, PhiForCausalLM):
    config_class = DualPhiConfig
    backbone_config = PhiConfig


class DualQwen2(DualChannelModel, Qwen2ForCausalLM):
    config_class = DualQwen2Config
    backbone_config = Qwen2Config

    def attention_masks(self, build: BuildMask) -> dict[str, Tensor | None]:
        masks = {"full_attention": build(None)}
        if "sliding_attention" in self.config.layer_types:
            masks["sliding_attention"] = build(self.config.sliding_window)
        return masks


class DualMistral(DualChannelModel, MistralForCausalLM):
    config_class = DualMistralConfig
    backbone_config = MistralConfig

    def attention_masks(self, build: BuildMask) -> Tensor | None:
        return build(self.config.sliding_window)


BACKBONES: tuple[type[DualChannelModel], ...] = (DualLlama, DualPhi, DualQwen2, DualMistral)


def load(path: str | os.PathLike[str], **kwargs: Any) -> DualChannelModel:
    """`from_pretrained` of whichever backbone the checkpoint has. Raises `ArchitectureError`."""
    model_type = saved_config(path)["model_type"]
    for backbone in BACKBONES:
        if model_type in (backbone.config_class.model_type, backbone.backbone_config.model_type):
            return backbone.from_pretrained(path, **kwargs)
    raise ArchitectureError(
        f"{path} holds a {model_type!r} model; there are dual-channel models on "
        f"{', '.join(b.backbone_config.model_type for b in BACKBONES)}"
    )
