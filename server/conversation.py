"""The conversation: its items in order, cut to what was heard, bounded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from handlers.messages import RATE_HZ, ChatMessage
from server.fields import WireError, new_id
from server.items import Item, ItemReference, MessageItem, chat

MAX_ITEMS = 512
MAX_CHARS = 262_144
KEPT_AUDIO_S = 30.0
BYTES_PER_S = 2 * RATE_HZ


class Conversation:
    """Items by id, in order.

    Bounds: beyond `max_items`, or `max_chars` of text in all, the oldest finished items are
    dropped, from the conversation and so from what the LM gets. Of users' audio the newest
    `kept_audio_s` are kept, whole parts only; an item without its audio is otherwise unharmed.
    The newest item is never dropped, nor is one in progress.
    """

    def __init__(
        self,
        max_items: int = MAX_ITEMS,
        max_chars: int = MAX_CHARS,
        kept_audio_s: float = KEPT_AUDIO_S,
    ) -> None:
        self.id = new_id("conv")
        self._max_items = max_items
        self._max_chars = max_chars
        self._max_audio_bytes = int(kept_audio_s * BYTES_PER_S)
        self._items: dict[str, Item] = {}
        self._order: list[str] = []

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, item_id: str) -> bool:
        return item_id in self._items

    def __iter__(self) -> Iterator[Item]:
        return (self._items[item_id] for item_id in self._order)

    def add(self, item: Item, previous_item_id: str | None = None) -> str | None:
        """Put `item` after another (None: at the end; "root": at the front).

        Returns the id of the item before it. Raises `WireError` for an id that is taken and
        for a previous item that is not there.
        """
        if item.id in self._items:
            raise WireError(
                "item_create_duplicate_item_id",
                "Error creating item: there is an item with this id already.",
                "item.id",
            )
        if previous_item_id is None:
            at = len(self._order)
        elif previous_item_id == "root":
            at = 0
        elif previous_item_id in self._items:
            at = self._order.index(previous_item_id) + 1
        else:
            raise _no_item("create", "previous_item_id", "previous_item_id")
        self._items[item.id] = item
        self._order.insert(at, item.id)
        self._drop_oldest(item)
        self._drop_audio()
        at = self._order.index(item.id)  # the one before it may have been dropped
        return self._order[at - 1] if at else None

    def retrieve(self, item_id: str) -> Item:
        """Raises `WireError`."""
        if item_id not in self._items:
            raise _no_item("retrieve")
        return self._items[item_id]

    def delete(self, item_id: str) -> None:
        """Raises `WireError`."""
        if item_id not in self._items:
            raise _no_item("delete")
        self._remove(item_id)

    def set_transcript(self, item_id: str, text: str) -> None:
        """The text of a user's audio has come. The item may be gone: then nothing happens."""
        item = self._items.get(item_id)
        for part in item.content[:1] if isinstance(item, MessageItem) else ():
            if part.type == "input_audio":
                part.text = text

    def truncate(self, item_id: str, content_index: int, audio_end_ms: int) -> None:
        """The client says how much of a spoken reply was played: the rest is as if never said.

        Raises `WireError`, changing nothing, for what is no spoken reply or shorter than that.
        """
        item = self._items.get(item_id)
        if item is None:
            raise _no_item("truncate")
        if not isinstance(item, MessageItem) or item.spoken is None:
            raise WireError(
                "unsupported_content_type",
                "Only model output audio messages can be truncated.",
                "item_id",
            )
        if content_index != 0:
            message = "Invalid value for 'content_index': the item has one part, 0."
            raise WireError("invalid_value", message, "content_index")
        length = item.spoken.samples
        if item.truncated and item.heard_samples is not None:
            length = item.heard_samples
        length_ms = -(-length * 1000 // RATE_HZ)
        if audio_end_ms > length_ms:
            raise WireError(
                "invalid_value",
                f"Audio content of {length_ms}ms is already shorter than {audio_end_ms}ms.",
                "audio_end_ms",
            )
        item.heard_samples = min(audio_end_ms * RATE_HZ // 1000, length)
        item.truncated = True

    def resolve(self, given: Iterable[Item | ItemReference]) -> tuple[Item, ...]:
        """The `input` of a response with its references looked up. Raises `WireError`."""
        resolved: list[Item] = []
        for index, one in enumerate(given):
            if isinstance(one, ItemReference):
                if one.id not in self._items:
                    raise _no_item("reference", f"response.input[{index}].id")
                resolved.append(self._items[one.id])
            else:
                resolved.append(one)
        return tuple(resolved)

    def history(self, instructions: str, extra: str | None = None) -> tuple[ChatMessage, ...]:
        """What the LM gets (see `items.chat`); `extra` is what the user may just have said."""
        return chat(self, instructions, extra)

    def _remove(self, item_id: str) -> None:
        del self._items[item_id]
        self._order.remove(item_id)

    def _drop_oldest(self, newest: Item) -> None:
        chars = sum(item.length_chars for item in self)
        for item in list(self):
            if len(self._order) <= self._max_items and chars <= self._max_chars:
                return
            if item is not newest and item.status != "in_progress":
                chars -= item.length_chars
                self._remove(item.id)

    def _drop_audio(self) -> None:
        left = self._max_audio_bytes
        for item_id in reversed(self._order):
            item = self._items[item_id]
            for part in reversed(item.content if isinstance(item, MessageItem) else []):
                if part.audio is not None:
                    left -= len(part.audio)
                    if left < 0:
                        part.audio = None


def _no_item(action: str, param: str = "item_id", what: str = "item_id") -> WireError:
    return WireError(
        f"item_{action}_invalid_{what}",
        f"There is no item with the id given as '{param}'.",
        param,
    )
