"""The generator of dialogues: its truth against its sound, its rooms, what it writes."""

from __future__ import annotations

import dataclasses
import json
import random
import wave
from collections.abc import Sequence
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("espeakng_loader", reason="dialogues are spoken by eSpeak NG")
pytest.importorskip("yaml", reason="options are YAML")

from models.common.errors import ConfigError
from models.parrot import domain
from models.parrot.dialogue_files import FISHER, Job, Maker, main, statistics_of
from models.parrot.dialogues import (
    LABELS,
    Dialogue,
    DialogueOptions,
    Span,
    generate,
    load_options,
)
from models.parrot.labels import FIRST_WORD, PAUSING
from models.parrot.rooms import EVENTS, Room, RoomOptions, heard_in, sound
from models.parrot.speech import PERSON_RMS, Audio, agent_clip, say_parts
from models.parrot.statistics import mean_of
from models.parrot.synthesis import RATE_HZ, Speaker, Synthesizer

RECIPE = load_options(
    Path(__file__).parents[2] / "models" / "parrot" / "configs" / "dialogues" / "tiny.yaml"
)
DRY = RoomOptions((90, 90), (0, 0), (0, 0), 0, (0, 0), 0, echo_share=0, telephone_share=0)
DRY_ROOM = Room(90, 0, 0, None, 0, None, 0, None, 0, 2000, False)
CLEAN = dataclasses.replace(
    RECIPE,
    length_s=(22, 36),
    room=DRY,
    sounds_per_minute=0,
    noise_share=0,
    own_voice_share=0,
    hesitation=0,
    stop_hesitation=0,
)
EDGE = RATE_HZ // 50


@pytest.fixture(scope="module")
def clean() -> list[Dialogue]:
    return [generate(seed, CLEAN, test=seed % 2 == 1) for seed in range(8)]


def rms(samples: Audio) -> float:
    return float(np.sqrt(np.square(samples, dtype=np.float64).mean()))


def seconds(span: Span, other: Span) -> float:
    """From the end of the one to the start of the other."""
    return (other.start - span.end) / RATE_HZ


def outside(length: int, spans: Sequence[Span]) -> np.ndarray:
    quiet = np.ones(length, bool)
    for span in spans:
        quiet[max(0, span.start - EDGE) : span.end + EDGE] = False
    return quiet


@pytest.mark.parametrize("seed", [7, 25])
def test_a_seed_is_one_dialogue_whatever_came_before(seed: int) -> None:
    """25 is a Klatt voice, whose noise comes from what all of eSpeak's copies share."""
    agent_clip.cache_clear()
    first = generate(seed, RECIPE, test=False)
    generate(8, RECIPE, test=True)
    again = generate(seed, RECIPE, test=False)  # its agent's clips are kept by now
    assert first.truth == again.truth
    assert np.array_equal(first.person, again.person)
    assert np.array_equal(first.agent, again.agent)
    assert generate(seed, RECIPE, test=True).truth.turns != first.truth.turns


def test_the_channels_sound_where_the_truth_says_and_nowhere_else(clean: list[Dialogue]) -> None:
    for dialogue in clean:
        length = len(dialogue.person)
        assert len(dialogue.agent) == length == dialogue.truth.length
        assert 22 <= length / RATE_HZ <= 50
        spoken: list[Span] = []
        answered: list[Span] = []
        for turn in dialogue.truth.turns:
            starts = [turn.span.start, *(pause.end for pause in turn.pauses)]
            ends = [*(pause.start for pause in turn.pauses), turn.span.end]
            spoken += [Span(a, b) for a, b in zip(starts, ends, strict=True)]
            answered += turn.backchannels
            if turn.reply:
                answered.append(turn.reply.span)
                spoken += [turn.reply.listener] if turn.reply.listener else []
        for span in spoken:
            part = dialogue.person[span.start : span.end]
            assert rms(part) > PERSON_RMS / 5
            assert np.abs(part[:EDGE]).max() > 10 * PERSON_RMS * 10 ** (-90 / 20)
            assert np.abs(part[-EDGE:]).max() > 10 * PERSON_RMS * 10 ** (-90 / 20)
        assert rms(dialogue.person[outside(length, spoken)]) < PERSON_RMS * 10 ** (-85 / 20)
        for span in answered:
            assert rms(dialogue.agent[span.start : span.end]) > 0.02
        assert not dialogue.agent[outside(length, answered)].any()


