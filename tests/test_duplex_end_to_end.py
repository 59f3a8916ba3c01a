"""The duplex brain over its real wire, with a small random checkpoint that the test makes."""

import pytest

pytest.importorskip("torch", reason="the duplex brain needs torch")
pytest.importorskip("transformers", reason="the duplex brain needs transformers")

import asyncio
import signal
import subprocess
import sys
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.server_process import free_port
from client.realtime import AudioChunk, Realtime, Refused
from handlers.base import CannotServe
from handlers.duplex.options import ParrotOptions
from handlers.duplex.parts import Checkpoint
from handlers.duplex.resample import FrameResampler
from handlers.duplex.rows import RowBank
from handlers.messages import RATE_HZ, Samples
from models.common.tokens import hushed, silent_frame
from models.parrot.backbones import DualLlama, DualLlamaConfig, load
from models.parrot.codec import CodecConfig, TinyCodec
from models.parrot.engine import DuplexLM
from server.session import Session
from tests.duplex_fakes import FRAME_SAMPLES, Repeater, Scripted, duplex_serving, sound

ROOT = Path(__file__).parent.parent
PATIENCE_S = 60.0
ROWS = 3
LEVELS = (4, 4, 2)


def checkpoint(folder: Path, codes: int = 32) -> Path:
    """Random weights, large enough that what is said depends on what is heard."""
    torch.manual_seed(7)
    config = DualLlamaConfig(
        join="sum",
        codebook_size=codes,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
    )
    DualLlama(config).save_pretrained(folder)
    codec = TinyCodec(CodecConfig(levels=LEVELS, width=16, fast_width=12, mel_bands=20))
    with torch.no_grad():
        for parameter in codec.parameters():
            parameter.mul_(2)
        codec.train()
        codec.encode(torch.randn(1, 640 * 50) * 0.2)  # fills the normalisation's averages
    codec.eval().save(folder)
    return folder


@dataclass
class Tapped:
    """An engine that keeps what went in and out of each session, in the order of opening."""

    engine: DuplexLM
    heard: list[list[Tensor]] = field(default_factory=list)
    said: list[list[Tensor]] = field(default_factory=list)
    together: int = 0  # steps of more than one session
    _index: dict[Hashable, int] = field(default_factory=dict)

    def open(self, session: Hashable, prefix: Tensor | None = None, *, seed: int = 0) -> None:
        self.engine.open(session, prefix, seed=seed)
        self._index[session] = len(self.heard)
        self.heard.append([])
        self.said.append([])

    def step(self, user: Mapping[Hashable, Tensor]) -> dict[Hashable, Tensor]:
        said = self.engine.step(user)
        self.together += len(user) > 1
        for session, frame in user.items():
            self.heard[self._index[session]].append(frame.clone())
            self.said[self._index[session]].append(said[session].clone())
        return said

    def close(self, session: Hashable) -> None:
        self.engine.close(session)

    def of(self, session: int) -> tuple[Tensor, Tensor]:
        """The person's codes and ours. [F, D] each"""
        index = session + 1  # the first was the warm-up
        return torch.stack(self.heard[index]), torch.stack(self.said[index])


class TappedCheckpoint(Checkpoint):
    tap: Tapped

    def engine(self) -> DuplexLM:
        self.tap = Tapped(super().engine())
        return self.tap


def options(folder: Path, **changes: Any) -> ParrotOptions:
    """Greedy; every frame is audible; however slow the machine, no tick is left out."""
    given = {
        "temperature": 0.0,
        "rows": ROWS,
        "window_frames": 512,
        "silence_db": -99.0,
        "max_tick_late_ms": 60_000.0,
    }
    return ParrotOptions(model_path=str(folder), **{**given, **changes})


def patient(rows: int) -> ParrotOptions:
    return ParrotOptions(rows=rows, max_tick_late_ms=60_000.0)


def voice(seconds: float, seed: int) -> Samples:
    """Something with changes in it. [T]"""
    noise = np.random.default_rng(seed).standard_normal(round(seconds * RATE_HZ))
    time = np.arange(len(noise)) / RATE_HZ
    loudness = 0.02 + 0.2 * np.square(np.sin(2 * np.pi * (1.1 + seed) * time))
    return (noise * loudness).astype(np.float32)


def resampled(audio: Samples, from_hz: int, to_hz: int, frame_samples: int) -> Samples:
    """[T] → [T * to_hz / from_hz]"""
    resampler = FrameResampler(from_hz, to_hz, frame_samples, rows=1)
    frames = audio.reshape(-1, frame_samples)
    return np.concatenate([resampler.push(frame[None], [0])[0] for frame in frames])


def whole_codes(codec: TinyCodec, audio: Samples) -> Tensor:
    """What the tokenizer makes of the whole signal, [T] at the wire's rate. → [F, D]"""
    own = resampled(audio, RATE_HZ, codec.sample_rate_hz, FRAME_SAMPLES)
    return codec.encode(torch.from_numpy(own)[None])[0]


