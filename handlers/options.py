"""How a stage's options name their flags; `server/flags.py` makes the command line of them."""

from __future__ import annotations

from dataclasses import field
from typing import Any

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")
"""Of `torch.compile`."""


def wrong_compile_mode(flag: str, mode: str) -> str | None:
    """What is wrong with it, if it is; no mode is right."""
    if not mode or mode in COMPILE_MODES:
        return None
    return f"--{flag} is {mode}; it can be {', '.join(COMPILE_MODES)}"


def option(default: Any, help: str, flag: str, *, shown: bool = True) -> Any:
    """A field that `--flag` sets. One that is not `shown`, a key, is left out of the `repr`."""
    return field(default=default, repr=shown, metadata={"help": help, "flag": f"--{flag}"})
