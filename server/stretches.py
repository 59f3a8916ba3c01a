"""The duplex model's channel on the wire: a response wherever it is audible, nothing else.

Synchronous and without a clock: the model's frames are the time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from handlers.messages import RATE_HZ, Samples, Uttered
from server import wire
from server.conversation import Conversation
from server.items import MessageItem, spoken_reply

MAX_BEHIND_S = 1.0
"""Audio that a client has not got or not played. Beyond it what the model says is passed over, so
that it is heard when it is said or not at all."""
CAUGHT_UP_S = 0.3
"""So much is usual: the network, the client's jitter buffer, the time between two reports."""
WIRE_BYTES_PER_S = 2 * RATE_HZ
MAX_KNOWN_ITEMS = 8
"""Of which a client may still report how far they were played."""


class Outlet(Protocol):
    @property
    def unsent_bytes(self) -> int: ...
    def send(self, event: dict[str, Any]) -> None: ...
    def send_audio(
        self, response_id: str, item_id: str, start_sample: int, samples: Samples
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class StretchSettings:
    silence_db: float = -50.0  # a frame below it is silent
    end_ms: float = 600.0  # silence that ends a response
    voice: str = "parrot"


class Stretches:
    """Frames in, events and audio out."""

    def __init__(
        self,
        out: Outlet,
        conversation: Conversation,
        settings: StretchSettings,
        passed_over: Callable[[int], None],
    ) -> None:
        self._out = out
        self._conversation = conversation
        self._settings = settings
        self._passed_over = passed_over  # told of samples that were not sent
        self.item: MessageItem | None = None  # of the response under way
        self.response_id = ""
        self._previous: str | None = None
        self._silent = 0  # samples since the last audible frame
        self._muted = False  # the client has cancelled; until the model is silent
        self._skipping = False  # the client is too far behind
        self._starts: deque[tuple[str, int]] = deque(maxlen=MAX_KNOWN_ITEMS)
        self._sent = 0  # samples of all items
        self._played: int | None = None  # ... and of them, what the client says it has played
        self._last_number = 0

    def uttered(self, frame: Uttered) -> None:
        """The model's next frame."""
        audible = frame.level_db >= self._settings.silence_db
        self._silent = 0 if audible else self._silent + len(frame.samples)
        over = self._silent >= self._settings.end_ms * RATE_HZ / 1000
        gap = frame.number - self._last_number
        self._last_number = frame.number
        if self.item is None:
            self._muted = self._muted and not over
            self._play_on(gap * len(frame.samples))
            if not audible or self._muted:
                return
            self._open()
        self._send(frame.samples)
        if over:
            self._close("completed")

    def cancel(self, reason: Literal["turn_detected", "client_cancelled"]) -> bool:
        """The client wants to hear no more of this; the model goes on unheard. False: of what?"""
        if self.item is None:
            return False
        self.item.cut(self._heard(self.item))
        self._muted = True
        self._close("cancelled", {"type": "cancelled", "reason": reason})
        return True

    def played(self, item_id: str, played_samples: int) -> None:
        """The client has played so much of an item."""
        for known, start in self._starts:
            if known == item_id:
                played = min(start + played_samples, self._sent)
                self._played = max(self._played or 0, played)

    # How far behind the client is.

    def _behind_s(self) -> float:
        unsent_s = self._out.unsent_bytes / WIRE_BYTES_PER_S
        if self._played is None:
            return unsent_s
        return max(unsent_s, (self._sent - self._played) / RATE_HZ)

    def _play_on(self, samples: int) -> None:
        """The model is silent meanwhile: a client plays on, whatever its last report was."""
        if self._played is not None:
            self._played = min(self._sent, self._played + samples)

    def _heard(self, item: MessageItem) -> int:
        """Samples of the current item."""
        assert item.spoken is not None
        total: int = item.spoken.samples
        return total if self._played is None else max(0, total - (self._sent - self._played))

    # The wire.

    def _send(self, samples: Samples) -> None:
        limit_s = CAUGHT_UP_S if self._skipping else MAX_BEHIND_S
        self._skipping = self._behind_s() > limit_s
        if self._skipping:
            self._passed_over(len(samples))
            return
        assert self.item is not None
        assert self.item.spoken is not None
        self._out.send_audio(self.response_id, self.item.id, self.item.spoken.samples, samples)
        self.item.spoken.add_audio(0, len(samples))
        self._sent += len(samples)

    def _open(self) -> None:
        self.response_id = wire.new_id("resp")
        item = self.item = spoken_reply(wire.new_id("item"))
        assert item.spoken is not None
        item.spoken.add_clause("")
        self._starts.append((item.id, self._sent))
        self._out.send(wire.response_created(self._response("in_progress")))
        self._previous = self._conversation.add(item)
        self._out.send(wire.output_item_added(self.response_id, item.to_wire()))
        self._out.send(wire.item_added(item.to_wire(), self._previous))
        self._out.send(wire.content_part_added(self.response_id, item.id, True))

    def _close(
        self, status: Literal["completed", "cancelled"], details: dict[str, Any] | None = None
    ) -> None:
        item, send = self.item, self._out.send
        assert item is not None
        item.status = "completed" if status == "completed" else "incomplete"
        send(wire.output_audio_done(self.response_id, item.id))
        send(wire.transcript_done(self.response_id, item.id, ""))
        send(wire.content_part_done(self.response_id, item.id, True, ""))
        send(wire.output_item_done(self.response_id, item.to_wire()))
        send(wire.item_done(item.to_wire(), self._previous))
        send(wire.response_done(self._response(status, details, [item.to_wire()])))
        self.item = None

    def _response(
        self,
        status: str,
        details: dict[str, Any] | None = None,
        output: list[dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        return wire.response(
            self.response_id,
            status=status,
            status_details=details,
            output=output or [],
            conversation_id=self._conversation.id,
            modality="audio",
            voice=self._settings.voice,
            max_tokens=None,
            metadata=None,
            usage=None if status == "in_progress" else (0, 0),
        )
