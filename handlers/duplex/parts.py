"""The models behind the stages: a checkpoint's tokenizer and its LM, loaded once.

Nothing heavy is imported before `tokenizer` or `engine` is called, on a stage's thread; the stages
load one after another.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from handlers.base import CannotServe
from handlers.duplex.options import ENGINES, ParrotOptions

if TYPE_CHECKING:
    from models.common.sampling import Sampling
    from models.common.tokens import SpeechTokenizer
    from models.parrot.engine import DuplexLM

PACKAGES = ("torch", "transformers", "safetensors")
FILES = ("config.json", "model.safetensors")


class Parts(Protocol):
    """What the stages run; scripted in tests."""

    @property
    def device(self) -> str: ...
    def tokenizer(self) -> SpeechTokenizer: ...
    def engine(self) -> DuplexLM: ...

    def stop(self) -> None:
        """End what the engine has started beside this process."""


def check(options: ParrotOptions) -> None:
    """What can be seen without loading. Raises `CannotServe`."""
    folder = Path(options.model_path)
    if not folder.is_dir():
        raise CannotServe(
            f"--parrot_model_path {folder}: there is no such folder. It must hold a dual-channel "
            f"checkpoint ({', '.join(FILES)} and its tokenizer); models/parrot/README.md says how "
            "to train one."
        )
    sharded = (folder / "model.safetensors.index.json").exists()
    wanted = FILES[:1] if sharded else FILES
    missing = [name for name in wanted if not (folder / name).exists()]
    if missing:
        raise CannotServe(f"--parrot_model_path {folder} lacks {', '.join(missing)}")
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        raise CannotServe(
            f"--brain parrot needs {', '.join(absent)}: python -m pip install -r requirements.txt"
        )
    if options.engine not in ENGINES:
        raise CannotServe(f"--parrot_engine {options.engine}: there are {', '.join(ENGINES)}")
    if options.rows < 1 or options.threads < 1:
        raise CannotServe("--parrot_rows and --parrot_threads must be 1 at least")


class Checkpoint:
    """`Parts` of a checkpoint folder. Raises `CannotServe`, `ModelError` where files are bad."""

    def __init__(self, options: ParrotOptions) -> None:
        self._options = options
        self._lock = threading.Lock()
        self._tokenizer: SpeechTokenizer | None = None
        self._stop: Callable[[], None] | None = None
        check(options)

    @property
    def device(self) -> str:
        if self._options.device != "auto":
            return self._options.device
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    def tokenizer(self) -> SpeechTokenizer:
        """The same one for the encoder and the decoder."""
        with self._lock:
            if self._tokenizer is None:
                from models.parrot.tokenizers import load_tokenizer

                self._tokenizer = load_tokenizer(self._options.model_path, self.device)
            return self._tokenizer

    def engine(self) -> DuplexLM:
        from models.common.errors import ConfigError
        from models.common.sampling import Sampling
        from models.common.tokens import rest_code

        o = self._options
        try:
            rest = rest_code(self.tokenizer(), self.device)
            sampling = Sampling(
                o.temperature, o.top_k, o.top_p, rest=rest, onset=o.onset, offset=o.offset
            )
            return self._vllm(sampling) if o.engine == "vllm" else self._torch(sampling)
        except ConfigError as error:
            raise CannotServe(f"--brain parrot: {error}") from error

    def _torch(self, sampling: Sampling) -> DuplexLM:
        from transformers.utils import logging

        from models.parrot.backbones import load
        from models.parrot.engine import Memory, TorchEngine

        logging.disable_progress_bar()
        model = load(self._options.model_path).to(self.device)
        self._check_codes(model.config)
        window = self._options.window_frames
        memory = Memory(frames=window) if window else None
        rows = self._options.rows
        return TorchEngine(model, rows, memory=memory, sampling=sampling, traced=True)

    def _vllm(self, sampling: Sampling) -> DuplexLM:
        if importlib.util.find_spec("vllm") is None:
            raise CannotServe("--parrot_engine vllm: the package vllm is not installed")
        from models.parrot.engine import LONGEST_WINDOW, Memory
        from models.parrot.vllm_engine import VllmEngine
        from models.parrot.vllm_plugin import served_config

        path, rows = self._options.model_path, self._options.rows
        config = served_config(path)
        self._check_codes(config)
        trained = min(config.max_position_embeddings, LONGEST_WINDOW)
        window = self._options.window_frames or trained
        memory = Memory(frames=window, keep=window // 2)
        engine = VllmEngine(path, rows, memory=memory, sampling=sampling)
        self._stop = engine.shutdown
        return engine

    def stop(self) -> None:
        if self._stop is not None:
            self._stop()

    def _check_codes(self, config: Any) -> None:
        speech = self.tokenizer()
        given = (speech.num_codebooks, speech.codebook_size)
        known = (config.num_codebooks, config.codebook_size)
        if given != known:
            raise CannotServe(
                f"{self._options.model_path}: the tokenizer has {given[0]} codebooks of "
                f"{given[1]}, the LM {known[0]} of {known[1]}"
            )
