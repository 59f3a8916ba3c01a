"""The vLLM LM stage. Runs where vLLM is: see requirements-vllm.txt."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from concurrent.futures import wait
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs requirements.txt")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from handlers.lm.vllm import VllmLM, VllmLMOptions
from handlers.messages import Ask, ChatMessage, Message, TextDelta, TextDone
from tests.handlers.endpoint import Bench, ticket
from tests.models.chat_model import SHAPE, save

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="needs vLLM (requirements-vllm.txt)"
)
WIDE = SHAPE | {"hidden_size": 128, "max_position_embeddings": 1024, "initializer_range": 0.05}
"""Heads as wide as vLLM's kernels take them."""
BLOCK = 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("chat"), LlamaConfig(**WIDE))


@pytest.fixture(scope="module")
def served(folder: str) -> Iterator[tuple[Bench, VllmLM]]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    bench = Bench()
    options = VllmLMOptions(
        model_name=folder,
        torch_dtype="float32",
        rows=4,
        gen_max_tokens=12,
        context_tokens=1024,
        enforce_eager=True,
    )
    stage = VllmLM(options, emit=bench.emitted.put)
    stage.start()
    stage.wait_ready(900)
    bench.put = stage.put
    yield bench, stage
    stage.stop(60)


def user(text: str) -> tuple[ChatMessage, ...]:
    return (ChatMessage("system", "Be kind."), ChatMessage("user", text))


def answered(bench: Bench, count: int) -> dict[str, tuple[str, TextDone]]:
    texts: dict[str, str] = {}
    done: dict[str, tuple[str, TextDone]] = {}
    while len(done) < count:
        message = bench.emitted.get(timeout=60)
        name = message.ticket.name
        if isinstance(message, TextDelta):
            texts[name] = texts.get(name, "") + message.text
        else:
            assert isinstance(message, TextDone), message
            done[name] = texts.get(name, ""), message
    return done


def generated(folder: str, messages: tuple[ChatMessage, ...], count: int) -> str:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = AutoTokenizer.from_pretrained(folder)
    ids = tokens.apply_chat_template(
        [{"role": each.role, "content": each.content} for each in messages],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=False,
    )
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=1,
        pad_token_id=1,
    )
    return str(tokens.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


@needs_vllm
def test_sessions_get_what_the_model_says_alone(served: Any, folder: str) -> None:
    bench, _ = served
    asked = {str(i): user("hello " * i) for i in range(1, 7)}  # more than rows
    for name, messages in asked.items():
        bench.put(Ask(ticket(name), messages))
    answers = answered(bench, len(asked))
    for name, messages in asked.items():
        text, done = answers[name]
        assert text.rstrip("�") == generated(folder, messages, 12).rstrip("�"), name
        assert (done.reason, done.output_tokens) == ("length", 12)


@needs_vllm
def test_a_cancelled_answer_is_aborted(served: Any) -> None:
    bench, stage = served
    unlimited = VllmLMOptions(**{**vars(stage.options), "gen_max_tokens": 700})
    stage.options, before = unlimited, stage.options
    try:
        first = ticket("first")
        bench.put(Ask(first, user("a long story")))
        bench.next(TextDelta)
        first.cancel()
        bench.put(Ask(ticket("second"), user("hello"), max_tokens=3))
        after: list[Message] = []
        while not after or not isinstance(after[-1], TextDone):
            after.append(bench.emitted.get(timeout=60))
        assert after[-1].ticket.name == "second"
        assert sum(message.ticket is first for message in after) <= 1  # on its way already
        while stage._llm.output_processor.has_unfinished_requests():
            bench.put(Ask(ticket("third"), user("hello"), max_tokens=1))
            answered(bench, 1)
        assert not wait(list(stage._running), timeout=60).not_done
    finally:
        stage.options = before


@needs_vllm
def test_a_conversation_that_goes_on_is_not_read_anew(served: Any) -> None:
    bench, stage = served
    cached: list[int] = []
    generate = stage._llm.generate

    async def watched(*args: Any, **kwargs: Any) -> Any:
        async for output in generate(*args, **kwargs):
            cached.append(output.num_cached_tokens)
            yield output

    stage._llm.generate = watched
    try:
        history = user("tell me, " * 60)
        bench.put(Ask(ticket("one"), history, max_tokens=4))
        text, done = answered(bench, 1)["one"]
        said = ChatMessage("assistant", text or "well")
        bench.put(Ask(ticket("two"), (*history, said, ChatMessage("user", "on")), max_tokens=4))
        answered(bench, 1)
        assert cached[-1] >= done.input_tokens // BLOCK * BLOCK - BLOCK > 0
    finally:
        stage._llm.generate = generate


def test_without_vllm_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *_: None if name == "vllm" else find(name)
    )
    stage = VllmLM(VllmLMOptions(model_name="any"), emit=Bench().emitted.put)
    with pytest.raises(ValueError, match=r"requirements-vllm\.txt"):
        stage.setup()


@needs_vllm
def test_no_such_model() -> None:
    stage = VllmLM(VllmLMOptions(model_name="/nowhere/at/all"), emit=Bench().emitted.put)
    with pytest.raises(ValueError, match="--lm_model_name /nowhere/at/all"):
        stage.setup()
