"""How well the endpoint policy tells the end of a turn from a pause inside it.

`python -m benchmarks.endpointing` plays test clips through the real voice detector and the real
recogniser (`--stt`) as far as 100 ms into each pause and each end, and counts what the policy would
do, how well its score tells ends from pauses (the area under the curve, 0.5 by chance), and how
many words the recogniser gets wrong.

`--fit` fits the policy's weights instead and prints them. The data are the turns of
`benchmarks.phrases`, every second phrase in every second voice (the rest is what the table
measures), once with the recogniser's text and once with the true text, because the recogniser
hears people far better than it hears eSpeak.

`--smart_turn FILE` adds the same with a Smart Turn model, and the area under its curve.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from benchmarks.clips import VARIANTS, Clip, make_clips, recorded_clips
from benchmarks.duplex_judge import word_errors
from benchmarks.phrases import TURNS
from handlers.audio import Resampler, to_pcm16
from handlers.messages import EAR_RATE_HZ, RATE_HZ, Samples
from handlers.stt.decoding import Decoding, load
from handlers.stt.moonshine import MoonshineOptions, MoonshineSTT
from handlers.stt.pocketsphinx import PocketSphinxOptions
from handlers.stt.streaming import Row
from handlers.stt.window import spoken
from handlers.turn.log_mel import INPUT_SAMPLES
from handlers.turn.smart_turn import SmartTurnModel
from handlers.vad.prosody import ProsodyTracker
from handlers.vad.silero import CONTEXT_SAMPLES, STATE_SIZE, WINDOW_SAMPLES, SileroModel
from server.endpointing import (
    VOICE_FEATURES,
    Cues,
    Features,
    LevelGate,
    TextPolicy,
    features,
    score,
)
from server.turns import TurnSettings

WINDOW_S = WINDOW_SAMPLES / EAR_RATE_HZ
LOOK_BACK_S = 0.3
SOFT_END_S = 0.1
LATE_MS = 900.0
VOICED = TurnSettings().threshold - TurnSettings().hysteresis
RIDGE = 2.0
VOICE_TRUST = 0.5
"""What is kept of the voice's weights: eSpeak's tunes are more regular than people's."""

Policy = Callable[[Cues], float]
Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Moment:
    """A pause or the end of a turn, as the policy sees it."""

    clip: str
    cues: Cues
    true_cues: Cues | None  # with the words that were really said, where they are known
    pause_s: float | None  # None: the turn is over


class Recogniser(Protocol):
    def hear(self, window: Samples) -> None: ...

    def conclude(self) -> tuple[str, float | None]:
        """The words so far, and the probability that the sentence ends with them."""

    def reset(self) -> None: ...


class BySphinx:
    def __init__(self) -> None:
        self._decoding = Decoding(load(PocketSphinxOptions().decoder_config()))
        self.reset = self._decoding.reset

    def hear(self, window: Samples) -> None:
        self._decoding.hear(to_pcm16(window))

    def conclude(self) -> tuple[str, float | None]:
        heard, end = self._decoding.conclude()
        return heard, None if math.isnan(end) else end


class ByMoonshine:
    def __init__(self) -> None:
        self._stt = MoonshineSTT(MoonshineOptions(), emit=print)
        self._stt.setup()
        self._windows: list[Samples] = []

    def reset(self) -> None:
        self._windows.clear()

    def hear(self, window: Samples) -> None:
        self._windows.append(window)

    def conclude(self) -> tuple[str, float | None]:
        row = Row(np.concatenate(self._windows), "en")
        (found,) = self._stt.recognise([row], lambda: [False])
        return spoken(found.text), self._stt.end_probability(found.text, "en")


RECOGNISERS: dict[str, Callable[[], Recogniser]] = {
    "pocketsphinx": BySphinx,
    "moonshine": ByMoonshine,
}


