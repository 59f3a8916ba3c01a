"""The command line: which brain and which parts have which flags, and what choosing one loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from handlers.duplex.options import ParrotOptions
from handlers.pipeline import STAGES
from handlers.stt.whisper import WhisperOptions
from server.options import BRAINS, parse

ROOT = Path(__file__).parents[2]
Capture = pytest.CaptureFixture[str]


def refusal(line: str, capsys: Capture) -> str:
    """The last line of what the command line is answered with."""
    with pytest.raises(SystemExit) as stopped:
        parse(line.split())
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_the_cascade_is_the_default() -> None:
    _, choice = parse([])
    assert choice.brain == "cascade"
    assert choice.backends == BRAINS["cascade"]


def test_the_duplex_brain_has_its_own_flags_and_no_lm_or_tts() -> None:
    options, choice = parse(["--brain", "parrot", "--parrot_rows", "3", "--port", "1"])
    assert (choice.brain, options.port) == ("parrot", 1)
    assert choice.backends == {"vad": "silero", "stt": "none"}
    assert choice.options["parrot"] == ParrotOptions(rows=3)
    _, choice = parse(["--brain", "parrot", "--stt", "pocketsphinx"])
    assert choice.backends["stt"] == "pocketsphinx"
    _, choice = parse(["--brain", "parrot", "--device", "cuda:1"])
    assert choice.options["parrot"].device == "cuda:1"


def test_a_turn_model_can_be_chosen() -> None:
    _, choice = parse(["--turn", "smart_turn", "--smart_turn_model", "file.onnx"])
    assert choice.backends["turn"] == "smart_turn"
    assert choice.options["turn"].model == "file.onnx"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--stt none", "argument --stt: invalid choice: 'none'"),
        ("--parrot_rows 3", "--parrot_rows belongs to --brain parrot; --brain cascade is chosen"),
        ("--brain parrot --tts espeak", "--tts belongs to --brain cascade; --brain parrot is"),
        ("--brain parrot --profile cpu", "--profile belongs to --brain cascade"),
        ("--description x", "--description belongs to --tts parler; --tts espeak is chosen"),
        ("--stt_compile_mode default", "--stt_compile_mode belongs to --stt whisper; --stt pocket"),
        ("--brain parrot --description x", "--tts parler; --brain parrot is chosen"),
        ("--speed 2", "there is no --speed"),
        ("--stt_gen_x 1", "--stt whisper; --stt pocketsphinx is chosen and has no generation"),
        ("--tts_gen_x 1", "there is no --tts_gen_x; --tts espeak is chosen and has no generation"),
        ("--tts parler --tts_gen_x 1", "--tts parler is chosen and has --tts_gen_min_new_tokens"),
        ("--stt_gen_=1", "--stt_gen_"),
        ("--device cuda", "--device cuda: none of the parts has one to choose"),
        ("--recv_host 127.0.0.1 --send_host ::1", "--recv_host 127.0.0.1, --send_host ::1: these"),
        ("--port 1 --send_port 2", "--port 1, --send_port 2: these are names of one"),
        ("--tts parler --tts_gen_do_sample maybe", "maybe: true or false"),
        ("--recv_host 0.0.0.0", "--host 0.0.0.0 can be reached from other machines"),
    ],
)
def test_a_flag_that_nothing_takes_is_refused_by_name(
    line: str, told: str, capsys: Capture
) -> None:
    assert told in refusal(line, capsys)


def test_the_two_ways_have_one_address() -> None:
    options, _ = parse("--recv_host ::1 --send_host ::1 --recv_port 7 --send_port 7".split())
    assert (options.host, options.port) == ("::1", 7)
    options, _ = parse("--port 1 --port 2".split())  # as everywhere, the last wins
    assert options.port == 2


def test_generation_options_pass_through() -> None:
    line = "--stt_gen_num_beams 2 --stt_gen_return_timestamps=False --stt_gen_task translate"
    _, choice = parse(["--stt", "whisper", *line.split(), "--stt_gen_x", "[0.5, null]"])
    gen = {"num_beams": 2, "return_timestamps": False, "task": "translate", "x": [0.5, None]}
    assert choice.options["stt"] == WhisperOptions(gen=gen)


def test_a_named_generation_option_is_not_passed_through() -> None:
    line = "--lm openai --lm_gen_temperature 0.5 --lm_gen_max_new_tokens 9 --lm_gen_seed 3"
    options = parse(line.split())[1].options["lm"]
    assert (options.gen_temperature, options.gen_max_tokens) == (0.5, 9)
    assert options.gen == {"seed": 3}
    _, choice = parse("--lm transformers --lm_gen_max_new_tokens 9".split())
    assert choice.options["lm"].gen_max_tokens == 9


@pytest.mark.parametrize(
    ("given", "value"), [("", True), ("True", True), ("false", False), (None, None)]
)
def test_a_truth_may_be_said_or_left_to_the_name(given: str | None, value: bool | None) -> None:
    flags = [] if given is None else ["--tts_gen_do_sample", *given.split()]
    _, choice = parse(["--tts", "parler", *flags])
    assert choice.options["tts"].do_sample is value
    _, choice = parse(["--tts", "parler", *flags, "--no-tts_gen_do_sample"])
    assert choice.options["tts"].do_sample is False


@pytest.mark.parametrize(
    ("stage", "name"), [(stage, name) for stage in BRAINS["cascade"] for name in STAGES[stage]]
)
def test_help_is_grouped_by_stage(stage: str, name: str, capsys: Capture) -> None:
    if (stage, name) == ("stt", "none"):
        return
    with pytest.raises(SystemExit) as stopped:
        parse([f"--{stage}", name, "--help"])
    assert stopped.value.code == 0
    told = capsys.readouterr().out
    chosen = {**BRAINS["cascade"], stage: name}
    groups = [line[:-1] for line in told.splitlines() if line.endswith(":") and line[0] != " "]
    assert groups[2:] == ["server", *(f"{key}: {value}" for key, value in chosen.items())]
    for other in set(STAGES["tts"]) - {chosen["tts"]}:
        assert other in told.partition(f"tts: {chosen['tts']}:\n  Others:")[2].splitlines()[0]


def test_choosing_the_duplex_brain_loads_no_torch_yet() -> None:
    code = (
        "import sys; from server.__main__ import main; from server.options import parse; "
        "parse(['--brain', 'parrot']); heavy = {'torch', 'transformers'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
