"""Smart Turn v3: from the sound of the last 8 s, the probability that a turn is complete.

An ONNX model by Daily (BSD-2-Clause), asked at every soft end. Nobody waits for its answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from handlers import onnx
from handlers.base import Emit, Handler, Observer
from handlers.messages import Completeness, Conclude, Heard, Message, Samples
from handlers.options import option
from handlers.ticket import Ticket
from handlers.turn.log_mel import FRAMES, INPUT_SAMPLES, MELS, log_mel

PACKAGE = "pipecat"
WEIGHTS = "audio/turn/smart_turn/data/smart-turn-v3.2-cpu.onnx"
HOW_TO_GET = (
    "give --smart_turn_model FILE, or take the weights in a package: "
    "pip install --no-deps pipecat-ai==1.14.0"
)


@dataclass(frozen=True)
class SmartTurnOptions:
    model: str = option(
        "", "Smart Turn v3 ONNX file (else the one in the pipecat-ai package)", "smart_turn_model"
    )


class SmartTurnModel:
    """The model on one thread.

    Raises FileNotFoundError where there is no such file, ValueError where it is another model.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"there is no Smart Turn model at {path}: {HOW_TO_GET}")
        try:
            self._session = onnx.session(path)
        except Exception as error:  # onnxruntime has a class for each way to be no model
            raise ValueError(f"{path} is not an ONNX model: {error}") from error
        inputs = self._session.get_inputs()
        if len(inputs) != 1 or inputs[0].shape[1:] != [MELS, FRAMES]:
            shapes = {value.name: value.shape for value in inputs}
            raise ValueError(f"{path} takes {shapes}, not one [B, {MELS}, {FRAMES}]")
        self._input: str = inputs[0].name

    def __call__(self, audio: Samples) -> Samples:
        """[B, INPUT_SAMPLES] at `EAR_RATE_HZ`, zeros before shorter audio → [B]."""
        found: Samples = self._session.run(None, {self._input: log_mel(audio)})[0]
        return found.reshape(len(audio))


def default_weights() -> Path:
    """Raises FileNotFoundError without the package."""
    found = onnx.packaged(PACKAGE, WEIGHTS)
    if found is None:
        raise FileNotFoundError(f"Smart Turn's weights are missing: {HOW_TO_GET}")
    return found


class _Utterance:
    """The latest INPUT_SAMPLES of an utterance."""

    def __init__(self) -> None:
        self._pieces: deque[Samples] = deque()
        self._length = 0

    def add(self, samples: Samples) -> None:
        self._pieces.append(samples)
        self._length += len(samples)
        while self._length - len(self._pieces[0]) >= INPUT_SAMPLES:
            self._length -= len(self._pieces.popleft())

    def audio(self) -> Samples:
        """[INPUT_SAMPLES], zeros first."""
        heard = np.concatenate([np.zeros(INPUT_SAMPLES, np.float32), *self._pieces])
        return np.asarray(heard[-INPUT_SAMPLES:], np.float32)


class SmartTurn(Handler[_Utterance]):
    """Hears what STT hears and answers each `Conclude` with a `Completeness`.

    A row in a batch costs as much as a row alone (60 ms on one core), so each has its own call and
    its answer leaves at once. A question is dropped when its speaker goes on before its turn comes.
    A failure costs a cue, not the utterance: it is logged and counted, and the rest decides.
    """

    stage: ClassVar[str] = "turn"
    Options: ClassVar[type[SmartTurnOptions]] = SmartTurnOptions
    requests: ClassVar[tuple[type, ...]] = (Conclude,)

    def __init__(
        self, options: SmartTurnOptions, *, emit: Emit, observer: Observer | None = None
    ) -> None:
        super().__init__(emit, observer=observer)
        self.options = options
        self._asked_of: dict[Ticket, int] = {}  # revision, oldest question first

    def setup(self) -> None:
        path = Path(self.options.model) if self.options.model else default_weights()
        self._model = SmartTurnModel(path)
        self._model(np.zeros((1, INPUT_SAMPLES), np.float32))

    def open(self, ticket: Ticket) -> _Utterance:
        return _Utterance()

    def close(self, ticket: Ticket, state: _Utterance) -> None:
        self._asked_of.pop(ticket, None)

    def process(self, batch: Sequence[Message]) -> Iterable[Message]:
        for message in batch:
            if isinstance(message, Heard):
                self.state(message.ticket).add(message.samples)
                self._asked_of.pop(message.ticket, None)
            elif isinstance(message, Conclude):
                self._asked_of[message.ticket] = message.revision
        while self._asked_of:
            ticket = next(iter(self._asked_of))
            revision = self._asked_of.pop(ticket)
            if ticket.live:  # one at a time: between two, the inbox may have news of the others
                self.busy = bool(self._asked_of)
                return self._judge(ticket, revision)
        self.busy = False
        return ()

    def _judge(self, ticket: Ticket, revision: int) -> list[Message]:
        try:
            probability = float(self._model(self.state(ticket).audio()[None])[0])
        except Exception as error:
            self._failure(ticket, error)
            return []
        return [Completeness(ticket, revision, probability)]
