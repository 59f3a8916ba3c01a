"""Any chat model of Transformers as the LM stage: all sessions in one batch."""

from __future__ import annotations

import dataclasses
import logging
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from handlers.base import Emit, Handler, Observer, StageError
from handlers.lm.answers import Answer
from handlers.lm.local import LocalLMOptions, calls_tools, told
from handlers.messages import Ask, Message, TextDone
from handlers.options import option, wrong_compile_mode
from handlers.ticket import Ticket

if TYPE_CHECKING:
    from tokenizers.decoders import DecodeStream

    from models.chat.engine import ChatEngine

log = logging.getLogger(__name__)

MAX_WAITING = 1024
READ_TOKENS = {"cpu": 32}
"""How many tokens of questions are read at a step while others speak, by device: on a CPU that
takes about as long as some steps of speaking, elsewhere hardly longer than one."""
READ_TOKENS_ELSEWHERE = 512


@dataclass(frozen=True)
class TransformersLMOptions(LocalLMOptions):
    """Of `rows`, half as often as memory needs."""

    device: str = option("auto", "cuda, cpu, mps; auto: the best there is", "lm_device")
    compile_mode: str = option(
        "",
        "torch.compile mode of the step: default, reduce-overhead or max-autotune",
        "lm_compile_mode",
    )


@dataclass(slots=True)
class _Reply:
    """An answer being written."""

    stream: DecodeStream
    answer: Answer
    input_tokens: int = 0
    max_tokens: int = 0
    output_tokens: int = 0


class TransformersLM(Handler[_Reply]):
    """An answer has a row of the batch from its first to its last token; those that find none
    free wait their turn. A row remembers: see `models.chat.engine`."""

    stage: ClassVar[str] = "lm"
    requests: ClassVar[tuple[type, ...]] = (Ask,)
    Options: ClassVar[type[TransformersLMOptions]] = TransformersLMOptions

    def __init__(
        self, options: TransformersLMOptions, *, emit: Emit, observer: Observer | None = None
    ) -> None:
        super().__init__(emit, observer=observer)
        self.options = options
        self._waiting: deque[Ask] = deque()
        self._replies: dict[Ticket, _Reply] = {}

    def setup(self) -> None:
        """Raises ValueError for a model that can't be had, or not in this memory."""
        from models.chat.load import load
        from models.common.device import chosen_device

        o = self.options
        o.check_named()
        if wrong := wrong_compile_mode("lm_compile_mode", o.compile_mode):
            raise ValueError(wrong)
        self._stops, self._seeds = o.stops, o.seeds()
        device = chosen_device(o.device)
        try:
            self._model = load(
                o.model_name, device=device, dtype=o.torch_dtype, packed=not o.compile_mode
            )
        except ValueError as error:
            raise ValueError(f"--lm_model_name {error}") from error
        tokens = min(o.context_tokens, self._model.tokens)
        self._engine = self._fitting_engine(device, tokens)
        self._prompts = o.prompts(self._model.tokenizer, tokens)

    def process(self, batch: Sequence[Message]) -> Iterable[Message]:
        for message in batch:
            assert isinstance(message, Ask)
            if len(self._waiting) < MAX_WAITING:
                self._waiting.append(message)
            else:
                yield self._failure(message.ticket, _TOO_MANY)
        yield from self._admit()
        if self._replies:
            yield from self._step()
        self.busy = bool(self._replies or self._waiting)

    def open(self, ticket: Ticket) -> _Reply:
        from tokenizers.decoders import DecodeStream

        return _Reply(DecodeStream(skip_special_tokens=True), Answer(False))

    def close(self, ticket: Ticket, state: _Reply) -> None:
        self._engine.close(ticket)
        self._replies.pop(ticket, None)

    def _admit(self) -> Iterable[Message]:
        """Gives those that wait a row, as long as there are rows."""
        while self._waiting and self._engine.free:
            ask = self._waiting.popleft()
            if not ask.ticket.live:
                continue
            try:
                self._begin(ask)
            except Exception as error:
                yield self._failure(ask.ticket, error)

    def _begin(self, ask: Ask) -> None:
        from tokenizers.decoders import DecodeStream

        ids = self._prompts.ids(ask)
        self._engine.open(ask.ticket, ids, seed=next(self._seeds))
        reply = self.state(ask.ticket)
        tools = calls_tools(ask)
        # Some models' marks of a call are special tokens.
        reply.stream = DecodeStream(skip_special_tokens=not tools)
        reply.answer = Answer(tools, self._stops)
        reply.input_tokens = len(ids)
        reply.max_tokens = self.options.max_tokens(ask)
        self._replies[ask.ticket] = reply

    def _step(self) -> Iterable[Message]:
        try:
            tokens = self._engine.step()
        except Exception as error:
            yield from self._give_up(error)
            return
        for ticket, token in tokens.items():
            try:
                yield from self._say(ticket, self._replies[ticket], token)
            except Exception as error:
                self._end(ticket)
                yield self._failure(ticket, error)

    def _say(self, ticket: Ticket, reply: _Reply, token: int) -> Iterable[Message]:
        reply.output_tokens += 1
        over = token in self._model.stop_ids
        if not over:
            backend = self._model.tokenizer.backend_tokenizer
            yield from told(ticket, reply.answer.push(reply.stream.step(backend, token) or ""))
            over = reply.answer.stopped
        full = reply.output_tokens >= reply.max_tokens or self._engine.full(ticket)
        if over or full:
            self._end(ticket)
            yield from told(ticket, reply.answer.flush())
            reason: Literal["stop", "length"] = "stop" if over else "length"
            yield TextDone(ticket, reason, reply.input_tokens, reply.output_tokens)

    def _end(self, ticket: Ticket) -> None:
        self._engine.close(ticket)
        del self._replies[ticket]

    def _give_up(self, error: Exception) -> Iterable[Message]:
        """A step failed: for want of memory at the cost of the newest answer, else of all."""
        from models.common.device import is_out_of_memory

        short = is_out_of_memory(error)
        for ticket in list(self._replies)[-1 if short else 0 :]:
            self._end(ticket)
            yield self._failure(ticket, _NO_MEMORY if short else error)

    def _fitting_engine(self, device: str, tokens: int) -> ChatEngine:
        """As many rows as asked for, or half as often as memory needs. Raises ValueError."""
        from models.chat.engine import ChatEngine
        from models.common.device import is_out_of_memory

        o, rows = self.options, self.options.rows
        while True:
            engine = ChatEngine(
                self._model.model,
                rows,
                tokens,
                sampling=dataclasses.replace(self._model.sampling, **o.sampling),
                read_tokens=READ_TOKENS.get(device, READ_TOKENS_ELSEWHERE),
                compile_mode=o.compile_mode or None,
            )
            try:
                engine.warm_up()
            except Exception as error:
                short = is_out_of_memory(error)
                if o.compile_mode and not short:
                    raise ValueError(
                        f"--lm_compile_mode {o.compile_mode}: the model cannot be compiled here "
                        f"({type(error).__name__})"
                    ) from error
                if not short:
                    raise
                if rows == 1:
                    raise ValueError(
                        f"--lm_model_name {o.model_name}: not enough memory for one conversation "
                        f"of {tokens} tokens; try a smaller --lm_context_tokens or model"
                    ) from None
                rows //= 2
                log.warning("lm: not enough memory; trying %d rows", rows)
                continue
            return engine


_TOO_MANY = StageError("lm_busy", "Too many questions wait for the lm.")
_NO_MEMORY = StageError("lm_out_of_memory", "The lm has not enough memory for another answer.")
