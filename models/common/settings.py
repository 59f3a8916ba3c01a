"""YAML as options: dataclasses of plain values, of tuples and of each other."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from models.common.errors import ConfigError


def load_yaml(path: Path) -> dict[str, Any]:
    """Raises `ConfigError`."""
    import yaml  # not in the light installation, which reads no files

    try:
        content = yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: no names with values")
    return content


def read(kind: Any, content: Any, name: str) -> Any:
    """`content` as the dataclass, dictionary, tuple or plain value that `kind` asks for. What it
    doesn't name keeps its default. Raises `ConfigError`, which says where."""
    if hasattr(kind, "__dataclass_fields__"):
        if not isinstance(content, dict):
            raise ConfigError(f"{name}={content!r}: a section with names and values")
        hints = get_type_hints(kind)
        prefix = f"{name}." if name else ""
        unknown = sorted(prefix + key for key in content.keys() - {f.name for f in fields(kind)})
        if unknown:
            raise ConfigError(f"there is no {', '.join(unknown)}")
        return kind(
            **{key: read(hints[key], value, prefix + key) for key, value in content.items()}
        )
    if kind is float and isinstance(content, str):  # YAML 1.1 takes 1e-3 for a word
        try:
            return float(content)
        except ValueError:
            raise ConfigError(f"{name}={content!r}: a number") from None
    if kind is float and isinstance(content, int) and not isinstance(content, bool):
        return float(content)
    origin = getattr(kind, "__origin__", None)
    if origin is tuple and isinstance(content, list | tuple):
        of_any_length = kind.__args__[-1] is Ellipsis
        if of_any_length or len(content) == len(kind.__args__):
            return tuple(read(kind.__args__[0], value, name) for value in content)
        raise ConfigError(f"{name}={content!r}: {len(kind.__args__)} values")
    if origin is dict and isinstance(content, dict):
        return content
    if origin is None and type(content) is kind:
        return content
    raise ConfigError(f"{name}={content!r}: of the wrong type")
