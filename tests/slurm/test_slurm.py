"""Check runs on a real Slurm that are stopped, preempted, requeued or lose a node: their result stays the same.

Must not know how the batch scripts work: tests look at jobs, logs and checkpoints. The result of a run is compared with
that of one process on one machine. Tests wait for events and assert no durations.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.helpers.slurm_cluster import Cluster, Job, wait_until, why_not
from tests.helpers.training import Run, settings_for, train
from tinytrain_dist.reliability.restart_history import read_changes

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
LENGTH = {"reproducible": True, "total_steps": 40, "ckpt_every": 10, "eval_every": 20, "log_every": 1}
BRAKE = "12:0.5"  # slows the first attempt by 14 s from step 12 on, time to send signals; a signal ends the wait


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    cluster = Cluster(folder)
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def alone(data: Path) -> dict[str, str]:
    """The digests of the same run in one process on one machine."""
    return train(data, "alone", 1, **LENGTH).digests()


@pytest.fixture(scope="module")
def limited(cluster: Cluster, data: Path) -> Job:
    """A job that reaches its time limit after two minutes; it runs while the other tests run."""
    env = {"BRAKE": "12:8"}  # the job takes longer than its limit, and the run knows the duration of a step
    return submit(cluster, data, "limited", "--nodelist=node4", "--time=2", "--signal=B:USR1@10", **env)


def config(folder: Path, name: str, **overrides: object) -> Path:
    path = folder / f"{name}.toml"
    settings = settings_for(folder, name, **{**LENGTH, **overrides})
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
    return path


def submit(
    cluster: Cluster,
    folder: Path,
    name: str,
    *flags: str,
    template: str = "train.sbatch",
    more: tuple[str, ...] = (),
    **env: str,
) -> Job:
    path = config(folder, name)
    return cluster.sbatch(folder / f"{name}.out", "--time=20", *flags, f"slurm/{template}", path, *more, **env)


def state(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "state.json").read_text())
    return found


@pytest.mark.usefixtures("limited")  # only to start it before the other tests
def test_two_nodes_with_two_processes_give_the_result_of_one_process(
    cluster: Cluster, data: Path, alone: dict[str, str]
) -> None:
    assert "127.0.1.1" in cluster("on", "node1", "getent", "hosts", "node1").stdout  # as Debian has it
    flags = [
        "--nodes",
        "2",
        "--processes-per-node",
        "2",
        "--time",
        "20",
        "--follow",
        "--sbatch",
        "--nodelist=node[1-2]",
    ]
    followed = cluster(sys.executable, "launch/submit.py", config(data, "two"), *flags)
    assert "parallel = ddp: 4 replica(s)" in followed.stdout
    assert "step 40: done at step 40 of 40" in followed.stdout
    assert followed.stdout.rstrip().endswith("has ended: COMPLETED")
    hosts = {rank["host"] for rank in json.loads((data / "two" / "environment.json").read_text())["ranks"]}
    assert hosts == {"node1", "node2"}
    assert Run(data / "two").digests() == alone


def test_usr1_to_the_batch_script_saves_and_requeues_and_no_step_is_lost(
    cluster: Cluster, data: Path, alone: dict[str, str]
) -> None:
    job = submit(cluster, data, "usr1", "--nodes=2", "--nodelist=node[1-2]", BRAKE=BRAKE)
    job.wait_for("step 13/")
    cluster("scancel", "--batch", "--signal=USR1", job.id)
    assert job.ends() == "COMPLETED", job.output()
    assert job.shows("Restarts") == "1"
    ((stopped, resumed),) = job.stopped_and_resumed()
    assert stopped == resumed > 12
    assert state(data / "usr1") == {"state": "done", "step": 40, "attempt": f"{job.id}.1", "first_step": resumed}
    assert Run(data / "usr1").digests() == alone


def test_a_run_continues_after_a_requeue_by_hand(cluster: Cluster, data: Path, alone: dict[str, str]) -> None:
    job = submit(cluster, data, "requeue", "--nodelist=node3", BRAKE=BRAKE)
    job.wait_for("step 13/")
    cluster("scontrol", "requeue", job.id)
    assert job.ends() == "COMPLETED", job.output()
    ((stopped, resumed),) = job.stopped_and_resumed()
    assert stopped == resumed > 12
    assert Run(data / "requeue").digests() == alone


@pytest.mark.parametrize("partition", ["main", "grace"])
def test_a_preempted_run_continues(cluster: Cluster, data: Path, alone: dict[str, str], partition: str) -> None:
    name = f"preempted-{partition}"
    nodes = ["--nodes=2", "--nodelist=node[1-2]"] if partition == "main" else ["--nodelist=node3"]
    job = submit(cluster, data, name, f"--partition={partition}", *nodes, BRAKE=BRAKE)
    job.wait_for("step 13/")
    cluster.sbatch(data / "urgent.out", "--partition=urgent", nodes[-1], "--exclusive", "--wrap=sleep 1", *nodes[:-1])
    assert job.ends() == "COMPLETED", job.output()
    assert job.shows("Restarts") == "1"
    ((stopped, resumed),) = job.stopped_and_resumed()
    assert stopped == resumed > 12
    assert ("requeued, time 1" in job.output()) == (partition == "grace")  # otherwise Slurm has requeued it
    assert Run(data / name).digests() == alone


def test_node_that_loses_its_power_costs_at_most_an_interval(
    cluster: Cluster, data: Path, alone: dict[str, str]
) -> None:
    job = submit(cluster, data, "power", "--nodes=2", "--exclude=node4", BRAKE=BRAKE)
    job.wait_for("step 13/")
    job.wait_for("saved ")
    cluster.power_off("node2")
    try:
        assert job.ends() == "COMPLETED", job.output()
    finally:
        cluster.start()
    assert job.shows("NodeList") == "node[1,3]"
    ((_, resumed),) = job.stopped_and_resumed()
    assert resumed >= 10
    assert Run(data / "power").digests() == alone


def test_an_elastic_job_goes_on_without_a_node_and_ends_with_the_same_bits(
    cluster: Cluster, data: Path, alone: dict[str, str]
) -> None:
    nodes = ["--nodes", "2:3", "--processes-per-node", "1", "--time", "20", "--sbatch", "--nodelist=node[1-3]"]
    path = config(data, "elastic", snapshot_every=5)
    submitted = cluster(sys.executable, "launch/submit.py", path, *nodes, BRAKE=BRAKE).stdout
    found = re.search(r"^job (\d+): (?s:.*)tail -F (\S+)$", submitted, re.MULTILINE)
    assert found, submitted
    job = Job(cluster, found[1], Path(found[2]))
    job.wait_for("step 13/")
    cluster.power_off("node2")  # slurmd, its steps and all that they have started
    try:
        job.wait_for("trained again")
    finally:
        cluster.start()
    assert job.ends() == "COMPLETED", job.output()
    assert job.shows("Restarts") == "0"
    changes = read_changes(data / "elastic")
    assert [(change["kind"], len(change.get("lost", []))) for change in changes] == [("lost", 1), ("recovered", 0)]
    assert len(changes[0]["nodes"]) == 2
    assert changes[1]["repeated_steps"] <= 2 * 5
    assert Run(data / "elastic").digests() == alone
    assert not cluster.processes("node1") + cluster.processes("node2") + cluster.processes("node3")


def test_run_that_fails_at_once_is_not_requeued(cluster: Cluster, data: Path) -> None:
    (data / "broken").mkdir()
    (data / "broken" / "train.npy").write_bytes(b"no token file")
    more = ("--train-data", str(data / "broken" / "train.npy"), "--vocab-size", "53")
    job = submit(cluster, data, "at-once", "--nodelist=node1", template="srun.sbatch", more=more)
    before = submit(cluster, data, "before", "--nodelist=node2", CRASH="0", MAX_RESTARTS="0")
    wrong = submit(cluster, data, "wrong", "--nodelist=node3", more=("--frob", "1"))
    assert (job.ends(), before.ends(), wrong.ends()) == ("FAILED", "FAILED", "FAILED")
    assert {each.shows("Restarts") for each in (job, before, wrong)} == {"0"}
    assert "this attempt ended before it wrote to its run folder" in job.output()
    assert "it failed before its first step" in before.output()
    assert "frob: unknown setting" in wrong.output()


def test_crash_after_progress_is_requeued_but_not_twice_at_one_step(cluster: Cluster, data: Path) -> None:
    job = submit(cluster, data, "crash", "--nodelist=node1", CRASH="12", MAX_RESTARTS="0")
    direct = {"template": "srun.sbatch", "BRAKE": BRAKE}
    capped = submit(cluster, data, "capped", "--nodelist=node2", **direct, MAX_REQUEUES="0")
    stopped = submit(cluster, data, "stopped", "--nodelist=node3", **direct)
    capped.wait_for("step 13/")
    cluster("scancel", "--batch", "--signal=USR1", capped.id)
    stopped.wait_for("step 13/")
    (data / "stopped" / "stop").touch()
    assert capped.ends() == "FAILED"
    assert "not requeued: MAX_REQUEUES is 0" in capped.output()
    assert state(data / "capped")["state"] == "preempted"
    assert stopped.ends() == "COMPLETED"
    assert "not requeued: a file named stop ended the run" in stopped.output()
    assert job.ends() == "FAILED"
    assert job.shows("Restarts") == "1"
    assert "requeued, time 1 of 20" in job.output()
    assert "not requeued: an earlier attempt also failed, at step 12" in job.output()


def test_scancel_saves_stays_cancelled_and_leaves_no_process(cluster: Cluster, data: Path) -> None:
    job = submit(cluster, data, "cancel", "--nodes=2", "--nodelist=node[1-2]", BRAKE=BRAKE)
    job.wait_for("step 13/")
    assert any("tinytrain_dist.train" in line for line in cluster.processes("node2"))
    cluster("scancel", job.id)
    assert job.ends() == "CANCELLED"
    wait_until(
        lambda: not cluster.processes("node1") + cluster.processes("node2"), lambda: str(cluster.processes("node2"))
    )
    assert job.shows("Restarts") == "0"
    assert state(data / "cancel")["state"] == "preempted"
    assert Run(data / "cancel").checkpoint.name == f"checkpoint-{state(data / 'cancel')['step']:08d}"


def test_array_of_three_on_one_node_whose_next_ports_are_taken(
    cluster: Cluster, data: Path, alone: dict[str, str]
) -> None:
    sweep = data / "sweep.txt"
    sweep.write_text("# three seeds\n--seed 0\n\n--seed 1\n--seed 2 --target-dir " + str(data / "third") + "\n")
    last = int(cluster.sbatch(data / "probe.out", "--wrap=true", "--nodelist=node1").id)
    ports = [20000 + last + ahead for ahead in range(1, 3)]
    listen = f"""import socket, time