def test_the_agent_answers_in_time_and_never_in_a_pause(clean: list[Dialogue]) -> None:
    pauses = late = in_time = turns = 0
    for dialogue in clean:
        for turn in dialogue.truth.turns:
            assert turn.reply is not None
            low, high = CLEAN.response_gap_s
            gap_s = seconds(turn.span, turn.reply.span)
            assert low - 1e-3 <= gap_s <= CLEAN.late_gap_s[1] + CLEAN.grid_s
            in_time += gap_s <= high + CLEAN.grid_s
            assert turn.reply.span.start % (CLEAN.grid_s * RATE_HZ) == 0
            during = np.zeros(len(dialogue.agent), bool)
            during[turn.span.start + int(0.3 * RATE_HZ) : turn.reply.span.start - EDGE] = True
            during &= outside(len(during), turn.backchannels)
            assert not dialogue.agent[during].any()
            turns += 1
            pauses += len(turn.pauses)
            late += len(turn.backchannels)
            assert turn.kind == "long" or not turn.backchannels
            if turn.kind == "phrase":
                assert turn.reply.text == turn.text
                low, high = CLEAN.pause_s
                assert all(low <= (p.end - p.start) / RATE_HZ <= high for p in turn.pauses)
    assert pauses > 20
    assert late > 1
    assert 0.75 * turns < in_time < turns


def test_a_reply_spoken_over_stops_and_the_new_turn_is_answered() -> None:
    options = dataclasses.replace(CLEAN, interruption_share=0.9, long_share=0.0)
    dialogue = generate(3, options, test=False)
    turns = dialogue.truth.turns
    interrupted = [(a, b) for a, b in pairwise(turns) if a.reply and a.reply.cut]
    assert len(interrupted) >= 3
    for turn, following in interrupted:
        assert turn.reply
        assert following.reply
        silent_s = (turn.reply.span.end - following.span.start) / RATE_HZ
        assert options.stop_s[0] - 1e-3 <= silent_s <= options.stop_s[1] + 1e-3
        whole = agent_clip(turn.reply.text)
        assert turn.reply.span.end - turn.reply.span.start < whole.audible
        said = dialogue.agent[turn.reply.span.start : turn.reply.span.end - EDGE]
        assert np.array_equal(said, whole.samples[whole.first :][: len(said)])
        assert not dialogue.agent[turn.reply.span.end : following.reply.span.start - EDGE].any()
    assert not turns[-1].reply or not turns[-1].reply.cut


def test_a_listeners_sound_stops_nothing() -> None:
    options = dataclasses.replace(CLEAN, listener_share=1.0, interruption_share=0.0)
    for turn in generate(4, options, test=False).truth.turns:
        assert turn.reply
        assert turn.reply.listener
        assert not turn.reply.cut
        assert turn.reply.span.start < turn.reply.listener.start < turn.reply.span.end
        assert turn.reply.span.end - turn.reply.span.start == agent_clip(turn.reply.text).audible


def test_what_is_held_out_is_in_the_test_side_alone(clean: list[Dialogue]) -> None:
    for dialogue in clean:
        _, variant = dialogue.truth.speaker.voice.split("+")
        assert (variant in domain.HELD_OUT_VARIANTS) == dialogue.truth.test
        phrases = [turn.text for turn in dialogue.truth.turns if turn.kind == "phrase"]
        assert all(domain.held_out(phrase) == dialogue.truth.test for phrase in phrases)


def test_the_agents_own_voice_is_for_training_alone() -> None:
    options = dataclasses.replace(CLEAN, own_voice_share=1.0)
    assert generate(1, options, test=False).truth.speaker.voice == domain.AGENT.voice
    assert generate(1, options, test=True).truth.speaker.voice != domain.AGENT.voice


def test_heights_are_for_training_alone_and_never_the_agents() -> None:
    options = dataclasses.replace(CLEAN, voice_height=(1.1, 1.1))
    assert generate(1, options, test=False).truth.speaker.height == 1.1
    assert generate(1, options, test=True).truth.speaker.height == 1.0
    options = dataclasses.replace(options, own_voice_share=1.0)
    assert generate(1, options, test=False).truth.speaker.height == 1.0


