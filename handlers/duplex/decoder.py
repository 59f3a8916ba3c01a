"""The third duplex stage: the model's codes become sound, each frame on its way to its session."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np

from handlers.duplex.stage import DuplexStage
from handlers.messages import RATE_HZ, Message, Tick, Ticked, Uttered
from handlers.ticket import Ticket

LEVEL_FLOOR = 1e-10  # mean square: -100 dB


class DuplexDecoder(DuplexStage):
    stage: ClassVar[str] = "duplex_decoder"

    def load(self) -> None:
        import torch

        from handlers.duplex.resample import FrameResampler
        from handlers.duplex.rows import RowBank

        speech, rows = self.parts.tokenizer(), self.options.rows
        self._rows: dict[Ticket, int] = {}
        self._bank = RowBank(
            speech.decode, speech.decoder_state, rows, self.parts.device, traced=speech.traceable
        )
        self._resampler = FrameResampler(speech.sample_rate_hz, RATE_HZ, speech.frame_samples, rows)
        self._bank.warm_up(torch.zeros(1, speech.num_codebooks, dtype=torch.long))

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
        levels_db = 10 * np.log10(np.maximum(np.square(sound).mean(axis=1), LEVEL_FLOOR))
        for frame, samples, level_db in zip(tick.frames, sound, levels_db.tolist(), strict=True):
            yield Uttered(frame.ticket, frame.number, frame.heard_sample, samples, level_db)
