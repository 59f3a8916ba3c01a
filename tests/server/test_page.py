"""The page in a real browser: a WAV as microphone, the real wire, scripted stages."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from handlers.messages import RATE_HZ
from server.hub import Hub
from server.session import Session
from tests.server.chromium import Chromium, Page, find, launched
from tests.server.page_stage import (
    LIMIT_S,
    Gated,
    Received,
    Running,
    Stage,
    click,
    status,
    turns,
    until_notice,
    until_state,
    until_text,
    write,
)
from tests.server.serving import serving

BROWSER = find()
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on the path")

FOREIGN = "parley.test"  # a plain-http name that is not loopback: no secure context


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    ready: queue.Queue[Running] = queue.Queue()

    async def main() -> None:
        async with serving(allowed_origins="") as served:
            running = Running(served, asyncio.get_running_loop(), asyncio.Event())
            served.hub.pipeline = Gated(served.stages)
            ready.put(running)
            await running.stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    running = ready.get(timeout=LIMIT_S)
    yield running
    running.loop.call_soon_threadsafe(running.stop.set)
    thread.join(LIMIT_S)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Chromium, Path]]:
    assert BROWSER is not None
    home = tmp_path_factory.mktemp("chromium")
    microphone = home / "microphone.wav"
    flags = (
        "--use-fake-ui-for-media-stream",
        "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-audio-capture={microphone}%noloop",
        "--autoplay-policy=no-user-gesture-required",
        f"--host-resolver-rules=MAP {FOREIGN} 127.0.0.1",
    )
    with launched(BROWSER, home / "profile", flags) as chromium:
        yield chromium, microphone


@pytest.fixture
def stage(
    server: Running, browser: tuple[Chromium, Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Stage]:
    received = Received()
    receive_text, receive_audio, hub_leave = Session.receive_text, Session.receive_audio, Hub.leave

    def text(session: Session, data: str) -> None:
        received.add(json.loads(data))
        receive_text(session, data)

    def audio(session: Session, data: bytes) -> None:
        received.add({"type": "audio", "bytes": len(data)})
        receive_audio(session, data)

    def leave(hub: Hub, session: Session) -> None:
        hub_leave(hub, session)
        received.add({"type": "left"})

    monkeypatch.setattr(Hub, "leave", leave)
    monkeypatch.setattr(Session, "receive_text", text)
    monkeypatch.setattr(Session, "receive_audio", audio)
    options = server.served.hub.options
    server.served.stages.said.clear()
    server.served.stages.asked.clear()
    stage = Stage(browser[0], browser[1], server.served, server.loop, received)
    stage.listen_to((10.0, False))
    yield stage
    stage.close()
    server.served.hub.options = options


@pytest.fixture
def page(stage: Stage) -> Iterator[Page]:
    """A tab that must end without an error in its console."""
    page = stage.page()
    yield page
    assert page.errors() == []


RESAMPLE = """
(async () => {
  const { Resampler } = await import("/page/resampler.js");
  const wave = (hz, rate) =>
    Float32Array.from({ length: rate }, (_, n) => Math.sin((2 * Math.PI * hz * n) / rate));
  const [from, to] = RATES;
  const tone = wave(1000, from);
  const whole = new Resampler(from, to).push(tone);
  const stream = new Resampler(from, to);
  const pieces = [];
  for (let at = 0; at < from; at += 128) pieces.push(...stream.push(tone.subarray(at, at + 128)));
  const expected = wave(1000, to);
  return {
    lengths: [whole.length, pieces.length],
    seam: Math.max(...whole.map((one, n) => Math.abs(one - pieces[n]))),
    error: Math.max(...whole.slice(200, -200).map((one, n) => Math.abs(one - expected[n + 200]))),
    alias: Math.max(...new Resampler(from, to).push(wave(15000, from)).slice(200, -200)),
  };
})()
"""


RATES_HZ = [(48_000, RATE_HZ), (44_100, RATE_HZ), (16_000, RATE_HZ), (RATE_HZ, 44_100)]


def test_resampling_is_exact_seamless_and_free_of_aliases(page: Page) -> None:
    for from_hz, to_hz in RATES_HZ:
        found = page.evaluate(RESAMPLE.replace("RATES", f"[{from_hz}, {to_hz}]"))
        assert found["lengths"][0] == found["lengths"][1] == pytest.approx(to_hz, rel=0.01)
        assert found["seam"] == 0
        assert found["error"] < 0.003
        if to_hz < 30_000 < from_hz:  # 15 kHz lies above half the second rate
            assert found["alias"] < 0.003


BUFFER = """
(async () => {
  const { PlaybackBuffer } = await import("/page/playback_buffer.js");
  const buffer = new PlaybackBuffer();
  const pull = (count) => {
    const out = new Float32Array(count);
    buffer.pull(out);
    return [...out];
  };
  const ramp = (start, count) => Float32Array.from({ length: count }, (_, n) => (start + n) / 1e4);
  STEPS
})()
"""


def in_buffer(page: Page, steps: str) -> Any:
    """Run `steps` with `buffer`, `pull(count)` and `ramp(start, count)` at hand."""
    return page.evaluate(BUFFER.replace("STEPS", steps))


def test_the_playback_buffer_waits_plays_cuts_and_resumes_exactly(page: Page) -> None:
    found = in_buffer(
        page,
        """
        buffer.push("a", 0, ramp(0, 480));
        const early = pull(120);
        buffer.push("a", 480, ramp(480, 1000));
        const played = pull(600);
        const cut = buffer.flush();
        const fade = pull(120);
        const again = buffer.flush();
        buffer.push("a", 600, ramp(600, 2000));
        const resumed = pull(240);
        return { early, played, cut, fade, again, resumed, progress: buffer.takeProgress(),
                 underruns: buffer.underruns };
        """,
    )
    assert found["early"] == [0] * 120
    assert found["played"] == pytest.approx([n / 1e4 for n in range(600)], abs=1e-7)
    assert found["cut"] == {"itemId": "a", "played": 600}
    assert found["again"] is None
    assert np.all(np.diff(found["fade"]) <= 0)
    assert found["fade"][0] < 0.06
    assert found["fade"][72:] == [0] * 48
    assert found["resumed"][72:] == pytest.approx([n / 1e4 for n in range(672, 840)], abs=1e-7)
    assert found["progress"] == [{"itemId": "a", "played": 840}]
    assert found["underruns"] == 0


def test_the_playback_buffer_learns_from_underruns_and_knows_the_end(page: Page) -> None:
    found = in_buffer(
        page,
        """
        const depths = [buffer.startDepth];
        buffer.push("a", 0, ramp(0, 960));
        pull(1200);
        pull(240);
        buffer.push("a", 960, ramp(960, 2000));
        depths.push(buffer.startDepth);
        pull(4000);
        buffer.end("a");
        const afterEnd = buffer.flush();
        buffer.push("b", 0, ramp(1000, 100));
        buffer.end("b");
        const short = pull(120);
        return { depths, afterEnd, short, progress: buffer.takeProgress(),
                 audible: buffer.audible, underruns: buffer.underruns };
        """,
    )
    assert found["depths"] == [960, 960 + 480]
    assert found["afterEnd"] is None
    assert found["short"][:100] == pytest.approx([n / 1e4 for n in range(1000, 1100)], abs=1e-7)
    assert found["progress"] == [{"itemId": "a", "played": 2960}, {"itemId": "b", "played": 100}]
    assert found["audible"] == {"itemId": "b", "offset": 0}
    assert found["underruns"] == 1


def test_a_spoken_turn_is_written_answered_heard_and_interrupted(stage: Stage, page: Page) -> None:
    stage.listen_to((0.2, False), (0.7, True), (1.7, False), (0.8, True), (6.0, False))
    stage.say(["the", "time"], "It is twelve. And there is a long story to it.")
    click(page, "start")
    until_text(page, ".person[aria-busy] .text", "the")
    until_state(page, "hearing")
    until_state(page, "speaking")
    assert turns(page)[0] == ("person", "the time")
    assert turns(page)[1][1].startswith("It is twelve.")
    until_text(page, ".parley .mark", "answered in")
    (answered_s,) = status(page)["answers_s"]
    assert 0.32 <= answered_s < 1.0  # the silence that ends a turn is 320 ms here

    until_text(page, ".parley.cut .mark", "interrupted")
    cut_at = stage.received.playback[-1]
    assert status(page)["flushes"] == 1
    assert status(page)["played_samples"] == cut_at
    heard_chars = cut_at / RATE_HZ / stage.served.stages.char_s
    side, text = turns(page)[1]
    assert side == "parley"
    assert 0 < len(text) <= heard_chars + 8
    until_state(page, "thinking")
    page.evaluate("until(() => parley.status().answers_s.length === 2)")
    assert [side for side, _ in turns(page)] == ["person", "parley", "person", "parley"]
    assert stage.served.stages.asked[-1].messages[1].content.strip() == text


def test_nothing_is_flushed_where_the_session_says_that_speech_interrupts_nothing(
    stage: Stage, page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = stage.served.hub
    detection = dataclasses.replace(hub.default_config.server_vad, interrupt_response=False)
    config = dataclasses.replace(hub.default_config, turn_detection=detection)
    monkeypatch.setattr(hub, "default_config", config)
    stage.listen_to((0.2, False), (0.5, True), (1.1, False), (0.5, True), (6.0, False))
    stage.say(["hello"], "Said to its very end.")
    click(page, "start")
    until_state(page, "speaking")
    until_state(page, "hearing")
    stage.received.wait(lambda: stage.received.playback.count(stage.spoken_samples // 2) == 2)
    assert status(page)["flushes"] == 0


def test_a_cough_pauses_the_reply_which_resumes_where_it_was(stage: Stage, page: Page) -> None:
    stage.listen_to((0.2, False), (0.5, True), (1.1, False), (0.2, True), (6.0, False))
    stage.say(["hm"], "Said to its very end.")
    click(page, "start")
    until_state(page, "speaking")
    page.evaluate("until(() => document.querySelector('.parley.paused'))")
    stage.received.wait(lambda: stage.received.playback[-1:] == [stage.spoken_samples])
    until_state(page, "listening")
    assert turns(page) == [("person", "hm"), ("parley", "Said to its very end.")]
    assert page.evaluate("document.querySelector('.cut, .paused')") is None
    assert status(page)["flushes"] == 1
    assert stage.received.playback == sorted(stage.received.playback)


def test_push_to_talk_sends_only_what_is_said_while_held(stage: Stage, page: Page) -> None:
    # This browser is made to refuse 24 kHz for the microphone: the worklet resamples then.
    page.evaluate(
        "(() => { const create = AudioContext.prototype.createMediaStreamSource;"
        "AudioContext.prototype.createMediaStreamSource = function (stream) {"
        "  if (this.sampleRate === 24000) throw new DOMException('', 'NotSupportedError');"
        "  window.usedRate = this.sampleRate;"
        "  return create.call(this, stream); }; })()"
    )
    stage.listen_to((20.0, True))
    stage.say(["spell", "cat"], "C, A, T.")
    click(page, "push-to-talk")
    click(page, "start")
    until_state(page, "ready")
    page.key("keyDown", " ", "Space")
    until_state(page, "hearing")
    stage.received.wait(lambda: len(stage.received.of("audio")) >= 30)
    page.key("keyUp", " ", "Space")
    stage.received.wait(lambda: stage.received.of("response.create"))
    until_text(page, ".parley .mark", "answered in")
    stage.received.wait(lambda: stage.received.playback[-1:] == [stage.spoken_samples])
    (answered_s,) = status(page)["answers_s"]
    assert 0.05 <= answered_s < 0.5  # the stages take 50 ms, and nobody waits for silence
    assert page.evaluate("usedRate") != RATE_HZ
    assert turns(page) == [("person", "spell cat"), ("parley", "C, A, T.")]
    types = stage.received.types
    assert types[0] == "session.update"
    assert types[-4:] == [
        "audio",
        "input_audio_buffer.commit",
        "response.create",
        "parley.playback",
    ]
    assert types.index("output_audio_buffer.clear") < types.index("input_audio_buffer.commit")
    assert stage.received.of("session.update")[0]["session"]["audio"]["input"] == {
        "turn_detection": None
    }


def test_writing_works_without_a_microphone_and_stops_a_reply(stage: Stage, page: Page) -> None:
    markup = "<img src=x onerror=alert(1)>"
    stage.say([], f"You wrote {markup} and I go on and on about it.")
    page.evaluate("voice.value = 'verse'; speed.value = 1.2; instructions.value = 'Be brief.'")
    write(page, markup)
    until_state(page, "speaking")
    assert page.evaluate("voice.disabled")
    assert stage.received.of("session.update")[0]["session"] == {
        "type": "realtime",
        "instructions": "Be brief.",
        "audio": {"output": {"voice": "verse", "speed": 1.2}},
    }
    assert (stage.served.stages.said[0].voice, stage.served.stages.said[0].speed) == ("verse", 1.2)
    stage.received.wait(lambda: stage.received.playback[-1:] > [RATE_HZ])
    stage.say([], "Good.")
    write(page, "stop")
    until_text(page, ".parley.cut .mark", "interrupted")
    cut_at = stage.received.playback[-1]
    until_text(page, ".parley .text", "Good.")
    until_state(page, "typing")
    (first, second, third, fourth) = turns(page)
    assert (first, third, fourth) == (("person", markup), ("person", "stop"), ("parley", "Good."))
    assert second[1]
    assert f"You wrote {markup} and I go on and on about it.".startswith(second[1])
    assert 0 < cut_at < stage.spoken_samples
    assert not stage.received.of("audio")
    assert page.evaluate("document.querySelectorAll('.turn img').length") == 0


def test_a_full_server_is_named(stage: Stage, page: Page) -> None:
    stage.configure(max_sessions=0)
    click(page, "start")
    assert "The server is full" in until_notice(page, "session_limit_reached")
    until_state(page, "off")


def test_a_key_is_asked_for_when_the_server_wants_one(stage: Stage) -> None:
    stage.configure(api_key="open-sesame")
    page = stage.page()
    assert page.evaluate("document.getElementById('key-form').hidden")
    click(page, "start")
    assert until_notice(page, "key") == "This server wants an API key."
    for key, outcome in (("wrong", "key"), ("open sesame", "key"), ("open-sesame", "")):
        page.evaluate(f"key.value = '{key}'; document.getElementById('key-form').requestSubmit()")
        if outcome:
            page.evaluate("until(() => !document.getElementById('key-form').hidden)")
    until_state(page, "listening")
    assert page.evaluate("document.getElementById('key-form').hidden && notice.hidden")


def test_a_lost_connection_comes_back_and_knows_what_was_said(stage: Stage, page: Page) -> None:
    stage.say([], "Yes.")
    write(page, "hello")
    until_text(page, ".parley .text", "Yes.")
    until_state(page, "typing")
    stage.drop_connections()
    assert "connection was lost" in until_notice(page, "lost")
    until_text(page, ".note", "Reconnected")
    assert page.evaluate("notice.hidden")
    write(page, "again")
    page.evaluate("until(() => document.querySelectorAll('.turn.parley').length === 2)")
    asked = stage.served.stages.asked[-1].messages
    assert [(m.role, m.content) for m in asked] == [
        ("user", "hello"),
        ("assistant", "Yes."),
        ("user", "again"),
    ]


def test_without_a_microphone_the_page_says_why_and_goes_on(stage: Stage, page: Page) -> None:
    for error, code in (
        ("NotAllowedError", "denied"),
        ("NotFoundError", "absent"),
        ("NotReadableError", "busy"),
    ):
        page.evaluate(
            "navigator.mediaDevices.getUserMedia = () =>"
            f"Promise.reject(new DOMException('no', '{error}'))"
        )
        click(page, "start")
        assert "icrophone" in until_notice(page, f"microphone_{code}")
        until_state(page, "typing")
        click(page, "start")
        until_state(page, "off")


def test_an_insecure_page_is_told_so_and_gets_written_answers(stage: Stage) -> None:
    page = stage.page(FOREIGN)
    click(page, "start")
    assert "--allowed_origins" in until_notice(page, "handshake_refused")
    stage.configure(allowed_origins=f"http://{FOREIGN}:{stage.served.port}")
    stage.say([], "In writing.")
    page = stage.page(FOREIGN)
    write(page, "hello")
    assert "https://" in until_notice(page, "insecure")
    until_text(page, ".parley .text", "In writing.")
    until_state(page, "typing")
    assert stage.served.stages.said == []


def test_muting_stopping_and_starting_again(stage: Stage, page: Page) -> None:
    for _ in range(2):
        click(page, "start")
    assert status(page)["link"] == "off"  # stopped while it was starting
    click(page, "start")
    until_state(page, "listening")
    click(page, "mute")
    until_state(page, "muted")
    frames = len(stage.received.of("audio"))
    stage.received.wait(lambda: len(stage.received.of("audio")) > frames + 5)
    click(page, "mute")
    until_state(page, "listening")
    click(page, "start")
    until_state(page, "off")
    stage.received.wait(lambda: stage.received.of("left"))
    assert stage.received.types == ["session.update", "audio", "left"]
