"""Trials held as conversations in real time, many sessions side by side."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

from benchmarks.duplex_trials import Trial
from benchmarks.listener import Conversation, Kind, Said, Script, Trace, hold
from benchmarks.scenes import INTERRUPTION_LEAD_MS, Scene, one_after_another
from client.realtime import Realtime, RealtimeError

ANSWER_S = 3.0
"""A turn that nothing follows within this is not taken up."""
FIRST_LOOK_S = 1.5
"""Until then after a turn, silence does not mean that the partner is done."""
REST_S = 0.8
"""Silence after which it is."""
REPLY_S = 4.0
"""A longer reply is stopped."""
REST_TIMEOUT_S = 5.0
SPOKEN_TIMEOUT_S = 120.0
SESSION_STAGGER_S = 0.4


@dataclass(slots=True)
class Run:
    """A trial and where it stands in its conversation, in samples."""

    trial: Trial
    trace: Trace | None = None  # None: never begun
    said: list[Said] = field(default_factory=list)
    settled: bool = False  # all was quiet when it began
    begin: int = 0
    end: int = 0  # 0: its session broke off


@dataclass(frozen=True, slots=True)
class Connection:
    url: str
    api_key: str | None = None
    binary: bool = True
    frame_ms: float = 20.0


def scene(run: Run) -> Scene:
    def script(talk: Conversation) -> Script:
        run.trace = talk.trace
        run.settled = yield from _settled(talk)
        run.begin = talk.sample
        trial = run.trial
        if trial.over is None:
            yield from _say(talk, run, "noise" if trial.task == "noise" else "turn")
        else:
            yield from _interrupted(talk, run)
        yield from _done(talk, run.said[-1].last_voiced)
        run.end = talk.sample

    return script


def _say(talk: Conversation, run: Run, kind: Kind) -> Script:
    said = talk.say(run.trial.clip, kind)
    run.said.append(said)
    yield from talk.until(lambda: talk.sample >= said.last_voiced, SPOKEN_TIMEOUT_S)


def _interrupted(talk: Conversation, run: Run) -> Script:
    """Say it over the reply; not at all where no reply comes, or it is over too soon."""
    yield from _say(talk, run, "prompt")
    end = run.said[0].last_voiced
    if (yield from talk.until(lambda: talk.audible_sample > end, ANSWER_S)):
        yield from talk.wait(run.trial.after_s)
        if talk.quiet_s < REST_S / 4:
            assert run.trial.over is not None
            said = talk.say(run.trial.over, "barge_in", lead_ms=INTERRUPTION_LEAD_MS)
            run.said.append(said)
            yield from talk.until(lambda: talk.sample >= said.last_voiced, SPOKEN_TIMEOUT_S)


def _done(talk: Conversation, spoken: int) -> Script:
    """Hear the reply to what ended at sample `spoken`, if one comes."""
    yield from talk.wait(FIRST_LOOK_S)
    if talk.audible_sample <= spoken:
        left_s = ANSWER_S - FIRST_LOOK_S
        yield from talk.until(lambda: talk.audible_sample > spoken, left_s)
    yield from talk.until(lambda: talk.quiet_s >= REST_S, REPLY_S)


def _settled(talk: Conversation) -> Generator[None, None, bool]:
    """Quiet, by itself or by the person's "stop"; False where neither helps."""
    if talk.quiet_s < REST_S or talk.replying:
        talk.hush()
    return (
        yield from talk.until(lambda: talk.quiet_s >= REST_S and not talk.replying, REST_TIMEOUT_S)
    )


async def hold_all(
    sessions: Sequence[Sequence[Run]],
    connection: Connection,
    parallel: int,
) -> list[str]:
    """Every session in real time, `parallel` at a time; returns what failed.

    The recordings are left in the runs: as a task's result, asyncio would print them (its runner
    looks up a signal handler that holds the task, which makes text of it).
    """
    failures: list[str] = []
    waiting = iter(enumerate(sessions))

    async def worker(number: int) -> None:
        await asyncio.sleep(number * SESSION_STAGGER_S)
        for index, runs in waiting:
            script = one_after_another([scene(run) for run in runs])
            talk = Conversation(script, frame_ms=connection.frame_ms)
            try:
                async with Realtime.connect(
                    connection.url, connection.api_key, connection.binary
                ) as client:
                    talk.binary = client.binary
                    await hold(client, talk)
            except RealtimeError as error:
                failures.append(f"session {index}: {error}")

    await asyncio.gather(*(worker(number) for number in range(parallel)))
    return failures
