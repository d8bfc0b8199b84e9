"""Owns that a run's nodes are looked at before it starts: who does not come, who is odd, who is slow, by name."""

from __future__ import annotations

import json
import os
import re
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import AGENT, launch_training, run_ranks
from tests.helpers.training import settings_for
from tinytrain_dist.cli import doctor, machine_checks, speed_checks
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed import network, rendezvous
from tinytrain_dist.distributed.context import DistributedContext, init_distributed
from tinytrain_dist.errors import ConfigError, RendezvousError
from tinytrain_dist.reliability import rank_consistency

DEBIAN = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]


def closed_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---------------------------------------------------------------- sockets


def test_debians_own_name_is_told_from_an_address() -> None:
    assert network.resolve("node7", lambda *_, **__: DEBIAN * 2) == ["127.0.1.1"]
    assert network.is_loopback("127.0.1.1")
    assert network.is_loopback("::1")
    assert not network.is_loopback("10.0.0.7")


def test_unknown_name_has_no_address() -> None:
    def nobody(*_: Any, **__: Any) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    assert network.resolve("no-such-host", nobody) == []


def test_port_that_listens_is_reached_and_a_closed_one_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert network.why_unreachable("127.0.0.1", server.getsockname()[1], 5) == ""
    assert network.why_unreachable("127.0.0.1", closed_port(), 0) == "refused: nothing listens there"


# ---------------------------------------------------------------- meeting


def join(variables: dict[str, dict[str, str]], seconds: float) -> str:
    """On a rank: meet with other variables than the launcher gave; what comes of it."""
    os.environ.update(variables.get(os.environ["RANK"], {}))
    try:
        return " ".join(rendezvous.rendezvous(seconds).hosts)
    except ConfigError as error:
        return f"{type(error).__name__}: {error.problems[0]}"


@pytest.mark.multiprocess
def test_rank_that_cannot_reach_the_head_says_where_and_why() -> None:
    port = closed_port()
    lost, waiting = run_ranks(2, join, {"0": {"MASTER_ADDR": "127.0.1.1", "MASTER_PORT": str(port)}}, 0.2)
    host = socket.gethostname()
    assert lost.startswith(f"RendezvousError: MASTER_ADDR: rank 0 on {host} cannot reach 127.0.1.1:{port} (refused")
    assert f"on {host} that is {host} itself" in lost
    assert waiting.startswith(
        f"RendezvousError: MASTER_ADDR: rank 1 on {host} timed out after 0.4 s waiting for rank 0"
    )


def missing(seconds: float) -> str:
    """On a rank: only rank 0 comes."""
    if os.environ["RANK"] != "0":
        return ""
    return join({}, seconds)


@pytest.mark.multiprocess
def test_ranks_that_do_not_come_are_named_in_time() -> None:
    said = run_ranks(3, missing, 0.2)[0]
    assert re.search(
        r"^ConfigError: 2 of 3 ranks did not come to 127.0.0.1:\d+ within 0.2 s: rank 1, 2; there were", said
    )


def occupied() -> str:
    """On rank 0, which serves the store: its port is somebody's."""
    if os.environ["RANK"] != "0":
        return ""
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    with socket.create_server(("127.0.0.1", 0)) as server:
        return join({"0": {"MASTER_PORT": str(server.getsockname()[1])}}, 2)


@pytest.mark.multiprocess
def test_port_of_another_job_is_named() -> None:
    said = run_ranks(1, occupied)[0]
    assert said.startswith("RendezvousError: MASTER_PORT: rank 0 on ")
    assert "take another port" in said


def arrive_as(name_of_rank: dict[str, str], loopback: str) -> str:
    """On a rank: come from another host, whose own name stands for `loopback`."""
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    host = name_of_rank[os.environ["RANK"]]
    rendezvous._own_arrival = lambda: {"host": host, "loopback": loopback if host == "node2" else ""}  # type: ignore[assignment]
    return join({}, 30)


@pytest.mark.multiprocess
def test_host_that_would_tell_others_a_loopback_address_is_named() -> None:
    two_nodes = {"0": "node1", "1": "node2"}
    for said in run_ranks(2, arrive_as, two_nodes, "127.0.1.1"):
        assert said.startswith("ConfigError: GLOO_SOCKET_IFNAME: not set, and the name of node2 (127.0.1.1)")
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


# ---------------------------------------------------------------- all ranks run the same


def take_census(settings: dict[str, Any], odd: str) -> str:
    """On a rank: the check at the start of a run, with something else on rank 2."""
    context = replace(init_distributed("cpu"), host=f"node{int(os.environ['RANK']) // 2 + 1}")
    if context.rank == 2:
        if odd == "settings":
            settings = {**settings, "lr_max": 0.5, "target_dir": "elsewhere"}
        elif odd == "code":
            rank_consistency.code_digest = lambda: "another"
        elif odd == "versions":
            torch.__version__ = "2.11.0"  # type: ignore[assignment]
        elif odd == "shape":
            context = replace(context, local_world_size=7)
        elif odd == "clock":
            real = rank_consistency.time.time
            rank_consistency.clock_offsets.__defaults__ = (lambda: real() - 100,)
    if odd == "threads":
        settings = {**settings, "cpu_threads": 4}
        rank_consistency.usable_cores = lambda: {0, 1} if context.rank < 2 else {0, 1, 2, 3, 4, 5, 6, 7}
    else:
        rank_consistency.usable_cores = lambda: {0, 1}
    try:
        return "\n".join(rank_consistency.check_rank_consistency(TrainingConfig(**settings), context))
    except ConfigError as error:
        return "\n".join([error.source, *error.problems])


