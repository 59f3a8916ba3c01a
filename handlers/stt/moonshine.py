"""Moonshine by ONNX Runtime: English in a quarter of the words wrong that PocketSphinx gets wrong,
quick on a CPU, and its weights come in a package.

The model (Jeffries et al. 2024, arXiv 2410.15608) hears as much audio as there is, without padding
to 30 s, and writes with punctuation.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from handlers.base import Emit, Observer
from handlers.messages import EAR_RATE_HZ
from handlers.options import option
from handlers.stt.streaming import (
    Abandoned,
    Hypothesis,
    Row,
    StreamingOptions,
    StreamingSTT,
    unknown_language,
    unusable,
)

PACKAGE, WEIGHTS = "moonshine_voice", "assets/tiny-en"
NETWORKS = ("encoder_model", "decoder_model_merged")
TOKENS = "tokenizer.bin"
BEGIN, END = 1, 2
TOKENS_PER_S = 6.5
"""No English has more; without the limit the model goes in circles now and then (its authors')."""
SPARE_TOKENS = 4


@dataclass(frozen=True)
class MoonshineOptions(StreamingOptions):
    model_name: str = option(
        "",
        f"folder with {', '.join(NETWORKS)} (.ort or .onnx) and {TOKENS} (else the package's)",
        "stt_model_name",
    )
    threads: int = option(1, "CPU threads", "stt_threads")


class MoonshineSTT(StreamingSTT):
    """Always the likeliest token. One utterance after the other: its encoder normalises over the
    whole length, so that padding would change what it hears."""

    Options: ClassVar[type[MoonshineOptions]] = MoonshineOptions
    window_samples: ClassVar[int] = 12 * EAR_RATE_HZ

    def __init__(
        self, options: MoonshineOptions, *, emit: Emit, observer: Observer | None = None
    ) -> None:
        super().__init__(options, emit=emit, observer=observer)
        self.options = options

    def load(self) -> None:
        o = self.options
        if o.gen:
            raise unusable(f"moonshine takes no --stt_gen_{next(iter(o.gen))}")
        folder = Path(o.model_name) if o.model_name else packaged()
        try:
            self._tokens = read_tokens((folder / TOKENS).read_bytes())
            self._encoder, self._decoder = (_session(folder, name, o.threads) for name in NETWORKS)
            self._caches = {
                i.name: (i.shape[1], i.shape[3])
                for i in self._decoder.get_inputs()
                if i.name.startswith("past")
            }
            self.recognise([Row(np.zeros(EAR_RATE_HZ, np.float32), None)], lambda: [False])
        except Exception as error:
            raise unusable(f"{folder} is no Moonshine that can be used", error) from error

    def check_language(self, language: str) -> None:
        if language != "en":
            raise unknown_language(language, ())

    def recognise(self, rows: Sequence[Row], abandoned: Abandoned) -> list[Hypothesis]:
        return [self._recognise(row, at, abandoned) for at, row in enumerate(rows)]

    def _recognise(self, row: Row, at: int, abandoned: Abandoned) -> Hypothesis:
        if abandoned()[at]:
            return Hypothesis("", "en")
        audio = row.samples[None]
        every = np.ones(audio.shape, np.int64)
        (hidden,) = self._encoder.run(None, {"input_values": audio, "attention_mask": every})
        most = SPARE_TOKENS + math.ceil(TOKENS_PER_S * len(row.samples) / EAR_RATE_HZ)
        decoding = _Decoding(self._decoder, self._caches, hidden)
        written = [decoding.write(BEGIN)]
        while written[-1] != END and len(written) < most and not abandoned()[at]:
            written.append(decoding.write(written[-1]))
        said = b"".join(self._tokens[token] for token in written if token > END)
        text = said.decode(errors="replace").replace("\u2581", " ").strip()
        return Hypothesis(text, "en")


class _Decoding:
    """One text in the making. `hidden`: [1, T, H], what the encoder made of the audio."""

    def __init__(self, decoder: Any, caches: Mapping[str, tuple[int, int]], hidden: Any) -> None:
        self._decoder = decoder
        self._renewed = list(caches)
        self._feed: dict[str, Any] = {
            "encoder_hidden_states": hidden,
            "encoder_attention_mask": np.ones(hidden.shape[:2], np.int64),
            "use_cache_branch": np.array([False]),
        }
        for name, (heads, width) in caches.items():
            self._feed[name] = np.zeros((1, heads, 0, width), np.float32)

    def write(self, last: int) -> int:
        """The likeliest token after the last one."""
        self._feed["input_ids"] = np.array([[last]])
        names = [name.replace("past_key_values", "present") for name in self._renewed]
        logits, *caches = self._decoder.run(["logits", *names], self._feed)
        self._feed.update(zip(self._renewed, caches, strict=True))
        # Keys and values of what was heard stay as they are from now on.
        self._feed["use_cache_branch"] = np.array([True])
        self._renewed = [name for name in self._renewed if ".decoder." in name]
        return int(logits[0, -1].argmax())


def packaged() -> Path:
    """The folder with the weights in the package, which is not imported. Raises `StageError`."""
    spec = importlib.util.find_spec(PACKAGE)
    for place in (spec and spec.submodule_search_locations) or ():
        if (Path(place) / WEIGHTS / TOKENS).is_file():
            return Path(place) / WEIGHTS
    raise unusable(
        "Moonshine's weights are missing: give --stt_model_name FOLDER, or "
        "python -m pip install --no-deps -r requirements-nodeps.txt"
    )


def read_tokens(data: bytes) -> list[bytes]:
    """Each token's UTF-8, behind its length in one byte or, from 128 on, two: 7 low bits first."""
    tokens, at = [], 0
    while at < len(data):
        length, at = data[at], at + 1
        if length >= 128:
            length, at = length - 128 + 128 * data[at], at + 1
        tokens.append(data[at : at + length])
        at += length
    return tokens


def _session(folder: Path, name: str, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    found = [folder / f"{name}{suffix}" for suffix in (".ort", ".onnx")]
    path = next((path for path in found if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"there is no {' or '.join(each.name for each in found)}")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
