"""A chat model and its tokenizer, from a folder or the hub, or a reason why not."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from models.chat.rows import attention_kinds
from models.common.attention import grouped_attention
from models.common.device import is_out_of_memory
from models.common.errors import ArchitectureError, ConfigError, first_line, listed
from models.common.packed import pack
from models.common.sampling import Sampling

DTYPES = ("auto", "float32", "bfloat16", "float16")
_GROWING_ROPE = ("dynamic", "longrope")
_GROUPED = "chat_grouped"
AttentionInterface.register(_GROUPED, grouped_attention)


@dataclass(frozen=True, slots=True)
class ChatModel:
    model: PreTrainedModel
    tokenizer: Any
    stop_ids: frozenset[int]
    """Any of them ends an answer."""
    sampling: Sampling
    """As the checkpoint advises."""
    tokens: int
    """The longest conversation that it can read."""


def load(name: str, *, device: str = "cpu", dtype: str = "auto", packed: bool = True) -> ChatModel:
    """`dtype` "auto" is the checkpoint's own; on a CPU float32 in place of float16. `packed`: see
    `prepare`.

    Raises `ConfigError` where there is no such model, tokenizer, dtype or device, and
    `ArchitectureError` where the weights don't fit the model or the model can't be served in rows.
    """
    logging.disable_progress_bar()
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype}: there are {', '.join(DTYPES)}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device}: {first_line(error)}") from error
    config = _found(name, AutoConfig)
    tokenizer = load_tokenizer(name)
    model = _weights(name, config, dtype)
    if device == "cpu" and model.dtype == torch.float16 and dtype == "auto":
        model = model.float()
    text = config.get_text_config()
    attention_kinds(text)
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ArchitectureError(f"{name}: a {config.model_type} model does not take positions")
    advice = model.generation_config
    model.to(device)
    prepare(model, packed=packed)
    stops = {*_ids(advice.eos_token_id), *_ids(config.eos_token_id), *_ids(tokenizer.eos_token_id)}
    return ChatModel(
        model=model,
        tokenizer=tokenizer,
        stop_ids=frozenset(stops),
        sampling=_sampling(advice),
        tokens=_longest(text),
    )


def prepare(model: PreTrainedModel, *, packed: bool = True) -> None:
    """For an engine's short steps of many rows. `generate` is not for it from then on: it does not
    always make the mask that the attention needs.

    `packed`: with weights packed where that is faster, which `torch.compile` can't read.
    """
    if model.config.get_text_config()._attn_implementation == "sdpa":
        model.set_attn_implementation(_GROUPED)
    if packed:
        pack(model)


def load_tokenizer(name: str) -> Any:
    """Raises `ConfigError`."""
    tokenizer = _found(name, AutoTokenizer)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ConfigError(f"{name}: its tokenizer is not one of the tokenizers library")
    return tokenizer


def longest(name: str) -> int:
    """How many tokens a conversation may have. Raises `ConfigError`."""
    return _longest(_found(name, AutoConfig).get_text_config())


def _found(name: str, kind: Any) -> Any:
    try:
        return kind.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        what = "tokenizer" if kind is AutoTokenizer else "model"
        where = "in that folder" if Path(name).is_dir() else "there, nor on a hub within reach"
        raise ConfigError(f"{name}: no {what} {where} ({first_line(error)})") from error


def _weights(name: str, config: PreTrainedConfig, dtype: str) -> PreTrainedModel:
    softcapped = getattr(config, "attn_logit_softcapping", None)  # only that way is it computed
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            attn_implementation="eager" if softcapped else None,
            ignore_mismatched_sizes=True,  # they are named below
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        if is_out_of_memory(error):
            raise
        raise ArchitectureError(f"{name}: can't be loaded: {first_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
    faults = {
        "lacks": found["missing_keys"],
        "has no place for": found["unexpected_keys"],
        "has other shapes in": {
            key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]
        },
    }
    told = [f"{fault} {listed(sorted(keys))}" for fault, keys in faults.items() if keys]
    if told:
        raise ArchitectureError(f"{name}: as a {config.model_type} model it {'; '.join(told)}")
    loaded: PreTrainedModel = model
    return loaded


def _sampling(advice: Any) -> Sampling:
    if not advice.do_sample:
        return Sampling()
    temperature = 1.0 if advice.temperature is None else advice.temperature
    top_k = 50 if advice.top_k is None else advice.top_k  # as `generate` has it
    return Sampling(temperature, top_k, 1.0 if advice.top_p is None else advice.top_p)


def _longest(config: PreTrainedConfig) -> int:
    """Beyond that the model has no positions, or its positions mean something else."""
    longest = getattr(config, "max_position_embeddings", None) or 2**20
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in _GROWING_ROPE:
        longest = min(longest, rope.get("original_max_position_embeddings") or longest)
    return int(longest)


def _ids(given: int | list[int] | None) -> list[int]:
    if given is None:
        return []
    return [given] if isinstance(given, int) else list(given)
