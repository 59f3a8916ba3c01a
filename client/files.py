"""WAV files in place of the microphone and the speaker, at real-time pace."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np

from client.conversation import Conversation
from client.playback import MS
from client.wav import WavWriter
from handlers.messages import RATE_HZ, Samples

BLOCK_SAMPLES = 20 * MS
MAX_AFTER_S = 120.0
"""The longest that is listened on after the input is over."""


class FileAudio:
    """Plays `samples` [T] at 24 kHz to the server and writes what is heard to `output`.

    Block k of the output is taken at k × 20 ms; block k of the input leaves when a microphone
    would have it, one block later. So the two files, laid over each other, are the conversation.
    """

    def __init__(
        self,
        samples: Samples,
        output: WavWriter | None,
        quiet_s: float,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._samples = samples
        self._output = output
        self._quiet_s = quiet_s
        self._sleep = sleep
        self._clock = clock

    async def run(self, conversation: Conversation) -> None:
        """Ends `quiet_s` after the input is over and nothing happens any more.

        While the connection is down, something does: it comes back or is given up.
        """
        clock = self._clock or asyncio.get_running_loop().time
        started_s = clock()
        block, quiet_since, events = 0, 0, -1
        input_blocks = -(-len(self._samples) // BLOCK_SAMPLES)
        while True:
            await self._sleep(max(0.0, started_s + block * BLOCK_SAMPLES / RATE_HZ - clock()))
            if block:
                conversation.microphone(self._input(block - 1))
            heard = conversation.playback.pull(BLOCK_SAMPLES)
            conversation.played(heard)
            if self._output is not None:
                self._output.write(heard)
            happening = conversation.busy or conversation.events != events
            if block < input_blocks or happening or not conversation.online:
                quiet_since = block
                events = conversation.events
            block += 1
            if (block - quiet_since) * BLOCK_SAMPLES >= self._quiet_s * RATE_HZ:
                return
            if (block - input_blocks) * BLOCK_SAMPLES >= MAX_AFTER_S * RATE_HZ:
                conversation.transcript.notice("the conversation does not end: stopped")
                return

    def _input(self, block: int) -> Samples:
        """Block [BLOCK_SAMPLES] of the input, silence after its end."""
        found = self._samples[block * BLOCK_SAMPLES : (block + 1) * BLOCK_SAMPLES]
        return np.pad(found, (0, BLOCK_SAMPLES - len(found)))
