"""Trains the codec from eSpeak NG alone: `python -m models.parrot.train_codec --output_dir DIR`.

In one run and one clock: the encoder and decoder learn to turn any voice into the agent's, the
vocoder learns the agent's sound. The decoder's targets are mel frames, pitch and voicing; a head
that is used in training only asks which phoneme it is; and one of the quantised numbers is to tell
whether the speech that has just ended fell or goes on. `--keep_codes` goes on with the decoder and
the vocoder alone, on the codes of what the agent says. Writes a log, what it ran with, and the
codec.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from models.common.errors import ConfigError
from models.common.harmonic import spectral_loss
from models.parrot import domain
from models.parrot.codec import VOCODER_HOPS, WEIGHTS, CodecConfig, Spoken, TinyCodec
from models.parrot.pairs import (
    ENDS,
    HOP_SAMPLES,
    NO_TONE,
    Batch,
    Pair,
    PairMaker,
    agent_pitch,
    stacked,
)
from models.parrot.rooms import RoomOptions, draw_room, heard_in
from models.parrot.speech import PERSON_RMS, agent_clip
from models.parrot.synthesis import Synthesizer

PHONEMES = 96
"""Room for all that the voices use; eSpeak's English ones come to about 70."""
PHONEME_SHARE, PITCH_SHARE, TONE_SHARE = 0.3, 1.5, 0.7
TONE_STEEPNESS = 2.0
CLEAN_SHARE = 0.2
CLIP_HOPS = 64
ANSWER_SHARE, OFF_GRID_SHARE = 0.35, 0.25
SILENT_FRAMES = (3, 10)
"""Before a saying."""
WARM_HOPS = 8
"""In which a vocoder that begins in the middle lacks what came before."""
SAID_ABOVE = -9.5
"""Mean log-mel of a hop in which something is said; -11.5 is silence."""


@dataclass(frozen=True)
class Settings:
    minutes: float = 20.0
    pairs: int = 3000  # in the pool; renewed while training, see `renewed_per_step`
    renewed_per_step: int = 1
    batch: int = 16
    frames: int = 64
    rate: float = 2e-3
    vocoder_batch: int = 6
    clips: int = 800  # of the agent, for the vocoder
    threads: int = 1
    seed: int = 0


