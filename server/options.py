"""The command line: flags come from the options dataclasses of the server and of each backend."""

from __future__ import annotations

import argparse
import dataclasses
import ipaddress
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from handlers.duplex.options import ParrotOptions
from handlers.pipeline import LOAD_TIMEOUT_S, STAGES, PipelineOptions, backend
from server.flags import Help, add_flags, collect, flag_names, takes
from server.profiles import PROFILES, Profile

PROG = "python -m server"
BRAINS: dict[str, Mapping[str, str]] = {
    "cascade": PipelineOptions().backends,
    "parrot": {"vad": "silero", "stt": "none"},
}
"""brain → the stages that have backends to choose from, with the default of each."""


def flag(default: Any, help: str, also: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": help, "also": also})


@dataclass(frozen=True)
class ServerOptions:
    host: str = flag(
        "127.0.0.1",
        "address to listen on, one for both ways; others than loopback need --api_key",
        also=("--recv_host", "--send_host"),
    )
    port: int = flag(
        8765, "TCP port, one for both ways (0: any free)", also=("--recv_port", "--send_port")
    )
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
    load_timeout_s: float = flag(
        LOAD_TIMEOUT_S, "time that each part gets to load, downloads included (s)"
    )
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
    argv = sys.argv[1:] if argv is None else argv
    chosen = _choose(argv)
    parser = _parser(PROG, formatter_class=Help)
    _add_choices(parser, chosen.brain)
    add_flags(parser.add_argument_group("server"), ServerOptions)
    for stage, cls in chosen.options.items():
        group = _stage_group(parser, stage, chosen)
        add_flags(group, cls, argv, chosen.defaults(stage))
    args, stray = parser.parse_known_args(argv)
    if stray:
        _refuse(parser, stray, chosen)
    server = collect(ServerOptions, args)
    if not server.api_key:
        server = dataclasses.replace(server, api_key=os.environ.get("PARLEY_API_KEY", ""))
    if not server.loopback and not server.api_key:
        parser.error(
            f"--host {server.host} can be reached from other machines: set --api_key or "
            "PARLEY_API_KEY, or listen on 127.0.0.1"
        )
    options = {stage: collect(cls, args) for stage, cls in chosen.options.items()}
    return server, PipelineOptions(chosen.backends, options, chosen.brain)


@dataclass(frozen=True)
class _Chosen:
    """What decides which flags there are."""

    brain: str
    profile: Profile
    backends: Mapping[str, str]
    device: str | None

    @property
    def options(self) -> dict[str, type[Any]]:
        """stage → its options, those of a brain that is a model at last"""
        found = {stage: _options(stage, name) for stage, name in self.backends.items()}
        return found | ({"parrot": ParrotOptions} if self.brain == "parrot" else {})

    def defaults(self, stage: str) -> Mapping[str, Any]:
        given = dict(self.profile.options(stage, self.backends.get(stage, "")))
        if self.device is not None and _has_device(self.options[stage]):
            given["device"] = self.device
        return given


def _choose(argv: Sequence[str]) -> _Chosen:
    """A first look at the flags, for those alone that decide which others there are."""
    first = _parser(PROG, add_help=False)
    _add_choices(first, "cascade")
    found, _ = first.parse_known_args(argv)
    profile = PROFILES[found.profile]
    stages = profile.backends() if found.brain == "cascade" else BRAINS[found.brain]
    second = _parser(PROG, add_help=False)
    for stage, default in stages.items():
        second.add_argument(f"--{stage}", choices=_known(stage, found.brain), default=default)
    named, _ = second.parse_known_args(argv)
    chosen = _Chosen(found.brain, profile, vars(named), found.device)
    if chosen.device is not None and not any(map(_has_device, chosen.options.values())):
        parts = ", ".join(f"{stage} {name}" for stage, name in chosen.backends.items())
        second.error(f"--device {chosen.device}: none of the parts has one to choose ({parts})")
    return chosen


def _parser(prog: str, **settings: Any) -> argparse.ArgumentParser:
    about = "Parley: streaming speech-to-speech over the Realtime protocol."
    usage = "%(prog)s [--profile NAME] [--STAGE PART] [--FLAG VALUE] ...  (--help lists them)"
    return argparse.ArgumentParser(
        prog, usage=usage, description=about, allow_abbrev=False, **settings
    )


def _add_choices(parser: argparse.ArgumentParser, brain: str) -> None:
    told = "; ".join(f"{name}: {profile.about}" for name, profile in PROFILES.items())
    group = parser.add_argument_group("what runs")
    group.add_argument(
        "--brain",
        choices=sorted(BRAINS),
        default=next(iter(BRAINS)),
        help="what answers: STT, LM and TTS in turn, or the full-duplex model",
    )
    if brain == "cascade":
        group.add_argument(
            "--profile",
            choices=list(PROFILES),
            default=next(iter(PROFILES)),
            help=f"parts and their models; single flags override it. {told}",
        )
    group.add_argument("--device", help="of every part that has one: cpu, cuda, cuda:1, mps")


def _stage_group(parser: argparse.ArgumentParser, stage: str, chosen: _Chosen) -> Any:
    if stage not in chosen.backends:
        return parser.add_argument_group(f"brain: {stage}")
    name, known = chosen.backends[stage], _known(stage, chosen.brain)
    others = [other for other in known if other != name]
    told = f"Others: {', '.join(others)}. Their flags: --{stage} NAME --help" if others else None
    group = parser.add_argument_group(f"{stage}: {name}", told)
    group.add_argument(f"--{stage}", choices=known, default=name, help=f"{stage} part")
    return group


def _known(stage: str, brain: str) -> list[str]:
    """Backends to choose from. Only a stage that may be missing can be none."""
    optional = BRAINS[brain][stage] == "none"
    return [name for name in sorted(STAGES[stage]) if optional or name != "none"]


def _options(stage: str, name: str) -> type[Any]:
    cls: Any = backend(stage, name)
    options: type[Any] = cls.Options
    return options


def _has_device(options: type[Any]) -> bool:
    return any(f.name == "device" for f in dataclasses.fields(options))


def _refuse(parser: argparse.ArgumentParser, stray: Sequence[str], chosen: _Chosen) -> NoReturn:
    """Says where the first flag belongs that nothing chosen has."""
    name = next((word.partition("=")[0] for word in stray if word.startswith("--")), stray[0])
    owners = _owners(name)
    stage = owners[0][0] if owners else name.removeprefix("--").partition("_")[0]
    named = " or ".join(f"--{kind} {one}" for kind, one in owners)
    told = f"{name} belongs to {named}" if owners else f"there is no {name}"
    if stage in chosen.backends:
        told += f"; --{stage} {chosen.backends[stage]} is chosen"
        prefix = f"--{stage}_gen_"
        if name.startswith(prefix):
            own = [flag for flag in flag_names(chosen.options[stage]) if flag.startswith(prefix)]
            told += f" and has {', '.join(own) or 'no generation options'}"
    elif owners:
        told += f"; --brain {chosen.brain} is chosen"
    parser.error(told)


def _owners(name: str) -> list[tuple[str, str]]:
    """(stage, backend) or ("brain", brain) of those that take a flag of this name"""
    found = [
        (stage, other)
        for stage, known in STAGES.items()
        for other in known
        if takes(_options(stage, other), name)
    ]
    if name == "--profile" or name.removeprefix("--") in BRAINS["cascade"]:
        found.append(("brain", "cascade"))
    if takes(ParrotOptions, name):
        found.append(("brain", "parrot"))
    return found
