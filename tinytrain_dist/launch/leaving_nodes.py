"""Let a node leave an elastic run, for example before a spot instance ends: all save, and the others train on.

The agent gets a signal, and tells the agents of the other nodes through the store. Must not know how a world ends or
begins: `elastic_nodes.py` does that.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING

from tinytrain_dist.launch.agent_signals import forward_signal
from tinytrain_dist.launch.agent_state import agent, exit_now, rank_pids, say
from tinytrain_dist.reliability.stop_requests import handle_unless_ignored

if TYPE_CHECKING:  # importing torchrun takes seconds
    from tinytrain_dist.distributed.torchrun_internals import ElasticRendezvous, Node

LEAVE_SIGNAL = signal.SIGUSR2


def handle_leave_signals() -> None:
    """Let SIGUSR2, and SIGTERM if TINYTRAIN_LEAVE_ON_SIGTERM is set, take this node out of the run."""
    numbers = [LEAVE_SIGNAL, signal.SIGTERM] if "TINYTRAIN_LEAVE_ON_SIGTERM" in os.environ else [LEAVE_SIGNAL]
    handle_unless_ignored(numbers, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    if agent.leaves or "TINYTRAIN_STOP" in os.environ:
        if number != LEAVE_SIGNAL:
            forward_signal(number, frame)
        return
    agent.leaves = True
    say(f"tinytrain: {signal.Signals(number).name}: this node leaves the run, after all have saved")
    if not any(rank_pids()):
        exit_now(0)  # it waits for other nodes, so that there is nothing to save


def leaving_nodes(rendezvous: ElasticRendezvous, number: int, world: Sequence[Node]) -> list[Node]:
    """Return the nodes of a world that were asked to leave, in the order of their ranks.

    number: of the world. If this node is one of them, it tells the others.
    """
    note = f"leaving.{number}"  # one note for all nodes, so that an agent reads one value a second and not one per node
    if agent.leaves:
        rendezvous.write(_key(number, rendezvous.own), "1")
        rendezvous.write(note, "1")
    if not rendezvous.read(note):
        return []
    return [node for node in world if rendezvous.read(_key(number, node))]


def _key(number: int, node: Node) -> str:
    return f"leaving.{number}.{node.address}.{node.pid}"
