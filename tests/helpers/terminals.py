"""Run a program in a pseudo-terminal, to test what happens when the terminal is closed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import subprocess
import termios
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.helpers.ranks import TrainingProcess, default_signals


class Terminal(TrainingProcess):
    """A program that leads the session of a terminal. Its output goes to a file, or to the terminal if asked."""

    master: int
    reader: threading.Thread | None = None  # copies what the terminal shows to the log
    closing = False

    def hang_up(self) -> None:
        """Close the terminal, like closing a window: the kernel sends SIGHUP to the program."""
        self.closing = True
        if self.reader is not None:
            self.reader.join()  # a read in progress would keep the terminal open
        os.close(self.master)
        self.master = -1

    def show(self) -> None:
        """Copy what the terminal shows to the log until it is closed. Runs in a thread."""
        with self.log.open("ab", buffering=0) as log:
            while not self.closing:
                if select.select([self.master], [], [], 0.05)[0]:
                    try:
                        log.write(os.read(self.master, 65536))
                    except OSError:  # the program has ended
                        return

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
    if output_to_terminal:
        terminal.reader = threading.Thread(target=terminal.show, daemon=True)
        terminal.reader.start()
    try:
        yield terminal
    finally:
        terminal.kill()
        if terminal.master >= 0:
            terminal.hang_up()
