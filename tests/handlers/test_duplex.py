"""The duplex stages on a virtual clock: ticks, rows, late audio, overload; scripted models."""

import pytest

pytest.importorskip("torch", reason="the duplex brain needs torch")
pytest.importorskip("transformers", reason="the duplex brain needs transformers")

import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from handlers.base import CannotServe, Handler
from handlers.duplex.chain import DuplexChain
from handlers.duplex.decoder import DuplexDecoder
from handlers.duplex.encoder import OVERLOADED_S
from handlers.duplex.options import ParrotOptions
from handlers.duplex.parts import Checkpoint
from handlers.duplex.resample import FrameResampler
from handlers.duplex.rows import RowBank
from handlers.duplex.stage import Frame, Tick, Ticking
from handlers.messages import (
    RATE_HZ,
    AudioIn,
    Failed,
    Join,
    Message,
    Samples,
    Skipped,
    Uttered,
)
from handlers.ticket import Ticket
from models.common.tokens import SETTLED_FRAMES, RowState, hushed, silent_frame
from models.parrot.tokenizers import load_tokenizer
from server.metrics import Metrics
from tests.duplex_fakes import (
    FRAME_S,
    FRAME_SAMPLES,
    LoudnessTokenizer,
    Repeater,
    Scripted,
    sound,
)

FRAME = FRAME_SAMPLES


def steps(count: int, first: int = 1) -> Samples:
    """Audible frames that can be told apart: all samples of frame n are (first + n) / 1000."""
    values = np.repeat(np.arange(first, first + count) / 1000, FRAME)
    return values.astype(np.float32)


class TestRowBank:
    def test_rows_step_come_leave_and_rest_alone(self) -> None:
        sizes: list[int] = []

        def add_up(given: Any, state: RowState, active: Any) -> Any:
            sizes.append(len(given))
            total = state.kept("sum", (1,), given) + given
            state.keep("sum", total, active)
            return total

        def step(given: dict[int, float]) -> dict[int, float]:
            out = bank.step({row: torch.tensor([value]) for row, value in given.items()})
            return {row: float(value) for row, value in out.items()}

        bank = RowBank(add_up, RowState, rows=6, device="cpu")
        for row in (5, 0, 3):
            bank.open(row)
        assert step({0: 1, 3: 5, 5: 2}) == {0: 1, 3: 5, 5: 2}
        assert step({3: 1}) == {3: 6}
        bank.close(5)  # another one moves
        assert step({0: 1, 3: 1}) == {0: 2, 3: 7}
        bank.open(5)
        assert step({5: 1, 3: 1, 0: 1}) == {0: 3, 3: 8, 5: 1}
        bank.close(5)
        bank.close(3)
        assert step({0: 1}) == {0: 4}
        assert sizes == [3, 1, 2, 3, 1]  # no other rows


class Rig:
    """The stage, run by hand on a clock that moves when told."""

    def __init__(self, rows: int = 4, **options: Any) -> None:
        self.now_s = 100.0
        self.model = Repeater(rows)
        self.metrics = Metrics()
        self.out: list[Message] = []
        self.ticks: list[Tick] = []
        self.step_s = 0.0  # that the LM takes
        self.chain = DuplexChain(
            ParrotOptions(rows=rows, **options),
            Scripted(self.model),
            emit=self.out.append,
            observer=self.metrics,
            clock=lambda: self.now_s,
        )
        self.chain.setup()
        self.model.closed.clear()  # the warm-up
        self._run, self.chain.lm.run = self.chain.lm.run, self._step  # type: ignore[method-assign]

    def _step(self, tick: Tick) -> Ticking:
        self.ticks.append(tick)
        self.now_s += self.step_s
        return (yield from self._run(tick))

    def give(self, *messages: Message) -> None:
        """The stage's thread takes these."""
        for message in self.chain.process(messages):
            self.chain.emit(message)

    def run(self, seconds: float) -> None:
        """Let time pass, serving the stage whenever it is due."""
        end_s = self.now_s + seconds
        while (due_s := self.chain.due_s) is not None and due_s <= end_s + 1e-9:
            self.now_s = max(self.now_s, due_s)
            self.give()
        self.now_s = max(self.now_s, end_s)

    def uttered(self, ticket: Ticket) -> list[Uttered]:
        return [m for m in self.out if isinstance(m, Uttered) and m.ticket is ticket]

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"parley_{name}", labels) or 0.0


class Nobody:
    def receive(self, message: Message) -> None: ...


def ticket(name: str = "") -> Ticket:
    return Ticket(Nobody(), name)


