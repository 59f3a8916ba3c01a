"""No model of when a turn is over: words and voice decide (`server.endpointing`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NoTurnOptions:
    """Nothing to choose."""


class NoTurnModel:
    Options = NoTurnOptions
