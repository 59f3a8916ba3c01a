"""Each backend alone, beside the plain way to do the same: `python -m benchmarks.models --lm`,
`--stt` or `--tts`: see `benchmarks/models_lm.py`, `models_stt.py` and `models_tts.py`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from benchmarks import models_lm, models_stt, models_tts
from benchmarks.report import environment, environment_lines, write_json

SECTIONS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "lm": models_lm.section,
    "stt": models_stt.section,
    "tts": models_tts.section,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--json", type=Path, help="write the result here")
    models_lm.add_flags(parser.add_argument_group("lm"))
    models_stt.add_flags(parser.add_argument_group("stt"))
    models_tts.add_flags(parser.add_argument_group("tts"))
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    settings = vars(args) | {"json": str(args.json or "")}
    print(environment_lines(environment(settings)))
    chosen = [name for name in SECTIONS if getattr(args, name)]
    if not chosen:
        parser.error(f"choose what to measure: {', '.join(f'--{name}' for name in SECTIONS)}")
    result = {name: SECTIONS[name](args) for name in chosen}
    if args.json:
        write_json(args.json, environment(settings) | result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
