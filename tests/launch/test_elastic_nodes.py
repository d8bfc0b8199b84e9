"""An agent of an elastic run: what it notices about other nodes, and what it does then."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import (
    AGENT,
    TrainingProcess,
    descendants,
    living_processes,
    standbys,
    training_process,
)
from tests.helpers.training import Run, config_file, settings_for
from tests.launch.test_elastic_agent import wait_until
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed.torchrun_internals import ElasticRendezvous, Node, RendezvousState, serve_store
from tinytrain_dist.launch import agent_state
from tinytrain_dist.launch.agent_state import RunOverError
from tinytrain_dist.launch.elastic_nodes import (
    ALL_LEAVE,
    JOINED,
    LAST_CALL_SECONDS,
    LEAVES,
    LEFT,
    LOST,
    ElasticNodes,
)
from tinytrain_dist.launch.standby_pool import StandbyPool
from tinytrain_dist.launch.start import ELASTIC_RENDEZVOUS
from tinytrain_dist.reliability.heartbeats import read_heartbeats
from tinytrain_dist.reliability.restart_history import append_change, read_changes
from tinytrain_dist.reliability.world import REGROUP_REASON, ProgressMark, main_reason

ONE, TWO, THREE = Node("node1", 11), Node("node2", 12), Node("node3", 13)


class Rendezvous:
    """What an agent sees of torchrun's rendezvous, set by a test."""

    fewest_nodes = 1

    failed_rounds = 0
    last_call = 30.0

    def __init__(self, *nodes: Node) -> None:
        self.own = nodes[0]
        self.values: dict[str, str] = {}
        self.state = RendezvousState(1, False, False, nodes, ())

    def see(self, number: int, nodes: tuple[Node, ...], waiting: tuple[Node, ...] = (), closed: bool = False) -> None:
        self.state = RendezvousState(number, True, closed, nodes, waiting)

    def refresh(self) -> None: ...

    def exit_round(self) -> None: ...

    def leave_open(self) -> None: ...

    def limit_silence(self, endpoint: str) -> None: ...

    def shorten_last_call(self, seconds: float) -> None:
        self.last_call = seconds

    def reopen(self, forget: str) -> bool:
        return True

    def write(self, key: str, value: str) -> None:
        self.values[key] = value

    def read(self, key: str) -> str:
        return self.values.get(key, "")

    def write_once(self, key: str, value: str) -> str:
        return self.values.setdefault(key, value)


@pytest.fixture
def agent_of_node1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Rendezvous]:
    """The agent of node 1 in a world of three nodes, of which the batch can use two."""
    monkeypatch.setenv("TINYTRAIN_WORLD", "")
    monkeypatch.setenv("TINYTRAIN_AGENT", str(tmp_path / "note"))
    monkeypatch.delenv("TINYTRAIN_STOP", raising=False)
    config = TrainingConfig(**settings_for(tmp_path, "run", parallel="ddp", micro_batch_size=4))
    rendezvous = Rendezvous(ONE, TWO, THREE)
    nodes = ElasticNodes(config, 1, tmp_path / "note", "store:1", StandbyPool(config))
    nodes.before_round(rendezvous)  # type: ignore[arg-type]
    nodes.after_round(rendezvous)  # type: ignore[arg-type]
    return nodes, rendezvous


def noticed(nodes: Any, rendezvous: Rendezvous) -> str | None:
    return nodes._regroup.kind if nodes.must_regroup(rendezvous) else None


def test_a_silent_node_ends_the_world_unless_it_is_a_spare(agent_of_node1: tuple[Any, Rendezvous]) -> None:
    nodes, rendezvous = agent_of_node1
    assert noticed(nodes, rendezvous) is None
    rendezvous.see(1, (ONE, TWO))
    assert [noticed(nodes, rendezvous) for _ in range(3)] == [None] * 3, "node 3 was a spare"
    rendezvous.see(1, (ONE, THREE), waiting=(TWO,))
    assert noticed(nodes, rendezvous) == LEFT
    rendezvous.see(1, (ONE, THREE))
    assert noticed(nodes, rendezvous) == LOST, "and missing twice in a row"


