"""Whisper by CTranslate2 (the package faster-whisper): the quickest on a CPU, in 8 bits too."""

from __future__ import annotations

from collections.abc import Sequence
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
    most_tokens,
    unknown_language,
    unusable,
)
from handlers.stt.window import unspoken


@dataclass(frozen=True)
class FasterWhisperOptions(StreamingOptions):
    model_name: str = option("small", "size, model on the hub, or folder", "stt_model_name")
    device: str = option("auto", "cpu or cuda", "stt_device")
    compute_type: str = option(
        "default", "int8, int8_float16, float16, bfloat16, float32 …", "stt_compute_type"
    )


class FasterWhisperSTT(StreamingSTT):
    """Any converted Whisper checkpoint, greedily unless `--stt_gen_beam_size` says otherwise.

    A batch under way cannot be broken off: it runs without Python.
    """

    Options: ClassVar[type[FasterWhisperOptions]] = FasterWhisperOptions

    def __init__(
        self, options: FasterWhisperOptions, *, emit: Emit, observer: Observer | None = None
    ) -> None:
        super().__init__(options, emit=emit, observer=observer)
        self.options = options

    def load(self) -> None:
        import ctranslate2
        from faster_whisper import WhisperModel

        o = self.options
        folder = Path(o.model_name)
        if folder.is_dir() and not (folder / "tokenizer.json").is_file():
            raise unusable(f"{folder} has no tokenizer.json")
        try:
            self._whisper: Any = WhisperModel(
                o.model_name, device=o.device, compute_type=o.compute_type
            )
        except Exception as error:
            raise unusable(f"{o.model_name} cannot be loaded", error) from error
        self._storage: Any = ctranslate2.StorageView.from_array
        self._model = self._whisper.model
        tokenizer = self._whisper.hf_tokenizer
        self._id: Any = tokenizer.token_to_id
        self._languages: list[str] = []
        if self._model.is_multilingual:
            codes = self._whisper.supported_languages
            self._languages = [code for code in codes if self._id(f"<|{code}|>") is not None]
        try:
            self.recognise([Row(np.zeros(EAR_RATE_HZ, np.float32), None)], lambda: [False])
        except Exception as error:
            raise unusable(f"{o.model_name} does not run", error) from error

    def check_language(self, language: str) -> None:
        if language not in (self._languages or ["en"]):
            raise unknown_language(language, self._languages)

    def recognise(self, rows: Sequence[Row], abandoned: Abandoned) -> list[Hypothesis]:
        features = self._storage(np.stack([self._log_mel(row) for row in rows]))
        encoded = self._model.encode(features)
        languages = self._spoken(encoded, rows)
        most = [most_tokens(row) for row in rows]
        # Of its maximum it takes half for the text.
        longest = min(self._whisper.max_length, 2 * max(most))
        results = self._model.generate(
            encoded,
            [self._prompt(language) for language in languages],
            return_scores=True,
            return_no_speech_prob=True,
            **{"beam_size": 1, "max_length": longest, **self.options.gen},
        )
        found = []
        for result, limit, language in zip(results, most, languages, strict=True):
            ids = result.sequences_ids[0][:limit]
            text = self._whisper.hf_tokenizer.decode(ids, skip_special_tokens=True)
            # The score is the mean over the tokens (to the power of the length penalty, here 1).
            made_up = unspoken(result.no_speech_prob, result.scores[0])
            found.append(Hypothesis("" if made_up else text, language))
        return found

    def _log_mel(self, row: Row) -> Any:
        """[M, 3000]: 30 s, what is not there as zeros."""
        extractor = self._whisper.feature_extractor
        frames = extractor(row.samples)[:, :-1]  # the last is of the extractor's own padding
        return np.pad(frames, ((0, 0), (0, extractor.nb_max_frames - frames.shape[1])))

    def _spoken(self, encoded: Any, rows: Sequence[Row]) -> list[str]:
        if not self._languages:
            return ["en"] * len(rows)
        given = [row.language for row in rows]
        if None not in given:
            return [language for language in given if language]
        ranked = self._model.detect_language(encoded)
        best = [row[0][0].strip("<|>") for row in ranked]
        return [name or detected for name, detected in zip(given, best, strict=True)]

    def _prompt(self, language: str) -> list[int]:
        names = ["startoftranscript"]
        names += [language, "transcribe"] if self._languages else []
        return [self._id(f"<|{name}|>") for name in [*names, "notimestamps"]]
