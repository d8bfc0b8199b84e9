"""Call functions that a fault may block for ever."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

TIMEOUT_SECONDS = 60.0  # after which a call counts as hanging; a test that passes never waits that long


def call_in_time(function: Callable[..., Any], *args: Any) -> Any:
    """Return the result of a call in another thread, so that a call that hangs fails the test."""
    answer: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue()

    def call() -> None:
        try:
            answer.put((function(*args), None))
        except BaseException as error:
            answer.put((None, error))

    threading.Thread(target=call, daemon=True).start()
    result, error = answer.get(timeout=TIMEOUT_SECONDS)
    if error is not None:
        raise error
    return result
