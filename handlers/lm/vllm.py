"""Any chat model that vLLM serves as the LM stage, in this server's own engine."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import itertools
import logging
import threading
from collections.abc import Coroutine, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from handlers.base import Emit, Handler, Observer, StageError
from handlers.lm.answers import Answer
from handlers.lm.local import LocalLMOptions, calls_tools, told
from handlers.messages import Ask, Message, TextDone
from handlers.options import option

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class VllmLMOptions(LocalLMOptions):
    gpu_memory_share: float | None = option(
        None, "of the GPU's memory for vLLM (0-1); else as vLLM has it", "lm_gpu_memory_share"
    )
    enforce_eager: bool = option(
        False, "nothing compiled: starts sooner, answers slower", "lm_enforce_eager"
    )


class VllmLM(Handler[None]):
    """Answers run in vLLM's own batch; a ticket that dies aborts its request.

    A conversation's question begins with the tokens of the one before, which vLLM knows again block
    by block. vLLM runs on a thread of this stage and in processes of its own, which it starts with
    the `spawn` method: the server's main module must not start anything when it is imported.
    """

    stage: ClassVar[str] = "lm"
    requests: ClassVar[tuple[type, ...]] = (Ask,)
    Options: ClassVar[type[VllmLMOptions]] = VllmLMOptions

    def __init__(
        self, options: VllmLMOptions, *, emit: Emit, observer: Observer | None = None
    ) -> None:
        super().__init__(emit, observer=observer)
        self.options = options
        self._names = itertools.count()
        self._running: set[Future[None]] = set()

    def setup(self) -> None:
        """Raises ValueError for a model that can't be had or served."""
        if importlib.util.find_spec("vllm") is None:
            raise ValueError("--lm vllm: vLLM is not installed; see requirements-vllm.txt")
        from models.chat.load import load_tokenizer

        o = self.options
        o.check_named()
        self._stops, self._seeds = o.stops, o.seeds()
        try:
            tokenizer = load_tokenizer(o.model_name)
        except ValueError as error:
            raise ValueError(f"--lm_model_name {error}") from error
        self._loop = asyncio.new_event_loop()
        self._engine_thread = threading.Thread(
            target=self._loop.run_forever, name="vllm", daemon=True
        )
        self._engine_thread.start()
        try:
            self._llm = self._wait(self._launched())
        except Exception as error:
            self._loop.call_soon_threadsafe(self._loop.stop)
            raise ValueError(
                f"--lm_model_name {o.model_name}: vLLM did not start: {error}"
            ) from error
        try:
            model = self._llm.vllm_config.model_config
            self._advice: dict[str, Any] = model.get_diff_sampling_param()
            if not _samples(o.model_name):
                self._advice["temperature"] = 0.0  # as transformers would; vLLM's default is 1
            self._prompts = o.prompts(tokenizer, model.max_model_len)
        except Exception:
            self.teardown()
            raise

    def teardown(self) -> None:
        for future in list(self._running):
            future.cancel()
        self._wait(self._stopped())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._engine_thread.join()
        del self._llm  # it would shut down again when the interpreter is half gone

    def handle(self, message: Message) -> Iterable[Message]:
        assert isinstance(message, Ask)
        ids = self._prompts.ids(message)
        future = asyncio.run_coroutine_threadsafe(self._guarded(message, ids), self._loop)
        self._running.add(future)

        def end() -> None:
            future.cancel()

        forget = message.ticket.on_cancel(end)

        def over(done: Future[None]) -> None:
            self._running.discard(done)
            forget()

        future.add_done_callback(over)
        return ()

    async def _guarded(self, ask: Ask, ids: list[int]) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            await self._answer(ask, ids)
        except EngineDeadError:
            dead = StageError("lm_engine_dead", "The lm's engine has failed; restart the server.")
            self.emit(self._failure(ask.ticket, dead))
        except Exception as error:
            self.emit(self._failure(ask.ticket, error))

    async def _answer(self, ask: Ask, ids: list[int]) -> None:
        """Cancelled, vLLM aborts the request."""
        answer, made, reason = Answer(calls_tools(ask)), 0, None
        outputs = self._llm.generate(
            {"type": "token", "prompt_token_ids": list(ids)},  # vLLM writes into its own
            self._params(ask),
            f"lm-{next(self._names)}",
        )
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                piece = output.outputs[0]
                made += len(piece.token_ids)
                reason = piece.finish_reason
                for message in told(ask.ticket, answer.push(piece.text)):
                    self.emit(message)
        for message in told(ask.ticket, answer.flush()):
            self.emit(message)
        ended: Literal["stop", "length"] = "length" if reason == "length" else "stop"
        self.emit(TextDone(ask.ticket, ended, len(ids), made))

    def _params(self, ask: Ask) -> Any:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        given = self._advice | self.options.sampling
        return SamplingParams(
            **given | {"max_tokens": self.options.max_tokens(ask)},
            stop=self._stops,
            seed=next(self._seeds),
            skip_special_tokens=not calls_tools(ask),
            output_kind=RequestOutputKind.DELTA,
        )

    async def _launched(self) -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        from models.chat.load import longest

        o = self.options
        memory = (
            {} if o.gpu_memory_share is None else {"gpu_memory_utilization": o.gpu_memory_share}
        )
        arguments = AsyncEngineArgs(
            model=o.model_name,
            dtype=o.torch_dtype,
            max_num_seqs=o.rows,
            enforce_eager=o.enforce_eager,
            disable_log_stats=True,
            max_model_len=min(o.context_tokens, longest(o.model_name)),  # more is refused
            **memory,
        )
        return AsyncLLM.from_engine_args(arguments)

    async def _stopped(self) -> None:
        self._llm.shutdown()
        await asyncio.sleep(0)  # what it has cancelled ends

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def _samples(name: str) -> bool:
    """Whether the checkpoint asks to be sampled from."""
    from transformers import GenerationConfig

    try:
        return bool(GenerationConfig.from_pretrained(name).do_sample)
    except OSError:  # it has no such file
        return False
