"""The local LM stage, on small random models: what it says is what `generate` says."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs requirements.txt")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from handlers.base import StageError
from handlers.lm.answers import Answer
from handlers.lm.openai import PROMPT
from handlers.lm.prompts import Prompts
from handlers.lm.transformers import TransformersLM, TransformersLMOptions
from handlers.messages import (
    Ask,
    ChatMessage,
    Failed,
    Message,
    TextDelta,
    TextDone,
    ToolCall,
    ToolUse,
)
from handlers.ticket import Ticket
from tests.handlers.endpoint import Bench, ticket
from tests.models.chat_model import SHAPE, TEMPLATE, save, tokenizer

WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("chat"), LlamaConfig(**SHAPE))


@contextmanager
def lm(folder: str, **options: Any) -> Iterator[tuple[Bench, TransformersLM]]:
    bench = Bench()
    chosen: dict[str, Any] = {
        "rows": 4,
        "gen_max_tokens": 16,
        "device": "cpu",
        "context_tokens": 512,
    } | options
    stage = TransformersLM(
        TransformersLMOptions(model_name=folder, **chosen), emit=bench.emitted.put
    )
    stage.start()
    try:
        stage.wait_ready(60)
        bench.put = stage.put
        yield bench, stage
    finally:
        stage.stop()


def user(*texts: str) -> tuple[ChatMessage, ...]:
    """A conversation: the user's and the assistant's texts in turn."""
    roles = ("user", "assistant")
    return tuple(
        ChatMessage(roles[index % 2], text)  # type: ignore[arg-type]
        for index, text in enumerate(texts)
    )


def heard(bench: Bench, count: int) -> dict[str, tuple[str, TextDone]]:
    """The answers of so many tickets, by name."""
    texts: dict[str, str] = {}
    done: dict[str, TextDone] = {}
    while len(done) < count:
        message = bench.emitted.get(timeout=30)
        if isinstance(message, TextDelta):
            assert message.ticket.name not in done
            texts[message.ticket.name] = texts.get(message.ticket.name, "") + message.text
        else:
            assert isinstance(message, TextDone), message
            done[message.ticket.name] = message
    return {name: (texts.get(name, ""), each) for name, each in done.items()}


def generated(folder: str, messages: tuple[ChatMessage, ...], count: int = 16) -> str:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "system", "content": PROMPT}]
    chat += [{"role": each.role, "content": each.content} for each in messages]
    ids = tokens.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=1,
        pad_token_id=1,
    )
    text = tokens.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def same(streamed: str, whole: str) -> bool:
    """But for half a character at the end, which is not passed on."""
    return streamed == whole.removesuffix("�") or whole.rstrip("�") == streamed.rstrip("�")


def test_more_sessions_than_rows_each_get_what_the_model_says_alone(folder: str) -> None:
    with lm(folder, rows=2) as (bench, _):
        asked = {str(i): user("hello " * i) for i in range(1, 6)}
        for name, messages in asked.items():
            bench.put(Ask(ticket(name), messages, max_tokens=None))
        answers = heard(bench, len(asked))
    for name, messages in asked.items():
        text, done = answers[name]
        assert same(text, generated(folder, messages)), name
        assert done.reason == "length"
        assert done.output_tokens == 16


def test_a_conversation_goes_on_as_one_that_is_read_anew(folder: str) -> None:
    """Through turns, one of them interrupted, and one that the person took back."""
    with lm(folder, gen_max_tokens=12) as (bench, stage):
        said: list[str] = []
        for turn in range(3):
            bench.put(Ask(ticket(str(turn)), user(*said, "and then?")))
            text, _ = heard(bench, 1)[str(turn)]
            assert same(text, generated(folder, user(*said, "and then?"), 12))
            kept = text[: len(text) // 2] if turn == 1 else text
            said += ["and then?", kept.replace("�", "?") or "well"]
        rows = stage._engine._rows
        assert sum(bool(row.ids) for row in rows) == 1  # all in one row


def at_steps(stage: Any, **actions: Callable[[], None]) -> None:
    """Does these on the stage's own thread, before its steps of these numbers (`s10=…`)."""
    step, count = stage._engine.step, itertools.count(1)

    def counted() -> Any:
        actions.get(f"s{next(count)}", lambda: None)()
        return step()

    stage._engine.step = counted


