"""Reading untrusted JSON: typed access to the fields of an object, with errors that name them."""

from __future__ import annotations

import binascii
import json
import math
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

MAX_TEXT_CHARS = 65_536
"""One text: instructions, a message, arguments of a call."""
MAX_ID_CHARS = 64
MAX_RAW_JSON_CHARS = 65_536
"""One value that is stored as it came: tools, tracing, prompt."""
MAX_RAW_JSON_DEPTH = 32


class WireError(Exception):
    """A client event that cannot be obeyed. The connection goes on.

    `message` names the field and the rule, never the offending value: it may be logged.
    """

    def __init__(
        self, code: str, message: str, param: str | None = None, event_id: str | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.event_id = event_id


def new_id(prefix: str) -> str:
    """A fresh identifier: `event`, `item`, `resp`, `sess` or `conv`, and 20 random hex digits."""
    return f"{prefix}_{secrets.token_hex(10)}"


def invalid_value(param: str, rule: str) -> WireError:
    return WireError("invalid_value", f"Invalid value for '{param}': {rule}.", param)


def invalid_type(param: str, wanted: str, value: object) -> WireError:
    got = _JSON_NAMES.get(type(value), "an object")
    return WireError(
        "invalid_type", f"Invalid type for '{param}': expected {wanted}, got {got}.", param
    )


_JSON_NAMES: dict[type, str] = {
    type(None): "null",
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "an array",
}


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of one JSON object; `path` is its own name as errors give it.

    A reader returns None where the field is absent or null, and raises `WireError` where it
    has the wrong type (`invalid_type`) or breaks a rule (`invalid_value`).
    """

    values: Mapping[str, Any]
    path: str = ""

    def param(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def has(self, name: str) -> bool:
        """Whether the field is there, be it null."""
        return name in self.values

    def required(self, read: Callable[[str], T | None], name: str) -> T:
        value = read(name)
        if value is None:
            param = self.param(name)
            raise WireError(
                "missing_required_parameter", f"Missing required parameter: '{param}'.", param
            )
        return value

    def text(self, name: str) -> str | None:
        """Any text of at most `MAX_TEXT_CHARS` that can be written as UTF-8."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise invalid_type(self.param(name), "a string", value)
        if len(value) > MAX_TEXT_CHARS:
            raise WireError(
                "string_above_max_length",
                f"'{self.param(name)}' is longer than {MAX_TEXT_CHARS} characters.",
                self.param(name),
            )
        if not _encodable(value):
            raise invalid_value(self.param(name), "it is not valid Unicode")
        return value

    def name(self, name: str) -> str | None:
        """An identifier: 1 to `MAX_ID_CHARS` printable ASCII characters."""
        value = self.text(name)
        if value is None:
            return None
        if not (0 < len(value) <= MAX_ID_CHARS and value.isascii() and value.isprintable()):
            rule = f"expected 1 to {MAX_ID_CHARS} printable ASCII characters"
            raise invalid_value(self.param(name), rule)
        return value

    def choice(self, name: str, *allowed: str) -> str | None:
        value = self.text(name)
        if value is not None and value not in allowed:
            listed = ", ".join(f"'{one}'" for one in allowed)
            raise invalid_value(self.param(name), f"supported values are {listed}")
        return value

    def boolean(self, name: str) -> bool | None:
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise invalid_type(self.param(name), "a boolean", value)
        return value

    def integer(self, name: str, low: int, high: int) -> int | None:
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise invalid_type(self.param(name), "an integer", value)
        if not low <= value <= high:
            raise invalid_value(self.param(name), f"expected an integer from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise invalid_type(self.param(name), "a number", value)
        if not low <= value <= high:  # also false for NaN
            raise invalid_value(self.param(name), f"expected a number from {low} to {high}")
        return float(value)

    def object(self, name: str) -> Fields | None:
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise invalid_type(self.param(name), "an object", value)
        return Fields(value, self.param(name))

    def array(self, name: str, limit: int) -> list[Any] | None:
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, list):
            raise invalid_type(self.param(name), "an array", value)
        if len(value) > limit:
            raise WireError(
                "array_above_max_length",
                f"'{self.param(name)}' has more than {limit} elements.",
                self.param(name),
            )
        return value

    def objects(self, name: str, limit: int) -> Iterator[Fields]:
        """The elements of an array of objects; none where it is absent or null."""
        for index, value in enumerate(self.array(name, limit) or ()):
            path = f"{self.param(name)}[{index}]"
            if not isinstance(value, dict):
                raise invalid_type(path, "an object", value)
            yield Fields(value, path)

    def pcm16(self, name: str) -> bytes | None:
        """Base64 of 16-bit samples, decoded."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise invalid_type(self.param(name), "a string", value)
        try:
            data = binascii.a2b_base64(value, strict_mode=True)
        except ValueError:
            raise invalid_value(self.param(name), "it is not base64") from None
        if len(data) % 2:
            raise invalid_value(self.param(name), "it has an odd number of bytes")
        return data

    def raw(self, name: str) -> Any:
        """A JSON value to be kept and given back as it is: bounded, and safe to encode again."""
        value = self.values.get(name)
        if not math.isfinite(_depth(value)):
            raise invalid_value(self.param(name), f"deeper than {MAX_RAW_JSON_DEPTH} levels")
        try:
            text = json.dumps(value, ensure_ascii=False, allow_nan=False)
            text.encode()
        except ValueError:
            raise invalid_value(self.param(name), "it cannot be written as JSON") from None
        if len(text) > MAX_RAW_JSON_CHARS:
            rule = f"longer than {MAX_RAW_JSON_CHARS} characters of JSON"
            raise invalid_value(self.param(name), rule)
        return value


def _encodable(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True


def _depth(value: object) -> float:
    """Levels of arrays and objects in a JSON value; infinite above `MAX_RAW_JSON_DEPTH`."""
    level = [value]
    for depth in range(MAX_RAW_JSON_DEPTH + 1):
        inside: list[object] = []
        for one in level:
            if isinstance(one, dict):
                inside.extend(one.values())
            elif isinstance(one, list):
                inside.extend(one)
        if not inside:
            return depth
        level = inside
    return math.inf
