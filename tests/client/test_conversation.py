from __future__ import annotations

import asyncio
import contextlib
import io
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.conversation import MAX_UNSENT_BLOCKS, Conversation
from client.playback import MS
from client.realtime import Disconnected, Realtime
from client.recording import Recording
from client.transcript import Transcript
from handlers.messages import Samples
from tests.client.fakes import Peer, Script, realtime_server, tone

pytestmark = pytest.mark.asyncio

SESSION = {"type": "realtime", "instructions": "Be brief."}


class Written:
    """A terminal that can be waited for."""

    def __init__(self) -> None:
        self.text = ""
        self._changed = asyncio.Event()

    def write(self, text: str) -> None:
        self.text += text
        self._changed.set()

    async def all_events_handled(self, peer: Peer) -> None:
        """Let the client come to the end of what `peer` has sent."""
        await peer.send("error", error={"message": "mark", "code": "mark"})
        while not self.text.endswith(MARK):
            self._changed.clear()
            await self._changed.wait()
        self.text = self.text.removesuffix(MARK)


MARK = "[error: mark (mark)]\n"


def conversation() -> tuple[Conversation, Written]:
    out = Written()
    return Conversation(Transcript(out.write, live=False)), out


async def hold(script: Script, talk: Conversation, **server: Any) -> None:
    async def then_close(peer: Peer) -> None:
        await peer.greet()
        await script(peer)

    async with realtime_server(then_close, **server) as url, Realtime.connect(url) as client:
        with pytest.raises(Disconnected):
            await talk.hold(client, SESSION)


async def test_both_sides_reach_the_transcript_and_the_audio_the_buffer() -> None:
    async def script(peer: Peer) -> None:
        update = await peer.receive_event("session.update")
        assert update["session"] == SESSION
        transcription = "conversation.item.input_audio_transcription"
        await peer.send(f"{transcription}.delta", item_id="u", delta="hello")
        await peer.send(f"{transcription}.completed", item_id="u", transcript="Hello.")
        await peer.send("response.created", response={"id": "r"})
        await peer.send("response.output_audio_transcript.delta", item_id="a", delta="Hi ")
        await peer.send("response.output_audio_transcript.delta", item_id="a", delta="there.")
        await peer.send_audio("a", 0, tone(100 * MS))
        await peer.send("response.done", response={"id": "r", "status": "completed"})
        await peer.send("error", error={"message": "Odd.", "code": "odd"})

    talk, out = conversation()
    await hold(script, talk)
    assert out.text == "you: Hello.\nparley: Hi there.\n[error: Odd. (odd)]\n"
    assert talk.playback.depth_samples == 100 * MS
    assert talk.busy  # until it has been played
    talk.playback.pull(100 * MS)
    assert not talk.busy


