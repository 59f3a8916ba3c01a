"""How a duplex checkpoint behaves, without server and clock: `python -m benchmarks.duplex_offline`.

Held-out dialogues, the same ones for every checkpoint, all side by side: the engine hears the
person's channel frame by frame, and what it answers is decoded, delayed as it would be live, and
measured as `benchmarks.duplex` does. The person's part stands fast: they go on as if the agent of
the data had answered them. Beside the model's figures stand those of that agent, found in the same
way, and the recogniser's understanding of its voice is what the model's is compared with.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Container, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.duplex import DIALOGUES
from benchmarks.duplex_dialogues import outcomes
from benchmarks.duplex_judge import CLOSED_ANSWERS, Hearings, Judge
from benchmarks.duplex_report import Figures, Share, bars, figures, print_turn_taking
from benchmarks.duplex_score import Hear, Outcome
from benchmarks.duplex_trials import to_wire_rate
from benchmarks.measure import AUDIBLE_DBFS
from benchmarks.report import Cell, environment, environment_lines, table, two_places, write_json
from handlers.duplex.options import ParrotOptions
from handlers.messages import Samples
from models.common.errors import ModelError
from models.common.sampling import Sampling
from models.common.tokens import SpeechTokenizer, hushed, rest_code, silent_frame
from models.parrot import domain
from models.parrot.dialogues import Dialogue, DialogueOptions, generate, load_options
from models.parrot.engine import DuplexLM, Memory, TorchEngine
from models.parrot.inference import open_model
from models.parrot.modeling import DualChannelModel

FIRST_SEED = 700_001
LIVE = ParrotOptions()
HEARINGS = Path(__file__).parents[1] / "out/hearings.json"
MARGIN_FRAMES = 20
"""Of silence around what is decoded by itself."""
SETTLING_FRAMES = 10
"""In which a decoder that begins makes sounds of its own."""
PERCENTILES = (10, 50, 90)


def held_out(count: int, options: DialogueOptions, first_seed: int = FIRST_SEED) -> list[Dialogue]:
    """Without the echo of the data's agent: it would give its answers away. That agent does at once
    what it ought to do."""
    room = replace(options.room, echo_share=0.0)
    options = replace(options, room=room, hesitation=0.0, stop_hesitation=0.0)
    return [generate(first_seed + index, options, test=True) for index in range(count)]


def make_engine(model: DualChannelModel, codec: SpeechTokenizer, o: argparse.Namespace) -> DuplexLM:
    """With a row for each dialogue. Raises `ConfigError`."""
    window = o.window or model.config.max_position_embeddings
    rest = rest_code(codec)
    return TorchEngine(
        model,
        o.dialogues,
        memory=Memory(window, o.keep, o.sinks),
        sampling=Sampling(
            o.temperature, o.top_k, o.top_p, rest=rest, onset=o.onset, offset=o.offset
        ),
    )


def converse(engine: DuplexLM, heard: Sequence[Tensor]) -> list[Tensor]:
    """The person's codes of each dialogue, [T, D] -> ours, [T, D]: the t-th follows on theirs."""
    longest_first = sorted(range(len(heard)), key=lambda index: -len(heard[index]))
    for index in longest_first:  # so that those that are over lie behind the others
        engine.open(index, seed=index)
    said: list[list[Tensor]] = [[] for _ in heard]
    for t in range(len(heard[longest_first[0]])):
        live = [index for index in longest_first if t < len(heard[index])]
        frames = engine.step({index: heard[index][t] for index in live})
        for index in live:
            said[index].append(frames[index])
    for index in longest_first:
        engine.close(index)
    return [torch.stack(of_dialogue) for of_dialogue in said]


def delay_samples(codec: SpeechTokenizer) -> int:
    """By how much what is said at a step comes later than the frame heard at it begins: a frame,
    the codec's latencies, and the audio that waits against jitter."""
    frames = 1 + codec.encode_latency_frames + codec.decode_latency_frames
    return frames * codec.frame_samples + round(LIVE.jitter_ms * codec.sample_rate_hz / 1000)


