"""A process beside the server's, for what would hold up the interpreter's other threads."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEAVE_TIMEOUT_S = 5.0


class Child:
    """`python -m module DESCRIPTOR arguments…`, and the pipe to it, whose other end DESCRIPTOR is.

    A closed pipe is its order to leave, so that it doesn't outlive the server however that ends.
    `shared`: file descriptors that it gets under the same numbers.
    """

    def __init__(self, module: str, *arguments: str, shared: Sequence[int] = ()) -> None:
        self._socket, theirs = socket.socketpair()
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno()), *arguments],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), *shared],
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C is for the server
            )
        self.pid = self._process.pid
        self.pipe = Connection(os.dup(self._socket.fileno()))

    def hang_up(self) -> None:
        """Whoever reads or writes, at either end, finds the pipe closed. For any thread."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Wait until it has left."""
        self.hang_up()
        try:
            self._process.wait(LEAVE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._socket.close()
