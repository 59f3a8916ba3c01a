"""How a stage's options name their flags; `server/flags.py` makes the command line of them."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(default: Any, help: str, flag: str, *, shown: bool = True) -> Any:
    """A field that `--flag` sets. One that is not `shown`, a key, is left out of the `repr`."""
    return field(default=default, repr=shown, metadata={"help": help, "flag": f"--{flag}"})