sockets = [socket.socket() for _ in range(2)]
for port, each in zip({ports}, sockets): each.bind(("", port)); each.listen()
print("ready", flush=True); time.sleep(600)"""
    command = ["on", "node1", sys.executable, "-c", listen]
    with subprocess.Popen(
        command, env=cluster.env, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as squatter:
        try:
            assert squatter.stdout is not None
            assert squatter.stdout.readline() == "ready\n"
            path = config(data, "sweep")
            log = data / "sweep-%a.out"
            job = cluster.sbatch(log, "--time=20", "--array=0-2", "--nodelist=node1", "slurm/array.sbatch", path, sweep)
            wait_until(lambda: not cluster("squeue", "-h", "-j", job.id).stdout, lambda: cluster("squeue").stdout)
        finally:
            os.killpg(squatter.pid, signal.SIGKILL)
    outputs = [(data / f"sweep-{task}.out").read_text() for task in range(3)]
    meeting = [int(port) for text in outputs for port in re.findall(r"rendezvous at \S+:(\d+)", text)]
    assert len(set(meeting)) == 3
    assert not set(meeting) & set(ports), "the ports that were taken must have been passed over"
    assert Run(data / "sweep" / "0").digests() == alone
    others = [Run(folder).digests() for folder in (data / "sweep" / "1", data / "third")]
    assert others[0] != others[1]
    assert alone not in others


def test_without_torchrun(cluster: Cluster, data: Path, alone: dict[str, str]) -> None:
    job = submit(
        cluster, data, "direct", "--nodes=2", "--ntasks-per-node=2", "--nodelist=node[1-2]", "--cpus-per-task=2",
        BRAKE=BRAKE, template="srun.sbatch",
    )  # fmt: skip
    job.wait_for("step 13/")
    cluster("scancel", "--batch", "--signal=USR1", job.id)
    assert job.ends() == "COMPLETED", job.output()
    ((stopped, resumed),) = job.stopped_and_resumed()
    assert stopped == resumed > 12
    assert Run(data / "direct").digests() == alone


def test_nodes_without_slurm_connect_and_a_signal_to_one_stops_both(
    cluster: Cluster, data: Path, alone: dict[str, str]
) -> None:
    path, log = config(data, "bare"), data / "bare0.out"
    for brake in (BRAKE, ""):
        with ExitStack() as stack:
            nodes = []
            for rank in (0, 1):
                command = ["on", f"node{rank + 1}", "launch/node.sh", path, "--nnodes", "2", "--node-rank", str(rank)]
                sink = stack.enter_context(open(data / f"bare{rank}.out", "w"))
                node = subprocess.Popen(
                    [*command, "--head", "node1"],
                    cwd=cluster.code,
                    env={**cluster.env, "BRAKE": brake},
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                )
                nodes.append(stack.enter_context(node))
                stack.callback(node.kill)
            if brake:
                wait_until(lambda: "step 13/" in log.read_text(), log.read_text)
                cluster.signal("node2", "TERM", "tinytrain_dist[.]agent")
            assert [each.wait(240) for each in nodes] == [0, 0], log.read_text()
        assert state(data / "bare")["state"] == ("preempted" if brake else "done")
    assert Run(data / "bare").digests() == alone


def test_a_time_limit_saves_requeues_and_continues(
    cluster: Cluster, data: Path, alone: dict[str, str], limited: Job
) -> None:
    assert limited.ends() == "COMPLETED", limited.output()
    assert int(limited.shows("Restarts")) >= 1
    assert all(stopped == resumed > 12 for stopped, resumed in limited.stopped_and_resumed())
    assert Run(data / "limited").digests() == alone
