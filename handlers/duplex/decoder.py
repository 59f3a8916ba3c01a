"""The third duplex stage: the model's codes become sound, each frame on its way to its session."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np

from handlers.duplex.stage import DuplexStage
from handlers.messages import RATE_HZ, Message, Samples, Tick, Ticked, Uttered
from handlers.ticket import Ticket

LEVEL_FLOOR = 1e-10  # mean square: -100 dB


class DuplexDecoder(DuplexStage):
    stage: ClassVar[str] = "duplex_decoder"

    def load(self) -> None:
        from handlers.duplex.resample import FrameResampler
        from handlers.duplex.rows import RowBank

        speech, rows = self.parts.tokenizer(), self.options.rows
        self._rows: dict[Ticket, int] = {}
        self._bank = RowBank(speech.decode, speech.decoder_state, rows, self.parts.device)
        self._resampler = FrameResampler(speech.sample_rate_hz, RATE_HZ, speech.frame_samples, rows)
        self._warm_up(speech.num_codebooks)

    def _warm_up(self, num_codebooks: int) -> None:
        import torch

        self._bank.open(0)
        self._bank.step({0: torch.zeros(1, num_codebooks, dtype=torch.long)})
        self._bank.close(0)

    def process(self, batch: Sequence[Message]) -> Iterable[Message]:
        for tick in batch:
            assert isinstance(tick, Tick)
            try:
                yield from self._utter(tick)
            except Exception as error:
                yield from self.failed([frame.ticket for frame in tick.frames], error)
            self.duplex.tick_done(self.clock() - tick.began_s)
            self.forward(Ticked(tick.ticket))

    def _utter(self, tick: Tick) -> Iterable[Message]:
        for ticket in tick.left:
            self._bank.close(self._rows.pop(ticket))
        for ticket, row in tick.joined:
            self._rows[ticket] = row
            self._bank.open(row)
            self._resampler.reset(row)
        if not tick.frames:
            return
        rows = [self._rows[frame.ticket] for frame in tick.frames]
        given = {row: frame.codes[None] for row, frame in zip(rows, tick.frames, strict=True)}
        decoded = self._bank.step(given)
        sound = self._resampler.push(np.stack([decoded[row].numpy() for row in rows]), rows)
        for frame, samples in zip(tick.frames, sound, strict=True):
            level_db = _level_db(samples)
            yield Uttered(frame.ticket, frame.number, frame.heard_sample, samples, level_db)


def _level_db(samples: Samples) -> float:
    return 10 * math.log10(max(float(np.mean(np.square(samples))), LEVEL_FLOOR))
