"""What can be wrong with a model's configuration, its checkpoint or its input."""

from __future__ import annotations

from collections.abc import Sequence


class ModelError(ValueError):
    """The base of them all."""


class ConfigError(ModelError):
    """A configuration that contradicts itself."""


class ArchitectureError(ModelError):
    """The checkpoint holds another architecture, or lacks weights of this one."""


class VocabularyError(ModelError):
    """Codes, or a checkpoint's tables, that don't fit the vocabulary asked for."""


class FrameLengthError(ModelError):
    """Tokens that don't make whole frames, or channels that don't have the same frames."""


class PackedIdOverflowError(ModelError):
    """A frame has more combinations of codes than an id can number."""


def first_line(error: BaseException) -> str:
    """Of its text, or its name where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def listed(names: Sequence[str], most: int = 8) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
