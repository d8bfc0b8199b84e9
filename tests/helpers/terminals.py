"""Owns a pseudo-terminal and the program in its foreground, for tests of what a closed terminal does to it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import subprocess
import termios
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.helpers.ranks import TrainingProcess, default_signals


class Terminal(TrainingProcess):
    """A program that leads the session of a terminal; its output goes to a file unless it is to go to the terminal."""

    master: int

    def hang_up(self) -> None:
        """Close the terminal, as a window or a connection that is closed: the kernel sends SIGHUP to the program."""
        os.close(self.master)
        self.master = -1

    def type(self, keys: bytes) -> None:
        """Press keys: b"\\x03" is Ctrl-C."""
        os.write(self.master, keys)


@contextlib.contextmanager
def in_terminal(
    command: Sequence[str | Path],
    cwd: Path,
    log: Path,
    env: Mapping[str, str] | None = None,
    *,
    output_to_terminal: bool = False,
) -> Iterator[Terminal]:
    """Start a program in the foreground of a new terminal; end all its processes on the way out."""
    master, slave = pty.openpty()

    def take_terminal() -> None:
        default_signals()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    with log.open("wb") as file:
        sink = slave if output_to_terminal else file.fileno()
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=cwd,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
            stdin=slave,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
            preexec_fn=take_terminal,
        )
    os.close(slave)
    terminal = Terminal(process, log, list(map(str, command)))
    terminal.master = master
    try:
        yield terminal
    finally:
        terminal.kill()
        if terminal.master >= 0:
            terminal.hang_up()
