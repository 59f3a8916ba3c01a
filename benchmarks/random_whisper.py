"""Whisper checkpoints with random weights, in the released layout: for speed and for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

SIZES = {
    "tiny": {"d_model": 384, "layers": 4, "heads": 6},
    "base": {"d_model": 512, "layers": 6, "heads": 8},
    "small": {"d_model": 768, "layers": 12, "heads": 12},
}
"""Of the released checkpoints."""
WORDS = 50_257
TIMES = 1501


def save(
    folder: Path,
    size: dict[str, int],
    *,
    languages: tuple[str, ...] = ("en", "zh", "de"),
    words: int = WORDS,
    max_length: int = 448,
    endless: bool = False,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Without languages, an English-only one. `endless`: it never ends a text by itself."""
    tokenizer = _tokenizer(languages, words)
    tokenizer.save_pretrained(folder)
    ids = tokenizer.get_vocab()
    end, start = ids["<|endoftext|>"], ids["<|startoftranscript|>"]
    tokens = {"bos_token_id": end, "pad_token_id": end, "eos_token_id": end}
    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=len(ids),
            d_model=size["d_model"],
            encoder_layers=size["layers"],
            decoder_layers=size["layers"],
            encoder_attention_heads=size["heads"],
            decoder_attention_heads=size["heads"],
            encoder_ffn_dim=4 * size["d_model"],
            decoder_ffn_dim=4 * size["d_model"],
            decoder_start_token_id=start,
            begin_suppress_tokens=None,
            suppress_tokens=None,
            **(tokens | config),
        )
    )
    model.generation_config = GenerationConfig(
        decoder_start_token_id=start,
        suppress_tokens=list(range(end if endless else end + 1, len(ids))),
        begin_suppress_tokens=[ids["Ġ"], end],
        max_length=max_length,
        is_multilingual=bool(languages),
        no_timestamps_token_id=ids["<|notimestamps|>"],
        return_timestamps=False,
        **tokens,
    )
    if languages:
        model.generation_config.lang_to_id = {f"<|{c}|>": ids[f"<|{c}|>"] for c in languages}
        tasks = ("translate", "transcribe")
        model.generation_config.task_to_id = {task: ids[f"<|{task}|>"] for task in tasks}
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    return folder


def _tokenizer(languages: tuple[str, ...], words: int) -> Any:
    vocabulary = sorted(ByteLevel.alphabet())
    vocabulary += [f"{number}!" for number in range(words - len(vocabulary) - 1)]
    if languages:  # the released ones have this, and CTranslate2 knows them by it
        vocabulary.append("")
    vocabulary.append("<|endoftext|>")
    made = WhisperTokenizer(vocab={word: at for at, word in enumerate(vocabulary)}, merges=[])
    names = ["startoftranscript", *(languages or ("en",)), "translate", "transcribe", "startoflm"]
    names += ["startofprev", "nospeech", "notimestamps"]
    made.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in names]})
    made.add_tokens([f"<|{step * 0.02:.2f}|>" for step in range(TIMES)], special_tokens=True)
    return made


def convert(folder: Path, target: Path) -> Path:
    """The same for CTranslate2."""
    from ctranslate2.converters import TransformersConverter

    files = ["tokenizer.json", "preprocessor_config.json"]
    TransformersConverter(str(folder), copy_files=files).convert(str(target), force=True)
    return target