def answers(folder: Path, user: Tensor) -> Tensor:
    """What the model says to these codes, a whole forward pass for each frame. [F, D] → [F, D]"""
    model = load(folder).eval()
    size = model.config.codebook_size
    codec = TinyCodec.load(folder)
    rest = int(codec.encode(torch.zeros(1, 25 * codec.frame_samples))[0, -1, 0])
    frames = torch.full((1, 2, user.shape[1]), model.config.start_id)
    said: list[Tensor] = []
    due = torch.zeros(user.shape[1])
    for frame in [None, *user]:
        if frame is not None:
            frames = torch.cat((frames, torch.stack((frame, said[-1]))[None]))
        with torch.no_grad():
            logits = model(frames.flatten()[None]).logits[0, -1, 1, :, :size]  # [D, K]
        silence = logits.softmax(-1)[:, rest]
        logits[:, rest] = -torch.inf
        quiet = frames[-1, 1] == rest
        due = 0.92 * due * quiet + 1 - silence
        options = ParrotOptions()
        needed = torch.where(quiet, options.onset, 1 - options.offset)
        said.append(torch.where(due >= needed, logits.argmax(-1), rest))
        due = due * quiet
    return torch.stack(said[1:])


def check_heard(heard: Tensor, folder: Path, audio: Samples) -> None:
    """The person's codes [F, D] are the whole signal's, behind some frames of silence."""
    codec = TinyCodec.load(folder)
    late = codec.encode_latency_frames
    for waited in range(10):
        signal = np.pad(audio, (waited * FRAME_SAMPLES, len(heard) * FRAME_SAMPLES))
        whole = whole_codes(codec, signal[: len(heard) * FRAME_SAMPLES])
        if torch.equal(heard[late:], whole[: len(heard) - late]):
            return
    raise AssertionError("what was heard is not what was said")


def check_audio(received: Samples, said: Tensor, folder: Path, row: int) -> None:
    """The audio [T] on the wire is that of our codes [F, D], from some frame on.

    Random weights make much of another order of summation, as with other rows beside it: within a
    fiftieth, by root mean square. In tests/models/test_codec.py rows are equal to much less.
    """
    codec = TinyCodec.load(folder)
    bank = RowBank(codec.decode, codec.decoder_state, ROWS, "cpu")
    bank.open(row)
    sound = np.concatenate([bank.step({row: frame[None]})[row].numpy() for frame in said])
    sound = resampled(sound, codec.sample_rate_hz, RATE_HZ, codec.frame_samples)
    late, rest = codec.decode_latency_frames, silent_frame(codec)
    sounding = torch.cat((rest.expand(late, -1), said))[: len(said)]
    wire: Any = SimpleNamespace(
        frame_samples=FRAME_SAMPLES, sample_rate_hz=RATE_HZ, decode_latency_frames=late
    )
    wanted = hushed(torch.from_numpy(sound), sounding, rest, wire).numpy().clip(-1, 1)
    assert len(received) > 10 * FRAME_SAMPLES
    assert np.abs(received).max() > 1e-3
    for begin in range(0, len(wanted) - len(received) + 1, FRAME_SAMPLES):
        off = wanted[begin : begin + len(received)] - received
        if np.square(off).sum() < np.square(received).sum() / 50**2:
            return
    raise AssertionError("what was sent is not what was said")


async def listen(client: Realtime, frames: int) -> Samples:
    """The first `frames` of the model's audio. [T]"""
    audio: list[Samples] = []
    async with asyncio.timeout(PATIENCE_S):
        async for event in client:
            if isinstance(event, AudioChunk):
                audio.append(event.samples)
                if len(audio) == frames:
                    break
            else:
                assert event["type"] != "error", event
    return np.concatenate(audio)


async def converse(url: str, audio: Samples, frames: int = 45) -> Samples:
    async with Realtime.connect(url) as client:
        await client.send_audio(audio)
        return await listen(client, frames)


async def until(client: Realtime, kind: str) -> dict[str, Any]:
    async with asyncio.timeout(PATIENCE_S):
        async for event in client:
            if not isinstance(event, AudioChunk) and event["type"] == kind:
                return event
    raise AssertionError("the connection ended")