class Listener:
    """The server's voice detector, prosody tracker, a recogniser and, if there is one, turn model.

    One clip at a time.
    """

    def __init__(self, recogniser: Recogniser, turn_model: SmartTurnModel | None = None) -> None:
        self._turn_model = turn_model
        self._silero = SileroModel()
        self._recogniser = recogniser
        decoder = load(PocketSphinxOptions().decoder_config())
        self._lm, self._logmath = decoder.get_lm(), decoder.get_logmath()

    def moments(self, clip: Clip) -> Iterable[Moment]:
        audio = Resampler(RATE_HZ, EAR_RATE_HZ).push(clip.samples, last=True)
        probabilities, gated = self._probabilities(audio)
        breaks = [(p.start_sample, p.text_before, p.duration_s) for p in clip.inner_pauses]
        tracker = ProsodyTracker()
        self._recogniser.reset()
        first = done = max(0, int((clip.onset_sample / RATE_HZ - LOOK_BACK_S) / WINDOW_S))
        voiced_ms = 0.0
        for at_sample, text, pause_s in (*breaks, (clip.last_voiced_sample, clip.text, None)):
            due = int((at_sample / RATE_HZ + SOFT_END_S) / WINDOW_S)
            for w in range(done, due):
                window = audio[w * WINDOW_SAMPLES : (w + 1) * WINDOW_SAMPLES]
                tracker.push(window, probabilities[w])
                self._recogniser.hear(window)
                voiced_ms += 1000 * WINDOW_S * (gated[w] >= VOICED)
            done = due
            heard, end = self._recogniser.conclude()
            complete = self._complete(audio[first * WINDOW_SAMPLES : done * WINDOW_SAMPLES])
            cues = Cues(heard, end, tracker.describe(), voiced_ms, complete)
            yield Moment(clip.name, cues, self._with_truth(cues, text), pause_s)

    def _complete(self, turn: Samples) -> float | None:
        if self._turn_model is None:
            return None
        audio = np.zeros((1, INPUT_SAMPLES), np.float32)
        latest = turn[-INPUT_SAMPLES:]
        audio[0, INPUT_SAMPLES - len(latest) :] = latest
        return float(self._turn_model(audio)[0])

    def _with_truth(self, cues: Cues, text: str) -> Cues | None:
        """The cues of a recogniser that makes no mistakes."""
        words = text.lower().replace(",", "").split()
        if not words:
            return None
        history = ["<s>", *words][:-3:-1]
        end = self._logmath.exp(self._lm.prob(["</s>", *history]))
        return dataclasses.replace(cues, text=" ".join(words), end_probability=end)

    def _probabilities(self, audio: Samples) -> tuple[list[float], list[float]]:
        """Of speech per window, as the ear hears it and as the turn machine takes it."""
        state = np.zeros((2, 1, STATE_SIZE), np.float32)
        padded = np.concatenate([np.zeros(CONTEXT_SAMPLES, np.float32), audio])
        gate = LevelGate()
        plain, gated = [], []
        for end in range(WINDOW_SAMPLES, len(audio) + 1, WINDOW_SAMPLES):
            window = padded[end - WINDOW_SAMPLES : end + CONTEXT_SAMPLES]
            probability, state = self._silero(window[None], state)
            level_db = 10 * math.log10(float(np.mean(np.square(window[CONTEXT_SAMPLES:]))) + 1e-10)
            plain.append(float(probability[0]))
            gated.append(gate(plain[-1], level_db))
        return plain, gated


def table(name: str, moments: Sequence[Moment], policy: Policy) -> str:
    """One line: shares of the true ends by hold, and of the pauses that would be cut into."""
    ends = np.array([policy(m.cues) for m in moments if m.pause_s is None])
    pauses = [(policy(m.cues), 1000 * m.pause_s) for m in moments if m.pause_s is not None]
    cut = np.mean([hold_ms < pause_ms for hold_ms, pause_ms in pauses]) if pauses else 0.0
    fast, middle = np.mean(ends <= 300), np.mean(ends <= 700)
    return (
        f"{name:34} {len(ends):5} {fast:8.0%} {middle:8.0%} {np.mean(ends > LATE_MS):8.1%}"
        f" {np.median(ends):8.0f} {len(pauses):7} {cut:6.1%}"
    )


