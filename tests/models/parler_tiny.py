"""Small random Parler-TTS checkpoints, in the layouts of the released ones."""

from __future__ import annotations

import json
import re
import string
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from models.parler.config import ParlerConfig
from models.parler.loading import _parts
from models.parler.modeling import ParlerModel

torch.set_num_threads(1)

BOOKS, CODES, WORDS = 3, 16, 40
SPECIAL = {"pad_token_id": CODES, "eos_token_id": CODES, "bos_token_id": CODES + 1}

LAYOUTS: dict[str, dict[str, Any]] = {
    "mini-v1": {},
    "large-v1": {"hidden_size": 48, "num_hidden_layers": 3},
    "mini-multilingual-v1.1": {"prompt_cross_attention": True, "vocab_size": WORDS + 8},
    "mini_v0.1": {"vocab_size_codes": CODES + 8, "num_key_value_heads": None},
    "rope": {"rope_embeddings": True, "use_fused_lm_heads": True},
}
"""What the released checkpoints differ in, and variants of the package that none of them has."""


def config(**changes: Any) -> dict[str, Any]:
    """`config.json`."""
    prompt: dict[str, Any] = {
        name: changes.pop(name)
        for name in ("prompt_cross_attention", "vocab_size")
        if name in changes
    }
    decoder = {
        "model_type": "parler_tts_decoder",
        "vocab_size": changes.pop("vocab_size_codes", CODES + 4),
        "max_position_embeddings": 128,
        "num_hidden_layers": 2,
        "ffn_dim": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 32,
        "num_codebooks": BOOKS,
        **SPECIAL,
        **changes,
    }
    text = {
        "model_type": "t5",
        "vocab_size": WORDS,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 40,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
    }
    codec = {
        "model_type": "dac",
        "encoder_hidden_size": 4,
        "downsampling_ratios": [4, 8],
        "decoder_hidden_size": 16,
        "n_codebooks": BOOKS,
        "codebook_size": CODES,
        "codebook_dim": 4,
        "sampling_rate": 44_100,
    }
    return {
        "model_type": "parler_tts",
        "vocab_size": WORDS,
        "prompt_cross_attention": False,
        "text_encoder": text,
        "audio_encoder": codec,
        "decoder": decoder,
        **prompt,
    }


def generation(**changes: Any) -> dict[str, Any]:
    """`generation_config.json`, greedy."""
    return {"max_length": 60, "min_new_tokens": 4, "do_sample": False, **SPECIAL, **changes}


def weights(
    settings: dict[str, Any], *, wrapped: bool = True, endless: bool = False
) -> dict[str, Tensor]:
    """A state dict by released names; `wrapped`: with the codec of Descript's package; `endless`:
    no id but codes is ever the likeliest, so that every frame has a sound and none is the last."""
    parsed = ParlerConfig.from_dict(settings)
    torch.manual_seed(0)
    model = ParlerModel(parsed)
    released = {}
    for name, tensor in model.state_dict().items():
        if not name.endswith(("weights", "norm.weight", "alpha")):  # all matter, none runs off
            wide = tensor.dim() > 1 and not name.startswith("audio_encoder")
            torch.nn.init.normal_(tensor, std=0.3 if wide else 0.1)
        released[name] = tensor.clone()
    for ours, theirs in _parts(parsed).items():
        whole = released.pop(ours)
        decoder = parsed.decoder
        sizes = [len(whole) // len(theirs)] * len(theirs)
        if "qkv" in ours:
            keys = decoder.key_heads * decoder.head_width
            sizes = [len(whole) - 2 * keys, keys, keys]
        released |= dict(zip(theirs, (part.clone() for part in whole.split(sizes)), strict=True))
    for book in range(parsed.decoder.num_codebooks) if endless else ():
        head = released[f"decoder.lm_heads.{book}.weight"]
        head[parsed.codec.codebook_size :] = head[:1] / 2
    del released["text_encoder.encoder.embed_tokens.weight"]
    if wrapped:
        released = _as_descript(released)
        released["audio_encoder.model.encoder.block.0.bias"] = torch.zeros(4)
    return released


def save(
    folder: Path, *, wrapped: bool = True, endless: bool = False, length: int = 60, **changes: Any
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    settings = config(**changes)
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps(generation(max_length=length)))
    save_file(weights(settings, wrapped=wrapped, endless=endless), folder / "model.safetensors")
    return folder


def _as_descript(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Codec weights by the names of Descript's package, weight-normalised."""
    out = {}
    for name, tensor in named.items():
        rest = name.removeprefix("audio_encoder.")
        if rest == name:
            out[name] = tensor
            continue
        blocks = 2
        rest = re.sub(r"^decoder\.conv1\.", "decoder.model.0.", rest)
        rest = re.sub(r"^decoder\.snake1\.", f"decoder.model.{blocks + 1}.", rest)
        rest = re.sub(r"^decoder\.conv2\.", f"decoder.model.{blocks + 2}.", rest)
        found = re.match(r"decoder\.block\.(\d+)\.(.+)", rest)
        if found:
            inner = found[2].replace("conv_t1.", "block.1.")
            inner = re.sub(r"^snake1\.", "block.0.", inner)
            unit = re.match(r"res_unit(\d)\.(snake|conv)(\d)\.(.+)", inner)
            if unit:
                place = (int(unit[3]) - 1) * 2 + (unit[2] == "conv")
                inner = f"block.{int(unit[1]) + 1}.block.{place}.{unit[4]}"
            rest = f"decoder.model.{int(found[1]) + 1}.{inner}"
        if rest.endswith(".weight") and "codebook" not in rest:
            norm = tensor.flatten(1).norm(dim=1).view(-1, *[1] * (tensor.dim() - 1))
            out[f"audio_encoder.model.{rest}_g"] = norm
            out[f"audio_encoder.model.{rest}_v"] = tensor * 2
        else:
            out[f"audio_encoder.model.{rest}"] = tensor
    return out


def save_tokenizer(folder: Path, vocabulary: int = WORDS) -> None:
    """Words of one letter, and what T5's own has beside them."""
    letters = dict.fromkeys(string.ascii_lowercase + ",.", 0)
    names = ["<pad>", "</s>", "<unk>", *letters]
    assert len(names) <= vocabulary
    words = models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>")
    made = Tokenizer(words)
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
