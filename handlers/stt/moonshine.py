"""Moonshine by ONNX Runtime: English, with a third of PocketSphinx's errors (`python -m
benchmarks.endpointing --stt …`), quick on a CPU, and its weights come in a package.

The model (Jeffries et al. 2024, arXiv 2410.15608) hears as much audio as there is, without padding
to 30 s, and writes with punctuation. The text of less of the same audio is a draft: what is right
of it is taken over in one step. The 8 bits of what a step reads are scaled by all of it, so that a
step over many tokens is not to the bit what many steps are: where two words are about as likely, it
may be the other one. Over 99 turns of eSpeak's, drafted a second before: 19 texts are others, 0.321
of the words wrong instead of 0.316, in 90 ms instead of 133.
"""

from __future__ import annotations

import logging
import math
import mmap
import os
import struct
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from handlers import onnx
from handlers.base import Emit, Observer, StageError
from handlers.child import Child
from handlers.messages import EAR_RATE_HZ, Conclude, Message, Samples
from handlers.options import option
from handlers.stt.decoding import NICENESS
from handlers.stt.streaming import (
    Abandoned,
    Hypothesis,
    Row,
    StreamingOptions,
    StreamingSTT,
    unknown_language,
    unusable,
)
from models.common.errors import first_line

log = logging.getLogger(__name__)

