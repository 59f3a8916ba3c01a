"""The command line: flags come from the options dataclasses of the server and of each backend."""

from __future__ import annotations

import argparse
import dataclasses
import ipaddress
import os
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from handlers.pipeline import STAGES, PipelineOptions, backend

T = TypeVar("T")


def flag(default: Any, help: str, name: str | None = None) -> Any:
    return field(default=default, metadata={"help": help, "flag": name} if name else {"help": help})


@dataclass(frozen=True)
class ServerOptions:
    host: str = flag("127.0.0.1", "address to listen on; others than loopback need --api_key")
    port: int = flag(8765, "TCP port (0: any free one)")
    api_key: str = flag("", "key that clients must present; else from PARLEY_API_KEY")
    allowed_origins: str = flag(
        "", "browser origins admitted beside the server's own page (comma-separated)"
    )
    max_sessions: int = flag(200, "sessions at a time; one more is refused")
    max_message_bytes: int = flag(16 * 2**20, "size of one websocket message (bytes)")
    max_backlog_s: float = flag(60.0, "audio received and not yet listened to, per session (s)")
    max_session_s: float = flag(3600.0, "length of a session (s)")
    idle_timeout_s: float = flag(600.0, "a session is closed after so long without a message (s)")
    max_unsent_s: float = flag(10.0, "a client that reads nothing for so long is closed (s)")
    max_unsent_bytes: int = flag(2 * 2**20, "a client with more than this unread is closed (bytes)")
    drain_s: float = flag(10.0, "time that running replies get to finish after SIGTERM (s)")
    output_lead_ms: float = flag(200.0, "how far audio is sent ahead of playing (ms)")
    instructions: str = flag("", "default instructions for the LM")
    unsure_silence_ms: float = flag(700.0, "silence before answering a turn that may go on (ms)")
    unfinished_silence_ms: float = flag(1500.0, "the same for a plainly unfinished turn (ms)")
    log_level: str = flag("info", "debug, info, warning or error")

    @property
    def loopback(self) -> bool:
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def parse(argv: Sequence[str] | None = None) -> tuple[ServerOptions, PipelineOptions]:
    """Flags → options. Exits with a usage message on bad ones, and when a key is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m server",
        description="Parley: streaming speech-to-speech over the Realtime protocol.",
        formatter_class=_Help,
    )
    _add_flags(parser.add_argument_group("server"), ServerOptions)
    # Which backends there are decides which flags there are: look at those first.
    chooser = argparse.ArgumentParser(add_help=False)
    for target in (chooser, parser.add_argument_group("stages")):
        for stage, known in STAGES.items():
            target.add_argument(
                f"--{stage}", choices=sorted(known), default=next(iter(known)), help=f"{stage} part"
            )
    chosen, _ = chooser.parse_known_args(argv)
    backends = {stage: getattr(chosen, stage) for stage in STAGES}
    options_of: dict[str, type[Any]] = {}
    for stage, name in backends.items():
        options_of[stage] = getattr(backend(stage, name), "Options")  # noqa: B009
        _add_flags(parser.add_argument_group(f"{stage}: {name}"), options_of[stage])
    args = parser.parse_args(argv)
    server = _collect(ServerOptions, args)
    if not server.api_key:
        server = dataclasses.replace(server, api_key=os.environ.get("PARLEY_API_KEY", ""))
    if not server.loopback and not server.api_key:
        parser.error(
            f"--host {server.host} can be reached from other machines: set --api_key or "
            "PARLEY_API_KEY, or listen on 127.0.0.1"
        )
    stage_options = {stage: _collect(cls, args) for stage, cls in options_of.items()}
    return server, PipelineOptions(backends=backends, options=stage_options)


def _add_flags(group: Any, cls: type[Any]) -> None:
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        kind = _plain(hints[f.name])
        name = f.metadata.get("flag") or f"--{f.name}"
        common = {"dest": _dest(cls, f.name), "default": f.default, "help": f.metadata["help"]}
        if kind is bool:
            group.add_argument(name, action=argparse.BooleanOptionalAction, **common)
        else:
            group.add_argument(name, type=kind, metavar=kind.__name__.upper(), **common)


def _plain(hint: Any) -> Any:
    """int from `int | None`."""
    if isinstance(hint, types.UnionType):
        return next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return hint


def _collect(cls: type[T], args: argparse.Namespace) -> T:
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    return cls(**{name: getattr(args, _dest(cls, name)) for name in names})


def _dest(cls: type[Any], name: str) -> str:
    return f"{cls.__name__}.{name}"


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=100)
