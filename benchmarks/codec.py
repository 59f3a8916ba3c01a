"""How well a codec keeps words: `python -m benchmarks.codec --codec FOLDER`.

Held-out phrases are spoken by the agent's voice and by held-out voices, clean and as microphones
hear them, go through the codec, and are heard by a recogniser that knows the domain's words only.
Also how many codes are used, how many bits they hold, and the time that a frame takes.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.duplex_judge import Judge, Understood, answer_words
from benchmarks.report import Cell, environment, environment_lines, table, two_places, write_json
from handlers.audio import Resampler
from handlers.messages import RATE_HZ, Samples
from models.common.tokens import SpeechTokenizer
from models.parrot import domain
from models.parrot.rooms import RoomOptions, draw_room, heard_in
from models.parrot.speech import PERSON_RMS, agent_clip
from models.parrot.synthesis import RATE_HZ as SPEECH_RATE_HZ
from models.parrot.synthesis import Synthesizer
from models.parrot.tokenizers import load_tokenizer

SILENCE_S = 0.4  # before and after


@dataclass(frozen=True, slots=True)
class Row:
    speech: str
    words: int
    understood_share: float


@dataclass(frozen=True, slots=True)
class Codes:
    used: int
    of: int
    bits: float
    ms_per_frame: float  # encode and decode, one row, one frame at a time


class Bench:
    def __init__(self, codec: SpeechTokenizer, seed: int) -> None:
        self._codec, self._judge = codec, Judge(answer_words())
        self._source, self._rng = random.Random(seed), np.random.default_rng(seed)
        self._counts: Counter[int] = Counter()

    def row(self, name: str, phrases: Sequence[str], spoken: Callable[[str], Samples]) -> Row:
        """`spoken` gives a phrase [T] at 16 kHz."""
        right = words = 0
        for phrase in phrases:
            samples = spoken(phrase)
            audio = Resampler(SPEECH_RATE_HZ, RATE_HZ, "HQ").push(samples, last=True)
            result = Understood.of(phrase, self._judge.hear(audio))
            right, words = right + result.right, words + result.words
        return Row(name, words, right / words)

    def coded(self, samples: Samples) -> Samples:
        frame = self._codec.frame_samples
        whole = np.pad(samples, (0, -len(samples) % frame))
        codes = self._codec.encode(torch.from_numpy(whole)[None])
        self._counts.update(codes.flatten().tolist())
        made: Samples = self._codec.decode(codes)[0].numpy()
        return made

    def of_agent(self, phrase: str) -> Samples:
        """From the beginning of a frame, as in dialogues."""
        clip = agent_clip(phrase)
        return padded(clip.samples)[clip.first :]

    def of_person(self, phrase: str, *, room: bool) -> Samples:
        speaker = domain.draw_speaker(self._source, test=True)
        with Synthesizer() as synthesizer:
            speech = synthesizer.say(speaker, phrase + ".").samples
        speech = padded(speech * (PERSON_RMS / np.sqrt(np.square(speech).mean())))
        if not room:
            return speech
        where = draw_room(RoomOptions(echo_share=0.0), self._source)
        return heard_in(where, speech, speech, PERSON_RMS, self._rng)

    def codes(self) -> Codes:
        total = sum(self._counts.values())
        shares = [count / total for count in self._counts.values()]
        bits = -sum(share * np.log2(share) for share in shares)
        codec = self._codec
        sound = torch.from_numpy(self.of_agent("apple banana river"))
        sound = sound[: len(sound) // codec.frame_samples * codec.frame_samples]
        encoder, decoder = codec.encoder_state(1), codec.decoder_state(1)
        frames = sound.view(-1, 1, codec.frame_samples)
        began = time.perf_counter()
        for frame in frames:
            codec.decode(codec.encode(frame, encoder), decoder)
        taken_ms = 1000 * (time.perf_counter() - began) / len(frames)
        return Codes(len(self._counts), codec.codebook_size, float(bits), taken_ms)


def padded(samples: Samples) -> Samples:
    return np.pad(samples, int(SILENCE_S * SPEECH_RATE_HZ))


def measure(codec: SpeechTokenizer, count: int, seed: int) -> tuple[list[Row], Codes]:
    bench = Bench(codec, seed)
    source = random.Random(seed)
    phrases = [domain.draw_phrase(source, test=True) for _ in range(count)]
    rows = [
        bench.row("agent, original", phrases, bench.of_agent),
        bench.row("agent, coded", phrases, lambda p: bench.coded(bench.of_agent(p))),
    ]
    for name, room in (("person", False), ("person in a room", True)):
        spoken = {phrase: bench.of_person(phrase, room=room) for phrase in phrases}
        rows.append(bench.row(f"{name}, original", phrases, spoken.__getitem__))
        coded = {phrase: bench.coded(sound) for phrase, sound in spoken.items()}
        rows.append(bench.row(f"{name}, coded", phrases, coded.__getitem__))
    return rows, bench.codes()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codec")
    parser.add_argument("--codec", default="tiny", help="folder of the codec; tiny: the shipped")
    parser.add_argument("--count", type=int, default=60, help="held-out phrases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows, codes = measure(load_tokenizer(args.codec), args.count, args.seed)
    settings = vars(args) | {"json": str(args.json or "")}
    print(environment_lines(environment(settings)))
    cells: list[list[Cell]] = [
        [row.speech, row.words, two_places(row.understood_share)] for row in rows
    ]
    print(table(("speech", "words", "understood"), cells))
    print(
        f"codes used {codes.used} of {codes.of}, {codes.bits:.1f} bits; "
        f"{codes.ms_per_frame:.1f} ms per frame"
    )
    if args.json:
        result = {"rows": [asdict(row) for row in rows], "codes": asdict(codes)}
        write_json(args.json, environment(settings) | result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