REST = "rank 0 (node1), rank 1 (node1), rank 3 (node2)"
CODE = rank_consistency.code_digest()


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("odd", "problems"),
    [
        ("nothing", ""),
        (
            "settings",
            "the world of 4 ranks\n"
            f"target_dir: 'elsewhere' on rank 2 (node2), but 'runs/default' on {REST}; "
            "give every node the same file and the same settings\n"
            f"lr_max: 0.5 on rank 2 (node2), but 0.001 on {REST}; give every node the same file and the same settings",
        ),
        ("code", f"code: 'another' on rank 2 (node2), but '{CODE}' on {REST}; start every node from"),
        ("versions", f"torch: '2.11.0' on rank 2 (node2), but {torch.__version__!r} on {REST}; use one environment"),
        ("shape", f"processes per node: 7 on rank 2 (node2), but 4 on {REST}; start the same number"),
        ("clock", "clock: node2 is 100.0 s behind node1; set it (chrony)"),
        ("threads", "threads: 2 process(es) on node1 run 8 threads on 2 core(s) and slow each other down; "
                    "set OMP_NUM_THREADS=1, or give the job more cores (--cpus-per-task)"),
    ],
)  # fmt: skip
def test_odd_rank_is_named_on_all_ranks(odd: str, problems: str) -> None:
    for said in run_ranks(4, take_census, {"batch_size": 4}, odd):
        assert (problems in said) if problems else said == ""
        assert said.count("clock") == (odd == "clock")
        assert said.count("threads") == (2 if odd == "threads" else 0)


def test_of_two_opinions_rank_0_has_the_usual_one() -> None:
    assert rank_consistency.find_differences([{"torch": 1}, {"torch": 2}], ["a", "b"]) == [
        "torch: 2 on rank 1 (b), but 1 on rank 0 (a); use one environment on all nodes"
    ]


@pytest.mark.multiprocess
def test_run_with_different_settings_on_its_ranks_does_not_start(tmp_path: Path) -> None:
    script = tmp_path / "odd.py"
    script.write_text(
        "import os, sys\nfrom tinytrain_dist.launch.worker import main\n"
        "main([*sys.argv[1:], '--seed', os.environ['RANK']])\n"
    )
    settings = settings_for(tmp_path, "run")
    config = tmp_path / "run.toml"
    config.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items()))
    done = launch_training([str(config)], 2, tmp_path, script=script, launcher=AGENT)
    assert done.returncode == 2
    last = done.stdout.rstrip().splitlines()[-1]
    assert last.startswith("  seed: 1 on rank 1 (")
    assert not (tmp_path / "run" / "checkpoints").exists()


# ---------------------------------------------------------------- the tool


