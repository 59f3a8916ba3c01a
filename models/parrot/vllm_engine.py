"""`DuplexLM` on vLLM: one resumable request per session, a frame's packed id at each step.

A request answers each chunk of frames with one sampled code, which vLLM then forgets: our code
comes back to it in the next frame, beside the person's. So what vLLM can't weigh, to speak or to
rest (`Sampling.rest`), is weighed here: it gives the likeliest sound and how likely silence is.
Before a request has taken as many frames as it may, a second one is begun with the session's last
frames; it reads them while the first goes on, and takes over at the first step that finds it ready.

vLLM's own loop runs in a thread of this engine; `step` blocks the caller's. vLLM starts processes
with the `spawn` method: a program that uses this must not do so while being imported.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import threading
from collections.abc import AsyncGenerator, Coroutine, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from models.common.errors import ConfigError
from models.common.sampling import Sampling, weighed
from models.parrot import vllm_plugin
from models.parrot.config import CHANNELS
from models.parrot.engine import (
    DuplicateSession,
    Memory,
    NoFreeRow,
    UnknownSession,
    check_prefix,
    check_user,
)
from models.parrot.frames import pack

T = TypeVar("T")
NEVER = -100.0
"""A logit's bias; vLLM allows no lower one."""
MARGIN_FRAMES = 8
"""A request that reaches its greatest length takes vLLM down, with all sessions: stay clear."""
LEAD_FRAMES = 32
"""So long, at least, does a successor have for reading a session's past."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """The code that vLLM has drawn and, where `Sampling.rest` keeps it from drawing silence, the
    probability that silence has."""

    code: int
    silence: float = 0.0


class _Request:
    """A resumable request: chunks of packed frames in, an answer out after each."""

    def __init__(self, llm: Any, name: str, params: Any) -> None:
        self._chunks: asyncio.Queue[list[int] | None] = asyncio.Queue()
        self._answer: asyncio.Future[_Answer] = asyncio.get_running_loop().create_future()
        self._rest = params.logprob_token_ids
        self._task = asyncio.create_task(self._run(llm.generate(self._inputs(), params, name)))

    async def ask(self, ids: list[int]) -> _Answer:
        self._answer = asyncio.get_running_loop().create_future()
        self._chunks.put_nowait(list(ids))  # ours may grow, and vLLM writes into its own
        await asyncio.wait((self._answer, self._task), return_when=asyncio.FIRST_COMPLETED)
        if not self._answer.done():
            await self._task  # raises what ended it
            raise RuntimeError("vLLM ended a session's request")
        return self._answer.result()

    async def close(self) -> None:
        self._chunks.put_nowait(None)
        await asyncio.wait((self._task,))

    async def _inputs(self) -> AsyncGenerator[Any, None]:
        from vllm.engine.protocol import StreamingInput

        while (ids := await self._chunks.get()) is not None:
            yield StreamingInput({"type": "token", "prompt_token_ids": ids})

    async def _run(self, outputs: AsyncGenerator[Any, None]) -> None:
        async for output in outputs:
            said = output.outputs[0]
            if said.token_ids:
                silence = [math.exp(said.logprobs[-1][r].logprob) for r in self._rest or ()]
                self._answer.set_result(_Answer(said.token_ids[-1], *silence))


@dataclass(slots=True)
class _Heir:
    request: _Request
    past: list[int]
    read: int
    """How much of `past` it was given at first."""
    ready: asyncio.Task[_Answer]


@dataclass(slots=True)
class _Session:
    request: _Request
    past: list[int]
    """The packed frames that the request has taken."""
    seed: int
    code: int
    """Ours in the frame to come."""
    due: float = 0.0
    """What has come together in silence, see `models.common.sampling.due`."""
    heir: _Heir | None = None


class VllmEngine:
    """`DuplexLM`. `options` go to vLLM's engine arguments.

    Raises what `vllm_plugin.served_config` does, and `ConfigError` where memory and rows don't fit
    each other or vLLM's cache.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        rows: int,
        *,
        memory: Memory | None = None,
        sampling: Sampling | None = None,
        **options: Any,
    ) -> None:
        vllm_plugin.environment()
        vllm_plugin.register()
        self._config = vllm_plugin.served_config(path)
        self._capacity, self._memory = rows, memory or Memory(frames=1024, keep=512)
        self._sampling = sampling or Sampling()
        self._rest = self._sampling.rest if self._sampling.temperature == 0 else None
        self._limit = self._memory.frames - MARGIN_FRAMES
        self._begin = self._limit - LEAD_FRAMES - rows
        if not 0 < self._memory.keep < self._begin:
            raise ConfigError(f"{self._memory}: frames are too few to keep so many for {rows} rows")
        start = torch.full((CHANNELS, 1), self._config.start_id)
        self._start = int(pack(start, self._config))
        self._sessions: dict[Hashable, _Session] = {}
        self._names = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        self._llm = self._wait(self._launched(str(path), options))
        self._check_cache()

    def open(self, session: Hashable, prefix: Tensor | None = None, *, seed: int = 0) -> None:
        """As `TorchEngine.open`."""
        if session in self._sessions:
            raise DuplicateSession(f"session {session!r} is open already")
        if len(self._sessions) == self._capacity:
            raise NoFreeRow(f"all {self._capacity} rows have a session")
        past, last = [self._start], self._config.start_id
        if prefix is not None and len(prefix):
            kept = check_prefix(prefix, self._config)[-self._memory.keep :]
            past += pack(kept, self._config).tolist()
            last = int(kept[-1, 1 - self._config.user_channel])
        self._sessions[session] = self._wait(self._begun(seed, past, last))

    def step(self, user: Mapping[Hashable, Tensor]) -> dict[Hashable, Tensor]:
        """As `TorchEngine.step`."""
        if not user:
            return {}
        sessions = [self._session(session) for session in user]
        channels = [torch.tensor([[session.code] for session in sessions])] * CHANNELS
        channels[self._config.user_channel] = check_user(user.values(), self._config)
        ids = pack(torch.stack(channels, dim=1), self._config).tolist()  # [n, C, 1] -> [n]
        self._wait(self._step(sessions, ids))
        return {name: torch.tensor([s.code]) for name, s in zip(user, sessions, strict=True)}

    def close(self, session: Hashable) -> None:
        """As `TorchEngine.close`."""
        self._wait(self._ended(self._session(session)))
        del self._sessions[session]

    def shutdown(self) -> None:
        """Ends all sessions and vLLM's processes."""
        for session in list(self._sessions):
            self.close(session)
        self._wait(self._stopped())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        del self._llm  # it would shut down again when the interpreter is half gone

    def _session(self, session: Hashable) -> _Session:
        if session not in self._sessions:
            raise UnknownSession(f"no session {session!r} is open")
        return self._sessions[session]

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _launched(self, path: str, options: Mapping[str, Any]) -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = AsyncEngineArgs(
            model=path,
            skip_tokenizer_init=True,
            max_model_len=self._memory.frames,
            max_num_seqs=2 * self._capacity,  # each may have an heir
            generation_config="vllm",  # nobody else's penalties
            disable_log_stats=True,
            **options,
        )
        return AsyncLLM.from_engine_args(arguments)

    def _check_cache(self) -> None:
        cache = self._llm.vllm_config.cache_config
        frames = cache.num_gpu_blocks * cache.block_size
        wanted = self._capacity * (self._memory.frames + self._memory.keep)
        if frames < wanted:
            self.shutdown()
            raise ConfigError(f"vLLM's cache holds {frames} frames, {wanted} are needed")

    def _params(self, seed: int) -> Any:
        """The only place that makes them: a penalty would count packed ids as codes, and crash.

        vLLM gives log probabilities as they are before the bias.
        """
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        top_k, rest = self._sampling.top_k, self._rest
        return SamplingParams(
            temperature=self._sampling.temperature,
            top_k=top_k
            if top_k < self._config.codebook_size
            else 0,  # of more, vLLM's kernel fails
            top_p=self._sampling.top_p,
            seed=None if self._sampling.temperature == 0 else seed,
            logit_bias=None if rest is None else {rest: NEVER},
            logprob_token_ids=None if rest is None else [rest],
            max_tokens=1,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )

    async def _begun(self, seed: int, past: list[int], last: int) -> _Session:
        request = _Request(self._llm, f"duplex-{next(self._names)}", self._params(seed))
        session = _Session(request, past, seed, last)
        self._choose([session], [await request.ask(past)])
        return session

    async def _step(self, sessions: list[_Session], ids: list[int]) -> None:
        self._choose(sessions, await asyncio.gather(*map(self._advance, sessions, ids)))
        longest = max(self._sessions.values(), key=lambda s: 0 if s.heir else len(s.past))
        if longest.heir is None and len(longest.past) >= self._begin:
            self._prepare_heir(longest)

    def _choose(self, sessions: list[_Session], answers: list[_Answer]) -> None:
        """Our code in the frame to come."""
        codes = [answer.code for answer in answers]
        if self._rest is not None:
            silence = torch.tensor([answer.silence for answer in answers])
            last = torch.tensor([session.code for session in sessions])
            before = torch.tensor([session.due for session in sessions])
            chosen, behind = weighed(torch.tensor(codes), silence, self._sampling, last, before)
            codes = chosen.tolist()
            for session, due in zip(sessions, behind.tolist(), strict=True):
                session.due = due
        for session, code in zip(sessions, codes, strict=True):
            session.code = code

    async def _advance(self, session: _Session, frame: int) -> _Answer:
        session.past.append(frame)
        heir = session.heir
        if heir is not None:
            heir.past.append(frame)
            if heir.ready.done() or len(session.past) >= self._limit:
                await heir.ready
                old, session.request = session.request, heir.request
                session.past, session.heir = heir.past, None
                answer = await heir.request.ask(heir.past[heir.read :])
                await old.close()
                return answer
        return await session.request.ask([frame])

    def _prepare_heir(self, session: _Session) -> None:
        session.seed += 1
        past = [self._start, *session.past[1 - self._memory.keep :]]
        request = _Request(self._llm, f"duplex-{next(self._names)}", self._params(session.seed))
        ready = asyncio.create_task(request.ask(past))
        session.heir = _Heir(request, past, len(past), ready)

    async def _ended(self, session: _Session) -> None:
        await session.request.close()
        if session.heir is not None:
            await session.heir.ready
            await session.heir.request.close()

    async def _stopped(self) -> None:
        self._llm.shutdown()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:  # vLLM's own
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