def test_a_higher_voice_is_as_fast() -> None:
    speaker = Speaker("en-us+Annie", 160, 50, 60)
    higher = dataclasses.replace(speaker, height=1.15)
    with Synthesizer() as synthesizer:
        plain, made = (synthesizer.say(who, "lemon garden yellow.") for who in (speaker, higher))
    assert len(made.samples) == pytest.approx(len(plain.samples), rel=0.05)
    assert np.allclose(made.words, plain.words, rtol=0.1, atol=0.02 * RATE_HZ)
    lemon = slice(plain.words[0], plain.words[1])
    assert centre_hz(made.samples[lemon]) == pytest.approx(
        1.15 * centre_hz(plain.samples[lemon]), rel=0.05
    )


def centre_hz(samples: Audio) -> float:
    """In the middle of its energy."""
    power = np.square(np.abs(np.fft.rfft(samples)))
    return float((power * np.fft.rfftfreq(len(samples), 1 / RATE_HZ)).sum() / power.sum())


def test_pauses_and_kinds_have_the_shares_asked_for(clean: list[Dialogue]) -> None:
    turns = [turn for dialogue in clean for turn in dialogue.truth.turns]
    phrases = [turn for turn in turns if turn.kind == "phrase"]
    places = sum(turn.text.count(" ") for turn in phrases)
    assert sum(len(t.pauses) for t in phrases) / places == pytest.approx(0.4, abs=0.1)
    wanted = CLEAN.phrase_share / (CLEAN.phrase_share + CLEAN.question_share + CLEAN.long_share)
    assert len(phrases) / len(turns) == pytest.approx(wanted, abs=0.1)


