"""Let the nodes of a run come and go: notice that one is lost or has joined, and begin a new world without or with it.

torchrun keeps the list of nodes in a store, and each agent writes there every second that it lives. By itself an agent
reacts to a failed rank and to a node that joins. This module adds

- a node that is silent: its agent does not write any more, because of a power loss, a cut network or SIGSTOP
- the saving of all ranks before a larger world begins, or before a node leaves that was asked to
- spares: nodes that the configuration cannot use
- the history of all changes with their reasons, and the exclusion of a node that fails repeatedly

Must not know what ranks compute.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed.network import StoreLostError
from tinytrain_dist.distributed.spares import describe_spares, usable_ranks
from tinytrain_dist.launch.agent_state import RankDeath, RunOverError, agent, rank_pids, say
from tinytrain_dist.launch.leaving_nodes import leaving_nodes
from tinytrain_dist.launch.lost_store import LostStore
from tinytrain_dist.launch.standby_pool import StandbyPool
from tinytrain_dist.reliability.restart_history import append_change, read_changes, why_excluded
from tinytrain_dist.reliability.run_state import has_saved_and_ended
from tinytrain_dist.reliability.world import forget_progress, read_progress, regroup_note, stop_note
from tinytrain_dist.utils.json_files import parse_json, to_json
from tinytrain_dist.utils.text import format_list

if TYPE_CHECKING:  # importing torchrun takes seconds
    from tinytrain_dist.distributed.torchrun_internals import ElasticRendezvous, Node, RendezvousState

LAST_CALL_SECONDS = 2.0  # for more survivors to arrive, once there are enough of them
SAVE_SECONDS = 600.0  # for the ranks to save before nodes join or leave
LEFT_SECONDS = 10.0  # for the ranks to fail or to end by themselves after a node has left the world
POLL_SECONDS = 0.05
LOST, LEFT, LEAVES, JOINED = "lost", "left", "leaves", "joined"
ALL_LEAVE, STORE_LOST = "all leave", "store lost"  # the run ends
SESSION_KEY = "session"  # of the value that all nodes of a run share, from its first world until it has ended


@dataclass(frozen=True)
class Regroup:
    """Why the present world ends: how nodes changed, a sentence about it, and when it was noticed."""

    kind: str  # LOST: ranks cannot save any more. LEFT: they fail or have saved. Otherwise: they are to save
    reason: str
    noticed: float = field(default_factory=time.time)


class ElasticNodes:
    """The part of an agent that follows the nodes of its run; it implements `RendezvousHooks`."""

    def __init__(
        self, config: TrainingConfig, ranks_per_node: int, folder_note: Path, endpoint: str, standbys: StandbyPool
    ) -> None:
        """Prepare for the first world. folder_note: TINYTRAIN_AGENT. endpoint: HOST:PORT. standbys: of this node."""
        self._endpoint = endpoint
        self._standbys = standbys
        self._config = config
        self._ranks_per_node = ranks_per_node
        self._folder_note = folder_note
        self._run = Path(config.target_dir)
        self._world: tuple[Node, ...] = ()
        self._round = -1
        self._session = ""
        self._regroup: Regroup | None = None
        self._missing: frozenset[Node] = frozenset()  # at the last look
        self._left_at = 0.0  # when this node left its last world
        self._progress: tuple[int, float] | None = None  # the newest completed step that this node knows, and its time
        self._rendezvous: ElasticRendezvous | None = None
        self._lost_store: LostStore | None = None
        self._spares_told: frozenset[Node] = frozenset()
        self._is_new = False  # this node joined after the run began, and is in its first world
        self._has_new = False  # another node has, without any other change

    # ------------------------------------------------------------ between two worlds

    def before_round(self, rendezvous: ElasticRendezvous) -> None:
        """Leave the present world, or enter for the first time.

        Errors: RunOverError if this node is excluded, or was asked to leave the run.
        """
        self._rendezvous = rendezvous
        rendezvous.limit_silence(self._endpoint)
        if self._world:
            rendezvous.shorten_last_call(LAST_CALL_SECONDS)
            self._regroup = self._regroup or Regroup(LEFT, "")
            self._progress = read_progress(self._folder_note) or self._progress
            failure = {"own": agent.own_failure, "text": self._regroup.reason or agent.own_failure, "time": time.time()}
            rendezvous.write(_failure_key(self._round, rendezvous.own), to_json(failure))
            if agent.leaves:
                _leave_run(rendezvous)
        else:
            self._enter(rendezvous)
        regroup_note(self._folder_note).unlink(missing_ok=True)
        self._left_at = time.time()

    def _enter(self, rendezvous: ElasticRendezvous) -> None:
        _reopen(rendezvous)
        session = rendezvous.read(SESSION_KEY)
        if session:
            _end_if_excluded(rendezvous, self._run, session)
        if session or rendezvous.state.complete:  # not complete: between two worlds
            rendezvous.shorten_last_call(LAST_CALL_SECONDS)
            self._is_new = True

    def all_have_joined(self, rendezvous: ElasticRendezvous) -> bool:
        """Return whether the next world need not wait for more nodes. A new node does not know who may come."""
        return bool(self._world) and not _may_come(rendezvous, self._round, self._world)

    def after_round(self, rendezvous: ElasticRendezvous) -> None:
        """Take note of the new world, and tell its ranks; one survivor writes the history."""
        state, now = rendezvous.state, time.time()
        before, former_round = self._world, self._round
        self._world, self._round = state.nodes, state.round
        self._session = self._session or rendezvous.write_once(SESSION_KEY, secrets.token_hex(8))
        survivors = sorted(set(before) & set(state.nodes))
        self._is_new = self._is_new and not before
        # a node that was cut off has missed a round, and does not know what has happened
        has_missed_none = former_round + rendezvous.failed_rounds + 1 == state.round
        if survivors and survivors[0] == rendezvous.own and has_missed_none:
            self._record(rendezvous, before, former_round, now)
        world = {"session": self._session, "round": state.round, "ready": now, "fewest_nodes": rendezvous.fewest_nodes}
        os.environ["TINYTRAIN_WORLD"] = to_json(world)
        if state.nodes[0] == rendezvous.own:
            _tell_nodes(state.nodes, self._config, self._ranks_per_node)
        self._has_new = bool(before) and set(before) < set(state.nodes)
        forget_progress(self._folder_note)
        self._regroup = None
        self._missing = self._spares_told = frozenset()
        agent.own_failure = ""

    def _record(self, rendezvous: ElasticRendezvous, before: Sequence[Node], former_round: int, now: float) -> None:
        assert self._regroup is not None, "this node was in the world before"
        state = rendezvous.state
        mistake = self._regroup.reason if self._has_new else ""
        found = _compare_worlds(rendezvous, former_round, before, mistake)
        step, _ = read_progress(self._folder_note) or (None, 0.0)
        # a world that ends before it has completed a step adds its time to that of the change before
        trained_until, idle_since = self._progress or (None, self._regroup.noticed)
        change: dict[str, Any] = {
            **found,
            "session": self._session,
            "round": self._round,
            "time": now,
            "step": step,
            "trained_until": trained_until,
            "nodes": [node.address for node in state.nodes],
            "idle_since": idle_since,
            "detection_seconds": max(0.0, self._regroup.noticed - idle_since),
            "stop_seconds": self._left_at - self._regroup.noticed,
            "rendezvous_seconds": now - self._left_at,
        }
        append_change(self._run, change)
        say(f"tinytrain: {found['reason']}; after step {step}, {len(before)} -> {len(state.nodes)} node(s)")

    # ------------------------------------------------------------ while ranks run

    def must_regroup(self, rendezvous: ElasticRendezvous) -> bool:
        """Return whether the present world has to end: a node is lost, has left, is to leave or waits to join."""
        regroup = self._look(rendezvous)
        if regroup is not None:
            self._regroup = regroup
            say(f"tinytrain: {regroup.reason}")
        elif "TINYTRAIN_STOP" not in os.environ:
            self._standbys.refill(read_progress(self._folder_note) is not None)
        return regroup is not None

    def _look(self, rendezvous: ElasticRendezvous) -> Regroup | None:
        state = rendezvous.state
        has_ended = read_progress(self._folder_note) is not None and has_saved_and_ended(self._run)
        if state.closed or has_ended:
            return None
        if rendezvous.own not in state.nodes:
            return Regroup(LOST, f"this node, {rendezvous.own.address}, was silent and the others train without it")
        missing = frozenset(node for node in self._used_nodes() if node not in state.nodes)
        left = missing & set(state.waiting)
        lost = (missing - left) & self._missing  # a node that changes worlds is missing for a moment
        self._missing = missing
        if lost:
            return Regroup(LOST, f"node {format_list(sorted(node.address for node in lost))} was lost")
        if left:
            return Regroup(LEFT, f"node {format_list(sorted(node.address for node in left))} has left the world")
        return self._leaving(rendezvous) or self._joining(state)

    def _used_nodes(self) -> tuple[Node, ...]:
        """Return the nodes of the present world that have a rank which is no spare."""
        used = usable_ranks(self._config, len(self._world) * self._ranks_per_node, self._ranks_per_node)
        return self._world[: -(-used // self._ranks_per_node)]

    def _leaving(self, rendezvous: ElasticRendezvous) -> Regroup | None:
        """Return the request to go on without nodes that were asked to leave. Without a spare, nothing changes."""
        used = self._used_nodes()
        leaving = [node for node in leaving_nodes(rendezvous, self._round, self._world) if node in used]
        if "TINYTRAIN_STOP" in os.environ:
            return None
        if set(leaving) == set(used):
            return Regroup(ALL_LEAVE, "all nodes were asked to leave")
        if leaving:
            addresses = format_list([node.address for node in leaving])
            return Regroup(LEAVES, f"node {addresses} leaves after the next save")
        return Regroup(LEAVES, "this node is a spare, and leaves") if agent.leaves else None

    def _joining(self, state: RendezvousState) -> Regroup | None:
        """Return the request for a larger world, if nodes wait that it can use and this one has completed a step."""
        if not state.waiting or "TINYTRAIN_STOP" in os.environ:
            return None
        per_node = self._ranks_per_node
        now = usable_ranks(self._config, len(state.nodes) * per_node, per_node)
        then = usable_ranks(self._config, (len(state.nodes) + len(state.waiting)) * per_node, per_node)
        addresses = format_list([node.address for node in state.waiting])
        if then <= now:
            if self._spares_told != frozenset(state.waiting):
                say(f"tinytrain: node {addresses} waits as a spare: more than {now} rank(s) would not shorten a step")
            self._spares_told = frozenset(state.waiting)
            return None
        if read_progress(self._folder_note) is None:
            return None
        return Regroup(JOINED, f"node {addresses} joins after the next save")

    # ------------------------------------------------------------ the end of the ranks of a world

    def store_is_lost(self, rendezvous: ElasticRendezvous) -> NoReturn:
        """Let the ranks save, because without the store no change of nodes can be noticed. Errors: RunOverError.

        If only the network of this node is cut, its ranks cannot save. When it is connected again, it joins again.
        """
        rendezvous.leave_open()
        self._regroup = Regroup(STORE_LOST, f"the store at {self._endpoint} cannot be reached any more")
        self._lost_store = LostStore(rendezvous, self._endpoint, SESSION_KEY, self._session)
        self._lost_store.report(self._regroup.reason)
        if not any(rank_pids()):
            self._lost_store.wait(lambda: True, SAVE_SECONDS)
        raise RunOverError(RankDeath("", 0))

    def forgives_mistake(self) -> bool:
        """Return whether this node trains on although all ranks report a mistake of the user, as after any failure.

        If a node has just joined, the mistake is probably its own: other settings, no data. It leaves, and the others
        train on without it.
        """
        if read_progress(self._folder_note) is not None:
            return False
        if self._is_new and self._rendezvous is not None:
            self._rendezvous.leave_open()
        if self._has_new:
            self._regroup = Regroup(LEFT, agent.own_failure)
            agent.own_failure = ""  # this node is not to blame
        return self._has_new

    def changes_world(self, failed: bool) -> bool:
        """Return whether the ranks end because another world is to begin. failed: one of them has failed."""
        if failed and self._regroup is None:
            self._regroup = Regroup(LEFT, "")
        return self._regroup is not None

    def end_ranks(self, pids: Sequence[int], any_alive: Callable[[], bool]) -> None:
        """Let the ranks end before this world does: they save, or fail because another node has left.

        any_alive: a function that returns whether one of them still runs. Ranks that do not end in time, or cannot
        because a node was lost meanwhile, are killed by the caller.
        """
        regroup = self._regroup
        if regroup is None or regroup.kind == LOST:
            return
        if regroup.kind in (ALL_LEAVE, STORE_LOST):
            stop_note(self._folder_note).write_text(regroup.reason, encoding="utf-8")
        else:
            regroup_note(self._folder_note).touch()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        if self._lost_store is not None:
            self._lost_store.wait(any_alive, SAVE_SECONDS)
            return
        looks = True
        end = time.monotonic() + (LEFT_SECONDS if regroup.kind == LEFT else SAVE_SECONDS)
        next_look = time.monotonic() + 1.0
        while any_alive() and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
            if looks and time.monotonic() > next_look:
                next_look = time.monotonic() + 1.0
                try:
                    found = self._look_again()
                except StoreLostError:
                    looks = False  # the ranks save; what comes next finds out
                    continue
                if found is not None and found.kind == LOST:
                    self._regroup = found
                    return

    def _look_again(self) -> Regroup | None:
        assert self._rendezvous is not None, "ranks run"
        self._rendezvous.refresh()
        return self._look(self._rendezvous)


def _tell_nodes(nodes: Sequence[Node], config: TrainingConfig, ranks_per_node: int) -> None:
    say(f"tinytrain: {len(nodes)} node(s) train: {format_list([node.address for node in nodes])}")
    if spares := describe_spares(config, len(nodes) * ranks_per_node, ranks_per_node):
        say(f"tinytrain: {spares}")


def _reopen(rendezvous: ElasticRendezvous) -> None:
    told = False
    while not rendezvous.reopen(forget=SESSION_KEY):
        if not told:
            say("tinytrain: waiting until all nodes of the run that has just ended are gone")
        told = True
        time.sleep(1.0)


def _may_come(rendezvous: ElasticRendezvous, former_round: int, before: Sequence[Node]) -> bool:
    """Return whether another node is about to join: one that waits, or has left the former world, but not the run.

    before: the nodes of the former world. If one of them was lost since it has left, the last call ends the waiting.
    """
    state = rendezvous.state
    leaving = leaving_nodes(rendezvous, former_round, before)
    absent = [node for node in before if node not in state.nodes and node not in leaving]
    return bool(state.waiting) or any(rendezvous.read(_failure_key(former_round, node)) for node in absent)


def _end_if_excluded(rendezvous: ElasticRendezvous, run: Path, session: str) -> None:
    address = rendezvous.own.address
    if reason := why_excluded(read_changes(run), session, address):
        rendezvous.leave_open()
        change = {"kind": "excluded", "session": session, "time": time.time(), "reason": reason, "node": address}
        append_change(run, change)
        raise RunOverError(RankDeath(reason, 1))


def _leave_run(rendezvous: ElasticRendezvous) -> NoReturn:
    rendezvous.exit_round()
    rendezvous.leave_open()
    say("tinytrain: this node has left the run")
    raise RunOverError(RankDeath("", 0))


def _compare_worlds(
    rendezvous: ElasticRendezvous, former_round: int, before: Sequence[Node], mistake: str
) -> dict[str, Any]:
    """Return what has happened to the nodes between two worlds, and the reason, as the history of restarts has it.

    before: the nodes of the former world. mistake: of the user, for which a node has just left; "" if there is none.
    """
    state = rendezvous.state
    reports = {node: _read_failure(rendezvous, former_round, node) for node in before}
    failed = [node.address for node in before if reports[node].get("own")]
    alive = {*state.nodes, *state.waiting}
    left = [node.address for node in leaving_nodes(rendezvous, former_round, before)]
    lost = [node.address for node in before if node not in alive and node.address not in left]
    joined = [node.address for node in state.nodes if node not in before]
    causes = sorted((float(report["time"]), str(report["own"])) for report in reports.values() if report.get("own"))
    texts = [str(report["text"]) for report in reports.values() if report.get("text")]
    if causes:
        kind, reason = "failed", causes[0][1]
    elif lost:
        how = f"has left: {mistake}" if mistake else "was lost"
        kind, reason = "lost", f"node {format_list(lost)} {how}"
    elif left:
        kind, reason = "left", f"node {format_list(left)} was asked to leave"
    elif joined:
        kind, reason = "joined", f"node {format_list(joined)} joined"
    else:
        kind, reason = "failed", (texts or ["a rank failed"])[0]
    all_failed = len(before) > 1 and len(failed) == len(before)
    lists = {"failed": failed, "lost": lost, "left": left, "joined": joined}
    return {"kind": kind, "reason": reason, **lists, "all_failed": all_failed}


def _failure_key(number: int, node: Node) -> str:
    return f"left.{number}.{node.address}.{node.pid}"


def _read_failure(rendezvous: ElasticRendezvous, number: int, node: Node) -> dict[str, Any]:
    text = rendezvous.read(_failure_key(number, node))
    report: dict[str, Any] = parse_json(text) if text else {}
    return report
