"""The first step of a tick: it keeps the time, and turns what people say into codes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from handlers.base import CannotServe, StageError
from handlers.duplex.stage import DuplexStage, Frame, Tick, Ticking
from handlers.duplex.stream import StreamSettings, UserStream
from handlers.messages import RATE_HZ, AudioIn, Join, Message, Skipped
from handlers.ticket import Ticket

if TYPE_CHECKING:
    from torch import Tensor

OVERLOADED_S = 5.0
NO_ROW = StageError("session_limit_reached", "Every row of the model is taken; try again later.")


def is_overloaded(skipped_s: float | None, now_s: float) -> bool:
    """Whether ticks were skipped, at last at `skipped_s`, within the last `OVERLOADED_S`."""
    return skipped_s is not None and now_s - skipped_s < OVERLOADED_S


class _Session:
    def __init__(self, row: int, settings: StreamSettings) -> None:
        self.row = row
        self.stream = UserStream(settings)
        self.number = 0  # of the next frame


class DuplexEncoder(DuplexStage):
    """Every frame's length a tick: a frame of each session, encoded.

    A tick that is late is made up for, one after another; of more than `max_tick_late_ms` the
    rest is skipped, everybody's audio of that time with it, so that nothing ever runs behind.
    Without sessions there are no ticks.
    """

    stage: ClassVar[str] = "duplex_encoder"

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._sessions: dict[Ticket, _Session] = {}
        self._free = list(range(self.options.rows))
        self._joined: list[tuple[Ticket, int]] = []
        self._left: list[Ticket] = []
        self._next_s = 0.0  # when the next tick is due
        self.skipped_s: float | None = None  # when ticks were last skipped

    def load(self) -> None:
        import torch

        from handlers.duplex.resample import FrameResampler
        from handlers.duplex.rows import RowBank

        options, speech = self.options, self.parts.tokenizer()
        samples = speech.frame_samples * RATE_HZ / speech.sample_rate_hz
        if not samples.is_integer():
            raise CannotServe(
                f"the tokenizer's frames of {speech.frame_samples} samples at "
                f"{speech.sample_rate_hz} Hz are no whole number of samples at {RATE_HZ} Hz"
            )
        self._frame_samples = int(samples)
        self._frame_s = samples / RATE_HZ
        self._settings = StreamSettings(
            self._frame_samples,
            jitter_samples=round(options.jitter_ms * RATE_HZ / 1000),
            max_late_samples=round(options.max_late_ms * RATE_HZ / 1000),
        )
        self._silence = np.zeros(self._frame_samples, np.float32)
        self._resampler = FrameResampler(
            RATE_HZ, speech.sample_rate_hz, self._frame_samples, options.rows
        )
        self._bank = RowBank(
            speech.encode,
            speech.encoder_state,
            options.rows,
            self.parts.device,
            traced=speech.traceable,
        )
        self._bank.warm_up(torch.zeros(speech.frame_samples))

    @property
    def due_s(self) -> float | None:
        """When the next tick is; None without sessions."""
        return self._next_s if self._sessions else None

    def is_due(self, now_s: float) -> bool:
        """Whether there is to be a tick now, be it to tell the others that everybody has gone."""
        return now_s >= self._next_s and bool(self._sessions or self._left)

    def hear(self, batch: Sequence[Message], now_s: float) -> Iterable[Message]:
        """Who has joined or gone, and people's audio."""
        for message in batch:
            match message:
                case Join(ticket):
                    yield from self._join(ticket, now_s)
                case AudioIn(ticket, samples):
                    if ticket in self._sessions:
                        self._sessions[ticket].stream.push(samples)
        self._let_go()

    def _join(self, ticket: Ticket, now_s: float) -> Iterable[Message]:
        self._let_go()
        if not self._free:
            yield from self.failed([ticket], NO_ROW)
            return
        if not self._sessions:
            self._next_s = max(self._next_s, now_s)
        row = self._free.pop()
        self._sessions[ticket] = _Session(row, self._settings)
        self._joined.append((ticket, row))
        self._resampler.reset(row)
        self._bank.open(row)
        self.observer.rows_in_use(len(self._sessions))

    def _let_go(self) -> None:
        """The rows of those who have gone are free."""
        for ticket in [ticket for ticket in self._sessions if not ticket.live]:
            row = self._sessions.pop(ticket).row
            self._bank.close(row)
            self._free.append(row)
            if (ticket, row) in self._joined:  # nobody else has heard of it
                self._joined.remove((ticket, row))
            else:
                self._left.append(ticket)
            self.observer.rows_in_use(len(self._sessions))

    def run(self, now_s: float) -> Ticking:
        late_s = now_s - self._next_s
        self.observer.ticked(late_s)
        if late_s * 1000 > self.options.max_tick_late_ms:
            self._skip(int(late_s / self._frame_s), now_s)
            yield from self._passed_over("overload")
        self._next_s += self._frame_s
        frames: tuple[Frame, ...] = ()
        try:
            frames = self._encode()
        except Exception as error:
            yield from self.failed(self._sessions, error)
        yield from self._passed_over("late")
        tick = Tick(tuple(self._joined), tuple(self._left), frames)
        self._joined, self._left = [], []
        return tick

    def _skip(self, ticks: int, now_s: float) -> None:
        self.skipped_s = now_s
        self.observer.ticks_skipped(ticks)
        self._next_s += ticks * self._frame_s
        for session in self._sessions.values():
            session.number += ticks
            session.stream.skip(ticks)

    def _passed_over(self, reason: Any) -> Iterable[Message]:
        for ticket, session in self._sessions.items():
            samples, session.stream.passed_over = session.stream.passed_over, 0
            if samples:
                self.observer.audio_skipped(reason, samples)
                yield Skipped(ticket, samples, reason)

    def _encode(self) -> tuple[Frame, ...]:
        """The next frame of every session."""
        if not self._sessions:
            return ()
        sessions = list(self._sessions.values())
        taken = [session.stream.take() for session in sessions]
        waiting = max(session.stream.waiting for session in sessions)
        self.observer.heard_late(self._frame_s + waiting / RATE_HZ)
        self.observer.silence_substituted(sum(samples is None for samples in taken))
        rows = [session.row for session in sessions]
        heard = np.stack([self._silence if samples is None else samples for samples in taken])
        codes = self._codes(rows, self._resampler.push(heard, rows))
        frames = []
        for ticket, session in self._sessions.items():
            position = session.stream.position
            frames.append(Frame(ticket, session.number, position, codes[session.row][0]))
            session.number += 1
        return tuple(frames)

    def _codes(self, rows: Sequence[int], samples: Any) -> dict[int, Tensor]:
        """[n, frame_samples] of these rows → per row [1, D]."""
        import torch

        given = dict(zip(rows, torch.from_numpy(samples), strict=True))
        codes: dict[int, Tensor] = self._bank.step(given)
        return codes
