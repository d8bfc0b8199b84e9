"""End a command quietly after Ctrl-C, also while Python still imports what the command needs.

Must be quick to import, because it cannot act before.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

EXIT_CODE = 130  # as shells report it
MESSAGE = "interrupted"


def end_quietly_on_interrupt() -> None:
    """Let Ctrl-C end this process at once, with one line. For moments in which there is nothing to clean up."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not if it is ignored, as by nohup
        signal.signal(signal.SIGINT, _end)


def raise_on_interrupt() -> None:
    """Undo `end_quietly_on_interrupt`: Ctrl-C raises KeyboardInterrupt again, so that a command can clean up."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, _: FrameType | None) -> None:
    try:
        os.write(2, f"{MESSAGE}\n".encode())
    finally:
        os._exit(EXIT_CODE)
