"""The server as a client meets it: admission, limits, bad input, slow and vanishing clients."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import Callable
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.frames import Close

from handlers.audio import to_pcm16
from handlers.messages import RATE_HZ
from server import wire
from tests.fakes import tone
from tests.server.serving import serving

pytestmark = pytest.mark.asyncio

BINARY = ["parley.v1"]


async def receive(ws: ClientConnection) -> dict[str, Any]:
    event: dict[str, Any] = json.loads(await asyncio.wait_for(ws.recv(), 5))
    return event


async def until(ws: ClientConnection, kind: str) -> dict[str, Any]:
    while True:
        data = await asyncio.wait_for(ws.recv(), 5)
        if isinstance(data, str):
            event: dict[str, Any] = json.loads(data)
            if event["type"] == kind:
                return event


async def send(ws: ClientConnection, kind: str, **fields: Any) -> None:
    await ws.send(json.dumps({"type": kind, **fields}))


async def answers(ws: ClientConnection) -> None:
    """The session is unharmed: a text question gets its answer."""
    await send(ws, "response.create", response={"output_modalities": ["text"]})
    done = await until(ws, "response.done")
    assert done["response"]["status"] == "completed"


async def until_closed(ws: ClientConnection) -> Close:
    """Read what is still sent, then the close frame."""
    try:
        async with asyncio.timeout(5):
            while True:
                await ws.recv()
    except ConnectionClosed as closed:
        return closed.rcvd or Close(1006, "")


async def eventually(true: Callable[[], bool]) -> None:
    """Let the event loop turn until it is so."""
    async with asyncio.timeout(5):
        while not true():  # noqa: ASYNC110 - what is awaited has no event of its own
            await asyncio.sleep(0)


async def test_a_spoken_turn_over_both_variants() -> None:
    async with serving() as server:
        speech = to_pcm16(np.concatenate([tone(1.0), np.zeros(RATE_HZ, np.float32)]))
        for subprotocols in (None, BINARY):
            async with connect(server.url, subprotocols=subprotocols, compression=None) as ws:  # type: ignore[arg-type]
                await until(ws, "session.created")
                if subprotocols:
                    await ws.send(speech)
                else:
                    event = {"audio": base64.b64encode(speech).decode()}
                    await send(ws, "input_audio_buffer.append", **event)
                samples = 0
                async with asyncio.timeout(5):
                    async for data in ws:
                        if isinstance(data, bytes):
                            _, start, chunk = wire.decode_audio_frame(data)
                            assert start == samples
                            samples += len(chunk)
                            continue
                        event = json.loads(data)
                        if event["type"] == "response.output_audio.delta":
                            samples += len(base64.b64decode(event["delta"])) // 2
                        if event["type"] == "response.done":
                            break
                assert samples == round(len("You said what time is it.") * 0.05 * RATE_HZ)


async def test_one_session_too_many_is_refused_by_name_at_once() -> None:
    async with serving(max_sessions=2) as server:
        async with connect(server.url) as first, connect(server.url) as second:
            await receive(first)
            await receive(second)
            took_s = []
            for _ in range(5):
                began_s = time.monotonic()
                async with connect(server.url) as third:
                    event = await receive(third)
                    took_s.append(time.monotonic() - began_s)
                    assert event["error"]["code"] == "session_limit_reached"
                    assert await until_closed(third) == Close(1013, "session_limit_reached")
            assert min(took_s) < 0.1  # the others may have met a busy machine
            await answers(first)
        await eventually(lambda: not server.hub.sessions)
        async with connect(server.url) as again:
            assert (await receive(again))["type"] == "session.created"


async def test_a_key_is_needed_where_one_is_set() -> None:
    async with serving(api_key="secret") as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
            with pytest.raises(InvalidStatus) as refused:
                await connect(server.url, additional_headers=headers)
            assert refused.value.response.status_code == 401
            assert json.loads(refused.value.response.body)["error"]["code"] == "invalid_api_key"
        async with connect(server.url, additional_headers={"Authorization": "Bearer secret"}) as ws:
            assert (await receive(ws))["type"] == "session.created"
        browser: Any = ["parley.v1", "openai-insecure-api-key.secret"]
        async with connect(server.url, subprotocols=browser) as ws:
            assert ws.subprotocol == "parley.v1"
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as http:
            assert (await http.get("/metrics")).status_code == 401
            assert (await http.get("/v1/audio/voices")).status_code == 401
            assert (await http.get("/healthz")).status_code == 200


@pytest.mark.parametrize(
    ("origin", "admitted"),
    [
        ("http://evil.example", False),
        ("http://127.0.0.1:1", False),
        ("null", False),
        ("http://127.0.0.1:{port}", True),
        ("https://app.example", True),
    ],
)
async def test_only_known_origins_are_admitted(origin: str, admitted: bool) -> None:
    async with serving(allowed_origins="https://app.example, https://b.example") as server:
        headers = {"Origin": origin.format(port=server.port)}
        if admitted:
            async with connect(server.url, additional_headers=headers) as ws:
                await receive(ws)
        else:
            with pytest.raises(InvalidStatus) as refused:
                await connect(server.url, additional_headers=headers)
            assert refused.value.response.status_code == 403


async def test_a_foreign_name_for_loopback_is_not_the_servers_own_page() -> None:
    async with serving() as server:
        headers = {"Origin": "http://evil.example", "Host": "evil.example"}
        with pytest.raises(InvalidStatus):
            await connect(server.url, additional_headers=headers)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        ("not json", "invalid_json"),
        ("[]", "invalid_event"),
        ('{"type":"no.such"}', "invalid_event"),
        ('{"type":"input_audio_buffer.append","audio":7,"event_id":"e"}', "invalid_type"),
        ('{"type":"input_audio_buffer.append","audio":"AAAA","event_id":"e"}', "invalid_value"),
        (b"\x00\x01\x02", "invalid_audio_frame"),
    ],
)
async def test_bad_input_is_answered_by_name_and_the_session_goes_on(
    data: str | bytes, code: str
) -> None:
    async with serving() as server, connect(server.url) as ws:
        await receive(ws)
        await ws.send(data)
        error = (await until(ws, "error"))["error"]
        assert error["code"] == code
        assert error["event_id"] == ("e" if '"e"' in str(data) else None)
        await answers(ws)


async def test_a_message_that_is_too_big_closes_that_connection_only() -> None:
    async with serving(max_message_bytes=2**20) as server, connect(server.url) as other:
        await receive(other)
        async with connect(server.url) as ws:
            await receive(ws)
            with contextlib.suppress(ConnectionClosed):
                await ws.send("x" * (20 * 2**20))
            assert (await until_closed(ws)).code == 1009
        await answers(other)


async def test_a_client_that_never_reads_is_closed_and_costs_nothing() -> None:
    async with serving(max_unsent_bytes=200_000, max_unsent_s=0.3) as server:
        other = await connect(server.url)
        async with other:
            await receive(other)
            async with connect(server.url) as ws:
                await receive(ws)
                ws.transport.pause_reading()
                item = {
                    "type": "message",
                    "role": "user",
                    "content": [{"type": "input_text", "text": "x" * 60_000}],
                }
                for _ in range(300):
                    await send(ws, "conversation.item.create", item=item)
                    if len(server.hub.sessions) == 1:
                        break
                await eventually(lambda: len(server.hub.sessions) == 1)
                metrics = server.hub.metrics.exposition().decode()
                assert 'parley_errors_total{code="slow_consumer"} 1.0' in metrics
                ws.transport.abort()
            await answers(other)


async def test_a_client_that_vanishes_leaves_nothing_behind() -> None:
    async with serving() as server:
        before = len(asyncio.all_tasks())
        for _ in range(20):
            ws = await connect(server.url)
            await receive(ws)
            await send(ws, "response.create")
            await until(ws, "response.created")
            ws.transport.abort()
        await eventually(lambda: not server.hub.sessions)
        assert all(not ask.ticket.live for ask in server.stages.asked)
        await eventually(lambda: len(asyncio.all_tasks()) <= before)


async def test_an_idle_session_is_closed_by_name() -> None:
    async with serving(idle_timeout_s=0.05) as server, connect(server.url) as ws:
        await receive(ws)
        assert (await receive(ws))["error"]["code"] == "idle_timeout"
        assert await until_closed(ws) == Close(1001, "idle_timeout")


async def test_draining_lets_a_reply_finish_and_refuses_new_sessions() -> None:
    async with serving(drain_s=5.0) as server, connect(server.url, subprotocols=BINARY) as ws:  # type: ignore[arg-type]
        await receive(ws)
        await send(ws, "response.create")
        await until(ws, "response.created")
        drained = asyncio.create_task(server.hub.drain())
        await asyncio.sleep(0)
        async with connect(server.url) as late:
            assert (await receive(late))["error"]["code"] == "server_shutting_down"
        assert (await until(ws, "response.done"))["response"]["status"] == "completed"
        assert (await until_closed(ws)).code == 1001
        await drained


async def test_draining_is_bounded() -> None:
    async with serving(drain_s=0.05) as server, connect(server.url) as ws:
        server.stages.lm_delay_s = None
        await receive(ws)
        await send(ws, "response.create")
        await until(ws, "response.created")
        await server.hub.drain()
        assert (await until_closed(ws)).code == 1001


async def test_the_voices_and_one_that_there_is_not() -> None:
    async with (
        serving() as server,
        connect(server.url) as ws,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as http,
    ):
        listed = (await http.get("/v1/audio/voices")).json()
        assert listed["voices"] == [{"name": "alloy"}, {"name": "verse", "language": "en"}]
        created = await receive(ws)
        assert listed["default"] == created["session"]["audio"]["output"]["voice"]
        await send(ws, "session.update", session={"voice": "nobody", "instructions": "Sing."})
        error = (await until(ws, "error"))["error"]
        assert (error["code"], error["param"]) == ("invalid_value", "session.audio.output.voice")
        assert "'alloy', 'verse'" in error["message"]
        await send(ws, "session.update", session={"voice": "verse"})
        updated = (await until(ws, "session.updated"))["session"]
        assert (updated["audio"]["output"]["voice"], updated["instructions"]) == ("verse", "")


async def test_health_and_metrics() -> None:
    async with (
        serving(max_sessions=3) as server,
        connect(server.url) as ws,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as http,
    ):
        await receive(ws)
        health = (await http.get("/healthz")).json()
        assert health == {"status": "ok", "sessions": 1, "limit": 3}
        assert "parley_sessions 1.0" in (await http.get("/metrics")).text
        page = await http.get("/")
        assert page.headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
