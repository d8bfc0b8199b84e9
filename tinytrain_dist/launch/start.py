"""Start the ranks of this machine: find cores, GPUs, addresses and ports, then become the agent or a rank.

Must not import torch or read settings: the agent does both. Read `local_command`, for all ranks on this machine, and
`node_command`, for one of several nodes. Both return a command, which `run` executes in place of this process.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tinytrain_dist.config.loading import config_file_of
from tinytrain_dist.distributed.network import (
    address_towards,
    hand_over,
    interface_addresses,
    is_free,
    is_ip_address,
    is_loopback,
    listen,
    resolve,
    slurm_hosts,
)
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.launch.machine import usable_cores, visible_gpus
from tinytrain_dist.reliability.stop_requests import block_stop_signals, unblock_stop_signals

RANK_MODULE = "tinytrain_dist.train"
AGENT_MODULE = "tinytrain_dist.agent"
MOST_CPU_RANKS = 8  # that are started on one machine without GPUs, if the user gives no number
MAX_RESTARTS = 3
# Ports for the rendezvous are below those of outgoing connections, which begin at 32768 on Linux.
DEFAULT_PORT = 29400  # as torchrun's
LARGEST_PORT = 65_535
FIRST_JOB_PORT = 20_000
NUM_JOB_PORTS = 12_000
PORT_STEP = 997  # jobs with neighbouring numbers often start together, and this leads them to different ports
# Importing from a shared disk can take minutes, and differs between nodes.
JOIN_SECONDS = 600
# Of torchrun's rendezvous in a run whose nodes come and go. A node is lost after five seconds without a sign of life:
# the real gap between two of them is up to twice the interval. last_call: for more nodes at the start, as torchrun's.
ELASTIC_RENDEZVOUS = {
    "join_timeout": 3600,
    "read_timeout": 60,
    "last_call_timeout": 30,
    "keep_alive_interval": 1,
    "keep_alive_max_attempt": 5,
}
ELASTIC_RESTARTS = 1000  # the history of the run decides before that, see reliability/restart_history.py
READ_SECONDS = 300


class StartError(ConfigError):
    """The ranks cannot be started as asked for."""

    def __init__(self, problem: str) -> None:
        """problem: a sentence that begins with the name of the option."""
        super().__init__(problem, "the command line")


@dataclass(frozen=True)
class Command:
    """A command and the environment variables that it needs in addition."""

    arguments: list[str]
    environment: dict[str, str]
    summary: str = ""  # one line for the user
    port: int | None = None  # on which the command listens; None: on none, or on one that it chooses

    def describe(self) -> str:
        """Return the variables, one per line, and the command, as a shell would read them."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in sorted(self.environment.items())]
        return "\n".join([*variables, shlex.join(self.arguments)])

    def run(self) -> NoReturn:
        """Become this command: the process stays the same, so signals reach what it starts.

        The port is bound here, and handed over: the command takes seconds until it could bind the port.
        Errors: StartError if the port is taken.
        """
        environment = {**os.environ, **self.environment}
        if self.port is not None:
            try:
                environment |= hand_over(listen(self.port))
            except OSError:
                raise _port_is_taken(self.port) from None
        # asks for a stop; must not kill this process before the program handles it (it does so in any case)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        block_stop_signals()
        try:
            if self.summary:
                with contextlib.suppress(OSError):
                    print(self.summary, file=sys.stderr, flush=True)
            os.execvpe(self.arguments[0], self.arguments, environment)
        finally:  # only if the command could not be started
            unblock_stop_signals()


@dataclass(frozen=True)
class NodeOptions:
    """How this node takes part in a run on several nodes. None: by Slurm's variables with `slurm`, else by default."""

    nnodes: str | None = None  # "N", or "MIN:MAX"
    node_rank: int | None = None
    head: str | None = None  # HOST or HOST:PORT
    nproc: int | None = None
    rdzv_id: str | None = None
    max_restarts: int | None = None
    store: str | None = None  # HOST or HOST:PORT of `tinytrain store`; None: node 0 serves the rendezvous
    address: str | None = None  # of this node, as the others reach it
    leave_on_sigterm: bool = False  # with `store`: SIGTERM takes this node out of the run, and does not stop it
    direct: bool = False  # this process is one rank, and srun has started all of them
    slurm: bool = False  # take what is None from Slurm's variables


