"""Each backend alone, beside the plain way to do the same: `python -m benchmarks.models --lm`,
or `--stt`, which `benchmarks/models_stt.py` describes.

The LM section: tokens per second of the chat engine at 1, 4, 16 ... sessions at once, of
`model.generate` for one session after another, and of the matrix products alone, which is what
the machine's memory and arithmetic allow. Random weights unless `--lm_model_name` names a model.
The ways take turns in short pieces, so that a busy machine slows all of them alike; processor time
stands beside wall time, since it suffers less from what else runs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.utils import logging

from benchmarks import models_stt
from benchmarks.report import Cell, environment, environment_lines, table, write_json
from models.chat.engine import ChatEngine
from models.chat.load import load

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


# Clocks.


@dataclass(frozen=True, slots=True)
class Seconds:
    wall: float
    cpu: float

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall + other.wall, self.cpu + other.cpu)


def timed(call: Callable[[], Any]) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


# The LM.


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second. `cpu`: per second of processor time."""

    way: str
    sessions: int
    wall: float
    cpu: float


@dataclass(frozen=True, slots=True)
class LMResult:
    parameters: int
    prompt_tokens: int
    first_token_ms: dict[str, float]  # of one question, by the way it is answered
    speeds: list[Speed]

    def of(self, way: str, sessions: int) -> Speed:
        return next(s for s in self.speeds if (s.way, s.sessions) == (way, sessions))


def measure_lm(
    model: PreTrainedModel, counts: Sequence[int], prompt_tokens: int, rounds: int
) -> LMResult:
    """Every way in its turn, `rounds` times, `STEPS` tokens of each session at a time."""
    ids = torch.randint(3, model.config.vocab_size, (max(counts), prompt_tokens))
    room = prompt_tokens + rounds * STEPS + 8
    engines = {count: _speaking(model, ids[:count].tolist(), room) for count in counts}
    linears = [each for each in model.modules() if isinstance(each, nn.Linear)]
    ways: dict[tuple[str, int], Callable[[], Any]] = {}
    for count, engine in engines.items():
        ways["engine", count] = partial(_repeat, engine.step)
        ways["products alone", count] = partial(_repeat, partial(_multiply, linears, count))
    plain = _Generate(model, ids[:1])
    ways["generate, one by one", 1] = lambda: plain.tokens(STEPS)
    taken = dict.fromkeys(ways, Seconds(0.0, 0.0))
    for _ in range(rounds):
        for key, call in ways.items():
            taken[key] += timed(call)
    speeds = [
        Speed(way, count, *(rounds * STEPS * count / t for t in (spent.wall, spent.cpu)))
        for (way, count), spent in taken.items()
    ]
    parameters = sum(each.numel() for each in model.parameters())
    return LMResult(
        parameters, prompt_tokens, _first_tokens(model, ids[0].tolist(), rounds), speeds
    )


def _speaking(model: PreTrainedModel, prompts: list[list[int]], room: int) -> ChatEngine:
    """All questions read: from now on each step is a token of every session."""
    engine = ChatEngine(model, len(prompts), room)
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


def _multiply(linears: Sequence[nn.Linear], rows: int) -> None:
    for linear in linears:
        linear(torch.zeros(rows, linear.in_features, dtype=linear.weight.dtype))


class _Generate:
    """`model.generate` for one session, going on where it stopped."""

    def __init__(self, model: PreTrainedModel, prompt: torch.Tensor) -> None:
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


def _first_tokens(model: PreTrainedModel, ids: list[int], rounds: int) -> dict[str, float]:
    """Milliseconds from a question to its first token, anew and as a conversation's next one."""
    engine = ChatEngine(model, 1, len(ids) + 80, read_tokens=len(ids))
    engine.warm_up()
    spent: dict[str, list[float]] = {"generate": [], "engine": [], "engine, next turn": []}
    for turn in range(rounds):
        prompt = [1 + turn % 2, *ids[1:]]  # nothing in common with the one before
        given = torch.tensor([prompt])
        spent["generate"].append(timed(partial(_Generate, model, given)).wall)
        for way, asked in (("engine", prompt), ("engine, next turn", [*prompt, *ids[:20]])):
            engine.open(way, asked)
            spent[way].append(timed(engine.step).wall)
            engine.close(way)
    return {way: 1000 * float(np.median(each)) for way, each in spent.items()}


def print_lm(result: LMResult) -> None:
    print(f"LM of {result.parameters / 1e6:.0f} M parameters, {result.prompt_tokens} tokens asked")
    one = {way: result.of(way, 1) for way in ("engine", "products alone")}
    plain = result.of("generate, one by one", 1)
    rows: list[list[Cell]] = []
    for speed in result.speeds:
        alone = one.get(speed.way, plain)
        rows.append(
            [
                speed.way,
                speed.sessions,
                round(speed.wall, 1),
                round(speed.cpu, 1),
                *(
                    f"{speed.wall / other.wall:.1f} ({speed.cpu / other.cpu:.1f})"
                    for other in (alone, plain)
                ),
            ]
        )
    headers = (
        "way",
        "sessions",
        "tokens/s",
        "per CPU s",
        "x one session (CPU)",
        "x generate (CPU)",
    )
    print(table(headers, rows))
    print(
        "first token, ms: "
        + ", ".join(f"{way} {ms:.0f}" for way, ms in result.first_token_ms.items())
    )


def lm_section(args: argparse.Namespace) -> dict[str, Any]:
    if args.lm_model_name:
        model = load(args.lm_model_name, dtype=args.lm_torch_dtype).model
    else:
        torch.manual_seed(0)
        dtype = getattr(torch, args.lm_torch_dtype.replace("auto", "float32"))
        config = LlamaConfig(**SHAPE, eos_token_id=None, bos_token_id=None)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.eval().requires_grad_(False)
    counts = [int(count) for count in args.lm_sessions.split(",")]
    result = measure_lm(model, counts, args.lm_prompt_tokens, args.lm_rounds)
    print_lm(result)
    return asdict(result)


SECTIONS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "lm": lm_section,
    "stt": models_stt.section,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--json", type=Path, help="write the result here")
    lm = parser.add_argument_group("lm")
    lm.add_argument("--lm", action="store_true", help="measure the LM")
    lm.add_argument("--lm_model_name", default="", help="instead of random weights")
    lm.add_argument("--lm_torch_dtype", default="auto")
    lm.add_argument("--lm_sessions", default="1,4,16", help="at once, one of them 1")
    lm.add_argument("--lm_rounds", type=int, default=5, help="turns of each way")
    lm.add_argument("--lm_prompt_tokens", type=int, default=64)
    models_stt.add_flags(parser.add_argument_group("stt"))
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    settings = vars(args) | {"json": str(args.json or "")}
    print(environment_lines(environment(settings)))
    chosen = [name for name in SECTIONS if getattr(args, name)]
    if not chosen:
        parser.error(f"choose what to measure: {', '.join(f'--{name}' for name in SECTIONS)}")
    result = {name: SECTIONS[name](args) for name in chosen}
    if args.json:
        write_json(args.json, environment(settings) | result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