def test_a_node_that_was_cut_off_notices_it(agent_of_node1: tuple[Any, Rendezvous]) -> None:
    nodes, rendezvous = agent_of_node1
    rendezvous.see(2, (TWO, THREE))
    assert noticed(nodes, rendezvous) == LOST
    rendezvous.see(2, (TWO, THREE), closed=True)
    assert noticed(nodes, rendezvous) is None, "the run has ended"


def test_a_node_joins_when_it_is_of_use_and_a_step_is_complete(
    agent_of_node1: tuple[Any, Rendezvous], monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes, rendezvous = agent_of_node1
    mark = ProgressMark()
    mark.set(5)
    rendezvous.see(1, (ONE, TWO, THREE), waiting=(Node("node4", 14),))
    assert noticed(nodes, rendezvous) is None, "two ranks are the most that can be used"

    rendezvous.see(2, (ONE,))
    nodes.before_round(rendezvous)
    nodes.after_round(rendezvous)
    rendezvous.see(2, (ONE,), waiting=(TWO,))
    assert noticed(nodes, rendezvous) is None, "this world has not completed a step"
    mark = ProgressMark()
    mark.set(6)
    monkeypatch.setenv("TINYTRAIN_STOP", "SIGTERM")
    assert noticed(nodes, rendezvous) is None, "the run is about to stop"
    monkeypatch.delenv("TINYTRAIN_STOP")
    assert noticed(nodes, rendezvous) == JOINED


def test_one_survivor_writes_why_the_world_ended(agent_of_node1: tuple[Any, Rendezvous], tmp_path: Path) -> None:
    nodes, rendezvous = agent_of_node1
    ProgressMark().set(7)
    rendezvous.see(1, (ONE, THREE))
    assert [nodes.must_regroup(rendezvous) for _ in range(2)] == [False, True]
    rendezvous.write("left.1.node3.13", json.dumps({"own": "", "text": "", "time": 1.0}))
    nodes.before_round(rendezvous)
    rendezvous.see(2, (ONE, THREE))
    nodes.after_round(rendezvous)
    (change,) = read_changes(tmp_path / "run")
    named = {name: change[name] for name in ("kind", "reason", "step", "lost", "failed", "joined", "all_failed")}
    reason = "node node2 was lost"
    assert named == {
        "kind": "lost",
        "reason": reason,
        "step": 7,
        "lost": ["node2"],
        "failed": [],
        "joined": [],
        "all_failed": False,
    }
    rendezvous.own = THREE
    nodes.before_round(rendezvous)
    rendezvous.see(3, (ONE, THREE))
    nodes.after_round(rendezvous)
    assert len(read_changes(tmp_path / "run")) == 1, "node 1 writes, and not every survivor"


def test_a_node_that_was_asked_to_leave_is_told_to_the_others_and_is_no_failure(
    agent_of_node1: tuple[Any, Rendezvous], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes, rendezvous = agent_of_node1
    monkeypatch.setattr(agent_state.agent, "leaves", False)
    rendezvous.see(1, (ONE, TWO, THREE))
    for node in (THREE, TWO):  # as their agents write it
        rendezvous.write(f"leaving.1.{node.address}.{node.pid}", "1")
        rendezvous.write("leaving.1", "1")
        assert noticed(nodes, rendezvous) == (LEAVES if node == TWO else None), "node 3 is a spare"
    nodes.before_round(rendezvous)
    rendezvous.see(2, (ONE,))
    nodes.after_round(rendezvous)
    (change,) = read_changes(tmp_path / "run")
    assert (change["kind"], change["left"], change["lost"]) == ("left", ["node2", "node3"], [])
    assert change["reason"] == "node node2, node3 was asked to leave"

    agent_state.agent.leaves = True
    assert noticed(nodes, rendezvous) == ALL_LEAVE, "no node is left, so the run ends"
    with pytest.raises(RunOverError) as over:
        nodes.before_round(rendezvous)
    assert over.value.death.exit_code == 0


def test_a_node_that_comes_between_two_worlds_does_not_wait_for_others(
    agent_of_node1: tuple[Any, Rendezvous], tmp_path: Path
) -> None:
    _, rendezvous = agent_of_node1
    assert rendezvous.last_call == 30.0, "the run begins: all nodes are to be in its first world"
    newcomer = Rendezvous(Node("node4", 14))
    newcomer.values = rendezvous.values
    config = agent_of_node1[0]._config
    new_agent = ElasticNodes(config, 1, tmp_path / "note4", "store:1", StandbyPool(config))
    new_agent.before_round(newcomer)  # type: ignore[arg-type]
    assert newcomer.last_call == LAST_CALL_SECONDS


def test_survivors_wait_for_each_other_and_for_nobody_else(
    agent_of_node1: tuple[Any, Rendezvous], monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes, rendezvous = agent_of_node1
    monkeypatch.setattr(agent_state.agent, "leaves", False)
    rendezvous.write("left.1.node1.11", "{}")
    rendezvous.write("left.1.node3.13", "{}")  # as agents write it before they leave a world
    rendezvous.see(2, (ONE,))
    assert not nodes.all_have_joined(rendezvous), "node 3 has left the former world for this one"
    rendezvous.see(2, (ONE, THREE))
    assert nodes.all_have_joined(rendezvous), "node 2 is lost"
    rendezvous.see(2, (ONE, THREE), waiting=(Node("node4", 14),))
    assert not nodes.all_have_joined(rendezvous), "a node that waits is about to join"
    rendezvous.see(2, (ONE,))
    rendezvous.write("leaving.1", "1")
    rendezvous.write("leaving.1.node3.13", "1")
    assert nodes.all_have_joined(rendezvous), "node 3 leaves the run"

    newcomer = Rendezvous(Node("node4", 14))
    new_agent = ElasticNodes(nodes._config, 1, nodes._folder_note, "store:1", StandbyPool(nodes._config))
    assert not new_agent.all_have_joined(newcomer), "it does not know who else may come"  # type: ignore[arg-type]


def test_a_world_that_ends_before_its_first_step_adds_its_time_to_the_change_before(
    agent_of_node1: tuple[Any, Rendezvous], tmp_path: Path
) -> None:
    nodes, rendezvous = agent_of_node1
    ProgressMark().set(7)
    for number, world in ((2, (ONE, THREE)), (3, (ONE,))):
        nodes.before_round(rendezvous)
        rendezvous.see(number, world)
        nodes.after_round(rendezvous)
    first, second = read_changes(tmp_path / "run")
    assert (first["step"], second["step"]) == (7, None)
    assert (second["trained_until"], second["idle_since"]) == (7, first["idle_since"])
    assert second["detection_seconds"] > first["detection_seconds"]


def test_a_survivor_writes_the_history_after_a_round_that_could_not_begin(
    agent_of_node1: tuple[Any, Rendezvous], tmp_path: Path
) -> None:
    nodes, rendezvous = agent_of_node1
    nodes.before_round(rendezvous)
    rendezvous.see(3, (ONE, THREE))
    rendezvous.failed_rounds = 1
    nodes.after_round(rendezvous)
    (change,) = read_changes(tmp_path / "run")
    assert (change["lost"], change["round"]) == (["node2"], 3)
    rendezvous.failed_rounds = 0
    nodes.before_round(rendezvous)
    rendezvous.see(5, (ONE, TWO, THREE))
    nodes.after_round(rendezvous)
    assert len(read_changes(tmp_path / "run")) == 1, "this node was cut off while the others were in round 4"


def test_the_mistake_of_a_node_that_has_just_joined_ends_only_that_node(
    agent_of_node1: tuple[Any, Rendezvous], tmp_path: Path
) -> None:
    nodes, rendezvous = agent_of_node1
    assert not nodes.forgives_mistake(), "all have started together"
    four = Node("node4", 14)
    for number, world in ((2, (ONE, TWO, THREE, four)), (3, (ONE, TWO, THREE))):
        nodes.before_round(rendezvous)
        rendezvous.see(number, world)
        nodes.after_round(rendezvous)
        if number == 2:
            agent_state.agent.own_failure = "lr_max: 0.02 on rank 3"
            assert nodes.forgives_mistake()
            assert nodes.changes_world(failed=True)
    joined, lost = read_changes(tmp_path / "run")
    assert (joined["kind"], joined["joined"]) == ("joined", ["node4"])
    assert (lost["kind"], lost["lost"], lost["failed"]) == ("lost", ["node4"], [])
    assert lost["reason"] == "node node4 has left: lr_max: 0.02 on rank 3"
    assert not nodes.forgives_mistake()


def test_a_change_of_nodes_is_the_reason_only_if_there_is_no_other() -> None:
    assert main_reason(["", REGROUP_REASON, "SIGTERM"]) == "SIGTERM"
    assert main_reason([REGROUP_REASON, ""]) == REGROUP_REASON
    assert main_reason(["", ""]) == ""


def test_a_thread_of_the_agent_may_end_while_its_ranks_are_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "1234").mkdir()  # as listed before the thread has ended, without its file `children`
    monkeypatch.setattr(agent_state, "TASKS", tmp_path)
    assert list(agent_state.rank_pids()) == []


# ---------------------------------------------------------------- real processes


@contextmanager
def node(config: str, folder: Path, port: int, number: int, nnodes: str) -> Iterator[TrainingProcess]:
    """Start the agent of a node at 127.0.0.NUMBER, as `tinytrain train --store` does."""
    conf = ",".join(f"{name}={value}" for name, value in {"is_host": 0, **ELASTIC_RENDEZVOUS}.items())
    options = [f"--nnodes={nnodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test"]
    options += [f"--rdzv-conf={conf}", f"--local-addr=127.0.0.{number}", "--max-restarts=1000"]
    env = {"TINYTRAIN_ELASTIC": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with training_process([config], 1, folder, env, launcher=AGENT, rendezvous=options) as running:
        yield running


@pytest.mark.multiprocess
def test_nodes_that_hang_or_leave_are_left_behind_and_a_lost_store_ends_the_run_well(tmp_path: Path) -> None:
    settings = {"total_steps": 100_000, "ckpt_every": 100_000, "eval_every": 100_000, "log_every": 5}
    config = config_file(tmp_path, compile=False, **settings)
    run = tmp_path / "run"

    def recoveries() -> int:
        return sum(change["kind"] == "recovered" for change in read_changes(run))

    store = [serve_store(0)]
    with ExitStack() as stack:
        first, second = (stack.enter_context(node(config, tmp_path, store[0].port, k, "1:2")) for k in (1, 2))
        wait_until(lambda: "step 5/" in first.output() + second.output(), first)
        wait_until(lambda: standbys(first.process.pid), first)
        (standby,) = standbys(first.process.pid)
        for pid in [second.process.pid, *descendants(second.process.pid)]:
            os.kill(pid, signal.SIGSTOP)  # none of its threads runs, as after a power loss
        wait_until(lambda: recoveries() == 1, first)
        assert "tinytrain: node 127.0.0.2 was lost" in first.output()
        assert [beat["pid"] for beat in read_heartbeats(run)] == [standby], "it is the rank of the new world"

        third = stack.enter_context(node(config, tmp_path, store[0].port, 3, "1:2"))
        wait_until(lambda: recoveries() == 2, first)
        third.process.send_signal(signal.SIGUSR2)
        family = descendants(third.process.pid)
        assert third.wait(120) == 0, third.output()
        wait_until(lambda: not set(family) & {pid for pid, _ in living_processes()})
        wait_until(lambda: recoveries() == 3, first)
        left, recovered = read_changes(run)[-2:]
        assert (left["kind"], left["left"], left["nodes"]) == ("left", ["127.0.0.3"], ["127.0.0.1"])
        assert recovered["repeated_steps"] == 0, "all have saved before"

        store.clear()
        assert first.wait(120) == 0, first.output()
        assert "start `tinytrain store` again, and then the same command on every node" in first.output()
        assert "Traceback" not in first.output().partition("was lost")[2]
    state = json.loads((run / "state.json").read_text())
    assert state["state"] == "preempted"
    assert state["reason"].startswith("the store at 127.0.0.1:")
    assert Run(run).checkpoint.name == f"checkpoint-{state['step']:08d}"


def own_rendezvous(store: Any, most: int, fewest: int | None = None) -> Any:
    """torchrun's rendezvous of a node at 127.0.0.1 that is played by this process. fewest: default `most`."""
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout

    return DynamicRendezvousHandler.from_backend(
        "test",
        store,
        C10dRendezvousBackend(store, "test"),
        most if fewest is None else fewest,
        most,
        local_addr="127.0.0.1",
        timeout=RendezvousTimeout(join=timedelta(seconds=20), last_call=timedelta(hours=1)),
    )


def test_a_round_begins_as_soon_as_all_have_joined() -> None:
    store = serve_store(0)
    handler = own_rendezvous(store, 2, fewest=1)
    answers = iter([False, True])
    ElasticRendezvous(handler).begin_when(lambda: next(answers))
    handler.next_rendezvous()  # otherwise after an hour, the last call
    assert list(answers) == []
    handler.shutdown()


def test_a_new_start_of_an_ended_run_forgets_its_session() -> None:
    store = serve_store(0)
    handler = own_rendezvous(store, 1)
    rendezvous = ElasticRendezvous(handler)
    rendezvous.write_once("session", "the first run")
    handler.set_closed()
    assert rendezvous.reopen(forget="session")
    assert rendezvous.read("session") == ""
    rendezvous.write_once("session", "the second run")
    assert rendezvous.reopen(forget="session"), "another node of the second run joins"
    assert rendezvous.read("session") == "the second run"


@pytest.mark.multiprocess
def test_a_node_that_is_lost_before_it_announces_itself_costs_seconds(tmp_path: Path) -> None:
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import _RendezvousJoinOp

    store = serve_store(0)
    head = own_rendezvous(store, 2)
    with node(config_file(tmp_path, total_steps=3), tmp_path, store.port, 2, "1:2") as second:
        # the first of two nodes joins, and dies before it tells the other one its address
        head._op_executor.run(_RendezvousJoinOp(), float("inf"))
        assert second.wait(120) == 0, second.output()
        assert "1 node(s) train: 127.0.0.2" in second.output()


@pytest.mark.multiprocess
def test_an_excluded_node_is_named_and_does_not_disturb_the_others(tmp_path: Path) -> None:
    config = config_file(tmp_path)
    store = serve_store(0)
    store.set("tinytrain.test.session", "a")
    for step in (3, 5, 9):
        lost = {"lost": ["127.0.0.2"], "failed": [], "reason": "node 127.0.0.2 was lost"}
        append_change(tmp_path / "run", {"kind": "lost", "session": "a", "step": step, **lost})
    with node(config, tmp_path, store.port, 2, "1:2") as running:
        assert running.wait(120) == 1, running.output()
        last = running.output().rstrip().splitlines()[-1]
    assert last.startswith(
        "error: node 127.0.0.2 is excluded: it has caused 3 restarts of this run (after steps 3, 5, 9)"
    )
    assert read_changes(tmp_path / "run")[-1]["kind"] == "excluded"
