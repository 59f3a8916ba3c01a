"""The third step of a tick: the model's codes become sound, a frame for each session."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import ClassVar

import numpy as np

from handlers.duplex.stage import DuplexStage, Frame, Tick, Ticking
from handlers.messages import RATE_HZ, Message, Uttered
from handlers.ticket import Ticket

LEVEL_FLOOR = 1e-10  # mean square: -100 dB


class DuplexDecoder(DuplexStage):
    """Whom the model has been silent for has nothing decoded: most of the time, most of them."""

    stage: ClassVar[str] = "duplex_decoder"

    def load(self) -> None:
        import torch

        from handlers.duplex.resample import FrameResampler
        from handlers.duplex.rows import RowBank
        from models.common.tokens import SETTLED_FRAMES, hush, silent_before, silent_frame

        speech, rows = self.parts.tokenizer(), self.options.rows
        self._rows: dict[Ticket, int] = {}
        self._silent_for: dict[Ticket, int] = {}  # frames
        self._settled = SETTLED_FRAMES
        self._silence = tuple(silent_frame(speech, self.parts.device).tolist())
        self._late = speech.decode_latency_frames
        self._silent_before: Callable[[int, int], int] = silent_before
        self._frame_samples = round(speech.frame_samples * RATE_HZ / speech.sample_rate_hz)
        self._hush = hush(self._frame_samples, RATE_HZ).numpy()
        self._bank = RowBank(
            speech.decode, speech.decoder_state, rows, self.parts.device, traced=speech.traceable
        )
        self._resampler = FrameResampler(speech.sample_rate_hz, RATE_HZ, speech.frame_samples, rows)
        self._bank.warm_up(torch.zeros(1, speech.num_codebooks, dtype=torch.long))

    def run(self, tick: Tick) -> Ticking:
        try:
            yield from self._utter(tick)
        except Exception as error:
            yield from self.failed([frame.ticket for frame in tick.frames], error)
        return tick

    def _utter(self, tick: Tick) -> Iterable[Message]:
        for ticket in tick.left:
            self._bank.close(self._rows.pop(ticket))
            del self._silent_for[ticket]
        for ticket, row in tick.joined:
            self._rows[ticket], self._silent_for[ticket] = row, 0
            self._bank.open(row)
            self._resampler.reset(row)
        if not tick.frames:
            return
        sound = np.zeros((len(tick.frames), self._frame_samples), np.float32)
        awake = [place for place, frame in enumerate(tick.frames) if self._sounds(frame)]
        if awake:
            frames = [tick.frames[place] for place in awake]
            rows = [self._rows[frame.ticket] for frame in frames]
            given = {row: frame.codes[None] for row, frame in zip(rows, frames, strict=True)}
            decoded = self._bank.step(given)
            heard = self._resampler.push(np.stack([decoded[r].numpy() for r in rows]), rows)
            silent = [self._silent_for[frame.ticket] for frame in frames]
            sound[awake] = heard * self._hush[[self._silent_before(n, self._late) for n in silent]]
        levels_db = 10 * np.log10(np.maximum(np.square(sound).mean(axis=1), LEVEL_FLOOR))
        for frame, samples, level_db in zip(tick.frames, sound, levels_db.tolist(), strict=True):
            yield Uttered(frame.ticket, frame.number, frame.heard_sample, samples, level_db)

    def _sounds(self, frame: Frame) -> bool:
        """Not once silence has lasted for so long that the decoder would only go on with it."""
        silent = tuple(frame.codes.tolist()) == self._silence
        self._silent_for[frame.ticket] = self._silent_for[frame.ticket] + 1 if silent else 0
        return self._silent_for[frame.ticket] <= self._settled