def check_config_file(config: Path) -> None:
    """Check that there is such a file, or a run with a config.toml, on this machine. Errors: StartError."""
    config = config_file_of(config)
    if config.exists() and not config.is_file():
        raise StartError(f"CONFIG: {config} is not a regular file; give a .toml file")
    if not config.is_file():
        raise StartError(
            f"CONFIG: there is no file {config} on {socket.gethostname()}; `tinytrain new FOLDER` makes one"
        )


def local_command(
    config: Path, settings: Sequence[str], nproc: int | None = None, max_restarts: int | None = None
) -> Command:
    """Return the command that starts all ranks on this machine.

    nproc: their number; None: one for each GPU. max_restarts: how often they are started again; None: never.
    Errors: StartError.
    """
    check_config_file(config)
    gpus, cores = visible_gpus(), usable_cores()
    if nproc is None:
        # with a power of two, the shares of most batches are even
        nproc = gpus or min(MOST_CPU_RANKS, 1 << (cores.bit_length() - 1))
    threads = _threads_per_rank(_checked_nproc(nproc), cores)
    restarts = [] if max_restarts is None else ["--max-restarts", str(_restarts(max_restarts))]
    where = f"{gpus} GPU(s)" if gpus else f"{cores} CPU core(s)"
    return Command(
        [*_python("-m", AGENT_MODULE), "--standalone", *restarts, *_rank_arguments(nproc, config, settings)],
        {"OMP_NUM_THREADS": threads},
        f"tinytrain train: {nproc} process(es) on {where}, {threads} thread(s) each",
    )


def module_command(module: str, arguments: Sequence[str], nproc: int) -> Command:
    """Return the command that starts a module of this package on several processes of this machine."""
    agent = [*_python("-m", AGENT_MODULE), "--standalone", "--nproc-per-node", str(nproc), "--no-python"]
    threads = _threads_per_rank(_checked_nproc(nproc), usable_cores())
    return Command([*agent, *_python("-u", "-m", module), *arguments], {"OMP_NUM_THREADS": threads})


def node_command(config: Path, settings: Sequence[str], options: NodeOptions) -> Command:
    """Return the command that starts the ranks of this node, or with `direct` the single rank of this task.

    Errors: StartError if an option is missing or wrong, the head cannot be reached, or its port is taken.
    """
    check_config_file(config)
    if options.store is not None:
        return elastic_command(config, settings, options)
    if options.address is not None:
        raise StartError("--address: has an effect only with --store; leave it out")
    if options.leave_on_sigterm:
        raise StartError("--leave-on-sigterm: has an effect only with --store; leave it out")
    slurm = os.environ if options.slurm or options.direct else {}
    nodes = SlurmNodes.of(slurm)
    nnodes = options.nnodes or slurm.get("SLURM_JOB_NUM_NODES", "")
    node_rank = slurm.get("SLURM_NODEID", "") if options.node_rank is None else str(options.node_rank)
    _, most = _node_range(nnodes)
    if not node_rank.isdecimal() or int(node_rank) >= most:
        raise StartError(
            f"--node-rank: {node_rank!r} is not a node's number; give 0 on the head, 1, 2, ... on the others"
        )
    head, port = split_head(options.head or (nodes.address(0) if nodes.names else ""), job_port(slurm))
    if not head and nnodes != "1":
        raise StartError("--head: not set; give the name or address of node 0 as the other nodes reach it")
    address = _own_address(head or nodes.peer_of_head())
    # without torchrun, every task is a rank with its own cores, and only rank 0 needs the port
    is_head = (slurm.get("SLURM_PROCID", "0") if options.direct else node_rank) == "0"
    if is_head and not is_free(port):
        raise _port_is_taken(port)
    own_port = port if is_head else None
    nproc = 1 if options.direct else _processes_of_node(options.nproc, slurm)
    environment = {
        "OMP_NUM_THREADS": _threads_per_rank(nproc, _cores_of_task(options.direct, slurm)),
        "PYTHONUNBUFFERED": "1",
        **_gloo_interface(address),
    }
    if options.direct:
        environment |= {"MASTER_ADDR": head or address, "MASTER_PORT": str(port)}
        return Command([*_python("-m", RANK_MODULE), str(config), *settings], environment, port=own_port)
    agent = [*_python("-m", AGENT_MODULE), "--nnodes", nnodes, "--max-restarts", str(_restarts(options.max_restarts))]
    # is_host: torch would guess it from host names
    conf = f"is_host={int(is_head)},join_timeout={JOIN_SECONDS},read_timeout={READ_SECONDS}"
    agent += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{head or address}:{port}", "--rdzv-conf", conf]
    agent += ["--rdzv-id", _run_name(options, slurm), "--local-addr", address]
    return Command([*agent, *_rank_arguments(nproc, config, settings)], environment, port=own_port)


