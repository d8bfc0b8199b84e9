"""Start the ranks of one machine or of one node, by launch/node.sh and by the functions behind it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import pytest

from tests.helpers.launching import free_port
from tests.helpers.ranks import REPOSITORY, TrainingProcess, default_signals
from tests.helpers.training import Run, config_file, train
from tinytrain_dist.distributed.network import is_free
from tinytrain_dist.distributed.torch_internals import tcp_store
from tinytrain_dist.distributed.torchrun_internals import serve_rendezvous
from tinytrain_dist.launch import start

pytestmark = pytest.mark.multiprocess
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


def test_two_nodes_on_one_machine_train_together_and_a_signal_to_one_stops_both(tmp_path: Path) -> None:
    length = {"total_steps": 100_000, "ckpt_every": 100_000, "eval_every": 100_000, "reproducible": True}
    config = config_file(tmp_path, **length)
    (tmp_path / "tmp").mkdir()
    # this machine's own name may resolve to 127.0.1.1, as on Debian
    options = ["--head", f"{socket.gethostname()}:{free_port()}"]
    with ExitStack() as stack:
        nodes = [start_node(stack, tmp_path, 0, config, *options)]
        nodes[0].wait_for_output("waiting for the other nodes to join at ")
        nodes.append(start_node(stack, tmp_path, 1, config, *options))
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


def test_node_reports_what_is_missing(tmp_path: Path) -> None:
    config = config_file(tmp_path)
    for args, sentence in [
        ((), "CONFIG.toml is missing"),
        (("nope.toml",), "there is no file nope.toml"),
        ((config,), "--nnodes: ''"),
        ((config, "--nnodes", "2"), "--node-rank: ''"),
        ((config, "--nnodes", "2", "--node-rank", "1"), "--head: not set"),
        ((config, "--nnodes", "2", "--node-rank", "0", "--head", "localhost:x"), "--head: 'x' is not a port"),
        ((config, "--nnodes", "2", "--node-rank", "0", "--head", "localhost:99999"), "--head: '99999' is not a port"),
        ((config, "--nnodes", "2", "--node-rank", "0", "--head", "::1"), "--head: '::1' is an IPv6 address"),
        ((config, "--nnodes", "2", "--node-rank", "1", "--head", "no.such.host.invalid"), "cannot be reached from"),
        ((config, "--nnodes", "1", "--node-rank", "0", "--nproc", "0"), "--nproc: 0 is not a number of processes"),
        ((config, "--nnodes", "3:2", "--node-rank", "0", "--head", "a"), "--nnodes: 3:2 has more nodes at least"),
        ((config, "--nnodes", "3:2", "--store", "127.0.0.1"), "--nnodes: 3:2 has more nodes at least"),
        ((config, "--nnodes", "2", "--store", "127.0.0.1", "--node-rank", "0"), "--node-rank: has no effect with"),
        ((config, "--nnodes", "2", "--store", "127.0.0.1:x"), "--store: 'x' is not a port"),
        ((config, "--nnodes", "2", "--store", "no.such.host.invalid"), "--store: no.such.host.invalid cannot be"),
        ((config, "--nnodes", "2", "--address", "127.0.0.1"), "--address: has an effect only with --store"),
        ((config, "--nnodes", "2", "--node-rank", "5", "--head", "a"), "--node-rank: '5' is not a node's number"),
        ((tmp_path,), "is not a regular file"),
        ((config, "--nnodes", "1", "--node-rank", "x"), "--node-rank: got 'x'; give a number"),
    ]:
        done = node(*args)
        assert done.returncode == 2, done.stdout
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_skipped_or_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Path(config_file(tmp_path))
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    first = start.head_endpoint(None)
    host, port = first.split(":")
    assert host == "127.0.0.1"
    assert port == "20005" or (int(port) - 20005) % 997 == 0, "20005, or the first free one in steps"
    with socket.socket() as squatter:
        squatter.bind(("", int(port)))
        squatter.listen()
        second = start.head_endpoint(None)
        monkeypatch.setenv("SLURM_JOB_ID", "6")
        assert second not in (first, start.head_endpoint(None))
        assert 20000 <= int(second.split(":")[1]) < 32000, "below the ports of outgoing connections"
        options = start.NodeOptions(nnodes="2", node_rank=0, head=f"localhost:{port}")
        with pytest.raises(start.StartError, match=f"port {port} of this node is taken"):
            start.node_command(config, [], options)


class Became(Exception):
    """What this process would have become: the environment of the new program."""


def test_the_port_of_the_head_is_bound_before_the_agent_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def become(_: str, __: object, environment: dict[str, str]) -> None:
        raise Became(environment)

    monkeypatch.setattr(start.os, "execvpe", become)
    port = free_port()
    command = start.Command(["agent"], {}, port=port)
    handler = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(Became) as became:
        command.run()
    signal.signal(signal.SIGUSR1, handler)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []), "a program that could not start leaves signals kept back"
    assert not is_free(port), "no other process can take it"
    with pytest.raises(start.StartError, match=f"port {port} of this node is taken"):
        command.run()
    monkeypatch.setenv("TINYTRAIN_LISTENER", became.value.args[0]["TINYTRAIN_LISTENER"])
    agents = serve_rendezvous(f"node0:{port}")
    torchruns = tcp_store("127.0.0.1", port, None, True, timedelta(seconds=60))
    agents.set("key", "value")
    assert torchruns.get("key") == b"value", "torchrun uses the server of the agent"
    assert "TINYTRAIN_LISTENER" not in os.environ
    assert serve_rendezvous(f"node0:{port}") is None


def test_the_command_of_a_node_under_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Path(config_file(tmp_path))
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text("#!/bin/sh\n[ $2 = hostnames ] && printf 'a\\nb\\n' || echo '   NodeAddr=127.0.0.1 Port=1'\n")
    scontrol.chmod(0o755)
    for name, value in {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "",
        "SLURM_JOB_ID": "12000",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "[ab]",
        "SLURM_NODEID": "1",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_CPUS_PER_TASK": "1",
        "TINYTRAIN_ATTEMPT": "12000.3",
    }.items():
        monkeypatch.setenv(name, value)
    command = start.node_command(config, ["--seed", "5"], start.NodeOptions(slurm=True))
    assert command.environment == {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    python = sys.executable
    assert command.arguments == [
        *f"{python} -P -m tinytrain_dist.agent --nnodes 2 --max-restarts 3 --rdzv-backend c10d".split(),
        *"--rdzv-endpoint 127.0.0.1:20000 --rdzv-conf is_host=0,join_timeout=600,read_timeout=300".split(),
        *"--rdzv-id 12000.3 --local-addr 127.0.0.1 --nproc-per-node 2 --no-python".split(),
        *f"{python} -P -u -m tinytrain_dist.train {config} --seed 5".split(),
    ]
    monkeypatch.setenv("MAX_RESTARTS", "x")
    with pytest.raises(start.StartError, match="MAX_RESTARTS: 'x' is not a whole number"):
        start.node_command(config, [], start.NodeOptions(slurm=True))
    with pytest.raises(start.StartError, match="--max-restarts: -1 is negative"):
        start.node_command(config, [], start.NodeOptions(slurm=True, max_restarts=-1))
    direct = start.node_command(config, [], start.NodeOptions(direct=True))
    assert direct.environment["MASTER_ADDR"] == "127.0.0.1"
    assert direct.environment["MASTER_PORT"] == "20000"
    assert direct.arguments == [*f"{python} -P -m tinytrain_dist.train {config}".split()]


def test_the_command_of_a_node_that_may_be_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Path(config_file(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    options = start.NodeOptions(nnodes="1:3", store="127.0.0.1", address="127.0.0.3", nproc=2)
    command = start.node_command(config, [], options)
    assert command.environment == {
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "TINYTRAIN_ELASTIC": "1",
    }
    conf = "is_host=0,join_timeout=3600,read_timeout=60,last_call_timeout=30,keep_alive_interval=1,"
    python = sys.executable
    assert command.arguments == [
        *f"{python} -P -m tinytrain_dist.agent --nnodes 1:3 --max-restarts 1000 --rdzv-backend c10d".split(),
        *f"--rdzv-endpoint 127.0.0.1:29400 --rdzv-conf {conf}keep_alive_max_attempt=5".split(),
        *"--rdzv-id tinytrain --local-addr 127.0.0.3 --nproc-per-node 2 --no-python".split(),
        *f"{python} -P -u -m tinytrain_dist.train {config}".split(),
    ]


def test_the_command_on_one_machine_has_a_rank_for_each_gpu_or_fills_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Path(config_file(tmp_path))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for gpus, cores, nproc, threads in ((0, 6, 4, "1"), (0, 64, 8, "8"), (0, 1, 1, "1"), (3, 12, 3, "4")):
        monkeypatch.setattr(start, "visible_gpus", lambda gpus=gpus: gpus)
        monkeypatch.setattr(start, "usable_cores", lambda cores=cores: cores)
        command = start.local_command(config, ["--seed", "5"])
        assert command.arguments[command.arguments.index("--nproc-per-node") + 1] == str(nproc)
        assert command.environment == {"OMP_NUM_THREADS": threads}
    with pytest.raises(start.StartError, match="--max-restarts: -1 is negative"):
        start.local_command(config, [], max_restarts=-1)
    assert "--max-restarts 2" in " ".join(start.local_command(config, [], max_restarts=2).arguments)


@pytest.mark.parametrize(
    ("given", "accepted"), [("abc", False), ("0", False), ("-1", False), ("2", True), ("2,1", True)]
)
def test_a_number_of_threads_that_cannot_be_used_is_refused(
    given: str, accepted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Path(config_file(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    if accepted:
        assert start.local_command(config, [], nproc=1).environment == {"OMP_NUM_THREADS": given}
    else:
        with pytest.raises(start.StartError, match=f"OMP_NUM_THREADS: '{given}' is not a number of threads; correct"):
            start.local_command(config, [], nproc=1)


EARLY_INTERRUPT = """
import os, signal, sys
from tinytrain_dist import __main__
from tinytrain_dist.launch import start
become = os.execvpe
def interrupt_and_become(*arguments):
    os.kill(os.getpid(), signal.SIGINT)
    become(*arguments)
os.execvpe = interrupt_and_become
sys.exit(__main__.main(["train", sys.argv[1], "--nproc", "1"]))
"""


def test_an_interrupt_before_the_agent_has_its_handlers_is_kept_for_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", EARLY_INTERRUPT, config_file(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=default_signals)
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines()[-1] == "interrupted"
    assert "Traceback" not in done.stderr
