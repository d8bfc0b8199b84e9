"""Act on a signal although the main thread is in native code, where Python's signal handlers do not run.

torch waits there for the head of a run, up to ten minutes. Must not know what the program does.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Collection

HANDLER_SECONDS = 2.0  # for the handler in the main thread to run


def call_if_not_handled(
    numbers: Collection[signal.Signals], handled: Callable[[], bool], act: Callable[[], None]
) -> None:
    """Call `act` in a thread if one of the signals arrives and its handler has not run after two seconds.

    handled: whether the handler of a signal has run.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)  # as set_wakeup_fd demands
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)

    def watch() -> None:
        while received := os.read(read_end, 1):  # Python writes the number of each signal when it arrives
            if received[0] in numbers:
                time.sleep(HANDLER_SECONDS)
                if not handled():
                    act()

    threading.Thread(target=watch, name="blocked signals", daemon=True).start()
