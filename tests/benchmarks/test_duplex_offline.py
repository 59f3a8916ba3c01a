"""Held-out dialogues without a server: the scoring of known agents, and a run of the whole."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="models need torch")
pytest.importorskip("transformers", reason="models need transformers")
pytest.importorskip("espeakng_loader", reason="dialogues are spoken by eSpeak NG")
pytest.importorskip("yaml", reason="options are YAML")

import torch

from benchmarks import duplex_offline
from benchmarks.duplex import DIALOGUES
from benchmarks.duplex_dialogues import outcomes
from benchmarks.duplex_judge import Hearings
from benchmarks.duplex_offline import as_heard, converse, delay_samples, held_out, spoken
from benchmarks.duplex_report import Figures, figures
from benchmarks.duplex_score import Outcome
from benchmarks.duplex_trials import to_wire_rate
from benchmarks.measure import AUDIBLE_DBFS, to_ms
from handlers.messages import Samples
from models.common.sampling import Sampling
from models.common.tokens import silent_frame
from models.parrot.backbones import DualLlama
from models.parrot.dialogues import Dialogue, load_options
from models.parrot.domain import BACKCHANNEL
from models.parrot.engine import Memory, TorchEngine
from models.parrot.speech import agent_clip
from models.parrot.synthesis import RATE_HZ
from models.parrot.tokenizers import load_tokenizer
from tests.models import tiny

COUNT = 5
NEAR_MS = 2.0
"""What the judge of these tests takes for a backchannel is just as long as one of the agent's."""


@pytest.fixture(scope="module")
def dialogues() -> list[Dialogue]:
    options = load_options(DIALOGUES)
    options = dataclasses.replace(
        options,
        length_s=(22.0, 24.0),
        phrase_share=0.5,
        question_share=0.1,
        long_share=0.2,
        noise_share=0.2,
        interruption_share=0.4,
        long_pause_s=(0.6, 1.0),  # or two backchannels may be heard as one sound
    )
    return held_out(COUNT, options)


def hear(samples: Samples) -> str:
    backchannel_ms = agent_clip(BACKCHANNEL).audible / RATE_HZ * 1000
    return BACKCHANNEL if abs(to_ms(len(samples)) - backchannel_ms) < NEAR_MS else "five apple"


def scored(dialogues: list[Dialogue], agents: list[Samples]) -> tuple[Figures, list[Outcome]]:
    found = [
        outcome
        for dialogue, agent in zip(dialogues, agents, strict=True)
        for outcome in outcomes(dialogue.truth, to_wire_rate(agent), hear, AUDIBLE_DBFS)
    ]
    return figures(found, [], expected_backchannels=0, not_held=0), found


def later(samples: Samples, seconds: float) -> Samples:
    shift = round(seconds * RATE_HZ)
    return np.concatenate((np.zeros(shift, np.float32), samples))[: len(samples)]


def test_the_agent_of_the_data_does_everything_right(dialogues: list[Dialogue]) -> None:
    found, each = scored(dialogues, [dialogue.agent for dialogue in dialogues])
    turns = [turn for dialogue in dialogues for turn in dialogue.truth.turns]
    cut = [turn for turn in turns if turn.reply and turn.reply.cut]
    assert found.turn_takeover.of >= 5
    assert found.turn_takeover.rate == 1
    assert found.pause_takeover.of >= 5
    assert found.pause_takeover.hits == found.long_takeover.hits == 0
    assert found.silent_in_time.of == len(cut) >= 3
    assert found.silent_in_time.rate == 1
    assert found.stop_ms.max is not None
    assert found.stop_ms.max <= 225
    assert found.long_takeover.of == sum(turn.kind == "long" for turn in turns) >= 3
    assert found.false_replies_per_minute == 0
    assert found.latency_ms.p50 == pytest.approx(240, abs=25)
    assert found.difference is not None
    assert found.difference.ipu.seconds < 2
    expected = sum(len(turn.backchannels) for turn in turns)
    assert sum(outcome.backchannels or 0 for outcome in each if outcome.task == "backchannel") == (
        expected
    )


def test_a_later_agent_is_later_by_just_so_much(dialogues: list[Dialogue]) -> None:
    first, _ = scored(dialogues, [dialogue.agent for dialogue in dialogues])
    found, _ = scored(dialogues, [later(dialogue.agent, 0.1) for dialogue in dialogues])
    assert first.latency_ms.p50 is not None
    assert first.stop_ms.p50 is not None
    assert found.latency_ms.p50 == pytest.approx(first.latency_ms.p50 + 100, abs=1)
    assert found.stop_ms.p50 == pytest.approx(first.stop_ms.p50 + 100, abs=1)