PACKAGE, WEIGHTS = "moonshine_voice", "assets/tiny-en"
NETWORKS = ("encoder_model", "decoder_model_merged")
TOKENS = "tokenizer.bin"
BEGIN, END = 1, 2
MARKS = frozenset((b".", b",", b"?", b"!", b"..."))
TOKENS_PER_S = 6.5
"""No English has more; without the limit the model goes in circles now and then (its authors')."""
SPARE_TOKENS = 4
NUMBER = struct.Struct("<I")
DIED = StageError("stt_unavailable", "Speech recognition ended unexpectedly; try again.")


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
    whole length, so that padding would change what it hears.

    It runs in a process of its own, as it would want the interpreter's lock again for each token.
    If that ends, what it was at fails as `stt_unavailable` and another one is started.
    """

    Options: ClassVar[type[MoonshineOptions]] = MoonshineOptions
    window_samples: ClassVar[int] = 12 * EAR_RATE_HZ

    def __init__(
        self, options: MoonshineOptions, *, emit: Emit, observer: Observer | None = None
    ) -> None:
        super().__init__(options, emit=emit, observer=observer)
        self.options = options
        self._number = 0  # of the text that is asked for
        self._child: Child | None = None

    def load(self) -> None:
        if self.options.gen:
            raise unusable(f"moonshine takes no --stt_gen_{next(iter(self.options.gen))}")
        self._shared = tempfile.TemporaryFile()  # noqa: SIM115
        self._shared.truncate(NUMBER.size)
        self._unwanted = mmap.mmap(self._shared.fileno(), NUMBER.size)
        self._child = self._started()

    def teardown(self) -> None:
        if self._child is not None:
            self._child.close()

    def put(self, message: Message) -> None:
        number = self._number  # not after the look at `at_partial`: it could be a final text's
        super().put(message)
        if isinstance(message, Conclude) and self.at_partial:
            NUMBER.pack_into(self._unwanted, 0, number)

    def check_language(self, language: str) -> None:
        if language != "en":
            raise unknown_language(language, ())

    def recognise(self, rows: Sequence[Row], abandoned: Abandoned) -> list[Hypothesis]:
        found = []
        for at, row in enumerate(rows):
            self._number += 1
            found.append(Hypothesis("", "en") if abandoned()[at] else self._ask(row))
        return found

    def _ask(self, row: Row) -> Hypothesis:
        if self._child is None:
            try:
                self._child = self._started()
            except StageError as error:  # it names a folder, which is for the operator
                log.error("stt: %s", error)
                raise DIED from None
        try:
            self._child.pipe.send_bytes(NUMBER.pack(self._number) + pack(row.draft, row.samples))
            tokens, text = unpack(self._child.pipe.recv_bytes())
            return Hypothesis(text.tobytes().decode(), "en", tuple(tokens))
        except (EOFError, OSError):
            log.error("stt: Moonshine's process (pid %s) ended", self._child.pid)
            self._child.close()
            self._child = None
            raise DIED from None

    def _started(self) -> Child:
        folder = Path(self.options.model_name) if self.options.model_name else packaged()
        shared = self._shared.fileno()
        arguments = (str(shared), str(folder), str(self.options.threads))
        child = Child("handlers.stt.moonshine", *arguments, shared=[shared])
        try:
            broken = child.pipe.recv_bytes().decode()
        except (EOFError, OSError):
            broken = "its process ended while it loaded"
        if broken:
            child.close()
            raise unusable(f"{folder} is no Moonshine that can be used: {broken}")
        return child


class Moonshine:
    """The networks. Raises what ONNX Runtime and the file system do."""

    def __init__(self, folder: Path, threads: int) -> None:
        self._tokens = read_tokens((folder / TOKENS).read_bytes())
        self._encoder, self._decoder = (_session(folder, name, threads) for name in NETWORKS)
        self._caches = {
            i.name: (i.shape[1], i.shape[3])
            for i in self._decoder.get_inputs()
            if i.name.startswith("past")
        }

    def write(
        self, samples: Samples, draft: Sequence[int], wanted: Callable[[], bool]
    ) -> list[int]:
        """The tokens of what is said in [T]; no more once they aren't wanted, which is asked at
        each. As much of the draft as the model would write itself is taken over in one step."""
        audio = samples[None]
        every = np.ones(audio.shape, np.int64)
        (hidden,) = self._encoder.run(None, {"input_values": audio, "attention_mask": every})
        most = SPARE_TOKENS + math.ceil(TOKENS_PER_S * len(samples) / EAR_RATE_HZ)
        decoding = _Decoding(self._decoder, self._caches, hidden)
        kept = list(draft[: most - 1])
        while kept and self._tokens[kept[-1]] in MARKS:  # it nearly always goes on otherwise
            kept.pop()
        written = decoding.read(kept)
        while written[-1] != END and len(written) < most and wanted():
            written += decoding.read([], written[-1])
        return written[:-1] if written[-1] == END else written

    def text(self, tokens: Sequence[int]) -> str:
        said = b"".join(self._tokens[token] for token in tokens if token > END)
        return said.decode(errors="replace").replace("\u2581", " ").strip()


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

    def read(self, draft: Sequence[int], last: int = BEGIN) -> list[int]:
        """After the last token: the draft as far as each of its tokens is the likeliest one, and
        the one that is it behind that."""
        self._feed["input_ids"] = np.array([[last, *draft]])
        names = [name.replace("past_key_values", "present") for name in self._renewed]
        logits, *caches = self._decoder.run(["logits", *names], self._feed)
        self._feed.update(zip(self._renewed, caches, strict=True))
        # Keys and values of what was heard stay as they are from now on.
        self._feed["use_cache_branch"] = np.array([True])
        self._renewed = [name for name in self._renewed if ".decoder." in name]
        likeliest: list[int] = logits[0].argmax(-1).tolist()
        right = 0
        while right < len(draft) and draft[right] == likeliest[right]:
            right += 1
        if right < len(draft):
            for name in self._renewed:
                self._feed[name] = self._feed[name][:, :, : right + 1]
        return likeliest[: right + 1]


def packaged() -> Path:
    """The folder with the weights in the package, which is not imported. Raises `StageError`."""
    found = onnx.packaged(PACKAGE, WEIGHTS)
    if found is not None and (found / TOKENS).is_file():
        return found
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
    found = [folder / f"{name}{suffix}" for suffix in (".ort", ".onnx")]
    path = next((path for path in found if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"there is no {' or '.join(each.name for each in found)}")
    return onnx.session(path, threads)


def main(descriptor: int, shared: int, folder: str, threads: int) -> None:
    """The process: says that it is ready, by nothing, or what is wrong; then answers numbered
    audio with texts. The number in `shared` is that of a text that nobody wants."""
    pipe, unwanted = Connection(descriptor), mmap.mmap(shared, NUMBER.size)
    try:
        model = Moonshine(Path(folder), threads)
        model.write(np.zeros(EAR_RATE_HZ, np.float32), (), lambda: True)
    except Exception as error:
        pipe.send_bytes(first_line(error).encode() or type(error).__name__.encode())
        return
    os.nice(NICENESS)
    with suppress(EOFError, OSError):
        pipe.send_bytes(b"")
        while True:
            message = pipe.recv_bytes()
            draft, audio = unpack(message[NUMBER.size :])
            wanted = partial(_differ, unwanted, message[: NUMBER.size])
            tokens = model.write(audio.view(np.float32), draft, wanted)
            pipe.send_bytes(pack(tokens, np.frombuffer(model.text(tokens).encode(), np.uint8)))


def pack(tokens: Sequence[int], rest: npt.NDArray[Any]) -> bytes:
    """A message of either end: tokens, and audio or a text's bytes."""
    return NUMBER.pack(len(tokens)) + np.asarray(tokens, np.int32).tobytes() + rest.tobytes()


def unpack(message: bytes) -> tuple[list[int], npt.NDArray[np.uint8]]:
    """The same, the rest as bytes."""
    (count,) = NUMBER.unpack_from(message)
    tokens = np.frombuffer(message, np.int32, count, NUMBER.size)
    return tokens.tolist(), np.frombuffer(message, np.uint8, offset=NUMBER.size + tokens.nbytes)


def _differ(shared: mmap.mmap, number: bytes) -> bool:
    return shared[:] != number


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
