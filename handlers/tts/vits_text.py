"""Text for a VITS voice: its tokens, and where the words end among them."""

from __future__ import annotations

import importlib.util
import re

from handlers.base import StageError
from models.common.errors import first_line

_WORD = re.compile(r"\S+")
READABLE = 0.5
"""A text with a smaller share of its letters in the vocabulary is in a script of others."""


class Reader:
    """A checkpoint's tokenizer. Raises StageError `tts_model_unusable`.

    Some checkpoints are trained on text in Latin letters for a language in other ones (`is_uroman`:
    the uroman package makes it), some on phonemes (the phonemizer package); without its package
    such a one would read nothing, or nonsense.
    """

    def __init__(self, name_or_folder: str) -> None:
        from transformers import VitsTokenizer
        from transformers.utils import cached_file

        try:
            cached_file(name_or_folder, "vocab.json")  # says what is wrong; the tokenizer does not
            self._tokenizer = VitsTokenizer.from_pretrained(name_or_folder)
        except Exception as error:
            reason = first_line(error)
            raise unusable(
                f"--tts_model_name {name_or_folder} has no usable tokenizer: {reason}"
            ) from error
        for wanted, package in (("is_uroman", "uroman"), ("phonemize", "phonemizer")):
            if getattr(self._tokenizer, wanted) and importlib.util.find_spec(package) is None:
                raise unusable(f"{name_or_folder} needs a package: pip install {package}")
        self._romanizer = None
        if self._tokenizer.is_uroman:
            import uroman

            self._romanizer = uroman.Uroman()
        self.language: str | None = self._tokenizer.language
        self.size = max(self._tokenizer.encoder.values()) + 1
        """Tokens; `<unk>`, which released checkpoints number behind them, has no weights there."""

    def read(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens, and for each word (characters of `text`, tokens) until its end.

        Both empty where there is nothing to read. Raises StageError `unreadable_text` where there
        is something but nothing of it is in the vocabulary, or too few of the letters.
        """
        if not any(char.isalnum() for char in text):
            return [], []
        latin = self._latin(text)
        plain = self._plain(latin)
        if not self._readable(latin, plain):
            message = "The voice cannot read this: little of it is in the voice's alphabet."
            raise StageError("unreadable_text", message)
        tokens = [token for token in self._tokenizer(latin)["input_ids"] if token < self.size]
        per_char = 2 if self._tokenizer.add_blank else 1
        marks = []
        for word in _WORD.finditer(text):
            chars = self._chars_until(text, word.end(), len(plain))
            marks.append((word.end(), min(max(per_char * chars, 1), len(tokens))))
        return tokens, marks

    def _latin(self, text: str) -> str:
        if self._romanizer is None or text.isascii():
            return text
        romanized: str = self._romanizer.romanize_string(self._tokenizer.normalize_text(text))
        return romanized

    def _plain(self, text: str) -> str:
        """As the tokenizer has it before it numbers the characters."""
        plain, _ = self._tokenizer.prepare_for_tokenization(text)
        return str(plain)

    def _readable(self, text: str, plain: str) -> bool:
        vocabulary = self._tokenizer.encoder
        known = [char for char in plain if char.isalnum() and char in vocabulary]
        if self._tokenizer.phonemize:  # not of the letters that `text` has
            return bool(known)
        return bool(known) and sum(map(str.isalpha, known)) >= READABLE * sum(
            map(str.isalpha, text)
        )

    def _chars_until(self, text: str, end: int, total: int) -> int:
        """How many of the plain text's `total` characters belong to `text[:end]`."""
        if self._romanizer is not None or self._tokenizer.phonemize:  # proportionally
            return round(total * end / len(text))
        return len(self._plain(text[:end]))


def unusable(message: str) -> StageError:
    return StageError("tts_model_unusable", message)
