"""The duplex benchmark: its material, its judge, and a run over a real websocket."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from benchmarks.clips import write_wav
from benchmarks.duplex import parse, score
from benchmarks.duplex_judge import Judge, Understood, answer_words, says, word_errors
from benchmarks.duplex_scenes import Connection, Run, hold_all
from benchmarks.duplex_trials import (
    PARTNERS,
    PAUSE_S,
    Booth,
    Counts,
    Trial,
    in_sessions,
    recorded_trials,
    to_wire_rate,
)
from benchmarks.measure import to_samples
from benchmarks.pictures import draw_duplex
from benchmarks.report import write_json
from handlers.messages import RATE_HZ, Samples
from models.parrot import domain
from models.parrot.dialogues import DialogueOptions
from models.parrot.speech import agent_clip
from tests.benchmarks.fakes import clip, noise
from tests.benchmarks.test_latency import ANSWER_MS, PLAYOUT_MS, serving
from tests.client.fakes import Peer, realtime_server

pytest.importorskip("espeakng_loader", reason="no test speech without eSpeak NG")

COUNTS = Counts(3, 2, 3, 2, 4, 3, 1)


def trials(partner: str, seed: int = 0, counts: Counts = COUNTS) -> list[Trial]:
    with Booth(seed, PARTNERS[partner](), DialogueOptions()) as booth:
        return booth.trials(counts)


@pytest.fixture(scope="module")
def parrot() -> list[Trial]:
    return trials("parrot")


def of(made: list[Trial], task: str) -> list[Trial]:
    return [trial for trial in made if trial.task == task]


def level(samples: Samples) -> float:
    return float(np.sqrt(np.mean(np.square(samples))))


def test_the_same_seed_gives_the_same_trials() -> None:
    once, again, other = (trials("parrot", seed, Counts(*[1] * 7)) for seed in (0, 0, 1))
    assert [trial.name for trial in again] == [trial.name for trial in once]
    for one, same in zip(once, again, strict=True):
        assert np.array_equal(one.clip.samples, same.clip.samples)
    assert not np.array_equal(once[0].clip.samples, other[0].clip.samples)


def test_what_is_said_is_held_out(parrot: list[Trial]) -> None:
    for trial in of(parrot, "turn") + of(parrot, "pause"):
        assert domain.held_out(trial.clip.text)
        assert trial.answer == trial.clip.text
    for trial in of(parrot, "question"):
        assert domain.QUESTIONS[trial.clip.text] == trial.answer


def test_pauses_are_where_they_are_said_to_be(parrot: list[Trial]) -> None:
    paused = of(parrot, "pause")
    assert {trial.clip.kind for trial in paused} == {"phrase", "hesitation"}
    for trial in paused:
        [pause] = trial.clip.inner_pauses
        samples = trial.clip.samples
        assert PAUSE_S[0] - 0.001 <= pause.duration_s <= PAUSE_S[1] + 0.001
        assert trial.clip.onset_sample < pause.start_sample
        assert pause.end_sample < trial.clip.last_voiced_sample
        third = (pause.end_sample - pause.start_sample) // 3  # past the room's echo
        inside = samples[pause.end_sample - third : pause.end_sample]
        spoken = samples[trial.clip.onset_sample : pause.start_sample]
        assert level(inside) < level(spoken) / 4
    for trial in of(parrot, "turn"):
        assert trial.clip.inner_pauses == ()


def test_an_interruption_comes_while_the_reply_still_lasts(parrot: list[Trial]) -> None:
    for trial in of(parrot, "interruption"):
        assert trial.over is not None
        assert trial.over_answer
        reply_s = agent_clip(trial.answer).audible / 16_000
        assert trial.after_s <= reply_s - 0.5


def test_backchannels_are_expected_inside_late_pauses(parrot: list[Trial]) -> None:
    expected = 0
    for trial in of(parrot, "backchannel"):
        pauses = trial.clip.inner_pauses
        assert len(pauses) == 2
        for span in trial.backchannels:
            expected += 1
            delay = [span.start - pause.start_sample for pause in pauses]
            assert to_samples(250) in delay
            assert span.start > trial.clip.onset_sample + 2.0 * RATE_HZ
    assert expected > 0


def test_a_dialogue_carries_its_truth(parrot: list[Trial]) -> None:
    [trial] = of(parrot, "dialogue")
    assert trial.activity is not None
    person, agent = trial.activity
    assert len(person) == len(agent)
    assert len(person) * 0.01 == pytest.approx(len(trial.clip.samples) / RATE_HZ, abs=0.02)
    assert person.any()
    assert agent.any()


def test_noise_is_not_speech(parrot: list[Trial]) -> None:
    loudest = [float(np.abs(trial.clip.samples).max()) for trial in of(parrot, "noise")]
    assert len(loudest) == 3
    assert all(trial.answer == "" for trial in of(parrot, "noise"))


def test_an_assistant_is_asked_what_it_can_do() -> None:
    made = trials("assistant")
    assert {trial.clip.text for trial in of(made, "interruption")} <= {
        "tell me a story",
        "what can you do",
        "count from one to twenty",
    }
    assert all("plus" in trial.clip.text for trial in of(made, "question"))
    assert all(len(trial.clip.inner_pauses) == 1 for trial in of(made, "pause"))
    assert all(trial.backchannels == () for trial in made)


def test_trials_are_dealt_out_to_sessions(parrot: list[Trial]) -> None:
    sessions = in_sessions(parrot, 4)
    assert sorted(t.name for s in sessions for t in s) == sorted(t.name for t in parrot)
    assert [len(session) for session in sessions] == [1, 4, 4, 4, 4, 1]


def test_recordings_are_turns_with_or_without_a_text(tmp_path: Path) -> None:
    pause = np.zeros(to_samples(1500), np.float32)
    room = noise(3000, rms=1e-4)
    for name, speech in (("one", noise(900)), ("two", np.concatenate([noise(500), pause] * 2))):
        long = np.pad(speech, (to_samples(500), to_samples(500)))
        write_wav(tmp_path / f"{name}.wav", long + np.resize(room, len(long)))
        (tmp_path / f"{name}.txt").write_text("red fish\n")
    found = {trial.name: trial.answer for trial in recorded_trials(tmp_path)}
    assert found == {"one-00": "red fish", "two-00": "", "two-01": ""}


def test_the_judge_understands_the_original_voice() -> None:
    pytest.importorskip("pocketsphinx", reason="the judge is PocketSphinx")
    judge = Judge(answer_words())
    source = random.Random(3)
    right = words = 0
    for _ in range(8):
        phrase = domain.draw_phrase(source, test=True)
        heard = Understood.of(phrase, judge.hear(to_wire_rate(agent_clip(phrase).samples)))
        right, words = right + heard.right, words + heard.words
    assert right >= 0.8 * words
    hum = to_wire_rate(agent_clip(domain.BACKCHANNEL).samples)
    assert judge.hear(hum) == domain.BACKCHANNEL
    assert judge.hear(np.zeros(0, np.float32)) == ""
    with pytest.raises(ValueError, match="xqzt"):
        Judge(["xqzt"])


def test_word_errors_are_the_fewest_changes() -> None:
    assert word_errors("a b c".split(), "a b c".split()) == 0
    assert word_errors("a b c".split(), "b c d".split()) == 2
    assert word_errors([], ["a"]) == 1
    assert word_errors(["a", "b"], []) == 2
    assert Understood.of("a b", "a b c d e") == Understood(0, 2)
    assert says("three", "two plus one is three")
    assert not says("i see", "see i")


@pytest.mark.asyncio
async def test_a_run_over_the_wire(tmp_path: Path) -> None:
    async def broken(peer: Peer) -> None:
        await peer.send("error", error={"type": "server_error", "code": "full", "message": "no"})

    runs = [
        [Run(Trial("turn-0", "turn", clip(400)))],
        [Run(Trial("pause-0", "pause", clip(300, 600, 300)))],
        [Run(Trial("lost", "turn", clip(300)))],
    ]
    options = parse(["--partner", "parrot"])
    server = serving(answer_ms=ANSWER_MS, reply_ms=500.0)
    async with realtime_server(server, server, broken) as url:
        failures = await hold_all(runs, Connection(url), parallel=3)
    assert len(failures) == 1
    assert "full" in failures[0]
    document = score(runs, options)
    turn, pause = document["outcomes"]
    assert turn.latency_ms == pytest.approx(ANSWER_MS + PLAYOUT_MS, abs=30.0)
    assert pause.takeover
    assert document["figures"].not_held == 1
    write_json(tmp_path / "duplex.json", document)
    written = json.loads((tmp_path / "duplex.json").read_text())
    assert written["figures"]["turn_takeover"] == {"hits": 1, "of": 1}
    assert written["bars"][0]["holds"] is False
    draw_duplex(document, tmp_path / "duplex.png")
    assert (tmp_path / "duplex.png").read_bytes().startswith(b"\x89PNG")
