"""Small random recognisers in the released layout: configuration, weights, tokenizer, features."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    MoonshineConfig,
    MoonshineForConditionalGeneration,
    PreTrainedTokenizerFast,
    Wav2Vec2FeatureExtractor,
)

from benchmarks import random_whisper

torch.set_num_threads(1)

LANGUAGES = ("en", "zh", "de")
LONGEST = 24
"""Tokens that it says at most."""


def whisper(folder: Path, *, multilingual: bool = True) -> Path:
    """Saves a Whisper of two layers into `folder`."""
    return random_whisper.save(
        folder,
        {"d_model": 32, "layers": 2, "heads": 4},
        languages=LANGUAGES if multilingual else (),
        words=257,
        max_length=LONGEST,
        seed=3,
        init_std=0.3,
    )


def specials_of(converted: Path) -> list[int]:
    """What is no text."""
    words: list[str] = json.loads((converted / "vocabulary.json").read_text())
    return list(range(words.index("<|endoftext|>") + 1, len(words)))


def converted(folder: Path, target: Path) -> Path:
    """The same for CTranslate2."""
    pytest.importorskip("ctranslate2", reason="faster-whisper is not installed")
    pytest.importorskip("faster_whisper", reason="faster-whisper is not installed")
    return random_whisper.convert(folder, target)


def moonshine(folder: Path) -> Path:
    """Saves a Moonshine, which hears the wave itself, into `folder`."""
    letters = {letter: index for index, letter in enumerate(sorted(ByteLevel.alphabet()))}
    core = Tokenizer(BPE(letters | {"<s>": 256, "</s>": 257}, []))
    core.decoder = ByteLevelDecoder()
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **tokens).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=True, do_normalize=False).save_pretrained(folder)
    config = MoonshineConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=2,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
        initializer_range=0.3,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=257,
        decoder_start_token_id=256,
    )
    torch.manual_seed(4)
    model = MoonshineForConditionalGeneration(config)
    model.generation_config.max_length = LONGEST
    model.save_pretrained(folder)
    return folder
