"""The processes that decode: a nursery loads PocketSphinx once, its forked workers share it.

Run as a script by `handlers.stt.pocketsphinx`, which owns the other end of every pipe. Needs
nothing else of this project and starts no thread before it forks. A closed pipe is the order to
leave, so that nobody outlives the server however that ends.

Nursery, on its control socket: sends `READY` when loaded; each `FORK` carries the end of a
worker's pipe. Worker, on its pipe: answers every message in order, beginning with its pid.
"""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import socket
import struct
import sys
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

READY = b"r"
FORK = b"f"
AUDIO = b"a"  # + pcm16 at 16 kHz → the text so far as UTF-8, or empty if it has not changed
CONCLUDE = b"c"  # → END + the text as UTF-8
RESET = b"x"  # forget the utterance → empty
PID = struct.Struct("<i")
END = struct.Struct("<d")  # P(the sentence ends here); NaN: not known

NICENESS = 5
"""Decoding gives way to the server's event loop when there are not cores enough."""
FRAME_BYTES = 320  # 10 ms
REVIEW_FRAMES = 10
"""Between looks at the partial text and at the cepstral mean."""
INITIAL_MEAN = (45.0, 2.0, -6.3, 11.4, -6.6, -1.8, -3.1, -9.0, -4.0, -6.6, 0.5, 0.6, -0.8)
"""Cepstral mean of recorded speech by three people and of eSpeak's; the first follows level."""
MEAN_FRAMES = (50,) + (300,) * 12
"""Time constants with which the mean follows the utterance.

The decoder's own starts at 40,3,-1 and learns only between utterances. Over 70 sentences in five
eSpeak voices this took word errors from 0.64 to 0.46 (0.49 at a quarter of the level); carrying
the mean over to the connection's next utterance gained nothing more."""
DECODER_FRAMES = 500  # the weight that the decoder gives to a mean that is set


class Decoding:
    """One utterance at a time, in segments that end where a final text is asked for.

    Ending the segment takes about 6 ms and finds the best path through the word lattice. Over 40
    sentences with a pause inside, that left 0.48 of the words wrong (0.47 if each was decoded
    whole); the running hypothesis of the whole, without a best path, 0.61.
    """

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self._lm = decoder.get_lm()
        self._logmath = decoder.get_logmath()
        self._running = False
        self.reset()

    def reset(self) -> None:
        if self._running:
            self._decoder.end_utt()
        self._running = False
        self._texts: list[str] = []
        self._partial = ""
        self._mean = list(INITIAL_MEAN)
        self._frames = 0.0

    def hear(self, pcm: bytes) -> str:
        """Decode more; the whole text so far if it has changed, else empty."""
        if not self._running:
            self._decoder.set_cmn(_text(self._mean))
            self._decoder.start_utt()
            self._running = True
            self._frames = 0.0
        self._decoder.process_raw(pcm)
        self._frames += len(pcm) / FRAME_BYTES
        if self._frames < REVIEW_FRAMES:
            return ""
        self._adapt()
        text = " ".join([*self._texts, *words(self._decoder.hyp())])
        if text == self._partial:
            return ""
        self._partial = text
        return text

    def _adapt(self) -> None:
        # The decoder's is the mean of DECODER_FRAMES at the set mean and of those heard since.
        heard = self._frames
        weighed = _vector(self._decoder.get_cmn(True))
        self._mean = [
            (old * memory + new * (DECODER_FRAMES + heard) - old * DECODER_FRAMES)
            / (memory + heard)
            for old, new, memory in zip(self._mean, weighed, MEAN_FRAMES, strict=True)
        ]
        self._decoder.set_cmn(_text(self._mean))
        self._frames = 0.0

    def conclude(self) -> tuple[str, float]:
        """The whole text, and P(it ends here | its last two words) or NaN."""
        if self._running:
            running = words(self._decoder.hyp())
            self._decoder.end_utt()
            self._running = False
            # Where no path through the lattice reaches the end, the running words stand.
            self._texts += words(self._decoder.hyp()) or running
        self._partial = " ".join(self._texts)
        return self._partial, self._end_probability()

    def _end_probability(self) -> float:
        return end_probability(self._lm, self._logmath, self._texts)


def end_probability(lm: Any, logmath: Any, texts: list[str]) -> float:
    """P(the sentence ends here | its last two words) by an `NGramModel`; NaN: not known."""
    # NGramModel.prob takes the word first, then its history, the latest word first.
    history = ["<s>", *texts][:-3:-1]
    if len(history) < 2 or lm.prob(history[:1]) <= logmath.get_zero():
        return math.nan
    return float(logmath.exp(lm.prob(["</s>", *history])))


def words(hypothesis: Any) -> list[str]:
    """The spoken words: no silences, noises or marks of which pronunciation it was."""
    if hypothesis is None:
        return []
    spoken = (word.partition("(")[0] for word in hypothesis.hypstr.split())
    return [word for word in spoken if word and word[0] not in "<[+"]


def _vector(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def _text(vector: list[float]) -> str:
    return ",".join(f"{number:.4f}" for number in vector)


def serve(pipe: Connection, decoding: Decoding) -> None:
    """A worker's life."""
    pipe.send_bytes(PID.pack(os.getpid()))
    while True:
        message = pipe.recv_bytes()
        kind, body = message[:1], message[1:]
        if kind == AUDIO:
            pipe.send_bytes(decoding.hear(body).encode())
        elif kind == CONCLUDE:
            text, end_probability = decoding.conclude()
            pipe.send_bytes(END.pack(end_probability) + text.encode())
        else:
            decoding.reset()
            pipe.send_bytes(b"")


def load(config: dict[str, Any]) -> Any:
    import pocketsphinx

    return pocketsphinx.Decoder(
        hmm=pocketsphinx.get_model_path("en-us/en-us"),
        lm=pocketsphinx.get_model_path("en-us/en-us.lm.bin"),
        dict=pocketsphinx.get_model_path("en-us/cmudict-en-us.dict"),
        loglevel="FATAL",
        **config,
    )


def _fork(pipe_fd: int, control: socket.socket, decoding: Decoding) -> None:
    if os.fork():
        os.close(pipe_fd)
        return
    code = 1
    try:
        control.close()
        with suppress(EOFError, BrokenPipeError, ConnectionResetError):
            serve(Connection(pipe_fd), decoding)
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)  # never back into the nursery's own life


def nursery(control: socket.socket, config: dict[str, Any]) -> None:
    # Told to go by a closed pipe alone: a drain may still need them after Ctrl-C or SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the workers
    decoding = Decoding(load(config))
    os.nice(NICENESS)
    gc.collect()
    gc.freeze()  # a collection would write to pages that all workers share
    gc.disable()
    control.sendall(READY)
    while True:
        order, pipes, _, _ = socket.recv_fds(control, 1, 1)
        if not order:
            break
        _fork(pipes[0], control, decoding)
    with suppress(ChildProcessError):
        os.wait()  # returns by raising, when the last worker is gone


if __name__ == "__main__":
    nursery(socket.socket(fileno=int(sys.argv[1])), json.loads(sys.argv[2]))