def as_heard(codec: SpeechTokenizer, codes: Tensor, length: int) -> Samples:
    """Our codes [T, D] -> the agent's channel [length] as it sounds on the person's clock.

    Long silences are left out of the decoding.
    """
    late, step = delay_samples(codec), codec.frame_samples
    channel = np.zeros(max(length, late + len(codes) * step), np.float32)
    rest = silent_frame(codec)
    for begin, end in spoken(codes, rest):
        decoded = codec.decode(codes[None, begin:end])[0]
        sound = hushed(decoded, codes[begin:end], rest, codec).numpy()
        if begin:
            sound[: SETTLING_FRAMES * step] = 0.0
        channel[late + begin * step : late + end * step] = sound
    return channel[:length]


def spoken(codes: Tensor, rest: Tensor) -> list[tuple[int, int]]:
    """Where [T, D] is not silence, and what the decoder may know of before and after it."""
    found: list[tuple[int, int]] = []
    for frame in torch.nonzero((codes != rest).any(-1))[:, 0].tolist():
        begin, end = max(0, frame - MARGIN_FRAMES), min(len(codes), frame + MARGIN_FRAMES + 1)
        if found and begin <= found[-1][1]:
            begin = found.pop()[0]
        found.append((begin, end))
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Prints, and returns everything that was found. Raises `ModelError`."""
    torch.set_num_threads(options.threads)
    model, codec = open_model(options.model, options.tokenizer)
    engine = make_engine(model, codec, options)
    data = replace(load_options(options.data), length_s=tuple(options.length_s))
    clock = Clock()
    dialogues = held_out(options.dialogues, data, options.first_seed)
    clock.lap("dialogues")
    heard = [codec.encode(whole_frames(codec, dialogue.person))[0] for dialogue in dialogues]
    clock.lap("codes")
    said = converse(engine, heard)
    clock.lap("model")
    channels = [
        as_heard(codec, codes, dialogue.truth.length)
        for codes, dialogue in zip(said, dialogues, strict=True)
    ]
    clock.lap("sound")
    judge = Judge(domain.WORDS, CLOSED_ANSWERS)
    with Hearings(judge.hear, judge.settings, options.hearings) as hear:
        truth = judged(dialogues, [dialogue.agent for dialogue in dialogues], hear)
        clock.lap("data judged")
        found = judged(dialogues, channels, hear)
        clock.lap("model judged")
    originals = [o.understood for o in truth if o.task in ("turn", "question") and o.understood]
    expected = sum(
        len(turn.backchannels) for dialogue in dialogues for turn in dialogue.truth.turns
    )
    ours, theirs = (figures(each, originals, expected, not_held=0) for each in (found, truth))
    minutes = sum(dialogue.truth.length for dialogue in dialogues) / codec.sample_rate_hz / 60
    print(f"{len(dialogues)} dialogues, {minutes:.1f} minutes; CPU seconds: {clock}")
    known = {outcome.name for outcome in truth if outcome.right}
    print_beside(known, (ours, found), (theirs, truth))
    print_turn_taking(ours)
    return {
        "figures": ours,
        "data": theirs,
        "bars": bars(ours, "parrot"),
        "outcomes": found,
        "cpu_s": clock.laps_s,
    }


def whole_frames(codec: SpeechTokenizer, samples: Samples) -> Tensor:
    """[T] -> [1, T'], what doesn't fill a frame left out."""
    length = len(samples) // codec.frame_samples * codec.frame_samples
    return torch.from_numpy(samples[None, :length].copy())


def judged(dialogues: Sequence[Dialogue], agents: Sequence[Samples], hear: Hear) -> list[Outcome]:
    """Of the agent's channels [T], at the rate of the dialogues."""
    return [
        outcome
        for dialogue, agent in zip(dialogues, agents, strict=True)
        for outcome in outcomes(dialogue.truth, to_wire_rate(agent), hear, AUDIBLE_DBFS)
    ]


class Clock:
    """CPU time of the parts of a run."""

    def __init__(self) -> None:
        self.laps_s: dict[str, float] = {}
        self._last_s = time.process_time()

    def lap(self, name: str) -> None:
        now_s = time.process_time()
        self.laps_s[name] = now_s - self._last_s
        self._last_s = now_s

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.laps_s.items())


