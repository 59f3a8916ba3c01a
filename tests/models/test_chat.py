"""The chat engine: whatever is batched, kept, copied or read in parts, each answer is the one that
`generate` gives alone."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="needs requirements.txt")

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from models.chat.engine import ChatEngine, NoFreeRow, TooManyTokens
from models.chat.load import load
from models.common.attention import grouped_attention
from models.common.errors import ArchitectureError, ConfigError
from models.common.packed import PackedLinear, can_pack
from models.common.sampling import Sampling
from tests.models.chat_model import SHAPE, VOCABULARY, model, prepared, save

WINDOW = 16
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen2-mixed": Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**SHAPE, head_dim=8),
    "mistral": MistralConfig(**SHAPE, sliding_window=WINDOW),
    "phi": PhiConfig(**SHAPE),
    "phi3": Phi3Config(**SHAPE),
    "gemma2": Gemma2Config(**SHAPE, head_dim=8, sliding_window=WINDOW),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=512,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    ),
}
LLAMA = CONFIGS["llama"]


def question(length: int, seed: int) -> list[int]:
    chosen = random.Random(seed)
    return [chosen.randrange(2, VOCABULARY) for _ in range(length)]


def alone(of: PreTrainedModel, ids: Sequence[int], count: int) -> list[int]:
    """The likeliest answer, by `generate`."""
    given = torch.tensor([list(ids)])
    out = of.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return list(out[0, len(ids) :].tolist())


def answer(engine: ChatEngine, ids: Sequence[int], count: int, session: Any = "one") -> list[int]:
    engine.open(session, ids)
    return finish(engine, session, count)


def finish(engine: ChatEngine, session: Any, count: int) -> list[int]:
    said: list[int] = []
    while len(said) < count:
        if session in (tokens := engine.step()):
            said.append(tokens[session])
    engine.close(session)
    return said


def reads(engine: ChatEngine, ids: Sequence[int]) -> int:
    """How many of the tokens are read when the question is asked now."""
    held: int = engine.open("probe", ids)
    return len(ids) - held


@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_that_rows_join_and_leave_says_what_each_says_alone(name: str) -> None:
    """Questions of all lengths, longer than windows and chunks, in rows used again and again."""
    of = model(CONFIGS[name])
    engine = ChatEngine(prepared(of.config), rows=3, tokens=120, read_tokens=7)
    engine.warm_up()
    chosen = random.Random(1)
    waiting = [(i, question(chosen.choice([1, 5, 30, 60]), seed=i)) for i in range(7)]
    asked, lengths = dict(waiting), {i: chosen.randrange(1, 30) for i, _ in waiting}
    said: dict[Any, list[int]] = {i: [] for i in asked}
    while any(len(said[i]) < lengths[i] for i in asked):
        if waiting and engine.free and chosen.random() < 0.4:
            engine.open(*waiting.pop(0))
        for session, token in engine.step().items():
            said[session].append(token)
            if len(said[session]) == lengths[session]:
                engine.close(session)
    assert said == {i: alone(of, ids, lengths[i]) for i, ids in asked.items()}


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_question_read_in_parts_is_answered_as_one_read_at_once(name: str) -> None:
    of = model(CONFIGS[name])
    ids = question(70, seed=0)
    at_once = ChatEngine(prepared(of.config), rows=1, tokens=100, read_tokens=100)
    assert len(at_once_said := answer(at_once, ids, 12)) == 12
    for read_tokens in (1, 3, 8):
        engine = ChatEngine(prepared(of.config), rows=1, tokens=100, read_tokens=read_tokens)
        assert answer(engine, ids, 12) == at_once_said


def test_a_long_question_does_not_hold_up_those_who_speak() -> None:
    engine = ChatEngine(prepared(LLAMA), rows=2, tokens=200, read_tokens=10)
    engine.open("speaks", question(5, seed=0))
    assert list(engine.step()) == ["speaks"]
    engine.open("asks", question(95, seed=1))
    turns = [sorted(engine.step()) for _ in range(11)]
    assert turns == [["speaks"]] * 9 + [["asks", "speaks"]] * 2


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_a_conversation_goes_on_where_it_stood(name: str) -> None:
    """Only what is new is read, and the answers are those of a model that reads everything."""
    of = model(CONFIGS[name])
    engine = ChatEngine(prepared(of.config), rows=2, tokens=300)
    history = question(40, seed=0)
    for turn in range(4):
        held = engine.open("one", history)
        assert held == (len(history) - 11 if turn else 0)  # the last token was never read
        said = finish(engine, "one", 15)
        assert said == alone(of, history, 15)
        history += said + question(10, seed=turn + 1)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_after_an_interruption_what_was_not_heard_is_forgotten(name: str) -> None:
    of = model(CONFIGS[name])
    engine = ChatEngine(prepared(of.config), rows=1, tokens=300)
    first = question(40, seed=0)
    said = answer(engine, first, 30)
    heard = first + said[:6] + question(9, seed=1)
    assert engine.open("one", heard) == 46
    assert finish(engine, "one", 20) == alone(of, heard, 20)
    assert answer(engine, first, 30) == said  # and back again


def test_a_common_beginning_is_copied_and_each_keeps_its_row() -> None:
    of = model(LLAMA)
    engine = ChatEngine(prepared(of.config), rows=3, tokens=200)
    system = question(20, seed=0)
    one, two = system + question(50, seed=1), system + question(50, seed=2)
    said = answer(engine, one, 10)
    assert engine.open("two", two) == 20
    assert finish(engine, "two", 10) == alone(of, two, 10)
    assert reads(engine, one + said[:9] + [5]) == 1  # nothing of the first one is lost


def test_the_row_unused_for_longest_is_given_away() -> None:
    engine = ChatEngine(prepared(LLAMA), rows=2, tokens=100)
    old, new, third = (question(30, seed=seed) for seed in range(3))
    for ids in (old, new, third):
        answer(engine, ids, 2)
    assert engine.open("new", [*new, 3]) == 30
    engine.close("new")
    assert engine.open("old", [*old, 3]) == 0


def test_a_row_is_free_as_soon_as_its_session_is_closed() -> None:
    engine = ChatEngine(prepared(LLAMA), rows=2, tokens=100)
    for session in ("a", "b"):
        engine.open(session, question(20, seed=ord(session)))
    with pytest.raises(NoFreeRow, match="all 2 rows"):
        engine.open("c", question(3, seed=0))
    engine.step()
    engine.close("a")
    engine.close("a")  # twice is as once
    assert engine.free == 1
    engine.open("c", question(3, seed=0))
    assert set(engine.step()) == {"b", "c"}


def test_a_conversation_ends_where_its_row_does() -> None:
    of = model(LLAMA)
    engine = ChatEngine(prepared(of.config), rows=1, tokens=24)
    ids = question(20, seed=0)
    with pytest.raises(TooManyTokens):
        engine.open("long", question(24, seed=0))
    engine.open("one", ids)
    said = []
    while not engine.full("one"):
        said.append(engine.step()["one"])
    assert said == alone(of, ids, 5)


def test_a_failed_step_can_be_tried_again() -> None:
    of = prepared(LLAMA)
    engine = ChatEngine(of, rows=2, tokens=100, read_tokens=8)
    ids = question(30, seed=0)
    engine.open("one", ids)
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls in (2, 4):
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = of.model.layers[1].register_forward_pre_hook(fail)
    said: list[int] = []
    failures = 0
    while len(said) < 5:
        try:
            said += engine.step().values()
        except torch.OutOfMemoryError:
            failures += 1
    hook.remove()
    assert failures == 2
    assert said == alone(model(LLAMA), ids, 5)


def test_a_seed_says_the_same_whatever_stands_beside() -> None:
    of = model(LLAMA)
    sampling = Sampling(temperature=0.8, top_k=20, top_p=0.9)

    def drawn(beside: int, seed: int) -> list[int]:
        engine = ChatEngine(prepared(of.config), rows=3, tokens=100, sampling=sampling)
        for other in range(beside):
            engine.open(other, question(12, seed=other), seed=other)
        engine.open("one", question(10, seed=9), seed=seed)
        return finish(engine, "one", 12)

    assert drawn(0, seed=4) == drawn(2, seed=4)
    assert drawn(0, seed=4) != drawn(0, seed=5)


def test_a_compiled_step_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and run as it is: the compiler itself would take minutes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    of = model(LLAMA)
    ids = [question(20, seed=seed) for seed in range(2)]
    compiled = prepared(of.config, packed=False)
    engine = ChatEngine(compiled, rows=3, tokens=300, compile_mode="default")
    engine.warm_up()
    for session, each in enumerate(ids):
        engine.open(session, each)
    said: dict[Any, list[int]] = {0: [], 1: []}
    for _ in range(10):
        for session, token in engine.step().items():
            said[session].append(token)
    assert said == {session: alone(of, each, 10) for session, each in enumerate(ids)}


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1),
        BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=1, n_head=2),
    ],
)
def test_a_model_that_cannot_be_served_in_rows_is_refused(tmp_path: Path, config: Any) -> None:
    with pytest.raises(ArchitectureError, match=config.model_type):
        load(save(tmp_path, config))


def test_a_checkpoint_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    folder = save(tmp_path, LLAMA)
    chat = load(folder)
    assert chat.tokens == 512
    assert chat.stop_ids == {1}
    assert chat.sampling == Sampling()
    ids = question(9, seed=0)
    said = answer(ChatEngine(chat.model, rows=1, tokens=50), ids, 8)
    assert said == alone(model(LLAMA), ids, 8)


def test_a_loaded_model_is_prepared(tmp_path: Path) -> None:
    """No keys copied for heads that share them; weights packed where the processor gains by it."""
    chat = load(save(tmp_path, LLAMA))
    layer = chat.model.model.layers[0]
    assert ALL_ATTENTION_FUNCTIONS[layer.self_attn.config._attn_implementation] is grouped_attention
    packed = can_pack(chat.model.model.embed_tokens.weight)
    assert isinstance(layer.mlp.up_proj, PackedLinear) == packed
    assert isinstance(chat.model.lm_head, PackedLinear) == packed


def test_what_a_checkpoint_lacks_or_has_too_much_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path, LLAMA)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    weights["model.extra.weight"] = torch.zeros(3)
    weights["model.norm.weight"] = torch.zeros(3)
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ArchitectureError) as error:
        load(folder)
    for told in (
        "lacks model.layers.1.mlp.up_proj.weight",
        "has no place for model.extra.weight",
        "has other shapes in model.norm.weight",
    ):
        assert told in str(error.value)


def test_no_such_model_dtype_or_device(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no model"):
        load(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="no model in that folder"):
        load(str(tmp_path))
    with pytest.raises(ConfigError, match="dtype int3"):
        load(str(tmp_path), dtype="int3")
    with pytest.raises(ConfigError, match="device warp"):
        load(str(tmp_path), device="warp")