def area(moments: Sequence[Moment], value: Callable[[Cues], float]) -> float:
    """The chance that an end has a higher value than a pause."""
    ends = np.array([value(m.cues) for m in moments if m.pause_s is None])[:, None]
    pauses = np.array([value(m.cues) for m in moments if m.pause_s is not None])
    return float(np.mean((ends > pauses) + 0.5 * (ends == pauses)))


HEADER = (
    f"{'':34} {'ends':>5} {'<=300':>8} {'<=700':>8} {'>900':>8} {'median':>8} {'pauses':>7}  cut"
)


def fit(moments: Iterable[Moment]) -> tuple[float, Features]:
    """Ridge logistic regression by Newton's method → (bias, weights), the voice's damped."""
    seen = [(m, cues) for m in moments for cues in (m.cues, m.true_cues) if cues is not None]
    x: Matrix = np.array([(1.0, *dataclasses.astuple(features(cues))) for _, cues in seen])
    y = np.array([m.pause_s is None for m, _ in seen], float)
    w = np.zeros(x.shape[1])
    for _ in range(30):
        p = 1 / (1 + np.exp(-x @ w))
        hessian = (x * (p * (1 - p))[:, None]).T @ x + RIDGE * np.eye(len(w))
        w -= np.linalg.solve(hessian, x.T @ (p - y) + RIDGE * w)
    w[1:][VOICE_FEATURES] *= VOICE_TRUST
    bias, *weights = (round(float(value), 2) for value in w)
    return bias, Features(*weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=202)
    parser.add_argument("--count", type=int, default=120, help="turns")
    parser.add_argument("--recordings", type=Path, help="folder of 16-bit mono WAV files")
    parser.add_argument("--stt", choices=RECOGNISERS, default="pocketsphinx")
    parser.add_argument("--smart_turn", type=Path, help="a Smart Turn v3 model (ONNX)")
    parser.add_argument("--fit", action="store_true", help="fit the weights and print them")
    options = parser.parse_args()
    half = 0 if options.fit else 1
    clips = make_clips(
        options.seed, options.count, phrases=TURNS[half::2], variants=VARIANTS[half::2], tail_s=0.2
    )
    turn_model = SmartTurnModel(options.smart_turn) if options.smart_turn else None
    listener = Listener(RECOGNISERS[options.stt](), turn_model)
    moments = [moment for clip in clips for moment in listener.moments(clip)]
    if options.fit:
        print(*fit(moments), sep="\n")
        return
    print(HEADER)
    report("recognised", moments)
    mute = [_with(m, dataclasses.replace(m.cues, prosody=None)) for m in moments]
    report("recognised, no prosody", mute)
    report("true words", [_with(m, m.true_cues) for m in moments if m.true_cues])
    if options.recordings:
        recorded = recorded_clips(options.recordings, tail_s=0.2)
        report("recorded", [m for c in recorded for m in listener.moments(c)])
    print(f"of the words, wrong: {words_wrong(moments):.0%}")
    words = area(moments, lambda cues: score(cues)[0])
    print(f"area under the curve: words and voice {words:.3f}")
    if options.smart_turn:
        print(f"turn model {area(moments, lambda cues: cues.complete or 0.0):.3f}")


def words_wrong(moments: Iterable[Moment]) -> float:
    """Of whole turns: words to be changed, left out or added, as a share of those said."""
    said = [(m.true_cues.text.split(), m) for m in moments if m.true_cues and m.pause_s is None]
    wrong = sum(word_errors(words, m.cues.text.split()) for words, m in said)
    return wrong / sum(len(words) for words, _ in said)


def report(name: str, moments: Sequence[Moment]) -> None:
    """The table's lines for the policy without and, where its cue is known, with a turn model."""
    policy = TextPolicy().hold_ms
    without = [_with(m, dataclasses.replace(m.cues, complete=None)) for m in moments]
    print(table(name, without, policy))
    if any(m.cues.complete is not None for m in moments):
        print(table(f"{name}, turn model", moments, policy))


def _with(moment: Moment, cues: Cues | None) -> Moment:
    assert cues is not None
    return dataclasses.replace(moment, cues=cues)


if __name__ == "__main__":
    main()
