"""The chat engine alone: `python -m benchmarks.models --lm`.

Tokens per second of the engine at 1, 4, 16 ... sessions at once, of `model.generate` for one
session after another, and of the engine's matrix products alone, which is what the machine's
memory and arithmetic allow. Time to the first token of a question asked while the other sessions
speak: anew, and as a conversation's next one. Random weights unless `--lm_model_name` names a
model; `generate` has the model as Transformers gives it. The ways take turns in short pieces, so
that a busy machine slows all of them alike; processor time stands beside wall time, since it
suffers less from what else runs.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.report import Cell, table
from handlers.lm.transformers import READ_TOKENS
from handlers.options import COMPILE_MODES
from models.chat.engine import ChatEngine
from models.chat.load import load, prepare

SHAPE = {
    "vocab_size": 16_000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
}
"""About 100 million parameters."""
STEPS = 8
NEXT_TURN_TOKENS = 20
MakeEngine = Callable[[int, int], ChatEngine]  # rows, tokens
PLAIN = "generate, one by one"


@dataclass(frozen=True, slots=True)
class Seconds:
    wall: float
    cpu: float

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall + other.wall, self.cpu + other.cpu)


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second. `cpu`: per second of processor time."""

    way: str
    sessions: int
    wall: float
    cpu: float


@dataclass(frozen=True, slots=True)
class FirstToken:
    """From a question to its first token, the median. `sessions`: that one and those speaking."""

    way: str
    sessions: int
    wall_ms: float
    cpu_ms: float


@dataclass(frozen=True, slots=True)
class Result:
    parameters: int
    prompt_tokens: int
    speeds: list[Speed]
    first_tokens: list[FirstToken]

    def of(self, way: str, sessions: int) -> Speed:
        return next(s for s in self.speeds if (s.way, s.sessions) == (way, sessions))


def timed(call: Callable[[], Any]) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def measure(
    plain: PreTrainedModel,
    served: PreTrainedModel,
    counts: Sequence[int],
    *,
    prompt_tokens: int,
    rounds: int,
    compiled: MakeEngine | None = None,
) -> Result:
    """`plain` and `served`: the same model, as Transformers has it and as the engine has it."""
    engines: dict[str, MakeEngine] = {"engine": partial(ChatEngine, served)}
    if compiled:
        engines["engine, compiled"] = compiled
    ids = torch.randint(3, plain.config.vocab_size, (max(counts), prompt_tokens))
    linears = [
        (linear.in_features, served.get_submodule(name))
        for name, linear in plain.named_modules()
        if isinstance(linear, nn.Linear)
    ]
    products = partial(_multiply, linears, plain.dtype)
    speeds = _speeds(engines, products, _Generate(plain, ids[:1]), counts, ids, rounds)
    first_tokens = [_generate_first(plain, ids[0], rounds)]
    for count in counts:
        first_tokens += _engine_first(served, ids[:count].tolist(), rounds)
    parameters = sum(each.numel() for each in plain.parameters())
    return Result(parameters, prompt_tokens, speeds, first_tokens)


# Tokens per second.


def _speeds(
    engines: Mapping[str, MakeEngine],
    products: Callable[[int], None],
    generating: _Generate,
    counts: Sequence[int],
    ids: Tensor,
    rounds: int,
) -> list[Speed]:
    """Every way in its turn, `rounds` times, `STEPS` tokens of each session at a time."""
    room = ids.shape[1] + (rounds + 1) * STEPS + 2 * max(counts)
    ways: dict[tuple[str, int], Callable[[], Any]] = {}
    for count in counts:
        for way, make in engines.items():
            engine = _speaking(make(count, room), ids[:count].tolist())
            ways[way, count] = partial(_repeat, engine.step)
        ways["products alone", count] = partial(_repeat, partial(products, count))
    ways[PLAIN, 1] = partial(generating.tokens, STEPS)
    taken = dict.fromkeys(ways, Seconds(0.0, 0.0))
    for _ in range(rounds):
        for key, call in ways.items():
            taken[key] += timed(call)
    return [
        Speed(way, count, *(rounds * STEPS * count / t for t in (spent.wall, spent.cpu)))
        for (way, count), spent in taken.items()
    ]


def _speaking(engine: ChatEngine, prompts: list[list[int]]) -> ChatEngine:
    """All questions read: from now on each step is a token of every session."""
    engine.warm_up()
    for session, prompt in enumerate(prompts):
        engine.open(session, prompt)
        engine.step()
    while len(engine.step()) < len(prompts):
        pass
    return engine


def _repeat(call: Callable[[], Any]) -> None:
    for _ in range(STEPS):
        call()


def _multiply(linears: Sequence[tuple[int, nn.Module]], dtype: torch.dtype, rows: int) -> None:
    with torch.no_grad():
        for width, linear in linears:
            linear(torch.zeros(rows, width, dtype=dtype))


