"""Check the rendezvous of ranks over a store: missing ranks and unusable addresses are named."""

from __future__ import annotations

import contextlib
import io
import os
import re
import socket

import pytest

from tests.helpers.launching import free_port
from tests.helpers.ranks import run_ranks
from tinytrain_dist.distributed import rendezvous
from tinytrain_dist.errors import ConfigError, RendezvousError
from tinytrain_dist.utils import waiting


def join(variables: dict[str, dict[str, str]], seconds: float) -> str:
    """On a rank: join the rendezvous with changed environment variables; return the hosts or the error."""
    os.environ.update(variables.get(os.environ["RANK"], {}))
    try:
        return " ".join(rendezvous.rendezvous(seconds).hosts)
    except ConfigError as error:
        return f"{type(error).__name__}: {error.problems[0]}"


@pytest.mark.multiprocess
def test_rank_that_cannot_reach_the_head_says_where_and_why() -> None:
    port = free_port()
    lost, waiting = run_ranks(2, join, {"0": {"MASTER_ADDR": "127.0.1.1", "MASTER_PORT": str(port)}}, 0.2)
    host = socket.gethostname()
    assert lost.startswith(f"RendezvousError: MASTER_ADDR: rank 0 on {host} cannot reach 127.0.1.1:{port} (refused")
    assert f" means {host} itself" in lost
    assert waiting.startswith(
        f"RendezvousError: MASTER_ADDR: rank 1 on {host} timed out after 0.4 s waiting for rank 0"
    )


def missing(seconds: float) -> str:
    """On a rank: only rank 0 joins."""
    if os.environ["RANK"] != "0":
        return ""
    return join({}, seconds)


@pytest.mark.multiprocess
def test_missing_ranks_are_named_in_time() -> None:
    said = run_ranks(3, missing, 0.2)[0]
    assert re.search(
        r"^ConfigError: 2 of 3 ranks did not join at 127.0.0.1:\d+ within 0.2 s: rank 1, 2; hosts that joined: ", said
    )


def missing_and_heard(seconds: float) -> str:
    """On a rank: only rank 0 joins; return what it prints while it waits."""
    waiting.FIRST_NOTICE_SECONDS = 0.0
    with contextlib.redirect_stdout(io.StringIO()) as said:
        missing(seconds)
    return said.getvalue()


@pytest.mark.multiprocess
def test_ranks_that_are_waited_for_are_named_meanwhile() -> None:
    said = run_ranks(3, missing_and_heard, 1.5)[0]
    assert re.fullmatch(r"waiting for 2 of 3 ranks to join: rank 1, 2 \(for 1 s so far, \d s more at most\)\n", said)


@pytest.mark.parametrize(
    ("head", "ranks_here", "expected"),
    [("pod-x", "2", "127.0.0.1"), ("10.0.0.7", "2", "10.0.0.7"), ("pod-x", "1", "pod-x"), ("fe80::1", "2", "fe80::1")],
)
def test_ranks_of_one_machine_need_no_name(
    head: str, ranks_here: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"MASTER_ADDR": head, "LOCAL_WORLD_SIZE": ranks_here, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert rendezvous._head_address() == expected


def occupied() -> str:
    """On rank 0, which serves the store: start the rendezvous while another program uses its port."""
    if os.environ["RANK"] != "0":
        return ""
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    with socket.create_server(("127.0.0.1", 0)) as server:
        return join({"0": {"MASTER_PORT": str(server.getsockname()[1])}}, 2)


@pytest.mark.multiprocess
def test_port_of_another_job_is_named() -> None:
    said = run_ranks(1, occupied)[0]
    assert said.startswith("RendezvousError: MASTER_PORT: rank 0 on ")
    assert "choose another port" in said


def arrive_as(name_of_rank: dict[str, str], loopback: str) -> str:
    """On a rank: join as another host, whose own name resolves to `loopback`."""
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    host = name_of_rank[os.environ["RANK"]]
    rendezvous._describe_own_host = lambda: {"host": host, "loopback": loopback if host == "node2" else ""}  # type: ignore[assignment]
    return join({}, 30)


@pytest.mark.multiprocess
def test_host_that_announces_a_loopback_address_is_named() -> None:
    two_nodes = {"0": "node1", "1": "node2"}
    for said in run_ranks(2, arrive_as, two_nodes, "127.0.1.1"):
        assert said.startswith("ConfigError: GLOO_SOCKET_IFNAME: not set, and the host name of node2 (127.0.1.1)")
    assert run_ranks(2, arrive_as, two_nodes, "") == ["node1 node2"] * 2
    assert run_ranks(2, arrive_as, {"0": "node2", "1": "node2"}, "127.0.1.1") == ["node2 node2"] * 2  # one machine


def test_tasks_of_srun_without_a_head_are_not_many_runs_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    slurm = {
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "1",
        "SLURM_NTASKS": "4",
        "SLURM_TASKS_PER_NODE": "2(x2)",
        "SLURM_NODEID": "0",
    }
    for name, value in {**slurm, "WORLD_SIZE": "", "LOCAL_RANK": "", "LOCAL_WORLD_SIZE": "", "RANK": ""}.items():
        monkeypatch.setenv(name, value)  # so that all are put back
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(ConfigError, match="MASTER_ADDR: not set, but srun started 4 tasks"):
        rendezvous.rendezvous()
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")  # the batch script itself, which Slurm also gives SLURM_NTASKS
    assert rendezvous.rendezvous().hosts == [socket.gethostname()]


def test_rendezvous_error_is_a_mistake_of_the_configuration() -> None:
    assert issubclass(RendezvousError, ConfigError)


def test_slurm_tasks_are_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "x")  # so that it is restored
        monkeypatch.delenv(name)
    given = {"PROCID": "9", "NTASKS": "11", "LOCALID": "1", "TASKS_PER_NODE": "4(x2),3", "NODEID": "2"}
    for name, value in given.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("MASTER_ADDR", "head")
    rendezvous.adopt_slurm_variables()
    found = [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")]
    assert found == ["9", "11", "1", "3"]