class TestStages:
    def test_every_frame_of_a_person_gets_one_of_the_model_on_time(self) -> None:
        rig, me = Rig(), ticket()
        rig.give(Join(me))
        rig.give(AudioIn(me, np.concatenate([sound(0.2, 0.0), sound(0.4, 0.5)]), 0))
        rig.run(1.0)
        frames = rig.uttered(me)
        assert [frame.number for frame in frames] == list(range(26))
        assert all(len(frame.samples) == FRAME for frame in frames)
        loud = [frame.number for frame in frames if frame.level_db > -20]
        assert loud == list(range(6, 17)) or loud == list(range(6, 16))
        assert frames[-1].heard_sample == round(0.6 * RATE_HZ)
        assert rig.metric("tick_lateness_seconds_count") == 26
        assert rig.metric("tick_lateness_seconds_sum") == pytest.approx(0, abs=1e-6)

    def test_no_sessions_no_ticks(self) -> None:
        rig, me = Rig(), ticket()
        rig.run(1.0)
        assert rig.chain.due_s is None
        rig.give(Join(me))
        rig.run(0.4)
        me.cancel()
        rig.run(1.0)
        assert rig.chain.due_s is None
        assert rig.metric("rows_in_use") == 0
        assert rig.model.sessions == {}
        assert len(rig.model.closed) == 1

    def test_sessions_share_a_tick_and_each_hears_its_own(self) -> None:
        rig, people = Rig(), [ticket(str(n)) for n in range(3)]
        for n, me in enumerate(people):
            rig.give(Join(me), AudioIn(me, sound(1.0, 0.2 * (n + 1)), 0))
        before = len(rig.ticks)
        rig.run(0.4)
        assert len(rig.ticks) - before == 10
        assert all(len(tick.frames) == 3 for tick in rig.ticks[before:])
        for n, me in enumerate(people):
            assert rig.model.sessions[me][-1][0] == pytest.approx(20 * (n + 1), abs=1)
            assert np.abs(rig.uttered(me)[-1].samples).max() == pytest.approx(
                0.2 * (n + 1), abs=0.02
            )

    def test_whom_the_model_has_long_been_silent_for_has_nothing_decoded(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rig, quiet, talking = Rig(), ticket("quiet"), ticket("talking")
        decoded: list[int] = []
        step = rig.chain.decoder._bank.step

        def counted(given: Any) -> Any:
            decoded.append(len(given))
            return step(given)

        monkeypatch.setattr(rig.chain.decoder._bank, "step", counted)
        again = np.concatenate([sound(0.2, 0.5), sound(1.8, 0.0), sound(1.0, 0.5)])
        rig.give(Join(quiet), Join(talking), AudioIn(quiet, again, 0))
        rig.give(AudioIn(talking, sound(3.0, 0.3), 0))
        rig.run(3.0)
        assert {1, 2} == set(decoded)
        asleep = decoded.index(1)
        assert decoded[asleep:].index(2) == pytest.approx(1.8 / 0.04 - SETTLED_FRAMES, abs=2)
        loud = [uttered.level_db > -20 for uttered in rig.uttered(quiet)]
        assert (loud[4], loud[10], any(loud[asleep : asleep + 15])) == (True, False, False)
        assert all(loud[-17:-3])
        assert all(uttered.level_db > -20 for uttered in rig.uttered(talking)[3:-3])

    @pytest.mark.parametrize("late", [0, 1, 2])
    def test_who_breaks_off_is_heard_no_more_whatever_the_decoder_makes_of_it(
        self, late: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def ringing(self: LoudnessTokenizer, codes: Tensor, *_: Any) -> Tensor:
            return torch.full((len(codes), self.frame_samples), 0.3)

        monkeypatch.setattr(LoudnessTokenizer, "decode", ringing)
        monkeypatch.setattr(LoudnessTokenizer, "decode_latency_frames", late)
        rig, me = Rig(), ticket()
        rig.give(Join(me), AudioIn(me, np.concatenate([sound(0.4, 0.5), sound(2.0, 0.0)]), 0))
        rig.run(2.0)
        said = [code for code, _ in rig.model.sessions[me]]
        first = next(n for n, code in enumerate(said) if code) + late
        over = next(n for n in range(first, len(said)) if not said[n]) + max(late - 1, 0)
        samples = [frame.samples for frame in rig.uttered(me)]
        assert all(np.abs(samples[n]).max() > 0.29 for n in range(first, over))
        assert np.abs(samples[over][: RATE_HZ // 200]).max() > 0.1  # fades
        assert not samples[over][RATE_HZ * 30 // 1000 :].any()
        assert not np.concatenate(samples[over + 1 :]).any()

    def test_what_breaks_off_sounds_live_as_in_a_file(self) -> None:
        speech, me = load_tokenizer("tiny"), ticket("me")
        rest = silent_frame(speech)
        generator = torch.Generator().manual_seed(3)
        said = torch.randint(speech.codebook_size, (60, 1), generator=generator)
        for begin, end in ((0, 6), (14, 15), (20, 22), (30, 45), (47, 48), (50, 60)):
            said[begin:end] = rest
        parts = Scripted(Repeater(1))
        parts.tokenizer = lambda: speech  # type: ignore[method-assign]
        out: list[Message] = []
        decoder = DuplexDecoder(ParrotOptions(rows=1), parts, Metrics())
        decoder.load()
        for n, codes in enumerate(said):
            out += decoder.run(Tick(((me, 0),) * (n == 0), (), (Frame(me, n, 0, codes),)))
        live = np.concatenate([m.samples for m in out if isinstance(m, Uttered)])
        sound = speech.decode(said[None], speech.decoder_state(1))[0]
        late = speech.decode_latency_frames
        sounding = torch.cat((rest.expand(late, -1), said))[: len(said)]
        whole = hushed(sound, sounding, rest, speech).numpy()
        resampler = FrameResampler(speech.sample_rate_hz, RATE_HZ, speech.frame_samples, rows=1)
        whole_frames = whole.reshape(-1, 1, speech.frame_samples)
        wanted = np.concatenate([resampler.push(frame, [0])[0] for frame in whole_frames])
        assert np.abs(wanted).max() > 0.1
        # The fade is live a millisecond earlier, as the resampler is that late.
        off = np.abs(live - wanted)[FRAME:].reshape(-1, FRAME)
        fading = [n for n in range(len(off)) if off[n].max() > 0.01]
        assert all(off[n, RATE_HZ * 32 // 1000 :].max() < 1e-3 for n in fading)
        assert len(fading) <= 6

    def test_a_row_is_free_as_soon_as_somebody_leaves_in_mid_tick(self) -> None:
        rig = Rig(rows=2)
        a, b, c, d = (ticket(name) for name in "abcd")
        rig.give(Join(a), Join(b), AudioIn(a, sound(1.0, 0.5), 0))
        rig.run(0.2)
        rig.give(Join(c))
        assert [(m.ticket, m.code) for m in rig.out if isinstance(m, Failed)] == [
            (c, "session_limit_reached")
        ]
        a.cancel()
        rig.give(Join(d), AudioIn(d, sound(1.0, 0.3), 0))
        rig.run(0.2)
        assert set(rig.model.sessions) == {b, d}
        assert {code for code, _ in rig.model.sessions[d]} <= {30, 0}
        assert not any(isinstance(m, Failed) and m.ticket is d for m in rig.out)
        assert [frame.number for frame in rig.uttered(b)] == list(range(11))

    def test_who_comes_and_goes_between_two_ticks_never_was(self) -> None:
        rig, a, b, c = Rig(rows=2), ticket(), ticket(), ticket()
        rig.give(Join(a))
        rig.now_s += 0.01
        rig.give(Join(b))
        b.cancel()
        rig.give()
        rig.give(Join(c))
        rig.run(0.1)
        assert set(rig.model.sessions) == {a, c}
        assert rig.model.closed == []

    def test_missing_audio_is_silence_and_is_counted(self) -> None:
        rig, me = Rig(), ticket()
        rig.give(Join(me))
        rig.run(0.4)
        assert rig.metric("silence_frames_total") == 11
        assert [code for code, _ in rig.model.sessions[me]] == [0] * 11

    def test_late_ticks_are_made_up_for(self) -> None:
        rig, me = Rig(), ticket()
        rig.give(Join(me), AudioIn(me, steps(50), 0))
        rig.run(0.4)
        rig.now_s += 0.2  # the thread slept
        rig.run(0.0)
        assert [frame.number for frame in rig.uttered(me)] == list(range(16))
        assert rig.metric("ticks_skipped_total") == 0
        assert rig.chain.due_s == pytest.approx(100.0 + 16 * FRAME_S)

    def test_too_late_ticks_are_skipped_by_name_and_the_channels_stay_together(self) -> None:
        rig, me = Rig(), ticket()
        rig.give(Join(me), AudioIn(me, steps(100), 0))
        rig.run(0.4)
        assert not rig.chain.overloaded
        rig.now_s += 1.01
        rig.run(0.0)
        told = [m for m in rig.out if isinstance(m, Skipped)]
        assert [(m.samples, m.reason) for m in told] == [(24 * FRAME, "overload")]
        assert rig.metric("ticks_skipped_total") == 24
        assert rig.metric("audio_skipped_seconds_total", reason="overload") == pytest.approx(0.96)
        last = rig.uttered(me)[-1]
        assert last.heard_sample == (last.number + 1) * FRAME
        assert rig.chain.due_s == pytest.approx(100.0 + (last.number + 1) * FRAME_S)
        assert rig.chain.overloaded
        rig.now_s += OVERLOADED_S
        assert not rig.chain.overloaded

    def test_a_model_that_hangs_holds_the_ticks_up_and_nothing_piles_up(self) -> None:
        rig, me = Rig(), ticket()
        rig.give(Join(me), AudioIn(me, steps(200), 0))
        rig.run(0.2)
        rig.step_s = 2.0
        rig.run(0.04)
        rig.step_s = 0.0
        before = len(rig.ticks)
        rig.run(0.0)
        assert len(rig.ticks) - before <= 1 + 0.4 / FRAME_S
        assert rig.metric("ticks_skipped_total") > 0
        last = rig.uttered(me)[-1]
        assert last.heard_sample == (last.number + 1) * FRAME
        assert last.number == pytest.approx(2.24 / FRAME_S, abs=3)

    def test_a_model_that_is_too_slow_for_good_skips_ticks_and_stays_on_time(self) -> None:
        rig, me = Rig(), ticket()
        rig.step_s = 0.06
        rig.give(Join(me), AudioIn(me, steps(250), 0))
        rig.run(6.0)
        last = rig.uttered(me)[-1]
        assert last.number == pytest.approx(6.0 / FRAME_S, abs=0.5 / FRAME_S)
        assert len(rig.uttered(me)) == pytest.approx(6.0 / 0.06, abs=2)

    def test_a_broken_model_fails_its_sessions_by_name_and_the_stages_go_on(self) -> None:
        rig, a, b = Rig(), ticket(), ticket()
        rig.give(Join(a))
        rig.run(0.2)
        rig.model.broken = True
        rig.run(0.04)
        failed = [m for m in rig.out if isinstance(m, Failed)]
        assert [(m.ticket, m.code) for m in failed] == [(a, "duplex_lm_error")]
        a.cancel()
        rig.model.broken = False
        rig.give(Join(b), AudioIn(b, sound(1.0, 0.5), 0))
        rig.run(0.4)
        assert rig.uttered(b)[-1].level_db > -20

    def test_jitter_makes_no_drift(self) -> None:
        """A minute of blocks of 20 ms that come up to 15 ms early or late."""
        rig, me = Rig(rows=1), ticket()
        rig.give(Join(me))
        jitter = np.random.default_rng(1).uniform(-0.015, 0.015, 3_000)
        block = np.zeros(480, np.float32)
        for count, off_s in enumerate(jitter):
            at_s = 100.0 + count * 0.02 + float(off_s)
            rig.run(max(0.0, at_s - rig.now_s))
            rig.give(AudioIn(me, block, count * 480))
            rig.out[:-1] = []
        rig.run(0.1)
        last = rig.uttered(me)[-1]
        assert last.number == pytest.approx(60 / FRAME_S, abs=4)
        assert abs(last.heard_sample - (last.number + 1) * FRAME) <= 4 * FRAME
        assert rig.metric("audio_skipped_seconds_total", reason="late") == 0


class Clocked(Handler[None]):
    """Notes when it is served and with how many messages."""

    def __init__(self) -> None:
        super().__init__(lambda message: None)
        self.served: list[tuple[float, int]] = []
        self.done = threading.Event()

    def setup(self) -> None:
        self.due_s = time.monotonic() + 0.02

    def process(self, batch: Sequence[Message]) -> Iterable[Message]:
        assert self.due_s is not None
        self.served.append((time.monotonic() - self.due_s, len(batch)))
        self.due_s += 0.01
        if len(self.served) == 5:
            self.due_s = None
            self.done.set()
        return ()


def test_a_stage_with_a_clock_is_served_then_and_not_before() -> None:
    stage, owner = Clocked(), ticket()
    stage.start()
    stage.wait_ready(5.0)
    for _ in range(7):
        stage.put(Join(owner))
    assert stage.done.wait(5.0)
    stage.stop()
    assert sum(count for _, count in stage.served) == 7
    assert all(late_s >= 0 for late_s, _ in stage.served)
    assert len(stage.served) == 5


@pytest.mark.parametrize(
    ("files", "options", "told"),
    [
        (None, {}, "there is no such folder"),
        ([], {}, "lacks config.json, model.safetensors"),
        (["config.json"], {}, "lacks model.safetensors"),
        (["config.json", "model.safetensors"], {"engine": "jax"}, "--parrot_engine jax"),
        (["config.json", "model.safetensors"], {"rows": 0}, "--parrot_rows"),
    ],
)
def test_what_is_missing_is_said(
    tmp_path: Any, files: list[str] | None, options: dict[str, Any], told: str
) -> None:
    folder = tmp_path / "checkpoint"
    if files is not None:
        folder.mkdir()
        for name in files:
            (folder / name).touch()
    with pytest.raises(CannotServe, match=told):
        Checkpoint(ParrotOptions(model_path=str(folder), **options))
