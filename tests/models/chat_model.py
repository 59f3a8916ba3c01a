"""Small random chat models with a tokenizer of their own, saved as released ones are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from models.chat.load import prepare

torch.set_num_threads(1)

TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 300
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Byte-level BPE; ids 0 and 1 begin and end a message."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(["hello there, how are you today? I am very well."] * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>")
    fast.chat_template = template
    return fast


def model(config: Any) -> PreTrainedModel:
    """In evaluation mode, the same weights for the same configuration."""
    torch.manual_seed(3)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return made.eval()


def prepared(config: Any, *, packed: bool = True) -> PreTrainedModel:
    """The same, as `load` gives it to an engine."""
    made = model(copy.deepcopy(config))  # the attention's name is written into it
    prepare(made, packed=packed)
    return made


def save(folder: Path, config: Any, template: str | None = TEMPLATE) -> str:
    model(config).save_pretrained(folder)
    tokenizer(template).save_pretrained(folder)
    return str(folder)
