"""A checkpoint on paired shards: its loss, and its turn-taking beside that of the data.

    python -m models.parrot.evaluate --model DIR --input_data DIR

The person's channel is given, ours is generated; both, and what the data have in our place, are
decoded and counted per minute (`statistics`).

T frames, C = 2 channels, D codebooks.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.common.errors import ModelError, VocabularyError
from models.common.tokens import SpeechTokenizer
from models.parrot.config import CHANNELS
from models.parrot.data import Layout, ValidationRows, check_vocabulary, collate, counted
from models.parrot.engine import DuplexLM
from models.parrot.inference import add_options, make_engine, open_model
from models.parrot.modeling import DualChannelModel
from models.parrot.shards import Shards
from models.parrot.statistics import (
    Activity,
    TurnTaking,
    mean_difference,
    mean_of,
    turn_taking,
    voice_activity,
)

ACTIVITY_S = 0.02


@dataclass(frozen=True, slots=True)
class Comparison:
    """Means per minute over the recordings."""

    data: TurnTaking
    generated: TurnTaking
    difference: TurnTaking
    """Of each recording by itself, without its sign, as published."""


@torch.no_grad()
def losses(model: DualChannelModel, rows: ValidationRows, batch_rows: int = 8) -> list[float]:
    """The mean cross-entropy of each channel, in nats. [C]"""
    sums = torch.zeros(2, CHANNELS, dtype=torch.float64)
    for begin in range(0, len(rows), batch_rows):
        batch = collate([rows[i] for i in range(begin, min(begin + batch_rows, len(rows)))])
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        counts = counted(batch, model.config.num_codebooks).cpu()
        sums += torch.stack((model(**batch).channel_losses.cpu().double() * counts, counts))
    mean: list[float] = (sums[0] / sums[1].clamp(min=1)).tolist()
    return mean


def generate(engine: DuplexLM, users: Mapping[int, Tensor], seed: int = 0) -> dict[int, Tensor]:
    """The person's frames of several conversations, [T, D] each -> ours, as many each.

    At least as many rows as conversations. Our first frame, for which nothing was heard, is not
    generated but silence in what `compare` makes of it: the t-th here follows on the person's t-th.
    """
    answers: dict[Hashable, list[Tensor]] = {name: [] for name in users}
    for name in users:
        engine.open(name, seed=seed + name)
    for t in range(max(map(len, users.values()))):
        going: dict[Hashable, Tensor] = {n: user[t] for n, user in users.items() if t < len(user)}
        for session, frame in engine.step(going).items():
            answers[session].append(frame)
        for name, user in users.items():
            if t + 1 == len(user):
                engine.close(name)
    return {name: torch.stack(answers[name]) for name in users}


def compare(
    engine: DuplexLM,
    tokenizer: SpeechTokenizer,
    conversations: Sequence[Tensor],
    *,
    rows: int,
    user_channel: int = 0,
    user_delay_frames: int = 0,
    seed: int = 0,
) -> Comparison:
    """Codes [T, C, D] of whole conversations. `rows` at a time are generated."""
    truth, generated = [], []
    for begin in range(0, len(conversations), rows):
        group = {begin + i: c.long() for i, c in enumerate(conversations[begin : begin + rows])}
        heard = {n: _delayed(c[:, user_channel], user_delay_frames) for n, c in group.items()}
        answers = generate(engine, heard, seed)
        for name, codes in group.items():
            user = _activity(tokenizer, codes[:, user_channel])
            truth.append(
                turn_taking(user, _activity(tokenizer, codes[:, 1 - user_channel]), ACTIVITY_S)
            )
            late = round(1 / tokenizer.frame_rate_hz / ACTIVITY_S)
            ours = np.roll(_activity(tokenizer, answers[name]), late)
            ours[:late] = False
            generated.append(turn_taking(user, ours, ACTIVITY_S))
    return Comparison(mean_of(truth), mean_of(generated), mean_difference(generated, truth))


def _delayed(codes: Tensor, frames: int) -> Tensor:
    """[T, D] -> [T, D], so many frames later; the first code stands for what was before."""
    return torch.cat((codes[:1].expand(frames, -1), codes))[: len(codes)]


def _activity(tokenizer: SpeechTokenizer, codes: Tensor) -> Activity:
    """[T, D] -> the voice activity of its sound, in steps of `ACTIVITY_S`."""
    samples = tokenizer.decode(codes[None])[0].numpy()
    return voice_activity(samples, round(ACTIVITY_S * tokenizer.sample_rate_hz))


def table(comparison: Comparison) -> str:
    """Number and seconds per minute."""
    lines = [f"{'per minute':<12}{'data':>14}{'generated':>14}{'|difference|':>14}"]
    for kind in ("ipu", "pause", "gap", "overlap"):
        cells = [
            getattr(stats, kind)
            for stats in (comparison.data, comparison.generated, comparison.difference)
        ]
        lines.append(
            f"{kind:<12}" + "".join(f"{f'{r.count:.1f} / {r.seconds:.1f} s':>14}" for r in cells)
        )
    return "\n".join(lines)


def evaluate(given: argparse.Namespace) -> dict[str, Any]:
    """Raises `ModelError`s."""
    model, tokenizer = open_model(given.model, given.tokenizer)
    model.eval()
    shards = Shards(given.input_data)
    check_vocabulary(model.config, shards.vocabulary)
    if shards.vocabulary.channels != CHANNELS:
        raise VocabularyError("evaluation takes paired shards: prepare them with --channels 2")
    layout = Layout.of(model.config, given.row_frames, given.user_delay_frames)
    rows = ValidationRows(shards, frozenset(shards.names), layout, given.loss_rows)
    by_channel = losses(model, rows)
    user = model.config.user_channel
    comparison = compare(
        make_engine(model, tokenizer, given.rows, given),
        tokenizer,
        [shards[i] for i in range(min(len(shards), given.recordings))],
        rows=given.rows,
        user_channel=user,
        user_delay_frames=given.user_delay_frames,
        seed=given.seed,
    )
    sys.stdout.write(
        f"loss: person {by_channel[user]:.4f}, ours {by_channel[1 - user]:.4f} nats\n"
        f"{table(comparison)}\n"
    )
    return {
        "loss_user": by_channel[user],
        "loss_agent": by_channel[1 - user],
        "turn_taking_per_minute": asdict(comparison),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m models.parrot.evaluate")
    add_options(parser)
    parser.add_argument("--input_data", type=Path, nargs="+", required=True, metavar="DIR")
    parser.add_argument("--recordings", type=int, default=32, help="so many are generated")
    parser.add_argument("--rows", type=int, default=8, help="so many of them at a time")
    parser.add_argument("--row_frames", type=int, default=400, help="for the loss")
    parser.add_argument("--loss_rows", type=int, default=256, help="for the loss, at most")
    parser.add_argument("--user_delay_frames", type=int, default=0, help="as in training")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    given = parser.parse_args()
    try:
        figures = evaluate(given)
    except ModelError as error:
        sys.exit(f"evaluate: {error}")
    if given.output:
        given.output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
