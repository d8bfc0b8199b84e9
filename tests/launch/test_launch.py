"""Owns what tinytrain_dist.agent and launch/node.sh add to torchrun: signals that save, nodes that meet, a last word.

Must not know Slurm; test_slurm.py does.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.helpers.ranks import AGENT, REPOSITORY, TrainingProcess, launch_training, training_process
from tests.helpers.training import Run, settings_for, train

pytestmark = pytest.mark.multiprocess


def config_file(folder: Path, **overrides: object) -> str:
    settings = settings_for(folder, "run", parallel="ddp", **overrides)
    path = folder / "run.toml"
    path.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items()))
    return str(path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signal_to_the_agent_saves_and_ends_well(tmp_path: Path, number: signal.Signals) -> None:
    config = config_file(tmp_path, total_steps=100_000, ckpt_every=100_000, log_every=5)
    with training_process([config], 2, tmp_path, launcher=AGENT) as running:
        running.wait_for_output("step 5/")
        os.kill(running.process.pid, number)
        assert running.wait(60) == 0, running.output()
        assert "Traceback" not in running.output()
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert state["state"] == "preempted"
    assert Run(tmp_path / "run").checkpoint.name == f"checkpoint-{state['step']:08d}"


def test_killed_rank_ends_the_others_and_is_the_last_word(tmp_path: Path) -> None:
    config = config_file(tmp_path, total_steps=100_000, ckpt_every=100_000, log_every=5)
    with training_process([config], 2, tmp_path, launcher=AGENT) as running:
        running.wait_for_output("step 5/")
        os.kill(running.worker_pids()[1], signal.SIGKILL)
        assert running.wait(60) == 128 + signal.SIGKILL
        last = running.output().rstrip().splitlines()[-1]
    assert last.startswith("error: rank ")
    assert "was killed by SIGKILL, after step " in last


def test_restart_in_place_resumes_from_the_newest_checkpoint(tmp_path: Path) -> None:
    config = config_file(tmp_path, total_steps=60, ckpt_every=5, eval_every=1000, log_every=5)
    with training_process([config], 2, tmp_path, launcher=AGENT, torchrun_args=["--max-restarts=2"]) as running:
        running.wait_for_output("checkpoint-00000005")
        os.kill(running.worker_pids()[0], signal.SIGKILL)
        assert running.wait(120) == 0, running.output()
    assert Run(tmp_path / "run").values("resumed", "text")
    assert json.loads((tmp_path / "run" / "state.json").read_text()) == {"state": "done", "step": 60}


def test_users_mistake_is_said_once_and_last(tmp_path: Path) -> None:
    done = launch_training(["--train-data", "x.npy", "--vocab-size", "9"], 2, tmp_path, launcher=AGENT)
    assert done.returncode == 2
    assert done.stdout.count("x.npy: no such token file") == 1
    assert done.stdout.rstrip().splitlines()[-1].startswith("error: x.npy")
    assert "Traceback" not in done.stdout


# ---------------------------------------------------------------- several nodes without Slurm

NODE = REPOSITORY / "launch" / "node.sh"


def node(*args: object, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return subprocess.run(
        [NODE, *map(str, args)],
        env={**clean, "PYTHON": sys.executable, **env},
        capture_output=True,
        text=True,
        check=False,
    )


def start_node(stack: ExitStack, folder: Path, rank: int, *args: object) -> TrainingProcess:
    command = [str(NODE), *map(str, args), "--nnodes", "2", "--node-rank", str(rank)]
    log = folder / f"node{rank}.log"
    env = {**os.environ, "PYTHON": sys.executable, "TMPDIR": str(folder / "tmp")}
    with log.open("wb") as sink:
        process = subprocess.Popen(command, env=env, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True)
    running = TrainingProcess(process, log, command)
    stack.callback(running.kill)
    return running


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def test_two_nodes_on_one_machine_train_together_and_a_signal_to_one_stops_both(tmp_path: Path) -> None:
    length = {"total_steps": 100_000, "ckpt_every": 100_000, "eval_every": 100_000, "reproducible": True}
    config = config_file(tmp_path, **length)
    (tmp_path / "tmp").mkdir()
    # this machine's own name may mean 127.0.1.1, as on Debian
    options = ["--head", f"{socket.gethostname()}:{free_port()}"]
    with ExitStack() as stack:
        nodes = [start_node(stack, tmp_path, rank, config, *options) for rank in (0, 1)]
        nodes[0].wait_for_output("step 5/")
        os.kill(nodes[1].process.pid, signal.SIGTERM)
        assert [each.wait(60) for each in nodes] == [0, 0], nodes[0].output()
    assert "Traceback" not in nodes[0].output() + nodes[1].output()
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert state["state"] == "preempted"
    left = [path.name for path in (tmp_path / "tmp").iterdir()]
    assert not [name for name in left if not name.startswith("torchinductor_")], "torchrun's folders must be gone"
    ranks = json.loads((tmp_path / "run" / "environment.json").read_text())["ranks"]
    assert len({rank["pid"] for rank in ranks}) == 2
    alone = train(tmp_path, "alone", 1, **{**length, "stop_at_step": state["step"]})
    assert alone.digests() == Run(tmp_path / "run").digests()


def test_node_says_what_is_missing(tmp_path: Path) -> None:
    config = config_file(tmp_path)
    for args, sentence in [
        ((), "no configuration given"),
        (("nope.toml",), "there is no file nope.toml"),
        ((config,), "--nnodes is ''"),
        ((config, "--nnodes", "2"), "--node-rank is ''"),
        ((config, "--nnodes", "2", "--node-rank", "1"), "no --head given"),
        ((config, "--nnodes", "2", "--node-rank", "0", "--head", "localhost:x"), "--head names the port 'x'"),
        ((config, "--nnodes", "2", "--node-rank", "1", "--head", "no.such.host.invalid"), "cannot be reached from"),
    ]:
        done = node(*args)
        assert done.returncode == 2, done.stdout
        assert sentence in done.stderr


def test_port_that_is_taken_is_passed_over_or_told(tmp_path: Path) -> None:
    config = config_file(tmp_path)
    slurm = {"SLURM_JOB_ID": "5", "SLURM_JOB_NUM_NODES": "1"}
    first = node("--print-head", **slurm).stdout.strip()
    host, port = first.split(":")
    assert host == "127.0.0.1"
    assert port == "20005" or (int(port) - 20005) % 997 == 0, "20005, or the first free one in steps"
    with socket.socket() as squatter:
        squatter.bind(("", int(port)))
        squatter.listen()
        second = node("--print-head", **slurm).stdout.strip()
        assert second not in (first, node("--print-head", **{**slurm, "SLURM_JOB_ID": "6"}).stdout.strip())
        assert 20000 <= int(second.split(":")[1]) < 32000, "below the ports of outgoing connections"
        done = node(config, "--nnodes", "2", "--node-rank", "0", "--head", f"localhost:{port}", "--dry-run")
    assert done.returncode == 2
    assert f"port {port} of this node is taken" in done.stderr


def test_node_command(tmp_path: Path) -> None:
    config = config_file(tmp_path)
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text("#!/bin/sh\n[ $2 = hostnames ] && printf 'a\\nb\\n' || echo '   NodeAddr=127.0.0.1 Port=1'\n")
    scontrol.chmod(0o755)
    slurm = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "",
        "SLURM_JOB_ID": "12000",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "[ab]",
        "SLURM_NODEID": "1",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_CPUS_PER_TASK": "1",
        "TINYTRAIN_ATTEMPT": "12000.3",
    }
    done = node(config, "--dry-run", "--seed", "5", **slurm)
    assert done.returncode == 0, done.stderr
    *environment, command = done.stdout.splitlines()
    assert environment == ["GLOO_SOCKET_IFNAME=lo", "OMP_NUM_THREADS=1"]
    assert command.split()[1:] == [
        *"-P -m tinytrain_dist.agent --nnodes 2 --nproc-per-node 2 --rdzv-backend c10d".split(),
        *"--rdzv-endpoint 127.0.0.1:20000 --local-addr 127.0.0.1 --max-restarts 3".split(),
        *r"--rdzv-conf is_host=0\,join_timeout=600\,read_timeout=300 --rdzv-id 12000.3".split(),
        *f"{REPOSITORY}/launch/train.py {config} --seed 5".split(),
    ]
    direct = node(config, "--direct", "--dry-run", **slurm).stdout.splitlines()
    assert "MASTER_ADDR=127.0.0.1" in direct
    assert "MASTER_PORT=20000" in direct
    assert "tinytrain_dist.agent" not in direct[-1]


def test_slurm_tasks_are_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    from tinytrain_dist.distributed import rendezvous

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


# ---------------------------------------------------------------- the batch script, with a Slurm that is played

PLAYED = {
    "scontrol": 'case "$*" in *requeue*) echo requeue >>$FAKE/asked ;; *) echo node ;; esac',
    "squeue": "echo ${LEFT:-UNLIMITED}",
    # what it is asked for, and then the command after its options
    "srun": 'echo "srun $*" >>$FAKE/asked; while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "apptainer": 'echo "apptainer $*" >>$FAKE/asked; while [ "${1%.sif}" = "$1" ]; do shift; done; shift; exec "$@"',
}


def batch(folder: Path, config: str, **env: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """Run slurm/train.sbatch as the batch host would; what it printed, and what it asked Slurm for."""
    (folder / "fake").mkdir()
    for name, body in PLAYED.items():
        (folder / "fake" / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / "fake" / name).chmod(0o755)
    done = subprocess.run(
        ["bash", REPOSITORY / "slurm" / "train.sbatch", config],
        env={
            **os.environ,
            "FAKE": str(folder / "fake"),
            "PATH": f"{folder / 'fake'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "SLURM_SUBMIT_DIR": str(REPOSITORY),
            "SLURM_JOB_ID": str(free_port()),  # two sessions on one machine must not meet
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_JOB_NODELIST": "node",
            "SLURM_NODEID": "0",
            "SLURM_CPUS_PER_TASK": "2",
            **env,
        },
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    return done, (folder / "fake" / "asked").read_text()


def test_batch_script_in_a_container_with_apptainer(tmp_path: Path) -> None:
    config = config_file(tmp_path, total_steps=2)
    python = sys.executable
    done, asked = batch(tmp_path, config, CONTAINER="image.sif", CONTAINER_MOUNTS="/data", CONTAINER_PYTHON=python)
    assert done.returncode == 0, done.stdout + done.stderr
    prefix = f"apptainer exec --bind {REPOSITORY},{REPOSITORY},/data --pwd {REPOSITORY} image.sif"
    first, step, second = asked.splitlines()
    assert first == f"{prefix} {sys.executable} {REPOSITORY}/launch/submit.py --print-run {config}"
    assert step.startswith(f"srun --kill-on-bad-exit=1 --cpus-per-task=2 {prefix} {REPOSITORY}/launch/node.sh {config}")
    assert second == step.removeprefix("srun --kill-on-bad-exit=1 --cpus-per-task=2 ")
    assert "done at step 2, began at 0" in done.stdout


def test_batch_script_in_a_container_with_pyxis_and_a_deadline(tmp_path: Path) -> None:
    config = config_file(tmp_path, total_steps=20_000, ckpt_every=20_000, eval_every=20_000)
    started = time.monotonic()
    done, asked = batch(
        tmp_path, config, CONTAINER_IMAGE="org#image", CONTAINER_PYTHON=sys.executable, LEFT="0:15", MAX_RESTARTS="0"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    options = f"--container-image=org#image --container-workdir={REPOSITORY} "
    options += f"--container-mounts={REPOSITORY}:{REPOSITORY},{REPOSITORY}:{REPOSITORY}"
    first, step, requeue = asked.splitlines()
    assert first.startswith(
        f"srun --nodes=1 --ntasks=1 {options} {sys.executable} {REPOSITORY}/launch/submit.py --print-run"
    )
    assert step.startswith(f"srun --kill-on-bad-exit=1 --cpus-per-task=2 {options} {REPOSITORY}/launch/node.sh")
    assert requeue == "requeue"
    assert "15 s left" in done.stdout
    assert "preempted (time_limit)" in done.stdout
    assert time.monotonic() - started > 10
    assert (tmp_path / "run" / "requeues").read_text().split()[1] == "preempted"
