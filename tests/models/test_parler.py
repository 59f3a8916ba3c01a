"""Parler-TTS: released layouts load, and rows, caches and streaming change nothing."""

import pytest

pytest.importorskip("torch", reason="models need torch")
pytest.importorskip("transformers", reason="models need transformers")

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from transformers import DacConfig, DacModel

from models.common.errors import ArchitectureError, ConfigError, ModelError
from models.common.ring import RingCache
from models.common.sampling import Sampling
from models.parler import engine as engines
from models.parler.codec import Unspoken, WindowDecoder, reach_frames
from models.parler.config import Generation, ParlerConfig
from models.parler.engine import NoFreeRow, ParlerEngine, Piece, Room, TooLong, fitting
from models.parler.loading import load
from models.parler.modeling import ParlerModel
from tests.models import parler_plain as plain
from tests.models import parler_tiny as tiny

DESCRIPTION, PROMPT = [3, 1, 4, 1, 5, 9], [2, 6, 5, 3]
OTHERS = [[2, 7, 1, 8, 2, 8], [1, 1, 2, 3], [31, 4], [9, 8, 7, 6, 5, 4, 3]]
ROOM = Room(12, 12)
EXACT: dict[str, float] = {"rtol": 0.0, "atol": 2e-6}
"""The codec's sound, fp32, sums of other order; its greatest sample is about 0.3."""
HIGH = Sampling(temperature=1.0, top_k=8)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("parler")
    return {name: tiny.save(folder / name, **made) for name, made in tiny.LAYOUTS.items()}


@pytest.fixture
def loaded(checkpoints: dict[str, Path]) -> tuple[ParlerModel, Generation]:
    return load(checkpoints["mini-v1"])


def engine(
    model: ParlerModel, generation: Generation, rows: int = 3, play_steps: int = 16
) -> ParlerEngine:
    return ParlerEngine(model, generation, rows, play_steps=play_steps, room=ROOM)


def pieces(of: ParlerEngine) -> list[Piece]:
    found: list[Piece] = []
    while of.at_work:
        found += of.step()
    return found


def joined(found: list[Piece], session: str = "a") -> Tensor:
    return torch.cat([piece.samples for piece in found if piece.session == session])


def pieces_of(of: ParlerEngine, prompts: list[list[int]]) -> list[Piece]:
    for prompt in prompts:
        of.open("a" if prompt is prompts[0] else object(), DESCRIPTION, prompt)
    return pieces(of)


def alone(model: ParlerModel, generation: Generation, prompt: list[int], seed: int = 0) -> Tensor:
    one = engine(model, generation, rows=1)
    one.open("a", DESCRIPTION, prompt, seed=seed)
    return joined(pieces(one))


# The engine against the plain model.


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_the_engine_speaks_what_the_plain_model_says(
    checkpoints: dict[str, Path], layout: str
) -> None:
    model, generation = load(checkpoints[layout])
    lengths = set()
    for prompt in (PROMPT, *OTHERS[:2]):
        chosen = plain.greedy(model, generation, DESCRIPTION, prompt)
        want = plain.sound(model, plain.frames(model, chosen))
        torch.testing.assert_close(alone(model, generation, prompt), want, **EXACT)
        lengths.add(len(want))
    assert max(lengths) > 0


def test_codebooks_end_one_after_another(loaded: tuple[ParlerModel, Generation]) -> None:
    model, generation = loaded
    end = model.config.decoder.eos_token_id
    heads = model.decoder.lm_heads.weight.data.view(tiny.BOOKS, -1, 32)
    heads[:, end] *= 3
    ended = 0
    for prompt in (PROMPT, *OTHERS):
        chosen = plain.greedy(model, generation, DESCRIPTION, prompt)
        ended += chosen.shape[1] < generation.max_length
        want = plain.sound(model, plain.frames(model, chosen))
        torch.testing.assert_close(alone(model, generation, prompt), want, **EXACT)
    assert ended  # some did, before the greatest length
    assert not (chosen[:, 1:5] == end).any()  # and none before the least


