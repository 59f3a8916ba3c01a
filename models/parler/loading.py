"""Released checkpoints, by their own key names, into `ParlerModel`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import cached_file

from models.common.errors import ArchitectureError, ConfigError, listed
from models.common.vocoder import fold_weight_norm
from models.parler.config import Generation, ParlerConfig
from models.parler.modeling import ParlerModel, sinusoids

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("float32", "bfloat16", "float16")
TIED = {"text_encoder.encoder.embed_tokens.weight": "text_encoder.shared.weight"}
"""What a checkpoint may leave out, because it is the other one."""
SINUSOIDS = {"decoder.model.decoder.embed_positions.weights", "embed_positions.weights"}
"""What follows from the configuration where a checkpoint leaves it out."""
NAMES_SHOWN = 12
"""Of missing and of unexpected keys, in an error."""


def load(
    name_or_folder: str | Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
) -> tuple[ParlerModel, Generation]:
    """A released model, by its name on the hub or from a folder. The codec stays in float32.

    Raises `ArchitectureError` (which names the keys that are missing or unexpected), `ConfigError`,
    and `OSError` where there is no such model.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype}: there are {', '.join(DTYPES)}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device}: {str(error).splitlines()[0]}") from error
    config = ParlerConfig.from_dict(_json(name_or_folder, "config.json"))
    generation = _json(name_or_folder, "generation_config.json", required=False)
    config = config.with_special_ids(generation)
    with torch.device("meta"):
        model = ParlerModel(config)
    weights, missing = _together(to_current_names(_read(name_or_folder)), _parts(config))
    _fill(model, weights, missing, str(name_or_folder))
    model.eval().requires_grad_(False).to(device=device, dtype=getattr(torch, dtype))
    model.audio_encoder.float()
    return model, Generation.from_dict(generation)


def to_current_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's weights with the codec as transformers names it, weight norms folded.

    The released models hold the codec of Descript's package in a wrapper
    (`audio_encoder.model.decoder.model.1.block.2.block.1.weight_g`); later ones hold transformers'.
    What only listens, the codec's encoder, is left out.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        current = _codec_name(name)
        if not current.startswith("audio_encoder.encoder."):
            renamed[current] = tensor
    return fold_weight_norm(renamed)


def _codec_name(name: str) -> str:
    wrapped = name.removeprefix("audio_encoder.model.")
    if wrapped == name:
        return name
    if wrapped.startswith("encoder."):
        return f"audio_encoder.{wrapped}"
    top = re.fullmatch(r"decoder\.model\.(\d+)\.(?!block\.)(.+)", wrapped)
    if top:
        place, rest = int(top[1]), top[2]
        part = "conv1" if place == 0 else "snake1" if rest == "alpha" else "conv2"
        return f"audio_encoder.decoder.{part}.{rest}"
    unit = re.fullmatch(r"decoder\.model\.(\d+)\.block\.(\d+)\.block\.([0-3])\.(.+)", wrapped)
    if unit:
        part = ("snake1", "conv1", "snake2", "conv2")[int(unit[3])]
        block = f"audio_encoder.decoder.block.{int(unit[1]) - 1}"
        return f"{block}.res_unit{int(unit[2]) - 1}.{part}.{unit[4]}"
    ends = re.fullmatch(r"decoder\.model\.(\d+)\.block\.([01])\.(.+)", wrapped)
    if ends:
        part = ("snake1", "conv_t1")[int(ends[2])]
        return f"audio_encoder.decoder.block.{int(ends[1]) - 1}.{part}.{ends[3]}"
    return f"audio_encoder.{wrapped}"


def _parts(config: ParlerConfig) -> dict[str, list[str]]:
    """Weights of ours → the checkpoint's that stand in it, one below the other."""
    decoder, parts = "decoder.model.decoder", {}
    books = range(config.decoder.num_codebooks)
    parts[f"{decoder}.embed_tokens.weight"] = [f"{decoder}.embed_tokens.{k}.weight" for k in books]
    if not config.decoder.use_fused_lm_heads:
        parts["decoder.lm_heads.weight"] = [f"decoder.lm_heads.{k}.weight" for k in books]
    for layer in range(config.decoder.num_hidden_layers):
        for attention, ours in (("self_attn", "qkv"), ("encoder_attn", "kv")):
            place = f"{decoder}.layers.{layer}.{attention}"
            theirs = [f"{place}.{letter}_proj.weight" for letter in ours]
            parts[f"{place}.{ours}_proj.weight"] = theirs
    return parts


def _together(
    weights: dict[str, Tensor], parts: Mapping[str, list[str]]
) -> tuple[dict[str, Tensor], set[str]]:
    """The weights, joined, and the names of those that are missing from a joined one."""
    missing = {name for names in parts.values() for name in names if name not in weights}
    for ours, theirs in parts.items():
        found = [weights.pop(name) for name in theirs if name in weights]
        if len(found) == len(theirs):
            weights[ours] = torch.cat(found)
    return weights, missing


def _fill(model: ParlerModel, weights: dict[str, Tensor], missing: set[str], where: str) -> None:
    for name, same in TIED.items():
        if same in weights:
            weights.setdefault(name, weights[same])
    expected = model.state_dict()
    for name in SINUSOIDS & expected.keys() - weights.keys():
        weights[name] = sinusoids(*expected[name].shape)
    extra = weights.keys() - expected.keys()
    if not missing:
        missing = expected.keys() - weights.keys() - TIED.keys()
    problems = [f"lacks {_listed(missing)}"] if missing else []
    problems += [f"has unexpected {_listed(extra)}"] if extra else []
    misfits = [
        f"{name} {list(weights[name].shape)} for {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    problems += [f"has {_listed(misfits)}"] if misfits else []
    if problems:
        raise ArchitectureError(f"{where} " + "; ".join(problems))
    model.load_state_dict(weights, assign=True)


def _listed(names: Iterable[str]) -> str:
    return listed(sorted(names), NAMES_SHOWN)


def _read(name_or_folder: str | Path) -> dict[str, Tensor]:
    index = _file(name_or_folder, INDEX, required=False)
    if index is None:
        path = _file(name_or_folder, WEIGHTS)
        assert path is not None
        return dict(load_file(path))
    weights: dict[str, Tensor] = {}
    for shard in sorted(set(json.loads(Path(index).read_text())["weight_map"].values())):
        path = _file(name_or_folder, shard)
        assert path is not None
        weights |= load_file(path)
    return weights


def _json(name_or_folder: str | Path, file: str, *, required: bool = True) -> dict[str, Any]:
    path = _file(name_or_folder, file, required=required)
    if path is None:
        if required:
            raise FileNotFoundError(f"{name_or_folder} has no {file}")
        return {}
    found: dict[str, Any] = json.loads(Path(path).read_text())
    return found


def _file(name_or_folder: str | Path, file: str, *, required: bool = True) -> str | None:
    path: str | None = cached_file(
        str(name_or_folder), file, _raise_exceptions_for_missing_entries=required
    )
    return path
