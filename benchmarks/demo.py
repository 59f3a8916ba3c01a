"""A spoken conversation with Parley: `make demo`.

Starts a server on loopback and talks to it over the real wire in real time: an eSpeak voice is
the person, with a pause inside a question, an interruption and an "uh-huh". Leaves the recording,
a picture and the figures in `out/demo/`.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.clips import Clip, joined, noise, trimmed
from benchmarks.listener import Conversation, Happened, Kind, Script, hold
from benchmarks.measure import AUDIBLE_DBFS
from benchmarks.pictures import draw_conversation
from benchmarks.report import (
    SPREAD_HEADERS,
    Spread,
    environment,
    environment_lines,
    table,
    write_json,
    write_recording,
)
from benchmarks.scenes import INTERRUPTION_LEAD_MS, REPLY_TIMEOUT_S, answered
from benchmarks.score import Scores
from benchmarks.server_process import Server, ServerFailed, running
from client.realtime import Realtime, RealtimeError
from client.transcript import Transcript
from handlers.messages import RATE_HZ
from models.parrot.synthesis import Speaker, Synthesizer

PERSON = Speaker(voice="en-us+edward", speed_wpm=165, pitch=40, intonation=60)
"""Of eSpeak's voices the one that PocketSphinx understands best."""
LEVEL_DBFS, ROOM_DBFS = -22.0, -50.0
LEAD_S, TAIL_S = 0.3, 1.5
PAUSE_S = 0.45
STORY_S = 3.0
"""How much of the story is heard before the interruption."""
THINKING_S = 0.5
"""Between a reply and the person's next turn."""


@dataclass
class Dialogue:
    """The person's side. `missed` is the first turn without an answer."""

    clips: dict[str, Clip]
    missed: str | None = None

    def script(self, talk: Conversation) -> Script:
        yield from talk.wait(0.3)
        for name in ("greeting", "arithmetic"):
            yield from self._ask(talk, name)
            yield from self._hear_out(talk)
        yield from self._ask(talk, "story")
        yield from talk.wait(STORY_S)
        yield from talk.until(lambda: talk.quiet_s == 0.0, 1.0)
        yield from self._ask(talk, "interruption", "barge_in")
        yield from self._hear_out(talk)
        yield from self._ask(talk, "counting")
        yield from talk.wait(1.0)
        talk.say(self.clips["backchannel"], "noise", INTERRUPTION_LEAD_MS)
        yield from talk.wait(1.0)
        yield from self._hear_out(talk)
        yield from self._ask(talk, "goodbye")
        yield from self._hear_out(talk)

    def _ask(self, talk: Conversation, name: str, kind: Kind = "turn") -> Script:
        """Say it and wait for the answer to begin."""
        clip = self.clips[name]
        said = talk.say(clip, kind, INTERRUPTION_LEAD_MS if kind == "barge_in" else None)
        there = yield from answered(talk, said)
        if not there and self.missed is None:
            self.missed = clip.text

    def _hear_out(self, talk: Conversation) -> Generator[None, None, None]:
        yield from talk.until(lambda: talk.at_rest, REPLY_TIMEOUT_S)
        yield from talk.wait(THINKING_S)


def make_dialogue() -> Dialogue:
    with Synthesizer(RATE_HZ) as voice:
        clips = (
            spoken(voice, "greeting", "Good morning."),
            spoken(voice, "arithmetic", "What is ninety", "minus fifteen?"),
            spoken(voice, "story", "I want to hear a story."),
            spoken(voice, "interruption", "Tell me a joke."),
            spoken(voice, "counting", "Can you count to ten?"),
            spoken(voice, "backchannel", "Uh-huh."),
            spoken(voice, "goodbye", "See you tomorrow."),
        )
    return Dialogue({clip.name: clip for clip in clips})


def spoken(voice: Synthesizer, name: str, *parts: str) -> Clip:
    """The parts with pauses of `PAUSE_S` between them, in a quiet room."""
    speech = trimmed(voice.say(PERSON, parts[0]).samples)
    for part in parts[1:]:
        speech = joined(speech, trimmed(voice.say(PERSON, part).samples), PAUSE_S)
    speech = speech * (_level(LEVEL_DBFS) / np.sqrt(np.mean(np.square(speech))))
    lead, tail = round(LEAD_S * RATE_HZ), round(TAIL_S * RATE_HZ)
    samples = np.pad(speech, (lead, tail))
    samples = samples + _level(ROOM_DBFS) * noise(np.random.default_rng(0), len(samples))
    text, end = " … ".join(parts), lead + len(speech)
    return Clip(name, "plain", samples, text, lead, end, voice=PERSON.voice)