def elastic_command(config: Path, settings: Sequence[str], options: NodeOptions) -> Command:
    """Return the command that starts the ranks of this node in a run whose nodes may come and go.

    Errors: StartError if an option is missing or wrong, or the store cannot be reached.
    """
    slurm = os.environ if options.slurm else {}
    nnodes = options.nnodes or slurm.get("SLURM_JOB_NUM_NODES", "")
    fewest, most = _node_range(nnodes)
    for name, value in (("--node-rank", options.node_rank), ("--head", options.head), ("--direct", options.direct)):
        if value is not None and value is not False:
            raise StartError(f"{name}: has no effect with --store, where every node is started alike; leave it out")
    host, port = split_head(options.store or "", job_port(slurm), "--store")
    if not host:
        raise StartError("--store: is empty; give HOST:PORT, as `tinytrain store` prints it")
    address = options.address or _own_address(host, "--store")
    nproc = _processes_of_node(options.nproc, slurm)
    environment = {
        "OMP_NUM_THREADS": _threads_per_rank(nproc, _cores_of_task(False, slurm)),
        "PYTHONUNBUFFERED": "1",
        "TINYTRAIN_ELASTIC": "1",
        **({"TINYTRAIN_LEAVE_ON_SIGTERM": "1"} if options.leave_on_sigterm else {}),
        **_gloo_interface(address),
    }
    restarts = ELASTIC_RESTARTS if options.max_restarts is None else options.max_restarts
    conf = {"is_host": 0, **ELASTIC_RENDEZVOUS}
    agent = [*_python("-m", AGENT_MODULE), "--nnodes", f"{fewest}:{most}", "--max-restarts", str(_restarts(restarts))]
    agent += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{host}:{port}"]
    agent += ["--rdzv-conf", ",".join(f"{name}={value}" for name, value in conf.items())]
    agent += ["--rdzv-id", _run_name(options, slurm), "--local-addr", address]
    return Command([*agent, *_rank_arguments(nproc, config, settings)], environment)


def _node_range(nnodes: str) -> tuple[int, int]:
    """Return MIN and MAX of --nnodes. Errors: StartError."""
    if not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", nnodes):
        raise StartError(f"--nnodes: {nnodes!r} is not a number of nodes; give a whole number, or MIN:MAX")
    fewest, _, most = nnodes.partition(":")
    if most and int(fewest) > int(most):
        raise StartError(f"--nnodes: {nnodes} has more nodes at least than at most; give MIN:MAX")
    return int(fewest), int(most or fewest)


def _run_name(options: NodeOptions, slurm: Mapping[str, str]) -> str:
    return options.rdzv_id or slurm.get("TINYTRAIN_ATTEMPT") or slurm.get("SLURM_JOB_ID") or "tinytrain"


def _restarts(asked: int | None) -> int:
    """Return how often the processes are started again: as asked for, or by the variable MAX_RESTARTS."""
    given = os.environ.get("MAX_RESTARTS") or str(MAX_RESTARTS)
    if asked is None and not given.isdecimal():
        raise StartError(f"MAX_RESTARTS: {given!r} is not a whole number; correct the variable, or unset it")
    restarts = int(given) if asked is None else asked
    if restarts < 0:
        raise StartError(f"--max-restarts: {restarts} is negative; give 0 for no restart")
    return restarts


def _port_is_taken(port: int) -> StartError:
    return StartError(f"--head: port {port} of this node is taken; give another one on every node: HOST:PORT")


def head_endpoint(peer: str | None) -> str:
    """Return HOST:PORT, how other nodes of a Slurm job reach this node and a free port of it.

    peer: the name or address of another node of the job; None: as Slurm knows it. Errors: StartError.
    """
    nodes = SlurmNodes.of(os.environ)
    peer = peer or nodes.peer_of_head()
    first = job_port(os.environ)
    ports = [FIRST_JOB_PORT + (first - FIRST_JOB_PORT + PORT_STEP * k) % NUM_JOB_PORTS for k in range(100)]
    return f"{_own_address(peer)}:{next(filter(is_free, ports), first)}"


