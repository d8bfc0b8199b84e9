"""Keep a program running when its output cannot be written: a full disk, a closed terminal, a reader that is gone.

Must not know what is printed. A program calls `keep_output_from_failing` first. What cannot be written is dropped.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, TextIO, cast

OnLoss = Callable[[str], None]


def print_line(text: str) -> None:
    """Print a line and flush, so that it is seen at once also in a file."""
    print(text, flush=True)


class TolerantStream:
    """A text stream whose writes never fail: what cannot be written is dropped.

    Everything but `write`, `writelines` and `flush` is the wrapped stream's own.
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        """name: what the stream is called in a message, such as "stdout"."""
        self._stream = stream
        self._name = name
        self._on_loss: OnLoss | None = None
        self.loss = ""  # a sentence on the first failure

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text, or drop it; return its length in both cases."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            self._note_loss(error)
            return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write texts one after the other."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush what was written, or drop it."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._note_loss(error)

    def call_on_loss(self, on_loss: OnLoss) -> None:
        """Call `on_loss` with a sentence, once: when output is lost for the first time, or now if it has been lost."""
        if self.loss:
            on_loss(self.loss)
        else:
            self._on_loss = on_loss

    def _note_loss(self, error: Exception) -> None:
        if self.loss:
            return
        reason = error.strerror if isinstance(error, OSError) else error
        self.loss = f"{self._name} cannot be written ({reason}); what cannot be written there is dropped"
        if self._on_loss is not None:
            self._on_loss(self.loss)


def keep_output_from_failing(*names: str) -> None:
    """Make stdout and stderr drop what they cannot write. names: only these of "stdout" and "stderr".

    A character that the terminal does not have is written as "?". A stream that was closed when the program was started
    is replaced by the null device, because the next file that the program opens would otherwise take its place and get
    what native libraries print.
    """
    _open_closed_descriptors()
    for name in names or ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, TolerantStream):
            continue
        if stream is None:
            descriptor = 1 if name == "stdout" else 2
            stream = open(descriptor, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - as long as the program
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
        setattr(sys, name, cast(TextIO, TolerantStream(stream, name)))


def call_on_lost_output(on_loss: OnLoss) -> None:
    """Call `on_loss` with a sentence when stdout or stderr loses output for the first time; at most once for each."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TolerantStream):
            stream.call_on_loss(on_loss)


def _open_closed_descriptors() -> None:
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this descriptor
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
            os.set_inheritable(descriptor, True)