@pytest.mark.parametrize("sampling", [Sampling(), HIGH])
def test_rows_that_join_and_leave_change_nobody(
    loaded: tuple[ParlerModel, Generation], sampling: Sampling
) -> None:
    model, generation = loaded
    generation = Generation(generation.max_length, generation.min_new_tokens, sampling)
    want = {name: alone(model, generation, OTHERS[name], seed=name) for name in range(4)}
    shared = engine(model, generation, rows=2)
    shared.open(0, DESCRIPTION, OTHERS[0], seed=0)
    found = [piece for _ in range(5) for piece in shared.step()]
    shared.open("gone", DESCRIPTION[:2], PROMPT)
    with pytest.raises(NoFreeRow):
        shared.open(1, DESCRIPTION, OTHERS[1])
    found += [piece for _ in range(7) for piece in shared.step()]
    shared.close("gone")
    waiting = [1, 2, 3]
    while waiting or shared.at_work:
        if waiting and shared.free_rows:
            name = waiting.pop(0)
            shared.open(name, DESCRIPTION, OTHERS[name], seed=name)
        found += shared.step()
    for name in range(4):
        sound = torch.cat([piece.samples for piece in found if piece.session == name])
        torch.testing.assert_close(sound, want[name], **EXACT)
        assert [piece.last for piece in found if piece.session == name][-1]