def last_pitch_hz(samples: Audio) -> float:
    """Of the last 50 ms, by autocorrelation."""
    window = samples[-RATE_HZ // 20 :] * np.hanning(RATE_HZ // 20)
    similar = np.correlate(window, window, "full")[len(window) - 1 :]
    shortest = RATE_HZ // 400
    return RATE_HZ / (shortest + int(similar[shortest : RATE_HZ // 70].argmax()))


def test_a_pause_sounds_unfinished_and_an_end_finished() -> None:
    speaker = Speaker("en-us+Annie", 160, 50, 60)
    with Synthesizer() as synthesizer:
        for word in ("lemon", "garden", "yellow"):
            parts, source = [word, word], random.Random(0)
            pause, end = say_parts(synthesizer, speaker, parts, source, cut_share=0)
            cut, _ = say_parts(synthesizer, speaker, parts, source, cut_share=1)
            risen, fallen = (last_pitch_hz(clip.samples[: clip.end]) for clip in (pause, end))
            assert risen > 1.2 * fallen
            assert last_pitch_hz(cut.samples[: cut.end]) > 1.1 * fallen


def test_noise_and_gain_are_as_loud_as_said() -> None:
    source = np.random.default_rng(0)
    voice = source.standard_normal(4 * RATE_HZ, dtype=np.float32) * np.float32(PERSON_RMS)
    silence = np.zeros_like(voice)
    for slope in (0.0, -6.0):
        room = dataclasses.replace(DRY_ROOM, snr_db=20, gain_db=6, slope_db_per_octave=slope)
        noise = heard_in(room, silence, silence, PERSON_RMS, source)
        assert 20 * np.log10(rms(noise) / PERSON_RMS) == pytest.approx(-14, abs=1.0)
    hum = dataclasses.replace(DRY_ROOM, snr_db=40, hum_hz=50.0, hum_below_noise_db=-20)
    loudest = np.abs(np.fft.rfft(heard_in(hum, silence, silence, PERSON_RMS, source))).argmax()
    assert loudest / 4 == pytest.approx(50, abs=1)
    phone = dataclasses.replace(DRY_ROOM, telephone=True)
    power = np.square(np.abs(np.fft.rfft(heard_in(phone, voice, silence, PERSON_RMS, source))))
    assert power[4 * 5000 :].mean() < 0.01 * power[4 * 1000 : 4 * 2000].mean()


def test_reverberation_and_echo() -> None:
    source = np.random.default_rng(0)
    click, silence = np.zeros((2, RATE_HZ), np.float32)
    click[100] = 0.5
    room = dataclasses.replace(DRY_ROOM, rt60_s=0.3, direct_over_reverberant_db=6.0)
    heard = heard_in(room, click, silence, 1e-3, source)
    tail = np.square(heard[102:], dtype=np.float64)
    assert 10 * np.log10(tail.sum() / float(heard[100]) ** 2) == pytest.approx(-6, abs=0.5)
    early, late = tail[:800].sum(), tail[2400:3200].sum()  # 150 ms apart: 30 dB
    assert 10 * np.log10(early / late) == pytest.approx(30, abs=3)
    room = dataclasses.replace(DRY_ROOM, echo_delay_s=0.1, echo_db=-20, echo_cutoff_hz=6000)
    heard = heard_in(room, silence, click, 1e-4, source)
    assert abs(int(np.abs(heard).argmax()) - 100 - RATE_HZ // 10) <= 2
    assert 0.2 < np.abs(heard).max() / 0.05 < 1


@pytest.mark.parametrize("kind", EVENTS)
def test_noises_have_the_level_asked_for(kind: str) -> None:
    samples = sound(kind, 0.05, np.random.default_rng(1))
    assert rms(samples) == pytest.approx(0.05, rel=1e-3)
    assert 0.1 * RATE_HZ <= len(samples) <= 2 * RATE_HZ


def test_the_agent_is_silent_on_noise() -> None:
    options = dataclasses.replace(RECIPE, noise_share=1e9)
    dialogue = generate(1, options, test=False)
    assert {turn.kind for turn in dialogue.truth.turns} == {"noise"}
    assert not dialogue.agent.any()


def test_options_are_named_and_in_range(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    for content, complaint in (
        ("pauses_s: [0, 1]", "there is no pauses_s"),
        ("pause_s: [1, 0.2]", "lowest, highest"),
        ("pause_s: [0.2, 1, 2]", "2 values"),
        ("room: {snr_db: 12}", "room.snr_db=12"),
        ("room: {snr_db: [5, 4]}", "snr_db"),
        ("room: {colour: 1}", "there is no room.colour"),
        ("phrase_share: often", "phrase_share='often'"),
        ("phrase_share: -1", "phrase_share"),
        ("- 1", "no names with values"),
    ):
        path.write_text(content)
        with pytest.raises(ConfigError, match=complaint):
            load_options(path)
    path.write_text("room: {snr_db: [5, 6]}\npause_share: 1")
    options = load_options(path)
    assert options.room == dataclasses.replace(RoomOptions(), snr_db=(5.0, 6.0))
    assert options.pause_share == 1.0


def test_by_default_silences_and_overlaps_last_as_in_calls() -> None:
    options = dataclasses.replace(DialogueOptions(), room=DRY)
    mean = mean_of([statistics_of(generate(seed, options, test=False)) for seed in range(16)])
    for name, rate in (("pause", mean.pause), ("gap", mean.gap), ("overlap", mean.overlap)):
        count, total_s = FISHER[name]
        assert rate.seconds / rate.count == pytest.approx(total_s / count, rel=0.25)


def test_files_and_a_second_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = f"--output_data {tmp_path} --hours 0.012 --seed 5 --processes 2 --wav".split()
    main(arguments)
    assert "| gap |" in capsys.readouterr().out
    assert len(list(tmp_path.glob("*.wav"))) == 2
    dialogue = generate(5_000_000_001, DialogueOptions(), test=False)
    with wave.open(str(tmp_path / "train-5-0000001.wav")) as file:
        assert (file.getnchannels(), file.getframerate()) == (2, RATE_HZ)
        read = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, 2) / 32767
    assert np.abs(read[:, 0] - dialogue.person).max() < 1e-4
    assert np.abs(read[:, 1] - dialogue.agent).max() < 1e-4
    truth = json.loads((tmp_path / "train-5-0000001.json").read_text())
    assert truth == json.loads(json.dumps(dataclasses.asdict(dialogue.truth)))
    main(arguments)
    assert "nothing was missing" in capsys.readouterr().out


def test_shards_hold_both_channels_codes(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="models need torch")
    pytest.importorskip("safetensors", reason="shards are safetensors")
    from models.parrot.codec import CodecConfig, TinyCodec
    from models.parrot.shards import Shards

    torch.manual_seed(0)
    codec = TinyCodec(CodecConfig()).eval()
    (tmp_path / "codec").mkdir()
    codec.save(tmp_path / "codec")
    tokenizer = ["--tokenizer", str(tmp_path / "codec")]
    for hours in ("0.005", "0.012"):  # one dialogue, then another one
        main(["--output_data", str(tmp_path / "out"), "--hours", hours, "--test", *tokenizer])
    shards = Shards([tmp_path / "out"])
    assert len(shards) == 2
    assert shards.vocabulary.labels == LABELS
    job = Job(DialogueOptions(), 0, True, tmp_path, str(tmp_path / "codec"))
    for number in range(2):
        dialogue = generate(number, job.options, test=True)
        made = Maker(job)(number)
        assert made.codes is not None
        assert np.array_equal(shards[number].numpy(), made.codes)
        labels = shards.labels(number)
        assert labels is not None
        assert np.array_equal(labels, dialogue.truth.labels(640, len(made.codes)))
        whole = len(dialogue.agent) // 640 * 640
        alone = codec.encode(torch.from_numpy(dialogue.agent[None, :whole]))
        assert torch.equal(shards[number][:, 1].long(), alone[0])


def test_an_agent_that_hesitates_may_come_in_at_any_frame() -> None:
    options = dataclasses.replace(
        CLEAN, hesitation=0.5, stop_hesitation=0.3, late_share=0, interruption_share=0.5
    )
    waits, stops = [], []
    for seed in range(24):
        turns = generate(seed, options, test=False).truth.turns
        for turn, following in pairwise(turns):
            assert turn.reply is not None
            waits.append(seconds(turn.span, turn.reply.span))
            if turn.reply.cut:
                stops.append((turn.reply.span.end - following.span.start) / RATE_HZ)
    steps = [int((wait - 0.22) / 0.04) for wait in waits]
    assert min(waits) >= 0.22
    for step in range(3):
        share = sum(s == step for s in steps) / len(steps)
        assert share == pytest.approx(0.5 ** (step + 1), abs=0.07)
    assert min(stops) >= 0.08
    assert 0.08 < sum(stop > 0.121 for stop in stops) / len(stops) < 0.5
    with pytest.raises(ConfigError, match="hesitation has to be below 1"):
        dataclasses.replace(CLEAN, hesitation=1.0)


def words_in(labels: np.ndarray) -> list[str]:
    return [domain.SAYABLE[n - FIRST_WORD] for n, _ in groupby(labels[labels >= FIRST_WORD])]


def test_labels_say_what_is_spoken(clean: list[Dialogue]) -> None:
    for dialogue in clean:
        truth, frames = dialogue.truth, len(dialogue.person) // 640
        labels = truth.labels(640, frames)
        speaking = labels >= FIRST_WORD
        for channel, active in enumerate(truth.activity(640)):
            assert np.array_equal(speaking[:, channel], active[:frames])
        for turn in truth.turns:
            words = [word for word, _ in groupby(turn.text.split())]
            assert words_in(labels[turn.span.start // 640 : turn.span.end // 640 + 1, 0]) == words
            if turn.reply:
                span, whole = turn.reply.span, turn.reply.text.split()
                said = words_in(labels[span.start // 640 : span.end // 640 + 1, 1])
                whole = [word for word, _ in groupby(whole)]
                assert said == whole[: len(said)]
                assert turn.reply.cut or said == whole
            for pause in turn.pauses:
                assert labels[(pause.start + pause.end) // 1280, 0] == PAUSING


def test_words_start_where_they_are_heard() -> None:
    clip = agent_clip("apple banana river")
    (first, *others) = clip.words
    assert first[0] == "apple"
    assert abs(first[1] - clip.first) < EDGE
    alone = [agent_clip(word).audible for word in ("apple", "banana")]
    at = clip.first
    for (word, start), before in zip(others, alone, strict=True):
        assert word in ("banana", "river")
        assert 0.5 * before < start - at < 1.3 * before
        at = start


def test_a_folder_without_a_codec_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch", reason="models need torch")
    with pytest.raises(SystemExit):
        main(f"--output_data {tmp_path}/out --hours 1 --tokenizer {tmp_path}".split())
    assert str(tmp_path) in capsys.readouterr().err