@dataclass(frozen=True)
class SlurmNodes:
    """The nodes of a Slurm job, in the order of their ranks."""

    names: list[str]

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> SlurmNodes:
        """Return the nodes that Slurm's variables name; none outside a job, or where scontrol is missing."""
        return cls(slurm_hosts(environment))

    def peer_of_head(self) -> str:
        """Return a host that node 0 must reach: the second node, or this machine if there is none."""
        return self.address(1) if len(self.names) > 1 else "127.0.0.1"

    def address(self, number: int) -> str:
        """Return the address that Slurm has for a node, or its name if Slurm has none."""
        record = _scontrol("show", "node", self.names[number])
        found = re.search(r"NodeAddr=(\S+)", record)
        return found[1] if found else self.names[number]


def _scontrol(*arguments: str) -> str:
    try:
        return subprocess.run(["scontrol", *arguments], capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""


def job_port(environment: Mapping[str, str]) -> int:
    """Return the port of the rendezvous: of a Slurm job one by its number, else torchrun's."""
    job = environment.get("SLURM_JOB_ID", "")
    return FIRST_JOB_PORT + int(job) % NUM_JOB_PORTS if job.isdecimal() else DEFAULT_PORT


def split_head(head: str, port: int, option: str = "--head") -> tuple[str, int]:
    """Return host and port of HOST or HOST:PORT; `port` if it names none. Errors: StartError, naming the option."""
    if head.count(":") > 1:
        raise StartError(f"{option}: {head!r} is an IPv6 address; give a name that resolves to it, or an IPv4 address")
    host, colon, text = head.partition(":")
    if not colon:
        return head, port
    if not text.isdecimal() or not 1 <= int(text) <= LARGEST_PORT:
        raise StartError(f"{option}: {text!r} is not a port; give HOST:PORT with a port from 1 to {LARGEST_PORT}")
    return host, int(text)


def _own_address(peer: str, option: str = "head") -> str:
    try:
        return address_towards(peer)
    except OSError as error:
        raise StartError(
            f"{option}: {peer} cannot be reached from {socket.gethostname()} ({error}); give an address that this node "
            "knows"
        ) from None


def _gloo_interface(address: str) -> dict[str, str]:
    """Return the variable that names the interface with this address, unless the user has set it.

    gloo would use this machine's own name, which may resolve to another interface. NCCL chooses one itself.
    """
    own = resolve(address) or [address]
    on_loopback = is_ip_address(own[0]) and is_loopback(own[0])  # every 127.x.y.z is there
    interfaces = interface_addresses().items()
    name = next((name for name, value in interfaces if value in own or (on_loopback and is_loopback(value))), "")
    return {"GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME") or name} if name else {}


def _processes_of_node(nproc: int | None, environment: Mapping[str, str]) -> int:
    if nproc is None:
        given = environment.get("SLURM_GPUS_ON_NODE") or environment.get("PROCESSES_PER_NODE") or ""
        nproc = int(given) if given.isdecimal() else visible_gpus() or 1
    return _checked_nproc(nproc)


def _checked_nproc(nproc: int) -> int:
    if nproc < 1:
        raise StartError(f"--nproc: {nproc} is not a number of processes; give at least 1")
    return nproc


def _cores_of_task(direct: bool, environment: Mapping[str, str]) -> int:
    """Return the number of cores for this task, at most those that Slurm has given to it."""
    given = environment.get("SLURM_CPUS_PER_TASK") or ("1" if direct else environment.get("SLURM_CPUS_ON_NODE", ""))
    cores = usable_cores()
    return min(cores, int(given)) if given.isdecimal() else cores


def _threads_per_rank(nproc: int, cores: int) -> str:
    given = os.environ.get("OMP_NUM_THREADS", "").strip()
    if given and not re.fullmatch(r"0*[1-9]\d*(,\s*0*[1-9]\d*)*", given):  # a list is for nested parallel regions
        raise StartError(f"OMP_NUM_THREADS: {given!r} is not a number of threads; correct the variable, or unset it")
    return given or str(max(1, cores // nproc))


def _python(*arguments: str) -> list[str]:
    """Return a command of this Python. -P: modules in the current folder must not hide installed ones."""
    return [sys.executable, "-P", *arguments]


def _rank_arguments(nproc: int, config: Path, settings: Sequence[str]) -> list[str]:
    """Return torchrun's arguments for the ranks of one node."""
    program = [*_python("-u", "-m", RANK_MODULE), str(config), *settings]
    return ["--nproc-per-node", str(nproc), "--no-python", *program]