@pytest.mark.asyncio
async def test_sessions_together_hear_and_say_what_the_plain_loop_does(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    parts = TappedCheckpoint(options(folder))
    voices = [voice(1.6, seed) for seed in (0, 1)]
    async with (
        duplex_serving(parts, options(folder)) as server,
        Realtime.connect(server.url) as first,
        Realtime.connect(server.url) as second,
    ):
        await first.send_audio(voices[0])
        await second.send_audio(voices[1])
        received = await asyncio.gather(listen(first, 45), listen(second, 45))
    assert parts.tap.together >= 40
    for session, audio in enumerate(voices):
        heard, said = parts.tap.of(session)
        assert len(heard) >= 45
        assert len(heard.unique()) > 3
        assert len(said.unique()) > 3
        check_heard(heard, folder, audio)
        torch.testing.assert_close(said, answers(folder, heard), rtol=0, atol=0)
        check_audio(received[session], said, folder, row=session)


@pytest.mark.asyncio
async def test_one_that_leaves_and_one_that_takes_its_row_disturb_nobody(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    parts = TappedCheckpoint(options(folder))
    async with duplex_serving(parts, options(folder)) as server:
        async with Realtime.connect(server.url) as staying:
            await staying.send_audio(voice(1.9, 0))
            lasting = asyncio.create_task(listen(staying, 70))
            await converse(server.url, voice(1.0, 1), frames=15)
            await converse(server.url, voice(1.0, 2), frames=25)
            await lasting
        assert server.metric("rows_in_use") <= 1
    for session in range(3):
        heard, said = parts.tap.of(session)
        check_heard(heard, folder, voice((1.9, 1.0, 1.0)[session], session))
        torch.testing.assert_close(said, answers(folder, heard), rtol=0, atol=0)


@pytest.mark.asyncio
async def test_more_sessions_than_rows_are_refused_until_one_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with duplex_serving(Scripted(Repeater(1)), patient(1)) as server:
        left, leave = asyncio.Event(), server.hub.leave

        def leave_and_tell(session: Session) -> None:
            leave(session)
            left.set()

        monkeypatch.setattr(server.hub, "leave", leave_and_tell)
        async with Realtime.connect(server.url):
            with pytest.raises(Refused, match="session_limit_reached"):
                async with Realtime.connect(server.url):
                    pass
        await left.wait()
        async with Realtime.connect(server.url) as client:
            await client.send_audio(sound(0.4, 0.5))
            await listen(client, 5)


@pytest.mark.asyncio
async def test_audio_that_a_stall_held_up_is_passed_over_and_told() -> None:
    async with duplex_serving(Scripted(Repeater(1)), patient(1)) as server:
        async with Realtime.connect(server.url) as client:
            await client.send_audio(sound(0.4, 0.5))
            await until(client, "response.done")  # the rest of that second there is silence
            await client.send_audio(sound(1.0, 0.5))
            error = await until(client, "error")
            assert error["error"]["code"] == "input_audio_late"
            done = asyncio.create_task(until(client, "response.done"))
            await done
        skipped = server.metric("audio_skipped_seconds_total", reason="late")
        assert 0.2 < skipped < 1.0


@pytest.mark.asyncio
async def test_a_listener_that_stays_behind_is_sent_no_more() -> None:
    async with duplex_serving(Scripted(Repeater(1)), patient(1)) as server:
        async with Realtime.connect(server.url) as client:
            await client.send_audio(sound(4.0, 0.5))
            samples = 0
            async with asyncio.timeout(PATIENCE_S):
                async for event in client:
                    if isinstance(event, AudioChunk):
                        samples += len(event.samples)
                        await client.report_playback(event.item_id, 480)
                    elif event["type"] == "response.done":
                        break
        assert 1.0 < samples / RATE_HZ < 1.2
        assert server.metric("audio_skipped_seconds_total", reason="client_behind") > 2.5


@pytest.mark.asyncio
async def test_a_broken_model_ends_its_sessions_by_name_and_serves_the_next() -> None:
    lm = Repeater(2)
    async with duplex_serving(Scripted(lm), patient(2)) as server:
        async with Realtime.connect(server.url) as client:
            await client.send_audio(sound(4.0, 0.5))
            await listen(client, 3)
            lm.broken = True
            with pytest.raises(Refused, match="duplex_lm_error"):
                await until(client, "never")
        lm.broken = False
        await converse(server.url, sound(1.0, 0.5), frames=5)


@pytest.mark.asyncio
async def test_a_checkpoint_that_does_not_fit_its_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, codes=20)
    parts = Checkpoint(options(folder))
    with pytest.raises(CannotServe, match="the tokenizer has 1 codebooks of 32, the LM 1 of 20"):
        parts.engine()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("checkpoint"))


def test_the_server_process_answers_and_ends_in_order(tmp_path: Path) -> None:
    port, folder = free_port(), checkpoint(tmp_path / "checkpoint")
    command = [sys.executable, "-m", "server", "--port", str(port), "--brain", "parrot"]
    command += ["--parrot_model_path", str(folder), "--parrot_rows", "2"]
    command += ["--parrot_silence_db", "-99", "--parrot_max_tick_late_ms", "60000"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith(b"Parley answers at "), (tmp_path / "log").read_text()
        asyncio.run(converse(f"ws://127.0.0.1:{port}/v1/realtime", voice(1.0, 0), frames=10))
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.wait()


def test_without_a_checkpoint_the_process_says_what_is_missing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "server", "--brain", "parrot"]
    command += ["--parrot_model_path", str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert ran.returncode == 2
    assert "lacks config.json, model.safetensors" in ran.stderr
    assert "Traceback" not in ran.stderr
