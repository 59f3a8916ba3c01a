"""The remote LM, against an endpoint that does what each test says."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from handlers.lm.openai import PROMPT, OpenAILM, OpenAILMOptions
from handlers.messages import (
    Ask,
    ChatMessage,
    Failed,
    TextDelta,
    TextDone,
    ToolCall,
    ToolUse,
)
from handlers.ticket import Ticket
from tests.handlers.endpoint import Bench, Endpoint, Exchange, endpoint, nowhere, ticket

KEY = "sk-a-secret"
SECRET_WORDS = "my password is swordfish"


@pytest.fixture
def remote() -> Iterator[Endpoint]:
    with endpoint() as one:
        yield one


@contextmanager
def lm(url: str, **options: Any) -> Iterator[Bench]:
    bench = Bench()
    chosen = OpenAILMOptions(base_url=url, model_name="tiny", api_key=KEY, **options)
    with bench.running(OpenAILM(chosen, emit=bench.emitted.put)):
        yield bench


def ask(owner: Ticket, text: str = SECRET_WORDS, **more: Any) -> Ask:
    return Ask(owner, (ChatMessage("user", text),), **more)


def delta(text: str, finish_reason: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}
    return {"object": "chat.completion.chunk", "choices": [choice]}


def say(exchange: Exchange, text: str) -> None:
    exchange.begin()
    exchange.event(delta(text, "stop"))
    exchange.event("[DONE]")
    exchange.end()


def test_text_goes_out_as_it_comes(remote: Endpoint) -> None:
    with lm(remote.url, gen_temperature=0.5, gen={"seed": 7}) as bench:
        owner = ticket()
        bench.put(ask(owner, "hello", max_tokens=20))
        exchange = remote.next()
        assert exchange.path == "/v1/chat/completions"
        assert exchange.headers["Authorization"] == f"Bearer {KEY}"
        assert exchange.json == {
            "model": "tiny",
            "messages": [
                {"role": "system", "content": PROMPT},
                {"role": "user", "content": "hello"},
            ],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": 20,
            "temperature": 0.5,
            "seed": 7,
        }
        exchange.begin()
        exchange.event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        exchange.event(delta("Hi "))
        assert bench.next(TextDelta) == TextDelta(owner, "Hi ")
        exchange.send('data: {"choices": [{"delta": {"con')  # cut anywhere
        exchange.send('tent": "there."}}]}\r\n\r\n: still here\n\n')
        assert bench.next(TextDelta) == TextDelta(owner, "there.")
        exchange.event(delta("", "length"))
        exchange.event({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}})
        exchange.event("[DONE]")
        exchange.end()
        assert bench.next(TextDone) == TextDone(owner, "length", 9, 2)


def test_instructions_take_the_place_of_the_prompt(remote: Endpoint) -> None:
    with lm(remote.url, init_chat_role="developer", init_chat_prompt="Be kind.") as bench:
        bench.put(ask(ticket(), "hello"))
        first = remote.next()
        assert first.json["messages"][0] == {"role": "developer", "content": "Be kind."}
        assert "max_tokens" not in first.json
        bench.put(Ask(ticket(), (ChatMessage("system", "Be brief."), ChatMessage("user", "hello"))))
        assert [m["content"] for m in remote.next().json["messages"]] == ["Be brief.", "hello"]


TOOL = {"type": "function", "name": "weather", "description": "It.", "parameters": {}}


def call(index: int, **function: str) -> dict[str, Any]:
    made: dict[str, Any] = {"index": index, "function": function}
    if call_id := function.pop("id", ""):
        made |= {"id": call_id, "type": "function"}
    return {"choices": [{"delta": {"tool_calls": [made]}, "finish_reason": None}]}


def test_calls_are_passed_on_whole_and_as_soon_as_they_are(remote: Endpoint) -> None:
    with lm(remote.url) as bench:
        owner = ticket()
        use = ToolUse("call_0", "time", "{}")
        messages = (
            ChatMessage("user", "weather?"),
            ChatMessage("assistant", "Well,", (use,)),
            ChatMessage("tool", "noon", call_id="call_0"),
        )
        choice = {"type": "function", "name": "weather"}
        bench.put(Ask(owner, messages, tools=(TOOL,), tool_choice=choice))
        exchange = remote.next()
        sent = exchange.json
        named = {"name": "weather", "description": "It.", "parameters": {}}
        assert sent["tools"] == [{"type": "function", "function": named}]
        assert sent["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
        function = {"name": "time", "arguments": "{}"}
        assert sent["messages"][2:] == [
            {
                "role": "assistant",
                "content": "Well,",
                "tool_calls": [{"id": "call_0", "type": "function", "function": function}],
            },
            {"role": "tool", "content": "noon", "tool_call_id": "call_0"},
        ]
        exchange.begin()
        exchange.event(delta("I look. "))
        assert bench.next(TextDelta).text == "I look. "
        exchange.event(call(0, id="call_a", name="weather", arguments=""))
        exchange.event(call(0, arguments='{"place": '))
        exchange.event(call(0, arguments='"Graz"}'))
        exchange.event(call(1, id="x" * 65, name="time"))
        first = ToolUse("call_a", "weather", '{"place": "Graz"}')
        assert bench.next(ToolCall) == ToolCall(owner, first)
        exchange.event(delta("", "tool_calls"))
        exchange.end()
        second = bench.next(ToolCall).use
        assert (second.name, second.arguments) == ("time", "{}")
        assert second.call_id.startswith("call_")  # in place of one that no client may send back
        assert bench.next(TextDone).reason == "stop"


@pytest.mark.parametrize("bad", [{"arguments": "{}"}, {"name": "f", "arguments": "x" * 70_000}])
def test_a_call_that_is_none_is_garbage(remote: Endpoint, bad: dict[str, str]) -> None:
    with lm(remote.url) as bench:
        bench.put(ask(ticket()))
        exchange = remote.next()
        exchange.begin()
        exchange.event(call(0, id="call_a", **bad))
        assert failure(bench)[0] == "lm_bad_answer"


def test_sessions_are_answered_side_by_side(remote: Endpoint) -> None:
    with lm(remote.url) as bench:
        owners = [ticket(str(n)) for n in range(16)]
        for owner in owners:
            bench.put(ask(owner, owner.name))
        exchanges = [remote.next() for _ in owners]  # none was answered yet
        for exchange in reversed(exchanges):
            name = exchange.json["messages"][-1]["content"]
            say(exchange, f"I am {name}.")
            owner = owners[int(name)]
            assert bench.next(TextDelta) == TextDelta(owner, f"I am {name}.")
            assert bench.next(TextDone).ticket is owner


@pytest.mark.parametrize("begun", [False, True])
def test_a_dead_ticket_closes_its_request(remote: Endpoint, begun: bool) -> None:
    with lm(remote.url) as bench:
        dying, living = ticket(), ticket()
        bench.put(ask(dying))
        exchange = remote.next()
        if begun:
            exchange.begin()
            exchange.event(delta("Hi "))
            bench.next(TextDelta)
        dying.cancel()
        exchange.wait_closed()
        bench.put(ask(living))
        say(remote.next(), "Hello.")
        assert bench.next(TextDelta) == TextDelta(living, "Hello.")


def failure(bench: Bench) -> tuple[str, str]:
    failed = bench.next(Failed)
    assert failed.stage == "lm"
    return failed.code, failed.message


@pytest.mark.parametrize(
    ("status", "code", "tries"),
    [
        (401, "lm_unauthorized", 1),
        (404, "lm_refused", 1),
        (429, "lm_rate_limited", 1),
        (500, "lm_endpoint_error", 2),
    ],
)
def test_a_refusal_is_named_and_says_nothing_private(
    remote: Endpoint, caplog: pytest.LogCaptureFixture, status: int, code: str, tries: int
) -> None:
    caplog.set_level(logging.DEBUG)
    with lm(remote.url) as bench:
        unlucky, other = ticket(), ticket()
        bench.put(ask(unlucky))
        body = f'{{"error": {{"message": "{SECRET_WORDS} {KEY}", "code": "not_for_you"}}}}'
        for _ in range(tries):
            remote.next().answer(body, status=status)
        found, message = failure(bench)
        assert found == code
        assert str(status) in message
        assert "not_for_you" in caplog.text
        for private in (KEY, "swordfish", remote.url):
            assert private not in caplog.text + message
        bench.put(ask(other))
        say(remote.next(), "Hello.")
        assert bench.next(TextDelta).ticket is other


@pytest.mark.parametrize(
    "answer",
    [
        "data: {not json\n\n",
        "data: [1, 2]\n\n",
        'data: "text"\n\n',
        'data: {"choices": [{"delta": 5}]}\n\n',
        'data: {"object": "other"}\n\n',
        f"data: {'[' * 100_000}\n\n",
    ],
)
def test_garbage_is_named(remote: Endpoint, answer: str) -> None:
    with lm(remote.url) as bench:
        bench.put(ask(ticket()))
        exchange = remote.next()
        exchange.begin()
        exchange.send(answer)
        assert failure(bench)[0] == "lm_bad_answer"
        exchange.wait_closed()


def test_a_page_instead_of_a_stream_is_garbage(remote: Endpoint) -> None:
    with lm(remote.url) as bench:
        bench.put(ask(ticket()))
        remote.next().answer("<html>Welcome</html>", "text/html")
        assert failure(bench)[0] == "lm_bad_answer"


def test_an_endpoint_that_is_down() -> None:
    with lm(nowhere()) as bench:
        bench.put(ask(ticket()))
        assert failure(bench)[0] == "lm_unreachable"


def test_an_address_that_is_none() -> None:
    with lm("ftp:/nothing") as bench:
        bench.put(ask(ticket()))
        assert failure(bench)[0] == "lm_unreachable"


@pytest.mark.parametrize("reset", [True, False])
def test_breaking_off_fails_the_reply_and_keeps_what_it_has(remote: Endpoint, reset: bool) -> None:
    with lm(remote.url) as bench:
        owner = ticket()
        bench.put(ask(owner))
        exchange = remote.next()
        exchange.begin()
        exchange.event(delta("I was about to "))
        assert bench.next(TextDelta).text == "I was about to "
        exchange.drop() if reset else exchange.end()
        assert failure(bench)[0] == "lm_interrupted"
        assert remote.requests.empty()  # no second try once something was passed on


def test_an_error_inside_the_stream(remote: Endpoint) -> None:
    with lm(remote.url) as bench:
        bench.put(ask(ticket()))
        exchange = remote.next()
        exchange.begin()
        exchange.event({"error": {"message": SECRET_WORDS, "code": 400}})
        assert failure(bench)[0] == "lm_endpoint_error"


def test_a_hiccup_is_passed_over(remote: Endpoint) -> None:
    with lm(remote.url) as bench:
        bench.put(ask(ticket()))
        remote.next().answer("", status=503)
        say(remote.next(), "Hello.")
        assert bench.next(TextDelta).text == "Hello."


def test_a_connection_lost_before_the_answer_is_tried_again(remote: Endpoint) -> None:
    with lm(remote.url) as bench:
        owner = ticket()
        bench.put(ask(owner))
        remote.next().drop()
        say(remote.next(), "Hello.")
        assert bench.next(TextDelta) == TextDelta(owner, "Hello.")
        bench.put(ask(owner))
        bench.next(TextDone)
        remote.next().drop()
        remote.next().drop()
        assert failure(bench)[0] == "lm_interrupted"


def test_too_slow_to_begin(remote: Endpoint) -> None:
    with lm(remote.url, first_token_timeout_s=0.3, token_timeout_s=60.0) as bench:
        bench.put(ask(ticket()))
        exchange = remote.next()
        exchange.begin()
        exchange.event({"choices": [{"delta": {"role": "assistant"}}]})  # not a token
        assert failure(bench)[0] == "lm_timeout"
        exchange.wait_closed()


def test_too_slow_between_tokens(remote: Endpoint) -> None:
    with lm(remote.url, first_token_timeout_s=60.0, token_timeout_s=0.05) as bench:
        bench.put(ask(ticket()))
        exchange = remote.next()
        exchange.begin()
        exchange.event(delta("Well, "))
        bench.next(TextDelta)
        assert failure(bench)[0] == "lm_timeout"
        exchange.wait_closed()


def test_the_fallback_answers_and_the_first_comes_back(remote: Endpoint) -> None:
    with endpoint() as second:
        choice = {
            "fallback_base_url": second.url,
            "fallback_model_name": "spare",
            "fallback_api_key": "sk-spare",
        }
        with lm(remote.url, fallback_s=1000.0, **choice) as bench:
            owner = ticket()
            bench.put(ask(owner))
            remote.next().answer("", status=429)
            spare = second.next()
            assert spare.json["model"] == "spare"
            assert spare.headers["Authorization"] == "Bearer sk-spare"
            say(spare, "I stand in.")
            assert bench.next(TextDelta) == TextDelta(owner, "I stand in.")
            bench.next(TextDone)
            bench.put(ask(owner))  # straight to the second
            say(second.next(), "Still me.")
            assert bench.next(TextDelta).text == "Still me."
            bench.next(TextDone)
            bench.put(ask(owner))
            second.next().answer("", status=401)  # now that one fails: the first is asked
            say(remote.next(), "I am back.")
            assert bench.next(TextDelta).text == "I am back."
            bench.next(TextDone)
            bench.put(ask(owner))
            say(remote.next(), "For good.")
            assert bench.next(TextDelta).text == "For good."
        with lm(remote.url, fallback_s=0.0, **choice) as bench:
            bench.put(ask(owner))
            remote.next().answer("", status=429)
            say(second.next(), "I stand in.")
            bench.next(TextDelta)
            bench.next(TextDone)
            bench.put(ask(owner))  # the time is over: the first gets another chance
            say(remote.next(), "I am back.")
            assert bench.next(TextDelta).text == "I am back."


def test_both_endpoints_failing_fails_the_reply(remote: Endpoint) -> None:
    with lm(remote.url, fallback_base_url=nowhere()) as bench:
        bench.put(ask(ticket()))
        remote.next().answer("", status=404)
        assert failure(bench)[0] == "lm_unreachable"


def test_a_model_must_be_named() -> None:
    stage = OpenAILM(OpenAILMOptions(), emit=print)
    stage.start()
    with pytest.raises(ValueError, match="--lm_model_name"):
        stage.wait_ready(5.0)


def test_options_do_not_show_their_keys() -> None:
    options = OpenAILMOptions(api_key=KEY, fallback_api_key=KEY)
    assert KEY not in repr(options)


def test_a_connection_serves_again(remote: Endpoint) -> None:
    with lm(remote.url) as bench:
        peers = set()
        for _ in range(3):
            bench.put(ask(ticket()))
            exchange = remote.next()
            peers.add(exchange.peer)
            say(exchange, "Hello.")
            bench.next(TextDelta)
            bench.next(TextDone)
            bench.settle()
        assert len(peers) == 1


def test_a_proxy_is_not_asked_for_what_is_on_this_machine(
    remote: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", nowhere())
    with lm(remote.url) as bench:
        bench.put(ask(ticket()))
        say(remote.next(), "Hello.")
        assert bench.next(TextDelta).text == "Hello."


def test_the_key_may_come_from_the_environment(
    remote: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARLEY_LM_API_KEY", "sk-environment")
    bench = Bench()
    options = OpenAILMOptions(base_url=remote.url, model_name="tiny")
    with bench.running(OpenAILM(options, emit=bench.emitted.put)):
        bench.put(ask(ticket()))
        assert remote.next().headers["Authorization"] == "Bearer sk-environment"
