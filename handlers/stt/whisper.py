"""Whisper and every other speech recogniser that transformers has, as the STT stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from handlers.base import Emit, Observer, StageError
from handlers.messages import EAR_RATE_HZ
from handlers.options import option, wrong_compile_mode
from handlers.stt.streaming import (
    Abandoned,
    Hypothesis,
    Row,
    StreamingOptions,
    StreamingSTT,
    most_tokens,
    unknown_language,
    unusable,
)
from handlers.stt.window import unspoken
from models.common.errors import listed

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class WhisperOptions(StreamingOptions):
    model_name: str = option(
        "openai/whisper-small", "model on the hub, or folder", "stt_model_name"
    )
    device: str = option("auto", "cpu, cuda or mps", "stt_device")
    torch_dtype: str = option("auto", "float32, float16 or bfloat16", "stt_torch_dtype")
    compile_mode: str = option(
        "", "torch.compile mode: default, reduce-overhead or max-autotune", "stt_compile_mode"
    )


class WhisperSTT(StreamingSTT):
    """Any `AutoModelForSpeechSeq2Seq` checkpoint.

    Those that know languages (multilingual Whispers) get each row's, or detect it. Compiled, the
    model runs with a static cache, in batches of 1, 2, 4 … rows, all of them warmed up in `setup`.
    """

    Options: ClassVar[type[WhisperOptions]] = WhisperOptions

    def __init__(
        self, options: WhisperOptions, *, emit: Emit, observer: Observer | None = None
    ) -> None:
        super().__init__(options, emit=emit, observer=observer)
        self.options = options

    # Loading.

    def load(self) -> None:
        import torch

        from models.common.device import chosen_device

        o = self.options
        if wrong := wrong_compile_mode("stt_compile_mode", o.compile_mode):
            raise unusable(f"{wrong}.")
        self._torch = torch
        self._device = torch.device(chosen_device(o.device))
        self._load_parts(_dtype(torch, o.torch_dtype, self._device))
        config = self._model.generation_config
        self._start: int = self._model.config.decoder_start_token_id
        self._languages: dict[str, int] = {
            token.strip("<|>"): index for token, index in (_get(config, "lang_to_id") or {}).items()
        }
        if not _get(config, "is_multilingual"):
            self._languages = {}
        self._english_only = self._is_whisper and not self._languages
        vocabulary = self._tokenizer.get_vocab()
        names = ("<|nospeech|>", "<|nocaptions|>")
        self._no_speech = next((vocabulary[n] for n in names if n in vocabulary), None)
        if o.compile_mode:
            self._compile()
        try:
            self._warm_up()
        except StageError:
            raise
        except Exception as error:
            raise unusable(f"{o.model_name} does not run", error) from error

    def _load_parts(self, dtype: Any) -> None:
        from transformers import AutoFeatureExtractor, AutoModelForSpeechSeq2Seq, AutoTokenizer
        from transformers.utils import logging

        name = self.options.model_name
        logging.disable_progress_bar()
        logging.set_verbosity(logging.CRITICAL)  # what is wrong with the weights is said below
        try:
            model, report = AutoModelForSpeechSeq2Seq.from_pretrained(
                name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
            )
            self._model: Any = model.to(self._device).eval()
        except Exception as error:
            raise unusable(f"{name} cannot be loaded", error) from error
        finally:
            logging.set_verbosity(logging.ERROR)  # it warns at every call of things that are so
        _check_keys(name, report)
        self._is_whisper = hasattr(model.config, "max_source_positions")
        try:
            self._features: Any = AutoFeatureExtractor.from_pretrained(name)
        except Exception as error:
            raise unusable(f"{name} has no usable preprocessor_config.json", error) from error
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name)
        except Exception as error:
            raise unusable(f"{name} has no usable tokenizer", error) from error
        if len(self._tokenizer) < model.config.vocab_size // 2:
            raise unusable(
                f"{name} has no tokenizer of its own: {len(self._tokenizer)} tokens for a "
                f"vocabulary of {model.config.vocab_size} (are its tokenizer files there?)"
            )

    def _compile(self) -> None:
        """The encoder, and the decoder's step, which a static cache gives shapes that stay."""
        from transformers import CompileConfig

        model, mode = self._model, self.options.compile_mode
        how = CompileConfig(mode=mode, fullgraph=True, dynamic=False)
        how._compile_all_devices = True
        model.generation_config.cache_implementation = "static"
        model.generation_config.compile_config = how
        encoder = model.get_encoder()
        encoder.forward = self._torch.compile(encoder.forward, mode=mode, dynamic=False)

    def _warm_up(self) -> None:
        second = np.zeros(EAR_RATE_HZ, np.float32)
        for rows in self._batch_sizes() if self.options.compile_mode else [1]:
            batch = [Row(second, next(iter(self._languages), None))] * rows
            nobody = [False] * rows
            try:
                self.recognise(batch, partial(list, nobody))
            except Exception as error:
                if not self.options.compile_mode:
                    raise
                mode = self.options.compile_mode
                message = f"--stt_compile_mode {mode}: the model cannot be compiled here"
                raise unusable(message, error) from error

    def _batch_sizes(self) -> list[int]:
        sizes = [1]
        while sizes[-1] < self.options.max_batch:
            sizes.append(2 * sizes[-1])
        return sizes

    # Recognising.

    def check_language(self, language: str) -> None:
        known = ["en"] if self._english_only else self._languages
        if known and language not in known:
            raise unknown_language(language, self._languages)

    def recognise(self, rows: Sequence[Row], abandoned: Abandoned) -> list[Hypothesis]:
        real = len(rows)
        if self.options.compile_mode:
            size = next(size for size in self._batch_sizes() if size >= real)
            rows = [*rows, *[rows[0]] * (size - real)]
        with self._torch.inference_mode():
            return self._recognise(rows, _padded(abandoned, len(rows) - real))[:real]

    def _recognise(self, rows: Sequence[Row], abandoned: Abandoned) -> list[Hypothesis]:
        model = self._model
        padding = {} if self._is_whisper else {"padding": True, "return_attention_mask": True}
        inputs = dict(
            self._features(
                [row.samples for row in rows],
                sampling_rate=EAR_RATE_HZ,
                return_tensors="pt",
                **padding,
            ).to(self._device)
        )
        main = model.main_input_name
        inputs[main] = inputs[main].to(model.dtype)
        settings: dict[str, Any] = dict(self.options.gen)
        settings["stopping_criteria"] = [self._ending(rows, abandoned)]
        if not self._is_whisper:
            return self._decoded(model.generate(**inputs, **settings), [None] * len(rows))
        encoded = model.get_encoder()(inputs[main])
        start = self._logits(self._ids([[self._start]] * len(rows)), encoded[0])[:, -1]  # [B, V]
        languages = self._spoken(start, rows)
        if self._languages:
            settings |= {"language": languages, "task": "transcribe"}
        ids = model.generate(encoder_outputs=encoded, **settings)
        found = self._decoded(ids, languages)
        if self._no_speech is not None:
            for row, no_speech in enumerate(start.softmax(-1)[:, self._no_speech].tolist()):
                if unspoken(no_speech, -math.inf):
                    prompt = self._ids([self._prompt(languages[row])])
                    mean = self._mean_log(prompt, ids[row : row + 1], encoded[0][row : row + 1])
                    if unspoken(no_speech, mean):
                        found[row] = Hypothesis("", languages[row])
        return found

    def _decoded(self, ids: torch.Tensor, languages: Sequence[str | None]) -> list[Hypothesis]:
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [Hypothesis(*pair) for pair in zip(texts, languages, strict=True)]

    def _spoken(self, start: torch.Tensor, rows: Sequence[Row]) -> list[str]:
        """Each row's language: as given, or the likeliest behind the start token."""
        if not self._languages:
            return ["en"] * len(rows)
        names = list(self._languages)
        best = start[:, list(self._languages.values())].argmax(-1).tolist()
        return [row.language or names[at] for row, at in zip(rows, best, strict=True)]

    def _prompt(self, language: str) -> list[int]:
        config = self._model.generation_config
        about = []
        if self._languages:
            about = [self._languages[language], config.task_to_id["transcribe"]]
        return [self._start, *about, config.no_timestamps_token_id]

    def _ids(self, ids: list[list[int]]) -> torch.Tensor:
        made: torch.Tensor = self._torch.tensor(ids, device=self._device)
        return made

    def _logits(self, ids: torch.Tensor, encoded: torch.Tensor) -> torch.Tensor:
        """[B, T], [B, S, C] → [B, T, V]"""
        decoder, head = self._model.get_decoder(), self._model.get_output_embeddings()
        hidden = decoder(ids, encoder_hidden_states=encoded, use_cache=False)[0]
        logits: torch.Tensor = head(hidden).float()
        return logits

    def _mean_log(self, prompt: torch.Tensor, ids: torch.Tensor, encoded: torch.Tensor) -> float:
        """The mean log probability of a text [1, T] and of its end, by greedy choice."""
        end = self._model.generation_config.eos_token_id
        ids = self._torch.cat([ids[ids != end][None], ids.new_full((1, 1), end)], dim=1)
        logits = self._logits(self._torch.cat([prompt, ids], dim=1), encoded)
        logs = logits[:, prompt.shape[1] - 1 : -1].log_softmax(-1)
        return float(logs.gather(2, ids[..., None]).mean())

    def _ending(self, rows: Sequence[Row], abandoned: Abandoned) -> Any:
        """A row ends when nobody wants to know it, or when nobody could have said so much."""
        tensor = self._torch.tensor
        most = tensor([most_tokens(row) for row in rows])

        def stop(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            done = tensor(abandoned()) | (ids.shape[1] > most)
            return done.repeat_interleave(len(ids) // len(rows)).to(ids.device)

        return stop


def _padded(abandoned: Abandoned, rows: int) -> Abandoned:
    return lambda: [*abandoned(), *[True] * rows]


def _get(config: Any, name: str) -> Any:
    return getattr(config, name, None)


def _check_keys(name: str, report: dict[str, Any]) -> None:
    """Raises `StageError` that lists what the checkpoint lacks, or has too much."""
    found = []
    for kind in ("missing", "unexpected", "mismatched"):
        found_keys = report.get(f"{kind}_keys") or ()
        keys = sorted(key if isinstance(key, str) else key[0] for key in found_keys)
        if keys:
            found.append(f"{kind}: {listed(keys)}")
    if found:
        raise unusable(f"The checkpoint {name} does not fit its model; {'; '.join(found)}.")


def _dtype(torch: Any, name: str, device: Any) -> Any:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise unusable(f"--stt_torch_dtype is {name}; it can be float32, float16 or bfloat16.")
    return dtype