class _Generate:
    """`model.generate` for one session, going on where it stopped."""

    def __init__(self, model: PreTrainedModel, prompt: Tensor) -> None:
        self._model, self._given, self._cache = model, prompt, None
        self.tokens(1)

    def tokens(self, count: int) -> None:
        out = self._model.generate(
            self._given,
            attention_mask=torch.ones_like(self._given),
            past_key_values=self._cache,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
        )
        self._given, self._cache = out.sequences, out.past_key_values


# Time to the first token.


def _generate_first(model: PreTrainedModel, ids: Tensor, rounds: int) -> FirstToken:
    given = ids[None]
    return _first(PLAIN, 1, [timed(partial(_Generate, model, given)) for _ in range(rounds)])


def _engine_first(
    model: PreTrainedModel, prompts: list[list[int]], rounds: int
) -> list[FirstToken]:
    """Of the last of these questions, asked while the others are being answered."""
    *others, last = prompts
    read = READ_TOKENS["cpu"]
    steps = len(last) // read + 3  # of a question at most
    room = len(last) + NEXT_TURN_TOKENS + steps * (len(prompts) + 2 * rounds)
    engine = _speaking(ChatEngine(model, len(prompts), room, read_tokens=read), others)
    spent: dict[str, list[Seconds]] = {"engine": [], "engine, next turn": []}
    for turn in range(rounds):
        first = [1 + turn % 2, *last[1:]]  # nothing in common with the one before
        for way, asked in (
            ("engine", first),
            ("engine, next turn", [*first, *last[:NEXT_TURN_TOKENS]]),
        ):
            engine.open(way, asked)
            spent[way].append(timed(partial(_until_answered, engine, way)))
            engine.close(way)
    return [_first(way, len(prompts), each) for way, each in spent.items()]


def _until_answered(engine: ChatEngine, session: str) -> None:
    while session not in engine.step():
        pass


def _first(way: str, sessions: int, spent: Sequence[Seconds]) -> FirstToken:
    wall, cpu = median(each.wall for each in spent), median(each.cpu for each in spent)
    return FirstToken(way, sessions, 1000 * wall, 1000 * cpu)


# The command line.


def show(result: Result) -> None:
    print(f"LM of {result.parameters / 1e6:.0f} M parameters, {result.prompt_tokens} tokens asked")
    rows: list[list[Cell]] = []
    plain = result.of(PLAIN, 1)
    for speed in result.speeds:
        alone = result.of(speed.way, 1)
        ratios = (
            f"{speed.wall / other.wall:.1f} ({speed.cpu / other.cpu:.1f})"
            for other in (alone, plain)
        )
        rows.append([speed.way, speed.sessions, round(speed.wall, 1), round(speed.cpu, 1), *ratios])
    headers = ("tokens/s", "sessions", "", "per CPU s", "x one session (CPU)", "x generate (CPU)")
    print(table(headers, rows))
    rows = [
        [first.way, first.sessions, round(first.wall_ms), round(first.cpu_ms)]
        for first in result.first_tokens
    ]
    print(table(("first token", "sessions", "ms", "CPU ms"), rows))


def add_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--lm", action="store_true", help="measure the LM")
    group.add_argument("--lm_model_name", default="", help="instead of random weights")
    group.add_argument("--lm_torch_dtype", default="auto")
    group.add_argument("--lm_compile_mode", default="", choices=("", *COMPILE_MODES))
    group.add_argument("--lm_sessions", default="1,4,16", help="at once, one of them 1")
    group.add_argument("--lm_rounds", type=int, default=5, help="turns of each way")
    group.add_argument("--lm_prompt_tokens", type=int, default=64)


def section(args: argparse.Namespace) -> dict[str, Any]:
    name, mode = args.lm_model_name, args.lm_compile_mode
    if name:
        given = partial(load, name, dtype=args.lm_torch_dtype)
        served = given().model
        unpacked = given(packed=False).model if mode else None
        plain = AutoModelForCausalLM.from_pretrained(name, dtype=served.dtype)
    else:
        torch.manual_seed(0)
        dtype = getattr(torch, args.lm_torch_dtype.replace("auto", "float32"))
        config = LlamaConfig(**SHAPE, eos_token_id=None, bos_token_id=None)
        plain = AutoModelForCausalLM.from_config(config, dtype=dtype)
        served = _prepared(plain, packed=True)
        unpacked = _prepared(plain, packed=False) if mode else None
    result = measure(
        plain.eval(),
        served,
        [int(count) for count in args.lm_sessions.split(",")],
        prompt_tokens=args.lm_prompt_tokens,
        rounds=args.lm_rounds,
        compiled=partial(ChatEngine, unpacked, compile_mode=mode) if unpacked else None,
    )
    show(result)
    return asdict(result)


def _prepared(plain: PreTrainedModel, *, packed: bool) -> PreTrainedModel:
    made = copy.deepcopy(plain)
    prepare(made, packed=packed)
    return made
