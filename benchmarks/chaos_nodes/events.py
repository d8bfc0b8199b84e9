"""Let nodes of a run fail and come back, one event after the other, and wait each time until the run trains on.

Every wait is for what the run itself records. Must not know how the figures are printed.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from chaos_nodes.network import MOST_NODES, Network
from chaos_nodes.node import ChaosError, Node, Setup
from chaos_nodes.run_history import (
    Recovery,
    caused_by,
    changes_of,
    last_step,
    nodes_that_train,
    recoveries,
)

PATIENCE_SECONDS = 300.0  # for the run to train on after an event
POLL_SECONDS = 0.2
SLOW_STEPS = 12  # that a slow node takes part in
MOST_CAUSED = 2  # restarts by one machine; after the third, the run would exclude it
RETURN = "return"
GIVES_UP = b"cannot be reached any more"
# and how likely each is; isolate: cut off for so long that the agent gives the store up
FAULTS = {"kill": 28, "double": 8, "rank": 14, "stop": 20, "cut": 18, "isolate": 4, "slow": 8}
DOUBLE_SECONDS = 10.0  # by which the second node of "double" is killed later at most: often while the others restart


@dataclass(frozen=True)
class Outcome:
    """What an event did. `seconds`: from the event until the next world has completed a step, without loading."""

    kind: str  # of FAULTS, or RETURN and what the node had suffered
    address: str
    seconds: float | None  # None: the same world trained on
    lost_steps: int
    allowed_steps: int
    recovery: Recovery | None
    restarts: int  # worlds that began because of the event


@dataclass
class Chaos:
    """A run whose nodes fail and come back at random."""

    setup: Setup
    network: Network
    shared: Path
    rng: random.Random
    snapshot_every: int
    replicated: bool  # every node holds the whole state
    ckpt_every: int
    alive: dict[str, Node] = field(default_factory=dict)  # by address: nodes that are in the run
    out: dict[str, tuple[Node, str]] = field(default_factory=dict)  # those that are not, and why
    numbers: Iterator[int] = field(default_factory=lambda: iter(range(1, MOST_NODES)))

    def start(self, nodes: int) -> None:
        """Start the nodes, and wait for the first steps."""
        for _ in range(nodes):
            node = Node(self.setup, self.network, next(self.numbers), self.shared)
            self.alive[node.address] = node
        self._wait(lambda: last_step(self.setup.run) > self.snapshot_every, "the first steps")

    def random_event(self, weights: dict[str, int]) -> list[Outcome]:
        """Let one event happen, or two for a double fault; return what each did. Errors: ChaosError."""
        spare = len(self.alive) - self.setup.fewest
        if self.out and (spare == 0 or self.rng.random() < 0.75):
            return [self.bring_back(self.rng.choice(sorted(self.out)))]
        possible = {kind: weight for kind, weight in weights.items() if spare >= (2 if kind == "double" else 1)}
        (kind,) = self.rng.choices(list(possible), list(possible.values()))
        return self.fault(kind)

    def planned_event(self, kind: str) -> list[Outcome]:
        """Let this event happen: one of FAULTS, or RETURN."""
        return [self.bring_back(next(iter(self.out)))] if kind == RETURN else self.fault(kind)

    def fault(self, kind: str) -> list[Outcome]:
        """Do something to a node of the run, and wait until the run trains on."""
        self._train_for_a_while()
        caused = self._caused()
        # a machine that is about to be excluded is only killed: then another one takes its place
        candidates = [address for address in sorted(self.alive) if caused[address] < MOST_CAUSED]
        if kind not in ("kill", "double", "slow") and not candidates:
            kind = "kill"
        if kind in ("kill", "double", "slow"):
            candidates = sorted(self.alive)
        address = self.rng.choice(candidates)
        return {"slow": self._slow, "double": self._double, "rank": self._kill_rank}.get(kind, self._take_out)(
            kind, address
        )

    def _take_out(self, kind: str, address: str) -> list[Outcome]:
        node = self.alive.pop(address)
        self.out[address] = (node, kind)
        printed = len(node.log.read_bytes())
        action = {"kill": node.lose_power, "stop": node.freeze}.get(kind, node.unplug)
        outcome = self._observe(kind, address, action, self._lost_by_one_node())
        if kind == "isolate":
            self._wait(lambda: GIVES_UP in node.log.read_bytes()[printed:], f"node {address} to give the store up")
        return [outcome]

    def _double(self, kind: str, address: str) -> list[Outcome]:
        """Kill a node, and a second one while the others may be restarting."""
        nodes = [self.alive.pop(address)]
        nodes.append(self.alive.pop(self.rng.choice(sorted(self.alive))))
        later = self.rng.uniform(0.0, DOUBLE_SECONDS)
        for node in nodes:
            self.out[node.address] = (node, "kill")

        def kill_both() -> None:
            nodes[0].lose_power()
            time.sleep(later)  # not to wait for anything: any moment will do
            nodes[1].lose_power()

        # A second copy of each shard is on one other node. If that is lost, too, the newest checkpoint has to do.
        allowed = self._lost_by_one_node() if self.replicated else 2 * self.ckpt_every
        outcome = self._observe(f"{kind}, {later:.1f} s apart", address, kill_both, allowed, later)
        return [outcome, outcome]

    def _kill_rank(self, kind: str, address: str) -> list[Outcome]:
        return [self._observe(kind, address, self.alive[address].kill_rank, self._lost_by_one_node())]

    def _slow(self, kind: str, address: str) -> list[Outcome]:
        """Slow a node down for some steps: the run has to wait for it, and not to leave it behind."""
        node, changes, step = self.alive[address], len(changes_of(self.setup.run)), last_step(self.setup.run)
        node.slow_down()
        try:
            self._wait(lambda: last_step(self.setup.run) >= step + SLOW_STEPS, f"steps with the slow node {address}")
        finally:
            node.speed_up()
        if restarts := len(changes_of(self.setup.run)) - changes:
            self._wait_for_world(1)
        return [Outcome(kind, address, None, 0, 0, None, restarts)]

    def bring_back(self, address: str) -> Outcome:
        """Undo what a node has suffered, and wait until it trains again."""
        self._train_for_a_while()
        node, cause = self.out.pop(address)
        if cause == "kill" and self._caused()[address] > MOST_CAUSED:
            node.close()
            return self._observe(f"{RETURN} after {cause}", address, self._add_machine, 0)
        self.alive[address] = node
        action = {"kill": node.start, "stop": node.thaw}.get(cause, node.plug_in)
        return self._observe(f"{RETURN} after {cause}", address, action, 0)

    def _add_machine(self) -> None:
        node = Node(self.setup, self.network, next(self.numbers), self.shared)
        self.alive[node.address] = node

    # ------------------------------------------------------------ waiting for the run

    def _observe(
        self, kind: str, address: str, action: Callable[[], None], allowed: int, later: float = 0.0
    ) -> Outcome:
        """Do something, wait until the nodes that are left train on, and return what it has cost."""
        before, changes = len(recoveries(self.setup.run)), len(changes_of(self.setup.run))
        step, at = last_step(self.setup.run), time.time() + later
        action()
        found = self._wait_for_world(before + 1)
        last = found[-1]
        # by the records of the run, and by what was seen from outside
        lost = max(step - last.loaded_step, *(recovery.lost_steps for recovery in found[before:]))
        seconds = float(last.times["time"]) - at - last.parts["load"]
        return Outcome(kind, address, seconds, lost, allowed, last, len(changes_of(self.setup.run)) - changes)

    def _wait_for_world(self, fewest_recoveries: int) -> list[Recovery]:
        """Wait until exactly the nodes that are alive have completed a step together; return all recoveries so far."""
        run = self.setup.run

        def trains() -> bool:
            return len(recoveries(run)) >= fewest_recoveries and set(nodes_that_train(run)) == set(self.alive)

        self._wait(trains, f"a step of {', '.join(sorted(self.alive))} together")
        return recoveries(run)

    def _train_for_a_while(self) -> None:
        """Wait for a random number of new steps, so that events hit any part of the time between two snapshots."""
        step = last_step(self.setup.run) + self.rng.randint(1, 2 * self.snapshot_every)
        self._wait(lambda: last_step(self.setup.run) >= step, f"step {step}")

    def _wait(self, holds: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + PATIENCE_SECONDS
        while not holds():
            ended = [node for node in self.alive.values() if node.exit_code is not None]
            if ended:
                raise ChaosError(
                    f"node {ended[0].address} has ended with exit code {ended[0].exit_code}, {self.describe()}"
                )
            if time.monotonic() > end:
                raise ChaosError(f"waited {PATIENCE_SECONDS:.0f} s for {what}, {self.describe()}")
            time.sleep(POLL_SECONDS)

    def describe(self) -> str:
        """Return the end of the output of all nodes."""
        nodes = [*self.alive.values(), *(node for node, _ in self.out.values())]
        return "after step " + "\n".join(
            [str(last_step(self.setup.run)), *(f"--- node {node.address}\n{node.output()}" for node in nodes)]
        )

    def _caused(self) -> Counter[str]:
        """Return how many restarts each address has caused."""
        return Counter(address for change in changes_of(self.setup.run) for address in caused_by(change))

    def _lost_by_one_node(self) -> int:
        # one interval, and the steps during a snapshot, which lasts at most one more interval
        return 2 * self.snapshot_every

    # ------------------------------------------------------------ the end

    def stop(self) -> int:
        """Let the run save and end on all nodes; return its last step. Errors: ChaosError."""
        (self.setup.run / "stop").touch()
        for node in self.alive.values():
            if code := node.wait(PATIENCE_SECONDS):
                raise ChaosError(f"node {node.address} ended with exit code {code}, {self.describe()}")
        return last_step(self.setup.run)

    def close(self) -> None:
        """End all processes."""
        for node in [*self.alive.values(), *(node for node, _ in self.out.values())]:
            node.close()


def names(kinds: str) -> Sequence[str]:
    """Return the kinds of events in a list with commas. Errors: ValueError."""
    found = kinds.split(",")
    if unknown := [kind for kind in found if kind not in (*FAULTS, RETURN)]:
        raise ValueError(f"{unknown[0]!r} is not an event; there are {', '.join((*FAULTS, RETURN))}")
    return found
