"""Tell a store that is gone from a network that is cut, and let a node that was cut off join its run again.

If the store is gone, the ranks of all nodes can still save, and end. If only this node is cut off, its ranks wait for
the others, which train without them: nothing but the end of the ranks and a new start helps. Must not know torch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from tinytrain_dist.launch.agent_state import agent, say

if TYPE_CHECKING:  # importing torchrun takes seconds
    from tinytrain_dist.distributed.torchrun_internals import ElasticRendezvous

PROBE_INTERVAL_SECONDS = 1.0
RETURN_SECONDS = 60.0  # for a cut network to return after the ranks have ended
POLL_SECONDS = 0.05


class LostStore:
    """A store to which the connection of this agent is lost."""

    def __init__(self, rendezvous: ElasticRendezvous, endpoint: str, key: str, value: str) -> None:
        """endpoint: HOST:PORT. key, value: what the store knew of this run; value "" if it has not begun."""
        self._rendezvous = rendezvous
        self._endpoint = endpoint
        self._key, self._value = key, value

    def answers(self) -> bool | None:
        """Return whether the store answers and knows this run; None if nothing answers: the network may be cut."""
        if not self._value or "TINYTRAIN_STOP" in os.environ:
            return False
        return self._rendezvous.is_served_at(self._endpoint, self._key, self._value)

    def report(self, problem: str) -> None:
        """Say what is wrong, as far as this node knows it, and what to do. problem: the first half of a sentence."""
        if self.answers() is False:
            how = "the run saves and ends"
        else:
            how = "this node joins again if only its own network was cut; otherwise the run saves and ends"
        say(
            f"tinytrain: {problem}; {how}. To go on, start `tinytrain store` again, and then the same command on every "
            "node"
        )

    def wait(self, must_wait: Callable[[], bool], seconds: float) -> None:
        """Wait until the store answers, and note that this node joins again then. must_wait: False ends the wait.

        A store that is surely gone is not asked again. One that does not answer is asked for a minute more.
        """
        end = time.monotonic() + seconds
        answer = self.answers()
        while answer is not True and must_wait() and time.monotonic() < end:
            time.sleep(POLL_SECONDS if answer is False else PROBE_INTERVAL_SECONDS)
            answer = answer if answer is False else self.answers()
        # The return of the network may have ended the ranks. Or they have saved, because all nodes had lost the store.
        end = time.monotonic() + RETURN_SECONDS
        while answer is None and time.monotonic() < end:
            time.sleep(PROBE_INTERVAL_SECONDS)
            answer = self.answers()
        if answer:
            say("tinytrain: the store answers again: this node was cut off, and joins again")
            agent.joins_again = True