async def test_playback_is_reported_while_playing_and_at_once_after_a_flush(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("client.conversation.REPORT_INTERVAL_S", 0.001)
    talk, out = conversation()

    async def next_report(peer: Peer) -> tuple[str, int]:
        event = await peer.receive_event("parley.playback")
        return event["item_id"], event["played_samples"]

    async def script(peer: Peer) -> None:
        await peer.send("response.output_audio_transcript.delta", item_id="a", delta="One two")
        await peer.send_audio("a", 0, tone(500 * MS))
        await out.all_events_handled(peer)
        for n in (1, 2, 3):
            talk.playback.pull(20 * MS)
            assert await next_report(peer) == ("a", n * 20 * MS)
        monkeypatch.setattr("client.conversation.REPORT_INTERVAL_S", 3600.0)
        talk.playback.pull(20 * MS)
        assert await next_report(peer) == ("a", 80 * MS)  # the last that waited so shortly
        talk.playback.pull(20 * MS)
        await peer.send("input_audio_buffer.speech_started", item_id="u")
        assert await next_report(peer) == ("a", 100 * MS)
        assert talk.playback.depth_samples == 0
        assert talk.busy  # the person speaks
        await peer.send("input_audio_buffer.speech_stopped", item_id="u")
        await peer.send("input_audio_buffer.cleared")
        await peer.send_audio("a", 100 * MS, tone(500 * MS)[100 * MS :])
        finished.append(True)

    finished: list[bool] = []
    await hold(script, talk)
    assert finished
    assert out.text == "parley: One two —\n"
    assert talk.playback.depth_samples == 400 * MS


async def test_speech_flushes_nothing_where_the_server_says_that_it_interrupts_nothing() -> None:
    talk, out = conversation()
    session = {"audio": {"input": {"turn_detection": {"interrupt_response": False}}}}

    async def script(peer: Peer) -> None:
        await peer.send("session.updated", session=session)
        await peer.send_audio("a", 0, tone(500 * MS))
        await peer.send("input_audio_buffer.speech_started", item_id="u")
        await out.all_events_handled(peer)
        assert talk.playback.depth_samples == 500 * MS
        await peer.send("session.updated", session={"audio": {"input": {"turn_detection": {}}}})
        await peer.send("input_audio_buffer.speech_started", item_id="v")
        await out.all_events_handled(peer)
        assert talk.playback.depth_samples == 0

    await hold(script, talk)


async def test_other_servers_are_told_by_truncation_and_stale_audio_is_dropped() -> None:
    truncations = []
    talk, out = conversation()

    async def script(peer: Peer) -> None:
        await peer.send_audio("a", 0, tone(500 * MS))
        await peer.send("response.output_audio_transcript.delta", item_id="a", delta="One")
        await out.all_events_handled(peer)
        talk.playback.pull(250 * MS)
        await peer.send("input_audio_buffer.speech_started", item_id="u")
        truncations.append(await peer.receive_event("conversation.item.truncate"))
        await peer.send_audio("a", 0, tone(500 * MS))
        await peer.send("response.output_audio_transcript.delta", item_id="a", delta=" two")

    await hold(script, talk, subprotocols=None)
    assert truncations == [
        {
            "type": "conversation.item.truncate",
            "item_id": "a",
            "content_index": 0,
            "audio_end_ms": 250,
        }
    ]
    assert talk.playback.depth_samples == 0
    assert out.text == "parley: One —\n"


async def test_the_microphone_is_sent_in_order_and_recorded_as_sent(tmp_path: Path) -> None:
    blocks = [tone(20 * MS, level=0.1 * n) for n in range(1, 5)]
    got: list[Samples] = []

    async def script(peer: Peer) -> None:
        await peer.receive_event("session.update")
        for block in blocks[1:]:
            talk.microphone(block)
        got.append(await peer.receive_audio(3 * 20 * MS))

    with Recording(tmp_path / "r.wav") as recording:
        talk = Conversation(Transcript(io.StringIO().write, live=False), recording)
        talk.microphone(blocks[0])  # offline: not sent
        await hold(script, talk)
        talk.played(tone(100 * MS))
    np.testing.assert_allclose(got[0], np.concatenate(blocks[1:]), atol=1 / 32768)
    with wave.open(str(tmp_path / "r.wav")) as wav:
        left = np.frombuffer(wav.readframes(wav.getnframes()), "<i2")[::2].astype(np.float32)
    assert not left[: 20 * MS].any()
    np.testing.assert_allclose(left[20 * MS : 80 * MS] / np.float32(32768), got[0], atol=1 / 32768)


async def test_a_slow_network_drops_the_oldest_microphone_audio_and_says_so_once() -> None:
    talk, out = conversation()

    async def script(peer: Peer) -> None:
        await peer.receive_event("session.update")
        for n in range(MAX_UNSENT_BLOCKS + 5):  # without giving the sender a chance to run
            talk.microphone(np.full(4, n / 100, np.float32))
        audio = await peer.receive_audio(4 * MAX_UNSENT_BLOCKS)
        assert audio[0] == pytest.approx(0.05, abs=1e-4)

    await hold(script, talk)
    assert out.text == "[the network is too slow: microphone audio is dropped]\n"


async def test_a_lost_connection_leaves_nothing_running_and_nothing_pending() -> None:
    async def script(peer: Peer) -> None:
        await peer.send("response.created", response={"id": "r"})
        await peer.send("input_audio_buffer.speech_started", item_id="u")

    talk, _ = conversation()
    before = asyncio.all_tasks()
    await hold(script, talk)
    assert not talk.busy
    with contextlib.suppress(asyncio.CancelledError):
        assert asyncio.all_tasks() == before