def test_a_cancelled_answer_stops_and_its_row_is_free(folder: str) -> None:
    with lm(folder, rows=1, gen_max_tokens=300) as (bench, stage):
        first, second = ticket("first"), ticket("second")
        mark: Any = object()

        def change_over() -> None:
            bench.put(Ask(second, user("hello"), max_tokens=3))
            first.cancel()
            bench.emitted.put(mark)

        at_steps(stage, s20=change_over)
        bench.put(Ask(first, user("a long story please"), max_tokens=None))
        heard = [bench.emitted.get(timeout=30)]
        while not isinstance(heard[-1], TextDone):
            heard.append(bench.emitted.get(timeout=30))
        at = heard.index(mark)
        assert at > 0
        assert all(message.ticket is second for message in heard[at + 1 :])


def test_a_ticket_that_dies_while_it_waits_gets_no_row(folder: str) -> None:
    with lm(folder, rows=1, gen_max_tokens=60) as (bench, stage):
        running, waiting, last = ticket("running"), ticket("waiting"), ticket("last")

        def crowd() -> None:
            bench.put(Ask(waiting, user("you there")))
            bench.put(Ask(last, user("hello"), max_tokens=2))
            waiting.cancel()
            running.cancel()

        at_steps(stage, s20=crowd)
        bench.put(Ask(running, user("hello")))
        while not isinstance(message := bench.emitted.get(timeout=30), TextDone):
            assert message.ticket is not waiting
        assert message.ticket is last


def test_stop_texts_and_the_end_of_a_message_end_an_answer(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = generated(folder, user("hello"))
    stop = whole.rstrip("�")[3:5]
    with lm(folder, gen_stop=json.dumps([stop])) as (bench, _):
        bench.put(Ask(ticket("one"), user("hello")))
        text, done = heard(bench, 1)["one"]
        assert text == whole[: whole.index(stop)]
        assert done.reason == "stop"
    with lm(folder) as (bench, stage):
        step, end = stage._engine.step, stage._model.tokenizer.eos_token_id
        made: list[int] = []

        def ends() -> dict[Any, int]:
            tokens = step()
            made.extend(tokens.values())
            return dict.fromkeys(tokens, end) if len(made) == 4 else tokens

        monkeypatch.setattr(stage._engine, "step", ends)
        bench.put(Ask(ticket("two"), user("hello")))
        text, done = heard(bench, 1)["two"]
        assert whole.startswith(text)
        assert (done.reason, done.output_tokens) == ("stop", 4)


def test_a_failing_step_costs_the_newest_answer_memory_fails_and_all_otherwise(
    folder: str,
) -> None:
    with lm(folder, gen_max_tokens=400) as (bench, stage):
        faults: list[Exception] = []

        def fail(*_: Any) -> None:
            if faults:
                raise faults.pop()

        stage._model.model.register_forward_pre_hook(fail)
        at_steps(
            stage,
            s5=lambda: bench.put(Ask(ticket("new"), user("and you?"))),
            s60=lambda: faults.append(torch.OutOfMemoryError("CUDA out of memory")),
            s80=lambda: faults.append(RuntimeError("anything")),
        )
        bench.put(Ask(ticket("old"), user("hello")))
        while not isinstance(message := bench.emitted.get(timeout=30), Failed):
            pass
        assert (message.ticket.name, message.code) == ("new", "lm_out_of_memory")
        assert bench.next(TextDelta).ticket.name == "old"
        while not isinstance(message := bench.emitted.get(timeout=30), Failed):
            pass
        assert (message.ticket.name, message.code) == ("old", "lm_error")
        bench.put(Ask(ticket("next"), user("hello"), max_tokens=1))
        assert "next" in heard(bench, 1)


def test_rows_are_halved_until_they_fit(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from models.chat.engine import ChatEngine

    tried: list[int] = []
    fits = 2

    def warm_up(engine: ChatEngine) -> None:
        tried.append(engine.free)
        if engine.free > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ChatEngine, "warm_up", warm_up)
    with lm(folder, rows=9):
        assert tried == [9, 4, 2]
    fits = 0
    with pytest.raises(ValueError, match="not enough memory for one"), lm(folder, rows=2):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_name": ""}, "--lm_model_name: name a chat model"),
        ({"compile_mode": "quick"}, "--lm_compile_mode is quick; it can be default, reduce"),
        ({"model_name": "/nowhere/at/all"}, "--lm_model_name /nowhere/at/all: no model"),
        ({"torch_dtype": "int3"}, "dtype int3"),
        ({"gen_stop": "stop"}, "--lm_gen_stop stop"),
        ({"chat_template": "/nowhere"}, "--lm_chat_template /nowhere"),
        ({"gen_temperature": -1.0}, "temperature"),
    ],
)
def test_bad_options_are_named(folder: str, options: dict[str, Any], message: str) -> None:
    chosen = TransformersLMOptions(**{"model_name": folder, "device": "cpu"} | options)
    stage = TransformersLM(chosen, emit=Bench().emitted.put)
    with pytest.raises(ValueError, match=message):
        stage.setup()


