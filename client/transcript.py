"""The live transcript of both sides on a terminal, or as plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable

YOU = "you"
PARLEY = "parley"
CUT_MARK = " —"
CLEAR_LINE = "\r\x1b[K"
CONTROLS = dict.fromkeys([*range(32), *range(127, 160)], " ")
"""Nothing that a server sends may steer the terminal."""


class Transcript:
    """Writes who says what, as it is said.

    `live` (a terminal): the person's words update in place while they are recognised, Parley's
    appear as they are spoken; at most the last line changes. Otherwise: one line per person's
    utterance, when it is final, and one per stretch of Parley's speech.
    """

    def __init__(self, write: Callable[[str], object], live: bool, columns: int = 80) -> None:
        self._write = write
        self._live = live
        self._columns = columns
        self._line: str | None = None  # the item on the unfinished last line
        self._partial: dict[str, str] = {}  # person's text so far, per item
        self._shown: dict[str, str] = {}  # person's text on a line that another one has closed
        self._saying = ""  # Parley's text on the current line
        self._speaker: str | None = None  # Parley's item in progress
        self._cut = False  # that item was cut, and may go on

    def person_delta(self, item_id: str, delta: str) -> None:
        """More of what the person says."""
        text = self._partial.get(item_id, "") + delta.translate(CONTROLS)
        self._partial[item_id] = text
        if not self._live or not text.strip():
            return
        if self._line != item_id:
            self._close_line()
        self._line = item_id
        room = self._columns - len(YOU) - 4
        shown = text.strip()
        shown = shown if len(shown) <= room else "…" + shown[1 - room :]
        self._write(f"{CLEAR_LINE}{YOU}: {shown}")

    def person_final(self, item_id: str, text: str) -> None:
        """All that the person said."""
        text = text.translate(CONTROLS).strip()
        self._partial.pop(item_id, None)
        already = self._shown.pop(item_id, None)
        if self._line == item_id:
            self._write(CLEAR_LINE)
            self._line = None
        elif text == already:
            return
        if text:
            self._say_line(f"{YOU}: {text}")

    def parley_delta(self, item_id: str, delta: str) -> None:
        """More of what Parley says."""
        if self._speaker != item_id:
            self.parley_done()
            self._speaker = item_id
        delta = delta.translate(CONTROLS)
        if self._live:
            if self._line != item_id:
                self._close_line()
                delta = delta.lstrip()
                self._write(f"{PARLEY}: {'… ' if self._cut else ''}{delta}")
                self._line = item_id
            else:
                self._write(delta)
        elif self._cut and not self._saying:
            delta = f"… {delta.lstrip()}"
        self._cut = False
        self._saying += delta

    def parley_cut(self) -> None:
        """Parley fell silent in the middle, because the person spoke."""
        if self._speaker is None or self._cut:
            return
        if self._live:
            if self._line == self._speaker:
                mark = CUT_MARK.lstrip() if self._saying.endswith(" ") else CUT_MARK
                self._write(f"{mark}\n")
                self._line = None
        elif self._saying.strip():
            self._say_line(f"{PARLEY}: {self._saying.strip()}{CUT_MARK}")
        self._saying = ""
        self._cut = True

    def parley_done(self) -> None:
        """Parley's turn is over."""
        if self._line is not None and self._line == self._speaker:
            self._close_line()
        elif not self._live and self._saying.strip():
            self._say_line(f"{PARLEY}: {self._saying.strip()}")
        self._saying = ""
        self._speaker = None
        self._cut = False

    def notice(self, text: str) -> None:
        """A line about the connection rather than from either speaker."""
        self._say_line(f"[{text.translate(CONTROLS)}]")

    def close(self) -> None:
        """Finish the last line."""
        self.parley_done()
        self._close_line()

    def _say_line(self, line: str) -> None:
        self._close_line()
        self._write(f"{line}\n")

    def _close_line(self) -> None:
        if self._line is None:
            return
        if self._line in self._partial:
            self._shown[self._line] = self._partial[self._line].strip()
        self._write("\n")
        self._line = None
