"""Keep processes of this node ready to become ranks, so that a new world need not wait until each has imported torch.

Only for runs whose nodes may come and go. Must not know how nodes find each other, or torch: the agent starts the
first standby before it imports torch itself.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.launch.agent_state import agent
from tinytrain_dist.launch.settings_check import training_arguments
from tinytrain_dist.utils.json_files import to_json

MODULE = "tinytrain_dist.launch.standby_rank"
THREADS = "OMP_NUM_THREADS"
START_SECONDS = 20.0  # for ranks to start, if they do not train
HAND_OVER_SECONDS = 10.0  # for a standby to take a large environment while it still imports
# What is imported until the first step of a run, some of it only when it is needed.
IMPORTS = (
    "tinytrain_dist.launch.rank_program",
    "tinytrain_dist.training.trainer",
    "tinytrain_dist.training.build",
    "tyro",
    "tinytrain_dist.metrics.trackers.tensorboard",
)
SHARDED_IMPORTS = ("torch.distributed.fsdp", "torch._dynamo", "tinytrain_dist.parallel.fsdp_collectives")
COMPILER_IMPORTS = ("torch._dynamo", "torch._inductor.compile_fx")


def imports_of(config: TrainingConfig) -> list[str]:
    """Return the modules that a standby imports for a run. None depends on the number of ranks."""
    modules = [*IMPORTS]
    if config.parallel in ("auto", "fsdp", "hsdp"):
        modules += SHARDED_IMPORTS
    if config.compile:
        modules += COMPILER_IMPORTS
    return modules


@dataclass(frozen=True)
class Standby:
    """A process that waits for a rank, and the connection through which it gets one."""

    process: subprocess.Popen[bytes]
    connection: socket.socket

    def end(self) -> None:
        """Kill the process, if it still runs."""
        self.connection.close()
        self.process.kill()
        self.process.wait()
        agent.standbys.discard(self.process.pid)


class StandbyPool:
    """The standbys of this node: as many as it has ranks."""

    def __init__(self, config: TrainingConfig) -> None:
        """Begin without any. config: of the run, for what its ranks import."""
        self._size = 0
        self._taken_at = 0.0  # when the last one became a rank, by time.monotonic()
        self._has_failed = False
        self._modules = imports_of(config)
        self._waiting: list[Standby] = []

    def fill(self, size: int) -> None:
        """Start standbys until there are `size`. They need seconds to get ready; this does not wait for them.

        If one has failed, no other one is started: it would fail as well.
        """
        self._size = size
        self._has_failed = self._has_failed or any(standby.process.poll() is not None for standby in self._waiting)
        while len(self._waiting) < self._size and not self._has_failed:
            self._waiting.append(self._start())

    def refill(self, ranks_train: bool) -> None:
        """Start the standbys that are missing, unless the ranks that took their places still need the processors.

        ranks_train: whether they have completed a step. Spares never do, and ranks that compile not for minutes.
        """
        if ranks_train or time.monotonic() - self._taken_at > START_SECONDS:
            self.fill(self._size)

    def _start(self) -> Standby:
        own, other = socket.socketpair()
        own.settimeout(HAND_OVER_SECONDS)
        with other:
            process = subprocess.Popen(
                [sys.executable, "-P", "-u", "-m", MODULE, *self._modules],
                env={**os.environ, "TINYTRAIN_STANDBY": str(other.fileno())},
                pass_fds=[other.fileno()],
                start_new_session=True,  # as torchrun starts ranks
            )
        agent.standbys.add(process.pid)
        return Standby(process, own)

    def take(self, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes] | None:
        """Let a standby become the rank that torchrun would start with this command and this environment.

        None: there is no standby, or the command is not that of our training program alone, or the rank is to have
        another number of threads, which is fixed when torch is imported.
        """
        arguments = training_arguments([*command[1:]]) if command[0] == sys.executable else None
        same_threads = environment.get(THREADS) == os.environ.get(THREADS)
        while self._waiting and same_threads and arguments is not None:
            standby = self._waiting.pop(0)
            order = to_json({"arguments": arguments, "environment": dict(environment)})
            try:
                standby.connection.sendall(order.encode())
                standby.connection.close()
            except OSError:  # it has ended, or does not read
                standby.end()
                continue
            self._taken_at = time.monotonic()
            agent.standbys.discard(standby.process.pid)
            agent.called_up[standby.process.pid] = [f"{name}={value}" for name, value in environment.items()]
            while len(agent.called_up) > self._size:
                del agent.called_up[next(iter(agent.called_up))]  # of an earlier world
            return standby.process
        return None

    def close(self) -> None:
        """End all standbys."""
        while self._waiting:
            self._waiting.pop().end()