def test_a_model_that_does_not_compile_is_refused_at_the_start(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled and warmed up before anybody is served."""

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    with (
        pytest.raises(ValueError, match="--lm_compile_mode default: the model cannot be compiled"),
        lm(folder, compile_mode="default"),
    ):
        pass


def test_a_tokenizer_without_a_chat_template_says_what_to_do(tmp_path: Path) -> None:
    plain = save(tmp_path, LlamaConfig(**SHAPE), template=None)
    with pytest.raises(ValueError, match="--lm_chat_template"), lm(plain):
        pass
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    with lm(plain, chat_template=str(template)) as (bench, _):
        bench.put(Ask(ticket("one"), user("hello"), max_tokens=2))
        assert "one" in heard(bench, 1)


# Prompts.


def prompts(tokens: int = 4000, template: str = TEMPLATE, prompt: str = "Be kind.") -> Prompts:
    return Prompts(tokenizer(template), tokens, role="system", prompt=prompt)


def shown(made: Prompts, *messages: ChatMessage, **ask: Any) -> str:
    text = tokenizer().decode(made.ids(Ask(ticket(), messages, **ask)))
    assert isinstance(text, str)
    return text.replace("<|im_end|>\n", "").replace("<|im_start|>", "|")


def test_the_first_message_is_the_sessions_own_instructions_or_the_default() -> None:
    hello = ChatMessage("user", "hello")
    assert shown(prompts(), hello) == "|system\nBe kind.|user\nhello|assistant\n"
    own = ChatMessage("system", "Be brief.")
    assert shown(prompts(), own, hello) == "|system\nBe brief.|user\nhello|assistant\n"
    assert shown(prompts(prompt=""), hello) == "|user\nhello|assistant\n"


def test_nobody_speaks_twice_in_a_row_and_a_template_without_a_system_gets_none() -> None:
    said = (ChatMessage("user", "wait"), ChatMessage("user", "hello"))
    assert shown(prompts(), *said) == "|system\nBe kind.|user\nwait\nhello|assistant\n"
    folded = shown(prompts(template=NO_SYSTEM), *said)
    assert folded == "|user\nBe kind.\nwait\nhello|assistant\n"


def test_tools_and_their_calls_are_in_the_templates_form() -> None:
    conversation = (
        ChatMessage("user", "rain?"),
        ChatMessage("assistant", "", (ToolUse("c1", "weather", '{"city": "Bonn"}'),)),
        ChatMessage("tool", "dry", call_id="c1"),
    )
    text = shown(prompts(), *conversation, tools=(WEATHER,))
    assert '"function": {"name": "weather"' in text
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Bonn"}}</tool_call>' in text
    assert text.endswith("|tool\ndry|assistant\n")
    assert "|tools" not in shown(prompts(), *conversation, tools=(WEATHER,), tool_choice="none")
    one = shown(
        prompts(),
        ChatMessage("user", "rain?"),
        tools=(WEATHER, WEATHER | {"name": "time"}),
        tool_choice={"type": "function", "name": "time"},
    )
    assert "time" in one
    assert "weather" not in one


def test_a_long_conversation_loses_its_beginning_and_seldom() -> None:
    """So that what is kept begins alike from turn to turn."""
    made = prompts(tokens=300)
    conversation: list[ChatMessage] = []
    beginnings = []
    for turn in range(40):
        conversation += [ChatMessage("user", f"number {turn} is it?")]
        ids = made.ids(Ask(ticket(), tuple(conversation)))
        assert len(ids) <= 300
        text = tokenizer().decode(ids)
        assert "Be kind." in text
        assert f"number {turn} is it?" in text
        beginnings.append(text.split("number ")[1].split()[0])
        conversation += [ChatMessage("assistant", "yes it is")]
    assert 3 <= len(set(beginnings)) <= 12
    with pytest.raises(StageError, match="too long"):
        made.ids(Ask(ticket(), (ChatMessage("user", "zq" * 400),)))


def test_a_conversation_that_the_template_refuses_is_a_named_failure() -> None:
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE
    made = prompts(template=strict, prompt="")
    with pytest.raises(StageError, match="does not take this") as error:
        made.ids(Ask(ticket(), (ChatMessage("assistant", "hi"), ChatMessage("user", "a"))))
    assert error.value.code == "lm_bad_conversation"


# Answers.


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>'
ANSWERS: list[tuple[str, str, list[tuple[str, str]]]] = [
    ("Hello there, 3 < 4.", "Hello there, 3 < 4.", []),
    ("<think>\nhm, <b>\n</think>\n\nHello.", "Hello.", []),
    ("One moment. " + CALL, "One moment. ", [("weather", '{"city": "Bonn"}')]),
    (CALL + CALL + "There.", "There.", [("weather", '{"city": "Bonn"}')] * 2),
    ('{"name": "time", "parameters": {}}', "", [("time", "{}")]),
    ('<|python_tag|>{"name": "time", "parameters": {}}', "", [("time", "{}")]),
    ('[TOOL_CALLS] [{"name": "time", "arguments": {"a": 1}}]', "", [("time", '{"a": 1}')]),
    ('[TOOL_CALLS]time[ARGS]{"a": 1}', "", [("time", '{"a": 1}')]),
    ('{"a list": [1]}', '{"a list": [1]}', []),
    ("I have <tool", "I have <tool", []),
]


@pytest.mark.parametrize(("written", "spoken", "called"), ANSWERS)
def test_words_calls_and_thoughts_are_told_apart_however_they_come(
    written: str, spoken: str, called: list[tuple[str, str]]
) -> None:
    chosen = random.Random(0)
    for _ in range(20):
        answer, found, rest = Answer(tools=True), [], written
        while rest:
            size = chosen.randrange(1, 6)
            found += answer.push(rest[:size])
            rest = rest[size:]
        found += answer.flush()
        assert "".join(each for each in found if isinstance(each, str)).strip() == spoken.strip()
        uses = [each for each in found if isinstance(each, ToolUse)]
        assert [(use.name, use.arguments) for use in uses] == called
        assert len({use.call_id for use in uses}) == len(uses)


def test_words_are_not_held_back_for_long() -> None:
    answer = Answer(tools=True, stops=["User:"])
    assert answer.push("Hello ") == ["Hello "]
    assert answer.push("you <too") == ["you "]
    assert answer.push(" late U") == ["<too late "]
    assert answer.push("ser: no") == []
    assert answer.stopped
    assert answer.push("more") == answer.flush() == []


def test_without_tools_a_call_is_text() -> None:
    answer = Answer(tools=False)
    assert "".join(map(str, [*answer.push(CALL), *answer.flush()])) == CALL


@pytest.mark.parametrize(
    "written", ["<tool_call>weather in Bonn</tool_call>", '<tool_call>{"name": "a', "[TOOL_CALLS]7"]
)
def test_a_call_that_cannot_be_read_is_a_named_failure(written: str) -> None:
    answer = Answer(tools=True)
    with pytest.raises(StageError) as error:
        [*answer.push(written), *answer.flush()]
    assert error.value.code == "lm_bad_call"


def test_a_call_is_passed_on_as_soon_as_it_is_written(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is random: what it says is put into its mouth."""
    with lm(folder, gen_max_tokens=200) as (bench, stage):
        tokens = stage._model.tokenizer
        script = iter(tokens("Let me see. " + CALL + " Dry.")["input_ids"] + [1])
        step = stage._engine.step
        monkeypatch.setattr(stage._engine, "step", lambda: {each: next(script) for each in step()})
        owner: Ticket = ticket("one")
        bench.put(Ask(owner, user("rain?"), tools=(WEATHER,)))
        messages: list[Message] = []
        while not messages or not isinstance(messages[-1], TextDone):
            messages.append(bench.emitted.get(timeout=30))
    at = next(i for i, message in enumerate(messages) if isinstance(message, ToolCall))
    call = messages[at]
    assert isinstance(call, ToolCall)
    assert (call.use.name, call.use.arguments) == ("weather", '{"city": "Bonn"}')
    before = [message.text for message in messages[:at] if isinstance(message, TextDelta)]
    after = [message.text for message in messages[at:] if isinstance(message, TextDelta)]
    assert ("".join(before), "".join(after)) == ("Let me see. ", " Dry.")