def print_beside(known: Container[str], *found: tuple[Figures, Sequence[Outcome]]) -> None:
    """The model's figures and the data's. `known`: answers that are understood in the data."""
    verdicts = {True: "holds", False: "MISSED", None: "not measured"}
    against = [bars(f, "parrot") for f, _ in found]
    rows: list[list[Cell]] = [
        [row["bar"], row["found"], other["found"], row["limit"], verdicts[row["holds"]]]
        for row, other in zip(*against, strict=True)
    ]
    print("\n" + table(("bar (share, of how many, 95 % interval)", "model", "data", "", ""), rows))
    columns = [details(f, each, known) for f, each in found]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    print("\n" + table(("other figures", "model", "data"), rows))


def details(f: Figures, found: Sequence[Outcome], known: Container[str]) -> dict[str, str | None]:
    """Figures without a bar, by their names."""
    turns = [o for o in found if o.task in ("turn", "question")]
    phrases = [o.understood for o in turns if o.task == "turn" and o.understood]
    questions = [o for o in turns if o.task == "question" and o.name in known]
    latencies = [o.latency_ms for o in turns if o.latency_ms is not None]
    stops = [o.stop_ms for o in found if o.stop_ms is not None]
    return {
        "last voiced → reply, p10 / p50 / p90 (ms)": percentiles(latencies),
        "spoken over → silent, p10 / p50 / p90 (ms)": percentiles(stops),
        "words of repeated phrases right": str(
            Share(sum(u.right for u in phrases), sum(u.words for u in phrases))
        ),
        "repeated phrases wholly right": str(
            Share(sum(u.right == u.words for u in phrases), len(phrases))
        ),
        "closed questions right, of those understood in the data": str(
            Share(sum(bool(o.right) for o in questions), len(questions))
        ),
        "pause: any sound at all": str(f.pause_sounds),
        "phrase or question: a backchannel in it": str(
            Share(sum(bool(o.backchannels) for o in turns), len(turns))
        ),
        "interruption: attended to, the right words": str(f.attended),
        "interruption: the old reply came back": str(f.resumed),
        "interruption: not tested, no reply sounding": str(f.interruptions_untested),
        "long turn: takeover": str(f.long_takeover),
        "long turn: backchannels per turn": two_places(f.backchannels_per_turn),
        "long turn: divergence of their timing (0–1)": two_places(f.timing_divergence),
        "noise only: false replies per minute": two_places(f.false_replies_per_minute),
        "noise only: minutes": two_places(f.noise_minutes),
    }


def percentiles(values: Sequence[float]) -> str | None:
    if not values:
        return None
    return " / ".join(f"{value:.0f}" for value in np.percentile(values, PERCENTILES))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=LIVE.model_path, metavar="DIR", help="checkpoint")
    add("--tokenizer", default="", help="a codec's folder; the checkpoint's, or the shipped one")
    add("--dialogues", type=int, default=60, help="how many")
    add("--first_seed", type=int, default=FIRST_SEED, help="of the dialogues")
    add("--length_s", type=float, nargs=2, default=(22.0, 36.0), help="of a dialogue (s)")
    add("--data", type=Path, default=DIALOGUES, help="options of the dialogues (YAML)")
    add("--onset", type=float, default=LIVE.onset, help="as --parrot_onset")
    add("--offset", type=float, default=LIVE.offset, help="as --parrot_offset")
    add("--temperature", type=float, default=LIVE.temperature, help="of sampling; 0: the likeliest")
    add("--top_k", type=int, default=LIVE.top_k)
    add("--top_p", type=float, default=LIVE.top_p)
    add("--window", type=int, default=0, help="frames it looks back; 0: as it was trained")
    add("--sinks", type=int, default=0, help="first frames that stay in the window")
    add("--keep", type=int, default=0, help="frames read anew when the window is full; 0: it rolls")
    add("--threads", type=int, default=1, help="of torch")
    add("--hearings", type=Path, default=HEARINGS, help="file of what was judged before")
    add("--json", type=Path, help="write all figures there")
    options = parser.parse_args(argv)
    if options.dialogues < 1:
        parser.error("--dialogues: at least 1")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    facts = environment(vars(options))
    print(environment_lines(facts), flush=True)
    try:
        document = measure(options)
    except ModelError as error:
        print(error, file=sys.stderr)
        return 1
    if options.json:
        write_json(options.json, {"environment": facts} | document)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