def examine(args: list[str], slow_rank: int | None = None, broken: str = "") -> tuple[int, str]:
    """On a rank: the doctor, quick, and with a slow device where the test wants one."""
    import contextlib
    import io

    rank = int(os.environ["RANK"])
    speed_checks.MIB = 1024
    rank_consistency.usable_cores = lambda: set(range(8))
    speed_checks.matmul_rate = lambda *_: 3e9 if rank == slow_rank else 1e10  # type: ignore[assignment]
    speed_checks.best_seconds = lambda action, *_: (action(), 1e-3)[1]  # type: ignore[assignment]
    if broken == "port" and rank == 0:
        doctor._try_peers = lambda host, _: [f"network: {host} cannot reach node2"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = doctor.main(args)
    return code, said.getvalue()


@pytest.mark.multiprocess
def test_healthy_ranks() -> None:
    (code, said), silent = run_ranks(2, examine, [])
    assert code == 0, said
    assert "PROBLEM" not in said
    assert said.rstrip().endswith("no problems found")
    assert "inside a node (2 ranks)" in said
    assert silent == (0, "")  # rank 0 says it for all


@pytest.mark.multiprocess
def test_slow_rank_is_named() -> None:
    (code, said), (other, _), _ = run_ranks(3, examine, [], 2)
    assert (code, other) == (1, 1)
    name = f"rank 2 ({socket.gethostname()})"
    assert f"PROBLEM  matmul bf16: {name} has 0.003 TFLOP/s, the median of 3 is 0.01;" in said
    assert "rank 1 (" not in said
    assert said.rstrip().endswith("2 problems found")


@pytest.mark.multiprocess
def test_broken_network_ends_the_examination_before_a_collective_hangs() -> None:
    (code, said), (other, _) = run_ranks(2, examine, [], None, "port")
    assert (code, other) == (1, 1)
    assert "cannot reach node2" in said
    assert "matmul" not in said


@pytest.mark.multiprocess
def test_run_folder_and_data_of_the_configuration(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "run", micro_batch_size=2)
    args = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    code, said = run_ranks(2, examine, args)[0]
    assert code == 0, said
    assert f"{tmp_path}/run/checkpoints is written, synced, renamed and seen by all" in said
    assert "disk: room for 3 checkpoints" in said
    assert not (tmp_path / "run").exists()
    (tmp_path / "train.npy").unlink()
    code, said = run_ranks(2, examine, args)[0]
    assert code == 1
    assert f"PROBLEM  train_data: there is no {tmp_path}/train.npy on {socket.gethostname()}" in said


@pytest.mark.multiprocess
def test_under_the_agent(tmp_path: Path) -> None:
    module = "tinytrain_dist.cli.doctor"
    done = launch_training(["--timeout", "60"], 2, tmp_path, script=module, torchrun_args=["-m"], launcher=AGENT)
    assert "on 2 ranks of" in done.stdout
    assert re.search(r"matmul bf16: .* TFLOP/s", done.stdout)
    assert done.returncode == (0 if "no problems found" in done.stdout else 1)  # a busy machine has a slow rank


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--nodes", "2"], "go together"),
        (["--nodes", "2", "--node", "2", "--head", "a:1"], "not among 0 .. 1"),
        (["--nodes", "2", "--node", "1", "--head", "a"], "has no port"),
        (["--timeout", "0"], "no time to wait"),
        (["--lr-maxx", "1"], "did you mean lr_max"),
        (["no-such-file.toml"], "cannot be read"),
    ],
)
def test_mistakes_on_the_command_line(args: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    from tinytrain_dist.cli.main import main

    try:
        code: Any = main(["doctor", *args])
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert says in capsys.readouterr().err


# ---------------------------------------------------------------- parts


def test_outlier_is_below_eight_tenths_of_the_median() -> None:
    rates = {"a": 10.0, "b": 10.2, "c": 7.9}
    (said,) = speed_checks.outliers("matmul", "TFLOP/s", rates, "look there")
    assert said == "matmul: c has 7.9 TFLOP/s, the median of 3 is 10; look there"
    assert speed_checks.outliers("matmul", "TFLOP/s", {**rates, "c": 8.1}, "") == []


@pytest.mark.parametrize("nodes", [2, 3, 4, 5, 8])
def test_each_node_swaps_with_both_neighbours_and_with_one_at_a_time(nodes: int) -> None:
    rounds = speed_checks.ring_rounds(nodes)
    for pairs in rounds:
        busy = [node for pair in pairs for node in pair]
        assert len(busy) == len(set(busy))
    everyone = sorted(node for pairs in rounds for pair in pairs for node in pair)
    assert everyone == sorted(list(range(nodes)) * (2 if nodes > 2 else 1))


@pytest.mark.parametrize(
    ("hosts", "says"),
    [
        (["a", "a", "b", "b"], ""),
        (["a", "a", "b"], "different numbers of processes (2 on a, 1 on b)"),
        (["a", "b", "a", "b"], "--distribution=block"),
    ],
)
def test_shape_of_the_world(hosts: list[str], says: str) -> None:
    context = DistributedContext(0, 0, len(hosts), 2, "a", torch.device("cpu"))
    assert says in " ".join(speed_checks.rank_placement_problems(hosts, context))
    assert bool(says) == bool(speed_checks.rank_placement_problems(hosts, context))


def test_limit_of_the_control_group_is_the_smallest_above(tmp_path: Path) -> None:
    job = tmp_path / "memory" / "slurm" / "job_1"
    job.mkdir(parents=True)
    (job / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert machine_checks.cgroup_limit("4:memory:/slurm/job_1\n", tmp_path) is None
    (job / "memory.limit_in_bytes").write_text("5000\n")
    (job.parent / "memory.limit_in_bytes").write_text("4000\n")
    assert machine_checks.cgroup_limit("4:memory:/slurm/job_1\n3:cpu:/x\n", tmp_path) == 4000
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "memory.max").write_text("max\n")
    assert machine_checks.cgroup_limit("0::/user\n", tmp_path) is None
    (tmp_path / "user" / "memory.max").write_text("77\n")
    assert machine_checks.cgroup_limit("0::/user\n", tmp_path) == 77


def test_interface_that_does_not_exist_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib7")
    assert any(
        level == machine_checks.PROBLEM and "no interface ib7" in text for level, text in machine_checks.machine()
    )
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "^docker0")
    assert not any("NCCL_SOCKET_IFNAME:" in text for _, text in machine_checks.machine())


def test_own_name_that_is_the_machine_itself_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: DEBIAN)
    notes = [text for level, text in machine_checks.name_and_interfaces("node7") if level == machine_checks.NOTE]
    assert notes[0].startswith("name: node7 resolves to 127.0.1.1 here; with several nodes export GLOO_SOCKET_IFNAME=")


def test_meeting_error_is_a_mistake_of_the_configuration() -> None:
    assert issubclass(RendezvousError, ConfigError)
