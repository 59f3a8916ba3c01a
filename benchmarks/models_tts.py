"""Synthesizers alone: `python -m benchmarks.models --tts`.

Random weights in the shapes of parler-tts-mini-v1 (its decoder and codec) and of an MMS-TTS voice,
so that it is about time and nothing else. As many clauses as `--tts_sessions` says are begun at the
same moment; how long until each is heard, and how long all of them take. The plain way waits for
the whole of a clause before it makes any sound; others wait behind it, so that n of them take n
times as long. (`tests/parity/parler_speed.py` has Parler beside its own package's streamer.)
"""

from __future__ import annotations

import argparse
import json
import queue
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DacConfig, T5Config, VitsConfig, VitsModel, VitsTokenizer

from benchmarks.report import Cell, Spread, table, two_places
from handlers.messages import RATE_HZ, Failed, Message, Say, Speech, Spoken
from handlers.ticket import Ticket
from handlers.tts.vits import VitsOptions, VitsTTS
from models.parler.config import DecoderConfig, Generation, ParlerConfig
from models.parler.engine import ParlerEngine
from models.parler.modeling import ParlerModel

LETTERS = "_abcdefghijklmnopqrstuvwxyz' -"
CODES, BOOKS, WORDS = 1024, 9, 64
SIZES: dict[str, dict[str, Any]] = {
    "mini": {"hidden_size": 1024, "num_hidden_layers": 24, "ffn_dim": 4096},
    "small": {"hidden_size": 64, "num_hidden_layers": 2, "ffn_dim": 128},
}
VITS_SIZES: dict[str, dict[str, Any]] = {
    "mini": {},
    "small": {"upsample_initial_channel": 32, "prior_encoder_num_flows": 1},
}
TEXT = "the weather will be fine tomorrow, and a little warmer than it was today"
LOAD_TIMEOUT_S = 600.0
HEADERS = ("", "clauses", "first audio p50 ms", "max", "RTF", "CPU", "sound each s")


@dataclass(frozen=True, slots=True)
class Result:
    way: str
    rows: int
    first_s: Spread
    real_time_factor: float  # time for all of them over their sound
    cpu_factor: float  # processor time over it, which other processes change less
    sound_s: float  # of each

    def cells(self) -> list[Cell]:
        first = [None if x is None else 1000 * x for x in (self.first_s.p50, self.first_s.max)]
        factors = map(two_places, (self.real_time_factor, self.cpu_factor, self.sound_s))
        return [self.way, self.rows, *first, *factors]


@dataclass(frozen=True, slots=True)
class Spoke:
    first_s: list[float]
    sound_s: float  # of all together


def measured(way: str, rows: int, speak: Callable[[], Spoke]) -> Result:
    wall, cpu = time.perf_counter(), time.process_time()
    spoke = speak()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    first, sound_s = Spread.of(spoke.first_s), spoke.sound_s
    return Result(way, rows, first, wall / sound_s, cpu / sound_s, sound_s / rows)


# Parler.


def random_parler(size: str) -> ParlerModel:
    """Every frame of it has a sound: what is no code is never among the likeliest."""
    text = T5Config(vocab_size=WORDS, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4)
    decoder = DecoderConfig(
        vocab_size=CODES + 64,
        max_position_embeddings=4096,
        num_attention_heads=16,
        num_codebooks=BOOKS,
        pad_token_id=CODES,
        eos_token_id=CODES,
        bos_token_id=CODES + 1,
        **SIZES[size],
    )
    channels = 1536 if size == "mini" else 32
    codec = DacConfig(decoder_hidden_size=channels, sampling_rate=44_100)
    torch.manual_seed(0)
    model = ParlerModel(ParlerConfig(WORDS, False, text, decoder, codec))
    heads: torch.Tensor = model.decoder.lm_heads.weight
    with torch.no_grad():
        heads.view(BOOKS, decoder.vocab_size, decoder.hidden_size)[:, CODES:] = 0
    model.eval().requires_grad_(False)
    return model


def speak_parler(engine: ParlerEngine, rows: int) -> Spoke:
    begun, first, samples = time.perf_counter(), dict[int, float](), 0
    for row in range(rows):
        engine.open(row, range(3, 43), range(3, 33))
    while engine.at_work:
        for piece in engine.step():
            first.setdefault(piece.session, time.perf_counter() - begun)
            samples += len(piece.samples)
    return Spoke(list(first.values()), samples / engine.rate_hz)


