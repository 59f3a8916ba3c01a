"""Options dataclasses as command-line flags.

A field is a flag: named by `flag` in its metadata or after itself, `also` by other names, with
`help`. A mapping with `prefix` takes every flag that begins with it and is no other field's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

_WORDS = {"True": True, "False": False, "None": None}


class Help(argparse.ArgumentDefaultsHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=100)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in ("", None):
            return action.help
        return super()._get_help_string(action)


class _Synonym(argparse.Action):
    """Several names of one value may be given where they agree. By one name, the last wins."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        given = vars(namespace).setdefault(f"names of {self.dest}", {})
        given[option_string] = values
        if len(set(given.values())) > 1:
            told = ", ".join(f"{name} {value}" for name, value in given.items())
            parser.error(f"{told}: these are names of one and the same value")
        setattr(namespace, self.dest, values)


def add_flags(
    group: Any, cls: type[Any], argv: Sequence[str] = (), defaults: Mapping[str, Any] | None = None
) -> None:
    """`defaults` by field, in place of the dataclass's own."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if "prefix" in f.metadata:
            _add_open_flags(group, cls, f, argv)
            continue
        kind = _plain(hints[f.name])
        default = (defaults or {}).get(f.name, f.default)
        also = f.metadata.get("also", ())
        told = f.metadata["help"] + (f"; also {', '.join(also)}" if also else "")
        common = {"dest": _dest(cls, f.name), "default": default}
        if kind is bool:
            group.add_argument(
                _name(f), type=_truth, nargs="?", const=True, metavar="BOOL", help=told, **common
            )
            group.add_argument(
                _negated(f),
                action="store_false",
                dest=common["dest"],
                help=argparse.SUPPRESS,
                default=default,
            )
            continue
        common |= {"type": kind, "metavar": kind.__name__.upper()}
        if also:
            common["action"] = _Synonym
        group.add_argument(_name(f), help=told, **common)
        for name in also:
            group.add_argument(name, help=argparse.SUPPRESS, **common)


def collect(cls: type[T], args: argparse.Namespace) -> T:
    values: dict[str, Any] = {}
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        dest = _dest(cls, f.name)
        if "prefix" in f.metadata:
            given = vars(args).items()
            values[f.name] = {
                name.removeprefix(f"{dest}."): value
                for name, value in given
                if name.startswith(f"{dest}.")
            }
        else:
            values[f.name] = getattr(args, dest)
    return cls(**values)


def takes(cls: type[Any], name: str) -> bool:
    """Whether a flag of this name is one of the dataclass's."""
    return name in flag_names(cls) or any(name.startswith(prefix) for prefix in _prefixes(cls))


def flag_names(cls: type[Any]) -> list[str]:
    """Of the flags that have one; an open set has none."""
    hints, found = typing.get_type_hints(cls), []
    for f in dataclasses.fields(cls):
        if "prefix" not in f.metadata:
            found += [_name(f), *f.metadata.get("also", ())]
            found += [_negated(f)] if _plain(hints[f.name]) is bool else []
    return found


def _prefixes(cls: type[Any]) -> Iterable[str]:
    return [f.metadata["prefix"] for f in dataclasses.fields(cls) if "prefix" in f.metadata]


def _add_open_flags(
    group: Any, cls: type[Any], f: dataclasses.Field[Any], argv: Sequence[str]
) -> None:
    """Whatever flags in `argv` begin with the prefix: a mapping of the rest of their names."""
    prefix, dest = f.metadata["prefix"], _dest(cls, f.name)
    shown = f"{prefix}NAME"
    given = {word.partition("=")[0] for word in argv if word.startswith(prefix)}
    for name in [shown, *sorted(given - {shown, *flag_names(cls)})]:
        group.add_argument(
            name,
            dest=f"{dest}.{name.removeprefix(prefix)}",
            type=_value,
            metavar="VALUE",
            default=argparse.SUPPRESS,
            help=f.metadata["help"] if name == shown else argparse.SUPPRESS,
        )


def _value(text: str) -> Any:
    """JSON, or as Python writes it, or the text as it is."""
    if text in _WORDS:
        return _WORDS[text]
    try:
        return json.loads(text)
    except ValueError:
        return text


def _truth(text: str) -> bool:
    try:
        return {"true": True, "false": False}[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text}: true or false") from None


def _plain(hint: Any) -> Any:
    """int from `int | None`."""
    if isinstance(hint, types.UnionType):
        return next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return hint


def _name(f: dataclasses.Field[Any]) -> str:
    name: str = f.metadata.get("flag") or f"--{f.name}"
    return name


def _negated(f: dataclasses.Field[Any]) -> str:
    return _name(f).replace("--", "--no-", 1)


def _dest(cls: type[Any], name: str) -> str:
    return f"{cls.__name__}.{name}"
