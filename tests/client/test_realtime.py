from __future__ import annotations

import socket

import numpy as np
import pytest
from websockets.typing import Subprotocol

from client.realtime import (
    SUBPROTOCOL,
    AudioChunk,
    Disconnected,
    Realtime,
    Refused,
    ServerUnavailable,
)
from tests.client.fakes import Peer, realtime_server, tone

pytestmark = pytest.mark.asyncio


async def events_until_closed(client: Realtime, kinds: list[str]) -> None:
    async for event in client:
        assert isinstance(event, dict)
        kinds.append(event["type"])


@pytest.mark.parametrize("subprotocols", [(SUBPROTOCOL,), None, (Subprotocol("realtime"),)])
async def test_same_audio_and_events_in_both_variants(
    subprotocols: tuple[Subprotocol] | None,
) -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        heard = await peer.receive_audio(240)
        await peer.send_audio("item_1", 0, heard)
        await peer.send_audio("item_1", len(heard), heard[:7])
        await peer.send_audio("item_2", 0, heard[:5])
        await peer.send("response.done", response={"id": "r"})

    sent = tone(240)
    got: list[AudioChunk] = []
    async with (
        realtime_server(script, subprotocols=subprotocols) as url,
        Realtime.connect(url) as client,
    ):
        assert client.binary == (subprotocols == (SUBPROTOCOL,))
        await client.send_audio(sent)
        kinds = []
        async for event in client:
            if isinstance(event, AudioChunk):
                got.append(event)
                continue
            kinds.append(event["type"])
            if event["type"] == "response.done":
                break
    assert kinds == ["session.created", "response.done"]
    assert [(c.item_id, c.start_sample, len(c.samples)) for c in got] == [
        ("item_1", 0, 240),
        ("item_1", 240, 7),
        ("item_2", 0, 5),
    ]
    np.testing.assert_allclose(got[0].samples, sent, atol=1 / 32768)


async def test_playback_is_reported_in_the_binary_variant_only() -> None:
    received = []

    async def script(peer: Peer) -> None:
        await peer.greet()
        received.append(await peer.receive())
        await peer.greet()

    for subprotocols in ((SUBPROTOCOL,), None):
        async with (
            realtime_server(script, subprotocols=subprotocols) as url,
            Realtime.connect(url) as client,
        ):
            await client.report_playback("item_1", 480)
            await client.send({"type": "response.create"})
            with pytest.raises(Disconnected):
                await events_until_closed(client, [])
    assert received == [
        {"type": "parley.playback", "item_id": "item_1", "played_samples": 480},
        {"type": "response.create"},
    ]


async def test_unreadable_frames_are_passed_over() -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        for junk in (b"", b"\x01", b"\x02abcdefgh", b"\x01\x01i\0\0\0\0x", "[]", "{", "[" * 10**5):
            await peer.socket.send(junk)
        await peer.send("response.output_audio.delta", item_id="i", delta="?")
        await peer.send("response.done")

    async with realtime_server(script) as url, Realtime.connect(url) as client:
        kinds = []
        async for event in client:
            assert isinstance(event, dict)
            kinds.append(event["type"])
            if len(kinds) == 2:
                break
    assert kinds == ["session.created", "response.done"]


async def test_nobody_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ServerUnavailable, match="no server answers"):
        async with Realtime.connect(f"ws://127.0.0.1:{port}/v1/realtime"):
            pass
    with pytest.raises(ServerUnavailable):
        async with Realtime.connect("http://127.0.0.1:1"):
            pass


async def test_wrong_key_is_refused_with_the_servers_words() -> None:
    async with realtime_server(Peer.greet, api_key="right") as url:
        with pytest.raises(Refused) as refused:
            async with Realtime.connect(url, api_key="wrong"):
                pass
        async with Realtime.connect(url, api_key="right"):
            pass
    assert refused.value.http_status == 401
    assert refused.value.code == "invalid_api_key"
    assert refused.value.message == "Wrong API key."


async def test_error_instead_of_a_greeting_is_a_refusal() -> None:
    async def full(peer: Peer) -> None:
        await peer.send("error", error={"code": "server_full", "message": "No room."})
        await peer.socket.close(1013)

    async with realtime_server(full) as url:
        with pytest.raises(Refused, match="No room") as refused:
            async with Realtime.connect(url):
                pass
    assert refused.value.code == "server_full"


async def test_error_then_close_is_a_refusal() -> None:
    async def expire(peer: Peer) -> None:
        await peer.greet()
        await peer.send("error", error={"code": "session_expired", "message": "Time is up."})
        await peer.socket.close(1001)

    kinds: list[str] = []
    async with realtime_server(expire) as url, Realtime.connect(url) as client:
        with pytest.raises(Refused) as refused:
            await events_until_closed(client, kinds)
    assert kinds == ["session.created", "error"]
    assert refused.value.code == "session_expired"


async def test_error_that_the_session_survives_is_an_event() -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        await peer.send("error", error={"code": "invalid_event", "message": "?"})
        await peer.send("response.done")
        await peer.socket.close(1001, "bye")

    kinds: list[str] = []
    async with realtime_server(script) as url, Realtime.connect(url) as client:
        with pytest.raises(Disconnected) as closed:
            await events_until_closed(client, kinds)
    assert kinds == ["session.created", "error", "response.done"]
    assert (closed.value.code, closed.value.reason) == (1001, "bye")


async def test_lost_connection() -> None:
    async def vanish(peer: Peer) -> None:
        await peer.greet()
        peer.socket.transport.abort()

    async with realtime_server(vanish) as url, Realtime.connect(url) as client:
        with pytest.raises(Disconnected) as lost:
            await events_until_closed(client, [])
        with pytest.raises(Disconnected):
            await client.send_audio(tone(10))
    assert lost.value.code == 1006