class Pool:
    """Pairs, part of them new at every step, each time in another room."""

    def __init__(self, maker: PairMaker, settings: Settings) -> None:
        self._maker, self._settings = maker, settings
        self._source = random.Random(settings.seed + 1)
        self._rng = np.random.default_rng(settings.seed + 2)
        self._pairs: list[Pair] = [maker.draw() for _ in range(settings.pairs)]

    def batch(self) -> Batch:
        for _ in range(self._settings.renewed_per_step):
            self._pairs[self._source.randrange(len(self._pairs))] = self._maker.draw()
        hops = self._settings.frames * 4
        rows = []
        for _ in range(self._settings.batch):
            pair = self._source.choice(self._pairs)
            start = self._source.randrange(0, hops // 3)
            rows.append((pair, self._heard(pair, start * HOP_SAMPLES, hops * HOP_SAMPLES), start))
        return stacked(rows, hops)

    def _heard(self, pair: Pair, start: int, length: int) -> np.ndarray:
        person = np.zeros(length, np.float32)
        speech = pair.speech[: length - start]
        rms = float(np.sqrt(np.square(speech).mean() + 1e-12))
        person[start : start + len(speech)] = speech
        if self._source.random() < CLEAN_SHARE:
            return person
        person *= PERSON_RMS / rms
        room = draw_room(RoomOptions(echo_share=0.0), self._source)
        return heard_in(room, person, person, PERSON_RMS, self._rng)


class VocoderPool:
    """The agent's own clips with what the vocoder is given of them."""

    def __init__(self, codec: TinyCodec, settings: Settings) -> None:
        self._codec, self._source = codec, random.Random(settings.seed + 3)
        self._clips: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        with Synthesizer() as synthesizer:
            for _ in range(settings.clips):
                self._clips.append(self._clip(synthesizer))

    def _clip(self, synthesizer: Synthesizer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        source = self._source
        text = domain.draw_phrase(source, test=False)
        if source.random() < 0.25:
            text = source.choice([*domain.QUESTIONS.values(), domain.LONG_TURN_REPLY])
        speaker = replace(domain.AGENT, speed_wpm=source.randint(120, 210))
        samples = synthesizer.say(speaker, text + source.choice(".,")).samples
        x = torch.from_numpy(samples[: len(samples) // HOP_SAMPLES * HOP_SAMPLES].copy())
        pitch, voiced = agent_pitch(x)
        with torch.no_grad():
            mel = self._codec.log_mel(x[None])[0]
        return x, mel, pitch, voiced

    def loss(self, rows: int, *, coded: bool) -> Tensor:
        """Of the sound made of true mel frames or, `coded`, of what came through the codec."""
        drawn = []
        for _ in range(rows):
            x, mel, pitch, voiced = self._source.choice(self._clips)
            start = self._source.randrange(max(len(pitch) - CLIP_HOPS, 0) + 1)
            end = start + CLIP_HOPS
            drawn.append(
                (
                    _padded(x[start * HOP_SAMPLES : end * HOP_SAMPLES], CLIP_HOPS * HOP_SAMPLES),
                    _padded(mel[start:end].T, CLIP_HOPS, float(np.log(1e-5))).T,
                    _padded(pitch[start:end], CLIP_HOPS, 200.0),
                    _padded(voiced[start:end], CLIP_HOPS),
                )
            )
        wanted, mel, pitch, voiced = (torch.stack(parts) for parts in zip(*drawn, strict=True))
        late = VOCODER_HOPS
        if coded:
            spoken = self._codec.speak(self._codec.quantise(wanted)[0])
            mel, pitch, voiced = spoken.mel, spoken.pitch_hz, torch.sigmoid(spoken.voicing)
            late = _late_hops(self._codec)
        made = self._codec.vocoder(mel, pitch, voiced)[:, late * HOP_SAMPLES :]
        wanted = wanted[:, : -late * HOP_SAMPLES]
        return _sound_loss(self._codec, made, wanted)


class Sayings:
    """What the agent says in dialogues, with its codes: there nothing else is ever decoded.

    In most of them the voice begins with a frame, as the agent of `configs/dialogues/tiny.yaml`
    does, and a saying then always has the same codes. Rows of F frames of silence, one saying, and
    silence; part of them new at every step.
    """

    def __init__(self, codec: TinyCodec, settings: Settings) -> None:
        self._codec, self._settings = codec, settings
        self._source = random.Random(settings.seed + 4)
        self._answers = [*domain.QUESTIONS.values(), domain.LONG_TURN_REPLY, domain.BACKCHANNEL]
        self._rows = [self._draw() for _ in range(settings.pairs)]

    def _draw(self) -> tuple[Tensor, ...]:
        source, frame = self._source, self._codec.frame_samples
        text = domain.draw_phrase(source, test=False)
        if source.random() < ANSWER_SHARE:
            text = source.choice(self._answers)
        clip = agent_clip(text)
        start = source.randint(*SILENT_FRAMES) * frame - clip.first
        if source.random() < OFF_GRID_SHARE:
            start += source.randrange(frame)
        x = torch.zeros(self._settings.frames * frame)
        voice = torch.from_numpy(clip.samples)[: len(x) - start]
        x[start : start + len(voice)] = voice
        pitch, voiced = agent_pitch(x)
        with torch.no_grad():
            return x, self._codec.quantise(x[None])[1][0], pitch, voiced

    def loss(self, step: int) -> tuple[Tensor, str]:
        settings, late = self._settings, _late_hops(self._codec)
        for _ in range(settings.renewed_per_step):
            self._rows[self._source.randrange(len(self._rows))] = self._draw()
        drawn = self._source.choices(self._rows, k=settings.batch)
        x, codes, pitch, voiced = (torch.stack(parts) for parts in zip(*drawn, strict=True))
        spoken = self._codec.speak(self._codec.quantiser.values(codes))
        mel = self._codec.log_mel(x)
        said = (mel.mean(-1) > SAID_ABOVE).float()
        total, of_mel = _decoder_losses(spoken, mel, pitch, voiced, said, late - VOCODER_HOPS)
        of_voice = self._sound_loss(spoken, said, x, late)
        return total + of_voice, (
            f"loss {total.item():.3f} mel {of_mel.item():.3f} vocoder {of_voice.item():.3f}"
        )

    def _sound_loss(self, spoken: Spoken, said: Tensor, x: Tensor, late: int) -> Tensor:
        """Of some rows and a part of each in which something is said: the vocoder takes far longer
        than the rest."""
        parts = []
        for row in range(self._settings.vocoder_batch):
            begin = int(said[row].argmax()) - WARM_HOPS  # there are more of silence before it
            begin += self._source.randrange(max(1, int(said[row].sum()) - CLIP_HOPS // 2))
            begin = min(begin, len(said[row]) - late - CLIP_HOPS)
            hops = slice(begin + late, begin + late + CLIP_HOPS)
            sound = x[row, begin * HOP_SAMPLES : (begin + CLIP_HOPS) * HOP_SAMPLES]
            voiced = torch.sigmoid(spoken.voicing[row, hops])
            parts.append((spoken.mel[row, hops], spoken.pitch_hz[row, hops], voiced, sound))
        mel, pitch_hz, voiced, wanted = (torch.stack(part) for part in zip(*parts, strict=True))
        made = self._codec.vocoder(mel, pitch_hz, voiced)
        made, wanted = (y[:, WARM_HOPS * HOP_SAMPLES :] for y in (made, wanted))
        return _sound_loss(self._codec, made, wanted)


def _sound_loss(codec: TinyCodec, made: Tensor, wanted: Tensor) -> Tensor:
    mels = [codec.log_mel(x) for x in (made, wanted)]
    return spectral_loss(made, wanted) + 0.5 * (mels[0] - mels[1]).abs().mean()


def _late_hops(codec: TinyCodec) -> int:
    """From speech to sound, through all of it."""
    return codec.config.hops_per_frame * (codec.encode_latency_frames + codec.decode_latency_frames)


def _padded(x: Tensor, length: int, value: float = 0.0) -> Tensor:
    return F.pad(x, (0, length - x.shape[-1]), value=value)


@dataclass(frozen=True)
class Losses:
    total: Tensor
    mel: Tensor
    phoneme_right: Tensor
    tone_right: Tensor  # of the frames that have one


def codec_losses(codec: TinyCodec, batch: Batch) -> Losses:
    """The targets stand later than the speech by both latencies, less the vocoder's part."""
    numbers = codec.numbers(batch.speech)
    of_tone, tone_hits = _tone_loss(numbers[:, -1], batch.tones, codec.encode_latency_frames)
    values, _ = codec.quantiser(numbers)
    spoken = codec.speak(values)
    late = _late_hops(codec) - VOCODER_HOPS
    said = (batch.phonemes > 0).float()
    total, mel = _decoder_losses(spoken, batch.mel, batch.pitch_hz, batch.voiced, said, late)
    made, wanted = slice(late, None), slice(0, batch.mel.shape[1] - late)
    assert codec.to_phoneme is not None
    phonemes = codec.to_phoneme(spoken.hidden)[..., made]  # [B, P, M]
    of_phoneme = F.cross_entropy(phonemes, batch.phonemes[:, wanted])
    total = total + PHONEME_SHARE * of_phoneme + TONE_SHARE * of_tone
    hits = (phonemes.argmax(1) == batch.phonemes[:, wanted])[said[:, wanted] > 0].float().mean()
    return Losses(total, mel, hits, tone_hits)


def _decoder_losses(
    spoken: Spoken, mel: Tensor, pitch_hz: Tensor, voiced: Tensor, said: Tensor, late: int
) -> tuple[Tensor, Tensor]:
    """Of what is wanted [B, M, bands], [B, M] each and comes so many hops later: in all, and of the
    mel frames. What is said counts more than how silent the silence is."""
    made, wanted = slice(late, None), slice(0, mel.shape[1] - late)
    weight = 0.3 + said[:, wanted]
    difference = (spoken.mel[:, made] - mel[:, wanted]).abs().mean(-1)
    of_mel = (difference * weight).sum() / weight.sum()
    voiced = voiced[:, wanted]
    voicing = F.binary_cross_entropy_with_logits(spoken.voicing[:, made], voiced)
    ratio = torch.log(spoken.pitch_hz[:, made] / pitch_hz[:, wanted]).abs()
    pitch = (ratio * voiced).sum() / voiced.sum().clamp(min=1)
    return of_mel + 0.3 * voicing + PITCH_SHARE * pitch, of_mel.detach()


def _tone_loss(numbers: Tensor, tones: Tensor, late_frames: int) -> tuple[Tensor, Tensor]:
    """Of a number [B, F] before it is rounded (after it, nothing was learnt) as a verdict on the
    tone [B, M]; and the share that is right."""
    per_frame = tones.shape[1] // numbers.shape[1]
    target = tones[:, per_frame // 2 :: per_frame]  # [B, F]
    numbers, target = numbers[:, late_frames:], target[:, : target.shape[1] - late_frames]
    toned = target > NO_TONE
    falls = (target == ENDS).float()
    loss = F.binary_cross_entropy_with_logits(TONE_STEEPNESS * numbers, falls, reduction="none")
    count = toned.sum().clamp(min=1)
    hits = ((numbers > 0) == (falls > 0)) & toned
    return (loss * toned).sum() / count, hits.sum() / count


def begin_from(folder: Path, codec: TinyCodec) -> None:
    """Takes the weights of another codec; quantised numbers that it lacks begin at random."""
    for name, weight in load_file(folder / WEIGHTS).items():
        target = codec.state_dict()[name]
        target[tuple(slice(size) for size in weight.shape)] = weight


class Whole:
    """The loss of all of the codec: on pairs, and of the vocoder."""

    def __init__(self, codec: TinyCodec, synthesizer: Synthesizer, settings: Settings) -> None:
        self._codec, self._rows = codec, settings.vocoder_batch
        self.maker = PairMaker(settings.seed, synthesizer, codec.config.mel_bands, test=False)
        self._pool, self._clips = Pool(self.maker, settings), VocoderPool(codec, settings)

    def loss(self, step: int) -> tuple[Tensor, str]:
        losses = codec_losses(self._codec, self._pool.batch())
        of_voice = self._clips.loss(self._rows, coded=step % 2 == 1)
        return losses.total + of_voice, (
            f"loss {losses.total.item():.3f} mel {losses.mel.item():.3f} "
            f"phonemes {losses.phoneme_right.item():.3f} "
            f"tones {losses.tone_right.item():.3f} vocoder {of_voice.item():.3f}"
        )


def speaking_parts(codec: TinyCodec) -> list[nn.Module]:
    """What makes sound of codes."""
    return [codec.from_code, codec.coarse, codec.up, codec.fine, codec.to_mel, codec.vocoder]


def train(
    output_dir: Path, settings: Settings, start: Path | None = None, *, keep_codes: bool = False
) -> None:
    """Raises `ConfigError` for codes to be kept of no codec."""
    if keep_codes and start is None:
        raise ConfigError("--keep_codes goes on with a codec: --start_from has to name it")
    torch.manual_seed(settings.seed)
    torch.set_num_threads(settings.threads)
    output_dir.mkdir(parents=True, exist_ok=True)
    codec = TinyCodec(CodecConfig(phonemes=PHONEMES))
    if start is not None:
        begin_from(start, codec)
    if keep_codes:
        codec.requires_grad_(False).eval()
        for part in speaking_parts(codec):
            part.requires_grad_(True)
    voice = list(codec.vocoder.parameters())
    other = [p for p in codec.parameters() if p.requires_grad and all(p is not v for v in voice)]
    optimiser = torch.optim.AdamW([{"params": other}, {"params": voice}], settings.rate)
    with Synthesizer() as synthesizer:
        began = time.monotonic()
        what = Sayings(codec, settings) if keep_codes else Whole(codec, synthesizer, settings)
        _log(output_dir, f"pool of {settings.pairs} in {time.monotonic() - began:.0f} s")
        began, step, share = time.monotonic(), 0, 0.0
        while share < 1.0:
            rate = settings.rate * min(1.0, step / 100) * (1.0 - share) + 1e-5
            for group in optimiser.param_groups:
                group["lr"] = rate
            loss, line = what.loss(step)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(other, 1.0)
            nn.utils.clip_grad_norm_(voice, 1.0)
            optimiser.step()
            share = (time.monotonic() - began) / (60 * settings.minutes)
            if step % 100 == 0:
                _log(output_dir, f"step {step} at {60 * settings.minutes * share:.0f} s: {line}")
            if step % 1000 == 999:
                codec.save(output_dir)
            step += 1
    codec.save(output_dir)
    dropped = what.maker.dropped if isinstance(what, Whole) else 0
    ran = {
        "settings": asdict(settings),
        "keep_codes": keep_codes,
        "steps": step,
        "pairs_dropped": dropped,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
    }
    (output_dir / "codec_training.json").write_text(json.dumps(ran, indent=2) + "\n")


def _log(folder: Path, line: str) -> None:
    print(line, flush=True)
    with (folder / "codec_training.log").open("a") as log:
        log.write(line + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m models.parrot.train_codec",
        description=(__doc__ or "").split("\n", maxsplit=1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="where the codec goes")
    parser.add_argument("--start_from", type=Path, help="folder of a codec to go on from")
    parser.add_argument(
        "--keep_codes", action="store_true", help="train what makes sound of them alone"
    )
    units = {"minutes": "of training", "frames": "of 40 ms per row", "rate": "learning rate"}
    for name, default in asdict(Settings()).items():
        text = units.get(name, "of training")
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    args = vars(parser.parse_args())
    folder, start, keep = (args.pop(name) for name in ("output_dir", "start_from", "keep_codes"))
    train(folder, Settings(**args), start, keep_codes=keep)


if __name__ == "__main__":
    main()
