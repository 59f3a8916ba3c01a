"""How well the endpoint policy tells the end of a turn from a pause inside it.

`python -m benchmarks.endpointing` plays test clips through the real voice detector and the real
recogniser as far as 100 ms into each pause and each end, and counts what the policy would do.

`--fit` fits the policy's weights instead and prints them. The data are the turns of
`benchmarks.phrases`, every second phrase in every second voice (the rest is what the table
measures), once with the recogniser's text and once with the true text, because the recogniser
hears people far better than it hears eSpeak.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.clips import VARIANTS, Clip, make_clips, recorded_clips
from benchmarks.phrases import TURNS
from handlers.audio import Resampler, to_pcm16
from handlers.messages import EAR_RATE_HZ, RATE_HZ, Samples
from handlers.vad.prosody import ProsodyTracker
from server.endpointing import Cues, Features, TextPolicy, features

WINDOW_SAMPLES = 512
LOOK_BACK_S = 0.3
SOFT_END_S = 0.1
LATE_MS = 900.0
VOICED = 0.5
RIDGE = 2.0

Policy = Callable[[Cues], float]
Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Moment:
    """A pause or the end of a turn, as the policy sees it."""

    clip: str
    cues: Cues
    true_cues: Cues | None  # with the words that were really said, where they are known
    pause_s: float | None  # None: the turn is over


class Listener:
    """Silero and PocketSphinx, one clip at a time."""

    def __init__(self) -> None:
        import pocketsphinx

        self._decoder: Any = pocketsphinx.Decoder(
            fwdflat=False,
            bestpath=False,
            maxhmmpf=3000,
            maxwpf=10,
            topn=2,
            loglevel="FATAL",
        )
        self._lm, self._logmath = self._decoder.get_lm(), self._decoder.get_logmath()
        self._session = _silero()

    def moments(self, clip: Clip) -> Iterable[Moment]:
        audio = Resampler(RATE_HZ, EAR_RATE_HZ).push(clip.samples, last=True)
        probabilities = self._probabilities(audio)
        onset_s = clip.onset_sample / RATE_HZ
        for pause in clip.inner_pauses:
            at_s = pause.start_sample / RATE_HZ
            cues = self._cues(audio, probabilities, onset_s, at_s)
            yield self._moment(clip.name, cues, pause.text_before, pause.duration_s)
        end_s = clip.last_voiced_sample / RATE_HZ
        cues = self._cues(audio, probabilities, onset_s, end_s)
        yield self._moment(clip.name, cues, clip.text, None)

    def _moment(self, clip: str, cues: Cues, text: str, pause_s: float | None) -> Moment:
        words = text.lower().replace(",", "").split()
        true = dataclasses.replace(
            cues, text=" ".join(words), end_probability=self._end_probability(words)
        )
        return Moment(clip, cues, true if words else None, pause_s)

    def _cues(
        self, audio: Samples, probabilities: Sequence[float], onset_s: float, at_s: float
    ) -> Cues:
        first = max(0, int((onset_s - LOOK_BACK_S) * EAR_RATE_HZ))
        last = int((at_s + SOFT_END_S) * EAR_RATE_HZ)
        windows = range(first // WINDOW_SAMPLES, last // WINDOW_SAMPLES)
        tracker = ProsodyTracker()
        for w in windows:
            window = audio[w * WINDOW_SAMPLES : (w + 1) * WINDOW_SAMPLES]
            tracker.push(window, probabilities[w])
        voiced = sum(probabilities[w] >= VOICED for w in windows)
        words = self._words(audio[first:last])
        return Cues(
            text=" ".join(words),
            end_probability=self._end_probability(words),
            prosody=tracker.describe(),
            voiced_ms=1000 * voiced * WINDOW_SAMPLES / EAR_RATE_HZ,
        )

    def _probabilities(self, audio: Samples) -> list[float]:
        state, context = np.zeros((2, 1, 128), np.float32), np.zeros(64, np.float32)
        found = []
        for start in range(0, len(audio) - WINDOW_SAMPLES + 1, WINDOW_SAMPLES):
            window = np.concatenate([context, audio[start : start + WINDOW_SAMPLES]])
            inputs = {"input": window[None], "state": state, "sr": np.array(EAR_RATE_HZ)}
            probability, state = self._session.run(None, inputs)
            context = window[-64:]
            found.append(float(probability[0, 0]))
        return found

    def _words(self, audio: Samples) -> list[str]:
        self._decoder.start_utt()
        self._decoder.process_raw(to_pcm16(audio), full_utt=False)
        self._decoder.end_utt()
        hypothesis = self._decoder.hyp()
        words = hypothesis.hypstr.split() if hypothesis else []
        return [word.partition("(")[0] for word in words if word[0] not in "<["]

    def _end_probability(self, words: Sequence[str]) -> float | None:
        if not words:
            return None
        history = list(reversed(["<s>", *words][-2:]))
        return float(self._logmath.exp(self._lm.prob(["</s>", *history])))


def _silero() -> Any:
    import importlib.util

    import onnxruntime

    package = importlib.util.find_spec("silero_vad")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("the silero-vad package holds the weights")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    weights = Path(package.origin).parent / "data" / "silero_vad.onnx"
    return onnxruntime.InferenceSession(str(weights), options)


def table(name: str, moments: Sequence[Moment], policy: Policy) -> str:
    """One line: shares of the true ends by hold, and of the pauses that would be cut into."""
    ends = np.array([policy(m.cues) for m in moments if m.pause_s is None])
    pauses = [(policy(m.cues), 1000 * m.pause_s) for m in moments if m.pause_s is not None]
    cut = np.mean([hold_ms < pause_ms for hold_ms, pause_ms in pauses]) if pauses else 0.0
    fast, middle = np.mean(ends <= 300), np.mean(ends <= 700)
    return (
        f"{name:26} {len(ends):5} {fast:8.0%} {middle:8.0%} {np.mean(ends > LATE_MS):8.1%}"
        f" {np.median(ends):8.0f} {len(pauses):7} {cut:6.1%}"
    )


HEADER = (
    f"{'':26} {'ends':>5} {'<=300':>8} {'<=700':>8} {'>900':>8} {'median':>8} {'pauses':>7}  cut"
)


def fit(moments: Iterable[Moment]) -> tuple[float, Features]:
    """Ridge logistic regression by Newton's method → (bias, weights)."""
    seen = [(m, cues) for m in moments for cues in (m.cues, m.true_cues) if cues is not None]
    x: Matrix = np.array([(1.0, *dataclasses.astuple(features(cues))) for _, cues in seen])
    y = np.array([m.pause_s is None for m, _ in seen], float)
    w = np.zeros(x.shape[1])
    for _ in range(30):
        p = 1 / (1 + np.exp(-x @ w))
        hessian = (x * (p * (1 - p))[:, None]).T @ x + RIDGE * np.eye(len(w))
        w -= np.linalg.solve(hessian, x.T @ (p - y) + RIDGE * w)
    bias, *weights = (round(float(value), 2) for value in w)
    return bias, Features(*weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=202)
    parser.add_argument("--count", type=int, default=120, help="turns")
    parser.add_argument("--recordings", type=Path, help="folder of 16-bit mono WAV files")
    parser.add_argument("--fit", action="store_true", help="fit the weights and print them")
    options = parser.parse_args()
    half = 0 if options.fit else 1
    clips = make_clips(
        options.seed, options.count, phrases=TURNS[half::2], variants=VARIANTS[half::2], tail_s=0.2
    )
    listener = Listener()
    moments = [moment for clip in clips for moment in listener.moments(clip)]
    if options.fit:
        print(*fit(moments), sep="\n")
        return
    policy = TextPolicy().hold_ms
    print(HEADER)
    print(table("recognised", moments, policy))
    mute = [_with(m, dataclasses.replace(m.cues, prosody=None)) for m in moments]
    print(table("recognised, no prosody", mute, policy))
    print(table("true words", [_with(m, m.true_cues) for m in moments if m.true_cues], policy))
    if options.recordings:
        recorded = recorded_clips(options.recordings, tail_s=0.2)
        print(table("recorded", [m for c in recorded for m in listener.moments(c)], policy))


def _with(moment: Moment, cues: Cues | None) -> Moment:
    assert cues is not None
    return dataclasses.replace(moment, cues=cues)


if __name__ == "__main__":
    main()