def measure_parler(args: argparse.Namespace, counts: list[int]) -> Iterator[Result]:
    steps, model = args.tts_steps, random_parler(args.tts_size)

    def engine(rows: int, play_steps: int, **more: Any) -> ParlerEngine:
        made = ParlerEngine(
            model, Generation(steps + 1, steps), rows, play_steps=play_steps, **more
        )
        made.open("warm", range(3, 43), range(3, 33))  # the description is known from then on
        made.step()
        made.close("warm")
        return made

    if mode := args.tts_compile_mode:
        compiled = engine(max(counts), args.tts_play_steps, compile_mode=mode)
        for rows in counts:
            yield measured(f"parler, {mode}", rows, partial(speak_parler, compiled, rows))
        model = random_parler(args.tts_size)  # anew, because the others pack its weights
    whole = engine(1, steps)
    yield measured("parler, whole clause", 1, partial(speak_parler, whole, 1))
    streamed = engine(max(counts), args.tts_play_steps)
    for rows in counts:
        yield measured("parler, streamed", rows, partial(speak_parler, streamed, rows))


# VITS.


class Nobody:
    def receive(self, message: Message) -> None: ...


def save_vits(folder: Path, size: str) -> None:
    torch.manual_seed(0)
    VitsModel(VitsConfig(vocab_size=len(LETTERS), **VITS_SIZES[size])).save_pretrained(folder)
    vocabulary = folder / "vocab.json"
    vocabulary.write_text(json.dumps({letter: i for i, letter in enumerate(LETTERS)}))
    VitsTokenizer(
        str(vocabulary), pad_token="_", language="eng", phonemize=False, is_uroman=False
    ).save_pretrained(folder)


def speak_vits(stage: VitsTTS, emitted: queue.Queue[tuple[float, Message]], rows: int) -> Spoke:
    owners = [Ticket(Nobody()) for _ in range(rows)]
    begun, first, samples, over = time.perf_counter(), dict[Ticket, float](), 0, 0
    for owner in owners:
        stage.put(Say(owner, TEXT, 0))
    while over < rows:
        now, message = emitted.get(timeout=LOAD_TIMEOUT_S)
        if isinstance(message, Failed):
            raise RuntimeError(message.message)
        if isinstance(message, Speech) and len(message.samples):
            first.setdefault(message.ticket, now - begun)
            samples += len(message.samples)
        over += isinstance(message, Spoken)
    for owner in owners:
        owner.cancel()
    return Spoke(list(first.values()), samples / RATE_HZ)


def vits_stage(folder: str, mode: str, counts: list[int]) -> Iterator[Result]:
    emitted: queue.Queue[tuple[float, Message]] = queue.Queue()
    options = VitsOptions(folder, device="cpu", compile_mode=mode)
    stage = VitsTTS(options, emit=lambda message: emitted.put((time.perf_counter(), message)))
    stage.start()
    try:
        stage.wait_ready(LOAD_TIMEOUT_S)
        speak_vits(stage, emitted, 1)
        for rows in counts:
            way = f"vits, {mode or 'streamed'}"
            yield measured(way, rows, partial(speak_vits, stage, emitted, rows))
    finally:
        stage.stop()


def measure_vits(args: argparse.Namespace, counts: list[int], folder: str) -> Iterator[Result]:
    tokenizer, model = VitsTokenizer.from_pretrained(folder), VitsModel.from_pretrained(folder)

    def whole() -> Spoke:
        begun = time.perf_counter()
        torch.manual_seed(0)  # the stage's: as long
        with torch.inference_mode():
            sound = model(**tokenizer(TEXT, return_tensors="pt")).waveform
        taken = time.perf_counter() - begun
        return Spoke([taken], sound.shape[1] / model.config.sampling_rate)

    whole()
    yield measured("vits, forward of the whole", 1, whole)
    yield from vits_stage(folder, "", counts)
    if args.tts_compile_mode:
        yield from vits_stage(folder, args.tts_compile_mode, counts)


def add_flags(group: Any) -> None:
    group.add_argument("--tts", action="store_true", help="measure the synthesizers")
    group.add_argument("--tts_size", choices=sorted(SIZES), default="mini")
    group.add_argument("--tts_sessions", default="1,4", help="clauses at once")
    group.add_argument("--tts_steps", type=int, default=129, help="of a Parler clause, 86 a second")
    group.add_argument("--tts_play_steps", type=int, default=43)
    group.add_argument("--tts_compile_mode", default="", help="measured too")


def section(args: argparse.Namespace) -> list[dict[str, Any]]:
    counts = [int(count) for count in args.tts_sessions.split(",")]
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as scratch:
        save_vits(Path(scratch), args.tts_size)
        for group in (measure_vits(args, counts, scratch), measure_parler(args, counts)):
            made = list(group)
            results += made
            print(table(HEADERS, [result.cells() for result in made]), "\n", flush=True)
    return [asdict(result) for result in results]
