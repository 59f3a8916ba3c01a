"""A small random VITS checkpoint in the released layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import VitsConfig, VitsModel, VitsTokenizer

torch.set_num_threads(1)

LETTERS = "_abcdefghijklmnopqrstuvwxyz' -"


def config(**changes: Any) -> VitsConfig:
    return VitsConfig(
        **{
            "vocab_size": len(LETTERS),
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 24,
            "flow_size": 8,
            "spectrogram_bins": 9,
            "prior_encoder_num_flows": 2,
            "prior_encoder_num_wavenet_layers": 2,
            "posterior_encoder_num_wavenet_layers": 1,
            "duration_predictor_filter_channels": 16,
            "duration_predictor_num_flows": 2,
            "upsample_initial_channel": 16,
            "upsample_rates": [4, 4, 2],
            "upsample_kernel_sizes": [8, 8, 4],
            "resblock_kernel_sizes": [3, 5],
            "resblock_dilation_sizes": [[1, 3], [1, 3]],
            "sampling_rate": 16_000,
            **changes,
        }
    )


def model(**changes: Any) -> VitsModel:
    """The same weights for the same shapes; tokens last about eight frames."""
    torch.manual_seed(3)
    made = VitsModel(config(**changes)).eval()
    with torch.no_grad():
        made.text_encoder.project.weight.mul_(0.3)
        for flow in made.flow.flows:
            flow.conv_post.weight.mul_(0.1)
        for layer in (made.decoder.conv_pre, *made.decoder.upsampler, made.decoder.conv_post):
            layer.weight.mul_(0.7)
        if made.config.use_stochastic_duration_prediction:
            made.duration_predictor.flows[0].translate.fill_(-2.0)
        else:
            made.duration_predictor.proj.bias.fill_(2.0)
    return made


def save(folder: Path, *, tokenizer: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Weights, configuration and tokenizer, as `from_pretrained` finds them."""
    model(**changes).save_pretrained(folder)
    vocabulary = folder / "vocab.json"
    vocabulary.write_text(json.dumps({letter: i for i, letter in enumerate(LETTERS)}))
    given = {"language": "eng", "phonemize": False, "is_uroman": False, **(tokenizer or {})}
    VitsTokenizer(str(vocabulary), pad_token="_", unk_token="<unk>", **given).save_pretrained(
        folder
    )
    return folder