def _level(dbfs: float) -> np.float32:
    return np.float32(10.0 ** (dbfs / 20.0))


class LiveTranscript:
    """Both sides on the terminal while they speak, from the server's events."""

    def __init__(self) -> None:
        live = sys.stdout.isatty()
        columns = shutil.get_terminal_size().columns
        self._terminal = Transcript(self._write, live, columns)

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def __call__(self, happened: Happened) -> None:
        event, show = happened.event, self._terminal
        item_id = str(event.get("item_id", ""))
        match happened.name:
            case "input_audio_buffer.speech_started":
                show.parley_cut()
            case "conversation.item.input_audio_transcription.delta":
                show.person_delta(item_id, str(event["delta"]))
            case "conversation.item.input_audio_transcription.completed":
                show.person_final(item_id, str(event["transcript"]))
            case "response.output_audio_transcript.delta":
                show.parley_delta(item_id, str(event["delta"]))
            case "response.done":
                show.parley_done()
            case "error":
                show.notice(f"error: {event['error'].get('message')}")

    def close(self) -> None:
        self._terminal.close()


async def converse(server: Server, dialogue: Dialogue) -> Conversation:
    """Hold the conversation. Raises `RealtimeError` when the connection fails."""
    transcript = LiveTranscript()
    talk = Conversation(dialogue.script, on_event=transcript)
    try:
        async with Realtime.connect(server.url) as client:
            await hold(client, talk)
    finally:
        transcript.close()
    return talk


def figures(scores: Scores) -> dict[str, Spread]:
    return {
        "last voiced → audible reply": Spread.of(scores.latencies_ms(("turn", "barge_in"))),
        "interruption → silence": Spread.of(scores.stops_ms()),
        "silence around the uh-huh": Spread.of([score.pause_ms for score in scores.noises]),
    }


def leave(talk: Conversation, scores: Scores, server: Server, out: Path) -> None:
    """Write the recording, the picture and the report; print the table."""
    spreads = figures(scores)
    said: dict[str, str] = {each.clip.name: each.clip.text for each in talk.trace.said}
    turns = [[f"“{said[score.clip]}”", score.latency_ms] for score in scores.turns]
    print("\n" + table(("last voiced → audible reply", "ms"), turns))
    print("\nAt the listener's ear, in ms:")
    print(table(SPREAD_HEADERS, [spread.row(name) for name, spread in spreads.items()]))
    for score in scores.barge_ins:
        if score.resumed:
            print("the interrupted reply came back")
    for noise_score in scores.noises:
        verdict = "went on" if noise_score.completed else "ended"
        print(f'the reply {verdict} after the "uh-huh"')
    facts = environment({"server": list(server.arguments)})
    print(f"server start to ready: {server.start_s:.2f} s\n" + environment_lines(facts))
    write_recording(out / "conversation.wav", talk.trace.recording())
    draw_conversation(talk.trace, scores, out / "conversation.png")
    document: dict[str, Any] = {
        "environment": facts,
        "audible_dbfs": AUDIBLE_DBFS,
        "server_start_s": server.start_s,
        "figures_ms": spreads,
        "turns": scores.turns,
        "barge_ins": scores.barge_ins,
        "noises": scores.noises,
        "errors": scores.errors,
    }
    write_json(out / "report.json", document)
    names = ", ".join(("conversation.wav", "conversation.png", "report.json"))
    print(f"\n{out}/: {names}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the results")
    parser.add_argument("server", nargs="*", help="flags for the server, after --")
    options = parser.parse_args(argv)
    dialogue, scores = make_dialogue(), Scores()
    try:
        with running(options.server, options.out / "server.log") as server:
            print(f"Parley answers at {server.url}\n", flush=True)
            talk = asyncio.run(converse(server, dialogue))
            scores.add(talk.trace)
            leave(talk, scores, server, options.out)
    except (ServerFailed, RealtimeError) as error:
        print(f"The demo failed: {error}", file=sys.stderr)
        return 1
    if dialogue.missed is not None:
        print(f"The demo failed: no reply to “{dialogue.missed}”", file=sys.stderr)
        return 1
    print(
        "\nGo on with a microphone: `make serve`, and `make talk` in a second terminal."
        "\nOr with a browser: `make serve`, then open http://127.0.0.1:8765/"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
