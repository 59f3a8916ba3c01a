"""The models themselves, on vLLM's own backbones. Imported in vLLM's processes only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

from models.parrot.config import CHANNELS


class PackedFrames(nn.Module):
    """Stands before one of vLLM's causal LMs: frames of packed ids in, our codes' logits out.

    N positions of all requests together, H hidden width, K ids per slot. The parameters that only
    `pair` uses are left out, and those of the tokenizer, which may lie in the same folder.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.hf_config
        slot, base = config.slot_size, config.base_vocab_size
        self.slot_size = slot
        tensors = {"digits": [slot, 1], "offsets": [base, base + slot]}
        for name, values in tensors.items():
            self.register_buffer(name, torch.tensor(values), persistent=False)
        first = base + (CHANNELS - 1 - config.user_channel) * slot
        self.codes = slice(first, first + config.codebook_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """[N] -> [N, H]"""
        codes = input_ids[:, None] // self.digits % self.slot_size  # [N, C]
        embeds: Tensor = self.model.embed_input_ids(codes + self.offsets).sum(1)
        return embeds

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Any:
        if inputs_embeds is None and input_ids is not None:
            inputs_embeds = self.embed_input_ids(input_ids)
        return super().forward(None, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """[N, H] -> [N, codebook_size], or None where another process has them"""
        logits = super().compute_logits(hidden_states)
        return None if logits is None else logits[:, self.codes]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded: set[str] = super().load_weights(
            (name, weight) for name, weight in weights if name.startswith(("model.", "lm_head."))
        )
        return loaded


class DualLlama(PackedFrames, LlamaForCausalLM): ...


class DualQwen2(PackedFrames, Qwen2ForCausalLM): ...


class DualMistral(PackedFrames, MistralForCausalLM): ...