def test_an_agent_that_says_nothing_and_one_that_never_stops(dialogues: list[Dialogue]) -> None:
    found, each = scored(dialogues, [np.zeros_like(d.agent) for d in dialogues])
    assert found.turn_takeover.hits == found.silent_in_time.of == 0
    assert found.interruptions_untested > 0
    assert all(not o.understood.right for o in each if o.understood)
    tone = np.float32(0.1) * np.sin(np.arange(100 * RATE_HZ, dtype=np.float32))
    found, _ = scored(dialogues, [tone[: len(d.agent)] for d in dialogues])
    assert found.turn_takeover.hits == 0  # it never began
    assert found.silent_in_time.of > 0
    assert found.silent_in_time.hits == 0


def test_an_agent_that_speaks_in_every_pause(dialogues: list[Dialogue]) -> None:
    agents = []
    for dialogue in dialogues:
        agent = dialogue.agent.copy()
        for turn in dialogue.truth.turns:
            for pause in turn.pauses:
                agent[pause.start + 800 : pause.start + 800 + RATE_HZ // 2] = 0.1
        agents.append(agent)
    found, _ = scored(dialogues, agents)
    assert found.pause_takeover.rate == found.long_takeover.rate == 1


def test_dialogues_side_by_side_are_as_each_alone() -> None:
    sampling = Sampling(temperature=1.0)
    heard = [torch.randint(tiny.CODES, (frames, 1)) for frames in (5, 9, 7)]
    memory = Memory(6, sinks=1)
    said = converse(TorchEngine(tiny.model(), 3, memory=memory, sampling=sampling), heard)
    assert [len(codes) for codes in said] == [5, 9, 7]
    for index, codes in enumerate(heard):
        engine = TorchEngine(tiny.model(), 1, memory=memory, sampling=sampling)
        engine.open("alone", seed=index)
        alone = [engine.step({"alone": frame})["alone"] for frame in codes]
        assert torch.equal(torch.stack(alone), said[index])


def test_silence_left_out_of_the_decoding_is_not_missed(dialogues: list[Dialogue]) -> None:
    codec = load_tokenizer()
    agent = next(d for d in dialogues if d.truth.turns[0].reply).agent
    samples = torch.from_numpy(agent[: 8 * RATE_HZ].copy())
    codes = codec.encode(samples[None])[0]
    parts = spoken(codes, silent_frame(codec))
    assert 0 < sum(end - begin for begin, end in parts) < len(codes)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(parts))
    late = delay_samples(codec)
    assert late == 3 * 640 + 320
    ours = as_heard(codec, codes, len(samples))
    whole = codec.decode(codes[None])[0].numpy()[: len(samples) - late]
    assert np.abs(ours[:late]).max() == 0
    frames = len(whole) // 640
    level = [np.square(x[: frames * 640].reshape(-1, 640)).mean(1) for x in (ours[late:], whole)]
    level = [power[10:] for power in level]  # until the whole one has settled
    heard = [power > 1e-5 for power in level]  # -50 dBFS
    assert heard[0].sum() > 10
    assert (heard[0] != heard[1]).sum() <= 1
    both = heard[0] & heard[1]
    assert np.abs(10 * np.log10(level[0][both] / level[1][both])).max() < 3.0  # other phases


def test_what_was_heard_before_is_not_asked_again(tmp_path: Path) -> None:
    asked: list[int] = []

    def judge(samples: Samples) -> str:
        asked.append(len(samples))
        return str(len(samples))

    for rule in ("a | b", "a | b", "a"):
        with Hearings(judge, rule, tmp_path / "new/hearings.json") as remembering:
            assert remembering(np.zeros(3, np.float32)) == "3"
            assert remembering(np.ones(4, np.float32)) == "4"
    assert asked == [3, 4, 3, 4]


def test_the_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pocketsphinx", reason="the judge is PocketSphinx")
    codec = load_tokenizer()
    torch.manual_seed(0)
    settings = tiny.settings(codebook_size=codec.codebook_size)
    DualLlama(DualLlama.config_class(**settings)).save_pretrained(tmp_path / "lm")
    flags = ["--model", str(tmp_path / "lm"), "--dialogues", "1", "--length_s", "4", "5"]
    flags += ["--window", "40", "--sinks", "2", "--hearings", str(tmp_path / "heard.json")]
    assert duplex_offline.main([*flags, "--json", str(tmp_path / "found.json")]) == 0
    printed = capsys.readouterr().out
    assert "takeover after a finished turn" in printed
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["environment"]["settings"]["sinks"] == 2
    shares = found["data"]["turn_takeover"]
    assert shares["hits"] == shares["of"]
    assert set(found["cpu_s"]) >= {"codes", "model", "sound"}
    assert duplex_offline.main([*flags, "--sinks", "40"]) == 1
    assert "sinks" in capsys.readouterr().err