def test_draws_follow_their_seed(loaded: tuple[ParlerModel, Generation]) -> None:
    model, generation = loaded
    generation = Generation(generation.max_length, generation.min_new_tokens, HIGH)
    one, same, other = (alone(model, generation, PROMPT, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert one.shape != other.shape or not torch.equal(one, other)


def test_a_description_is_encoded_once(
    loaded: tuple[ParlerModel, Generation], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, generation = loaded
    spoken = engine(model, generation)
    encoded: list[list[int]] = []
    describe = model.describe

    def counted(ids: Tensor) -> Tensor:
        encoded.extend(ids.tolist())
        return describe(ids)

    monkeypatch.setattr(model, "describe", counted)
    monkeypatch.setattr(engines, "DESCRIPTIONS_KEPT", 2)
    for description in (DESCRIPTION, [4, 2], DESCRIPTION, [9], [4, 2]):
        spoken.open("a", description, PROMPT)
        spoken.close("a")
    assert encoded == [DESCRIPTION, [4, 2], [9], [4, 2]]


def test_what_does_not_fit_is_refused(loaded: tuple[ParlerModel, Generation]) -> None:
    model, generation = loaded
    spoken = engine(model, generation, rows=1)
    for description, prompt in (([1] * 13, PROMPT), (DESCRIPTION, [1] * 13)):
        with pytest.raises(TooLong):
            spoken.open("a", description, prompt)
    assert spoken.free_rows == 1
    long = Generation(max_length=200, min_new_tokens=0)
    with pytest.raises(ConfigError, match="128"):
        engine(model, long)
    with pytest.raises(ConfigError, match="max_length=4"):
        engine(model, Generation(max_length=4))
    with pytest.raises(ConfigError, match="play_steps=0"):
        engine(model, generation, play_steps=0)


def test_fewer_rows_where_memory_is_short(
    loaded: tuple[ParlerModel, Generation], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, generation = loaded
    limit = 2

    def short(rows: int, *sizes: Any, **settings: Any) -> Any:
        if rows > limit:
            raise torch.OutOfMemoryError
        return RingCache(rows, *sizes, **settings)

    monkeypatch.setattr(engines, "RingCache", short)
    assert fitting(model, generation, 8, play_steps=16, room=ROOM).rows == 2
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        fitting(model, generation, 8, play_steps=16, room=ROOM)


# Sound while it comes.


@pytest.mark.parametrize("play_steps", [1, 13, 24, 1000])
def test_streamed_sound_is_the_whole_sound(
    loaded: tuple[ParlerModel, Generation], play_steps: int
) -> None:
    model, generation = loaded
    want = plain.greedy(model, generation, DESCRIPTION, OTHERS[0])
    whole = plain.sound(model, plain.frames(model, want))
    spoken = engine(model, generation, play_steps=play_steps)
    spoken.open("a", DESCRIPTION, OTHERS[0])
    found = pieces(spoken)
    torch.testing.assert_close(joined(found), whole, **EXACT)
    assert (len(found) > 1) == (play_steps < 1000)
    assert [piece.last for piece in found] == [False] * (len(found) - 1) + [True]


def test_layers_are_compiled_once_and_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first clause, for any number of rows; the code of one layer serves all of them,
    more than torch would compile one after another."""
    path = tiny.save(tmp_path, num_hidden_layers=10)
    model, generation = load(path)
    want = [joined(pieces_of(engine(model, generation), OTHERS[:count])) for count in (1, 3)]
    made, compile = CompileCounter(), torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda part, mode, dynamic: compile(part, backend=made, dynamic=dynamic)
    )
    torch.compiler.reset()
    compiled = ParlerEngine(
        load(path)[0], generation, 3, play_steps=16, room=ROOM, compile_mode="default"
    )
    graphs = made.frame_count
    assert 0 < graphs < 10  # of two parts, for one row, several and a text; not of every layer
    for count, sound in zip((1, 3), want, strict=True):
        torch.testing.assert_close(joined(pieces_of(compiled, OTHERS[:count])), sound, **EXACT)
    assert made.frame_count == graphs


def test_the_first_sound_comes_after_play_steps_and_one_decode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load(tiny.save(tmp_path, endless=True))
    decoded: list[int] = []
    decode = model.audio_encoder.decode

    def counting(audio_codes: Tensor) -> Any:
        decoded.append(audio_codes.shape[2])
        return decode(audio_codes=audio_codes)

    monkeypatch.setattr(model.audio_encoder, "decode", counting)
    spoken = engine(model, Generation(80, 80, Sampling()), play_steps=32)
    spoken.open("a", DESCRIPTION, PROMPT)
    steps = next(step for step in range(1, 99) if spoken.step())
    assert steps == 32
    assert decoded == [32 - tiny.BOOKS + 1]


@pytest.mark.parametrize("ratios", [[2, 4], [2, 4, 8, 8], [4, 6, 2]])
def test_nothing_beyond_its_reach_changes_a_frame(ratios: list[int]) -> None:
    torch.manual_seed(0)
    config = DacConfig(
        encoder_hidden_size=2,
        downsampling_ratios=ratios,
        decoder_hidden_size=2 ** len(ratios) * 2,
        n_codebooks=2,
        codebook_size=8,
        codebook_dim=2,
    )
    codec = DacModel(config).eval().double()
    for name, parameter in codec.named_parameters():
        if "alpha" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    reach, hop, at = reach_frames(config), config.hop_length, 40
    latents = torch.randn(1, config.hidden_size, 80, dtype=torch.double, requires_grad=True)
    samples = codec.decoder(latents)[0, 0, at * hop : (at + 1) * hop]
    (gradient,) = torch.autograd.grad(samples.square().sum(), latents)
    (touched,) = gradient[0].abs().sum(0).nonzero(as_tuple=True)
    assert at - reach <= int(touched.min()) <= at <= int(touched.max()) <= at + reach
    assert int(touched.max() - touched.min()) >= 2 * reach - 2  # nor is it much too wide


def test_an_odd_upsampling_is_refused() -> None:
    with pytest.raises(ConfigError, match="5"):
        reach_frames(DacConfig(downsampling_ratios=[2, 5]))


def test_windows_forget_what_is_behind_them(loaded: tuple[ParlerModel, Generation]) -> None:
    model, _ = loaded
    decoder = WindowDecoder(model.audio_encoder)
    codes = torch.randint(0, tiny.CODES, (200, tiny.BOOKS), generator=torch.manual_seed(2))
    unspoken, sound, longest = Unspoken(tiny.BOOKS, decoder.reach), [], 0
    for number, part in enumerate(codes.split(10)):
        unspoken.push(part)
        window = unspoken.window(last=number == 19)
        if window is not None:
            longest = max(longest, len(window.codes))
            sound += decoder.decode([window])
    torch.testing.assert_close(torch.cat(sound), plain.sound(model, codes), **EXACT)
    assert longest <= 10 + 2 * decoder.reach
    assert unspoken.window(last=True) is None


# Checkpoints.


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_both_codec_layouts_load_alike(
    checkpoints: dict[str, Path], layout: str, tmp_path: Path
) -> None:
    wrapped, _ = load(checkpoints[layout])
    current, _ = load(tiny.save(tmp_path, wrapped=False, **tiny.LAYOUTS[layout]))
    torch.testing.assert_close(wrapped.state_dict(), current.state_dict())


def test_shards_load_as_one_file(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    whole = checkpoints["large-v1"]
    weights = load_file(whole / "model.safetensors")
    for file in ("config.json", "generation_config.json"):
        (tmp_path / file).write_text((whole / file).read_text())
    names = sorted(weights)
    index: dict[str, str] = {}
    for shard, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{shard + 1}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, tmp_path / file)
        index |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    torch.testing.assert_close(load(tmp_path)[0].state_dict(), load(whole)[0].state_dict())


@pytest.mark.parametrize(
    "name",
    [
        "decoder.lm_heads.1.weight",
        "decoder.model.decoder.layers.0.self_attn.k_proj.weight",
        "decoder.model.decoder.layer_norm.bias",
        "text_encoder.shared.weight",
        "embed_prompts.weight",
    ],
)
def test_missing_and_unexpected_keys_are_named(tmp_path: Path, name: str) -> None:
    path = tiny.save(tmp_path) / "model.safetensors"
    weights = load_file(path)
    weights["decoder.gate.weight"] = weights.pop(name)
    save_file(weights, path)
    with pytest.raises(ArchitectureError) as raised:
        load(tmp_path)
    assert f"lacks {name}" in str(raised.value)
    assert "unexpected decoder.gate.weight" in str(raised.value)


def test_a_wrong_shape_is_named(tmp_path: Path) -> None:
    path = tiny.save(tmp_path) / "model.safetensors"
    weights = load_file(path)
    weights["embed_prompts.weight"] = torch.zeros(2, 2)
    save_file(weights, path)
    with pytest.raises(ArchitectureError, match=r"embed_prompts.weight \[2, 2\] for \[40, 32\]"):
        load(tmp_path)


def test_sinusoids_may_be_left_out(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = tiny.save(tmp_path) / "model.safetensors"
    weights = load_file(path)
    del weights["decoder.model.decoder.embed_positions.weights"]
    save_file(weights, path)
    want = load(checkpoints["mini-v1"])[0].state_dict()
    torch.testing.assert_close(load(tmp_path)[0].state_dict(), want)


def test_what_cannot_be_loaded_says_why(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"config\.json"):
        load(tmp_path)
    good = checkpoints["mini-v1"]
    with pytest.raises(ConfigError, match="float8"):
        load(good, dtype="float8")
    with pytest.raises(ConfigError, match="device"):
        load(good, device="cuda:7" if not torch.cuda.is_available() else "nowhere")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"model_type": "musicgen"}, "musicgen"),
        ({"audio_encoder": {"model_type": "encodec"}}, "encodec"),
        ({"decoder": None}, "decoder"),
        ({"decoder": {"num_attention_heads": 3}}, "num_attention_heads=3"),
        ({"decoder": {"num_key_value_heads": 3}}, "16 heads on 3"),
        ({"decoder": {"num_codebooks": 2}}, "2 codebooks, 3 in the codec"),
    ],
)
def test_a_bad_configuration_is_refused(changes: dict[str, Any], error: str) -> None:
    with pytest.raises(ModelError, match=error):
        ParlerConfig.from_dict(tiny.config() | changes)


def test_the_released_configurations_are_understood() -> None:
    """The sizes that `config.json` of mini-v1 has, with its codec's wrapper of Descript's."""
    saved = tiny.config(hidden_size=64, num_codebooks=9)
    saved["audio_encoder"] = {"model_type": "dac", "num_codebooks": 9, "sampling_rate": 44_100}
    config = ParlerConfig.from_dict(saved)
    assert (config.codec.hop_length, config.codec.hidden_size) == (512, 1024)
    assert reach_frames(config.codec) == 11
    assert config.projects_description
    assert config.with_special_ids({"eos_token_id": 7}).decoder.eos_token_id == 7


def test_generation_follows_the_checkpoint_and_the_flags() -> None:
    saved = Generation.from_dict({"do_sample": True, "max_length": 99, "min_new_tokens": 10})
    assert saved == Generation(99, 10, Sampling(temperature=1.0, top_k=50))
    assert saved.changed(do_sample=False).sampling == Sampling()
    assert saved.changed(temperature=0.5, top_p=0.9).sampling == Sampling(0.5, 50, 0.9)
    greedy = Generation.from_dict({})
    assert greedy.sampling == Sampling()
    assert greedy.changed(do_sample=True, max_length=7).sampling.temperature == 1.0
