"""What the tests of the page stand on: browser, microphone and server; hands and eyes."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
import wave
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from handlers.messages import RATE_HZ, Ask, AudioIn, Finish, Listen, Retain, Samples, Say
from tests.fakes import ScriptedStages
from tests.server.chromium import Chromium, Page
from tests.server.serving import Serving

MICROPHONE_HZ = 48_000
NOISE_LEVEL = 0.01  # what the browser's own processing leaves of silence is less
LIMIT_S = 20.0  # for what takes a fraction of a second on an idle machine


@dataclass
class Gated:
    """Scripted stages for which quiet audio is silence."""

    stages: ScriptedStages

    @property
    def voices(self) -> tuple[str, ...]:
        return self.stages.voices

    @property
    def voice_languages(self) -> Mapping[str, str]:
        return self.stages.voice_languages

    def hear(self, message: AudioIn | Retain | Listen | Finish) -> None:
        if isinstance(message, AudioIn) and np.std(message.samples) < NOISE_LEVEL:
            message = dataclasses.replace(message, samples=message.samples * 0)
        self.stages.hear(message)

    def ask(self, message: Ask) -> None:
        self.stages.ask(message)

    def say(self, message: Say) -> None:
        self.stages.say(message)


@dataclass
class Received:
    """What the server got from the page, in order; audio frames as {"type": "audio"}."""

    events: list[dict[str, Any]] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def add(self, event: dict[str, Any]) -> None:
        with self.changed:
            self.events.append(event)
            self.changed.notify_all()

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["type"] == kind]

    def wait(self, what: Callable[[], object]) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: bool(what()), LIMIT_S), self.types

    @property
    def types(self) -> list[str]:
        """Runs of the same type counted once."""
        types = [event["type"] for event in self.events]
        return [t for i, t in enumerate(types) if i == 0 or types[i - 1] != t]

    @property
    def playback(self) -> list[int]:
        return [event["played_samples"] for event in self.of("parley.playback")]


@dataclass
class Stage:
    """One browser with one tab at a time, before one server."""

    browser: Chromium
    microphone: Path
    served: Serving
    loop: asyncio.AbstractEventLoop
    received: Received
    pages: list[Page] = field(default_factory=list)

    def listen_to(self, *parts: tuple[float, bool]) -> None:
        """What the microphone will hear from its opening: (seconds, whether voiced)."""
        audio = np.concatenate([voice(seconds) * voiced for seconds, voiced in parts])
        with wave.open(str(self.microphone), "wb") as file:
            file.setparams((1, 2, MICROPHONE_HZ, 0, "NONE", ""))
            file.writeframes((audio * 32767).astype("<i2").tobytes())

    def say(self, words: list[str], answer: str) -> None:
        """What the recogniser will understand and the responder say."""
        self.served.stages.words = words
        self.served.stages.answer = lambda question: answer

    def configure(self, **options: Any) -> None:
        self.served.hub.options = dataclasses.replace(self.served.hub.options, **options)

    def page(self, host: str = "127.0.0.1") -> Page:
        """Open a tab; it closes with the test."""
        page = self.browser.page(f"http://{host}:{self.served.port}/")
        self.pages.append(page)
        return page

    def drop_connections(self) -> None:
        def drop() -> None:
            for session in list(self.served.hub.sessions):
                session.close(1012, "restart")

        self.loop.call_soon_threadsafe(drop)

    def close(self) -> None:
        for page in self.pages:
            page.close()
        self.received.wait(lambda: not self.served.hub.sessions)

    @property
    def spoken_samples(self) -> int:
        """Length of all replies so far."""
        stages = self.served.stages
        return sum(round(stages.char_s * len(one.text) * RATE_HZ) for one in stages.said)


def voice(seconds: float) -> Samples:
    """Something that noise suppression takes for speech, [T] at MICROPHONE_HZ."""
    t = np.arange(round(seconds * MICROPHONE_HZ)) / MICROPHONE_HZ
    pitch_hz = 140 + 25 * np.sin(2 * np.pi * 2.1 * t)
    phase = 2 * np.pi * np.cumsum(pitch_hz) / MICROPHONE_HZ
    buzz = sum(np.sin(k * phase) / k for k in range(1, 16))
    swell = 0.55 + 0.45 * np.sin(2 * np.pi * 4 * t)
    return np.clip(0.25 * buzz * swell, -1, 1).astype(np.float32)


@dataclass
class Running:
    served: Serving
    loop: asyncio.AbstractEventLoop
    stop: asyncio.Event


def click(page: Page, element_id: str) -> None:
    page.evaluate(f"document.getElementById('{element_id}').click()")


def write(page: Page, text: str) -> None:
    page.evaluate(f"document.getElementById('text').value = {json.dumps(text)}")
    page.evaluate("document.getElementById('compose').requestSubmit()")


def until_state(page: Page, state: str) -> None:
    page.evaluate(f"until(() => document.body.dataset.state === '{state}')")


def until_notice(page: Page, code: str) -> str:
    text: str = page.evaluate(
        f"until(() => !notice.hidden && notice.dataset.code === '{code}' && notice.innerText)"
    )
    return text.strip()


def turns(page: Page) -> list[tuple[str, str]]:
    """(side, text) of each turn of the transcript."""
    found = page.evaluate(
        "[...document.querySelectorAll('.turn')].map((turn) =>"
        "[turn.classList[1], turn.querySelector('.text').textContent])"
    )
    return [(side, text) for side, text in found]


def until_text(page: Page, selector: str, text: str) -> None:
    page.evaluate(
        f"until(() => [...document.querySelectorAll('{selector}')]"
        f".some((one) => one.textContent.includes({json.dumps(text)})))"
    )


def status(page: Page) -> dict[str, Any]:
    found: dict[str, Any] = page.evaluate("parley.status()")
    return found
