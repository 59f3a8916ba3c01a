"""What a profile chooses, and what still overrides it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from handlers.pipeline import PipelineOptions, backend
from server.options import parse
from server.profiles import PROFILES

ROOT = Path(__file__).parents[2]


def chosen(line: str) -> PipelineOptions:
    return parse(line.split())[1]


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_chooses_parts_and_their_options(name: str) -> None:
    choice = chosen(f"--profile {name}")
    assert choice.backends == PROFILES[name].backends()
    for stage, part in PROFILES[name].parts.items():
        made: Any = backend(stage, part.backend)
        assert choice.options[stage] == dataclasses.replace(made.Options(), **part.options)


def test_the_embedded_one_is_the_default() -> None:
    assert chosen("--profile embedded") == chosen("")
    assert chosen("").backends == PipelineOptions().backends


def test_flags_override_a_profile() -> None:
    choice = chosen("--lm_model_name other/model --profile cuda --stt_device cpu --device cuda:1")
    lm, stt, tts = (choice.options[stage] for stage in ("lm", "stt", "tts"))
    assert (lm.model_name, lm.device, lm.torch_dtype) == ("other/model", "cuda:1", "bfloat16")
    assert stt.device == "cpu"
    assert tts.device == "cuda:1"


def test_another_part_has_its_own_defaults() -> None:
    choice = chosen("--profile cuda --stt faster-whisper --tts openai")
    options: Any = backend("tts", "openai")
    assert choice.options["tts"] == options.Options()
    assert choice.options["stt"].model_name == "small"
    assert choice.options["lm"] == chosen("--profile cuda").options["lm"]


def test_choosing_any_loads_no_library_yet() -> None:
    code = (
        "import sys; from server.__main__ import main; from server.options import parse; "
        "from server.profiles import PROFILES; [parse(['--profile', name]) for name in PROFILES]; "
        "heavy = {'torch', 'transformers', 'ctranslate2', 'httpx2'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
