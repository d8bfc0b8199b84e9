"""Run the processes of a multi-process test: start them, collect what they return, and always end them.

Must not know what is trained. With `run_ranks`, a test of several ranks is an ordinary function. `launch_training` runs
the training command itself. Ranks are forked from one server process that has imported tests/helpers/preloaded.py. A
call therefore takes 0.1 s per rank instead of 4 s. Every call has new processes, so nothing is left over for the next
test.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tinytrain_dist.launch.standby_rank import STANDBY_NAME

REPOSITORY = Path(__file__).resolve().parents[2]
PRELOADED = "tests.helpers.preloaded"
# Forking a process that imported torch is safe while it has one thread. On other systems, libraries may start threads.
START_METHOD = "forkserver" if sys.platform == "linux" else "spawn"
STARTING_SECONDS = 120.0  # for imports; the time limit of a test begins afterwards
# When a rank fails, the others often fail within milliseconds because of it. Wait this long to see all errors.
SETTLING_SECONDS = 0.3
LATE = "was not done"
STACK_DUMP_SECONDS = (
    10.0  # a rank that is not done in time gets at most this long to write its stacks before it is killed
)


@dataclass
class _Rank:
    """One rank of one call: its process, its result or error, and when it failed."""

    rank: int
    process: BaseProcess
    connection: Connection
    log: Path
    result: Any = None
    returned: bool = False
    error: str | None = None
    failed_at: float = float("inf")

    @property
    def settled(self) -> bool:
        return self.returned or self.error is not None

    def fail(self, error: str, at_seconds: float) -> None:
        if self.error is None:
            self.error, self.failed_at, self.returned = error, at_seconds, False

    def kill(self) -> None:
        """End the rank and all processes that it started; each rank leads its own process group."""
        for end in (lambda: os.killpg(self.process.pid or 0, signal.SIGKILL), self.process.kill):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                end()
        self.process.join()
        self.connection.close()

    def log_tail(self, characters: int = 6000) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return text if len(text) <= characters else "[...]\n" + text[-characters:]


_alive: set[int] = set()


@atexit.register
def _kill_what_is_left() -> None:
    for pid in list(_alive):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout_seconds: float = 120,
    env: Mapping[str, str] | None = None,
) -> list[Any]:
    """Run `function(*args)` on `world_size` ranks and return what each returned, in the order of ranks.

    Each rank is a new process with the variables that torchrun would set (RANK, WORLD_SIZE, MASTER_PORT, ...), the
    caller's environment and working directory, `env` on top, and one torch thread. `function` must be a module-level
    function; its arguments and result are pickled. A process group that it leaves open is closed after all ranks have
    returned.

    Errors: AssertionError if a rank raises, dies or is not done in time. It names the first failing rank and has its
    traceback and output. All other ranks are killed at once, also if the caller is interrupted.
    """
    if "<locals>" in function.__qualname__:
        raise TypeError(f"{function.__qualname__} cannot be sent to a rank; move it to the top level of its module")
    import torch.distributed as dist

    # The parent serves the store, as torchrun's agent does. The system chooses the port, and no rank has to be first.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks: list[_Rank] = []
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        try:
            for rank in range(world_size):
                rank_env = {**os.environ, **_torchrun_env(rank, world_size, store.port), **(env or {})}
                ranks.append(
                    _start_rank(rank, Path(folder) / f"rank{rank}.log", rank_env, function, args, timeout_seconds)
                )
            _drive(ranks, timeout_seconds)
        finally:
            for each in ranks:
                each.kill()
                _alive.discard(each.process.pid or 0)
        for each in ranks:
            if output := each.log_tail():
                print(f"--- output of rank {each.rank} ---\n{output}")
        if any(each.error for each in ranks):
            raise AssertionError(_describe_failure(ranks, function))
    del store
    return [each.result for each in ranks]


def _torchrun_env(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "ROLE_RANK": str(rank),
        "ROLE_WORLD_SIZE": str(world_size),
        "ROLE_NAME": "default",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_RUN_ID": f"test-{port}",
        "OMP_NUM_THREADS": "1",
        # A laptop's own host name may resolve to an address that is down; a test needs the loopback only.
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0"),
    }


def _start_rank(
    rank: int,
    log: Path,
    env: Mapping[str, str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
    timeout_seconds: float,
) -> _Rank:
    context = multiprocessing.get_context(START_METHOD)
    if START_METHOD == "forkserver":
        context.set_forkserver_preload([PRELOADED])
    ours, theirs = context.Pipe()
    call = pickle.dumps((function, args))
    process = context.Process(
        target=_rank_main,
        args=(theirs, str(log), dict(env), os.getcwd(), list(sys.path), call, timeout_seconds),
        name=f"rank{rank}",
    )
    process.start()
    _alive.add(process.pid or 0)
    theirs.close()
    return _Rank(rank, process, ours, log)


def _rank_main(
    connection: Connection,
    log: str,
    env: dict[str, str],
    cwd: str,
    path: list[str],
    call: bytes,
    timeout_seconds: float,
) -> None:
    """Run as a rank: prepare, report ready, wait for the parent, run, send the result, wait again, close."""
    with contextlib.suppress(PermissionError):
        os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[:] = path
    try:
        import torch

        torch.set_num_threads(1)
        random.seed(0)
        function, args = pickle.loads(call)
        connection.send_bytes(pickle.dumps(("ready", None)))
        connection.recv_bytes()
        faulthandler.dump_traceback_later(timeout_seconds, file=sys.stderr)
        answer = pickle.dumps(("returned", function(*args)))
        faulthandler.cancel_dump_traceback_later()
    except BaseException:
        # Other ranks may hang in a collective with this rank. Do nothing: the parent ends all ranks.
        failed_at = time.monotonic()
        connection.send_bytes(pickle.dumps(("raised", (failed_at, traceback.format_exc()))))
        connection.recv_bytes()
        return
    connection.send_bytes(answer)
    connection.recv_bytes()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(os.getpid(), signal.SIGKILL)
        os._exit(1)


def _drive(ranks: list[_Rank], timeout_seconds: float) -> None:
    """Lead all ranks through the states ready, returned and ended; return early if one of them fails."""
    if not _collect(ranks, time.monotonic() + STARTING_SECONDS, "was not ready to start"):
        return
    _tell(ranks)
    for each in ranks:
        each.returned = False
    if not _collect(ranks, time.monotonic() + timeout_seconds, f"{LATE} after {timeout_seconds:g} s"):
        _await_stacks([each for each in ranks if (each.error or "").startswith(LATE)])
        return
    _tell(ranks)
    deadline = time.monotonic() + timeout_seconds
    for each in ranks:
        each.process.join(max(0.0, deadline - time.monotonic()))
        if each.process.exitcode != 0:
            each.fail(f"returned, but its process {_ending(each.process)}", time.monotonic())


def _tell(ranks: Iterable[_Rank]) -> None:
    for each in ranks:
        with contextlib.suppress(OSError):
            each.connection.send_bytes(b"go")


def _collect(ranks: list[_Rank], deadline: float, late: str) -> bool:
    """Wait until all ranks have answered, one has failed, or time is up; return whether all answered without error."""
    while waiting := [each for each in ranks if not each.settled]:
        if any(each.error for each in ranks):
            deadline = min(deadline, time.monotonic() + SETTLING_SECONDS)
        handles = {each.connection: each for each in waiting}
        ready = wait(list(handles), timeout=max(0.0, deadline - time.monotonic()))
        for connection in ready:
            _receive(handles[connection])
        if not ready and time.monotonic() >= deadline:
            if not any(each.error for each in ranks):
                for each in waiting:
                    each.fail(late, time.monotonic())
            break
    return all(each.error is None for each in ranks)


def _await_stacks(late: list[_Rank]) -> None:
    """Wait for ranks to write their stacks, which each does when its time is up, or a little later."""
    deadline = time.monotonic() + STACK_DUMP_SECONDS
    while not all(_has_all_stacks(each) for each in late) and time.monotonic() < deadline:
        time.sleep(0.02)


def _has_all_stacks(rank: _Rank) -> bool:
    """Return whether the stacks are complete: they end with the outermost frame of the main thread, a module."""
    _, timeout, stacks = rank.log_tail().partition("Timeout (")
    _, _, outermost_frames = stacks.partition(f"in {_rank_main.__name__}\n")
    return bool(timeout) and "in <module>\n" in outermost_frames


def _receive(each: _Rank) -> None:
    try:
        verb, payload = pickle.loads(each.connection.recv_bytes())
    except (EOFError, ConnectionResetError):
        each.process.join(STACK_DUMP_SECONDS)
        # A process that died is the cause of what other ranks report, even if their reports arrive first.
        each.fail(f"died: its process {_ending(each.process)}", float("-inf"))
        return
    if verb == "raised":
        each.fail(payload[1], payload[0])
    else:
        each.result, each.returned = payload, True


def _ending(process: BaseProcess) -> str:
    code = process.exitcode
    if code is None:
        return "did not end"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _describe_failure(ranks: list[_Rank], function: Callable[..., Any]) -> str:
    first = min((each for each in ranks if each.error), key=lambda each: (each.failed_at, each.rank))
    lines = [f"rank {first.rank} of {len(ranks)} failed in {function.__name__}: {(first.error or '').rstrip()}"]
    for each in ranks:
        if each is not first and each.error:
            lines.append(f"then rank {each.rank}: {each.error.rstrip().splitlines()[-1]}")
        elif each is not first:
            lines.append(f"rank {each.rank} {'had returned' if each.returned else 'was killed while it ran'}")
    # After a time-out, the stacks are in the output of every rank, and any of them may show the reason.
    timed_out = (first.error or "").startswith(LATE)
    for each in ranks if timed_out else [first]:
        if output := each.log_tail():
            lines.append(f"--- output of rank {each.rank} ---\n{output.rstrip()}")
    return "\n".join(lines)


# ---------------------------------------------------------------- the launcher's own command


@dataclass
class TrainingProcess:
    """A running `torchrun ... launch/train.py`: its process and its output so far."""

    process: subprocess.Popen[bytes]
    log: Path
    command: list[str] = field(default_factory=list)

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, timeout_seconds: float) -> int:
        """Wait and return the exit code. Errors: AssertionError with the output if it takes longer."""
        try:
            return self.process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"{' '.join(self.command)} was not done after {timeout_seconds:g} s\n{self.output()}"
            ) from None

    def wait_for_output(self, text: str, timeout_seconds: float = 120) -> str:
        """Return all output once it contains `text`. Errors: AssertionError if the process ends or is too slow."""
        deadline = time.monotonic() + timeout_seconds
        while text not in (output := self.output()):
            ended = self.process.poll() is not None
            if (ended and text not in self.output()) or time.monotonic() > deadline:
                state = f"ended with {self.process.returncode}" if ended else f"ran for {timeout_seconds:g} s"
                raise AssertionError(f"{' '.join(self.command)} {state} without printing {text!r}\n{output}")
            time.sleep(0.02)
        return output

    def worker_pids(self) -> list[int]:
        """Return the process IDs of the ranks, to send signals to them."""
        return [pid for pid in descendants(self.process.pid) if "train.py" in _command_line(pid)]

    def kill(self) -> None:
        """End torchrun and its workers. Each worker leads a session, so killing torchrun's group would not end it."""
        family = [self.process.pid, *descendants(self.process.pid)]
        for pid in family:
            for end in (os.killpg, os.kill):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    end(pid, signal.SIGKILL)
        self.process.wait()


def default_signals() -> None:
    """Give a new process the signal handling of a login shell, even if the tests run under nohup."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)


TORCHRUN = ("-m", "torch.distributed.run")
AGENT = ("-m", "tinytrain_dist.agent")


@contextlib.contextmanager
def training_process(
    args: Sequence[str],
    nproc: int,
    cwd: Path | str,
    env: Mapping[str, str] | None = None,
    *,
    torchrun_args: Sequence[str] = (),
    script: Path | str = REPOSITORY / "launch" / "train.py",
    launcher: Sequence[str] = TORCHRUN,
    rendezvous: Sequence[str] = ("--standalone",),
) -> Iterator[TrainingProcess]:
    """Start `torchrun --standalone ... launch/train.py ARGS` on `nproc` ranks; end all processes on the way out."""
    command = [sys.executable, *launcher, *rendezvous, f"--nproc-per-node={nproc}"]
    command += [*torchrun_args, str(script), *map(str, args)]
    full_env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        **({"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if tuple(launcher) == TORCHRUN else {}),
        "PYTHONUNBUFFERED": "1",
        **(env or {}),
    }
    with tempfile.TemporaryDirectory(prefix="training-") as folder:
        log = Path(folder) / "output.log"
        with log.open("wb") as sink:
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env=full_env,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=default_signals,
            )
        running = TrainingProcess(process, log, command)
        try:
            yield running
        finally:
            running.kill()


def launch_training(
    args: Sequence[str],
    nproc: int,
    cwd: Path | str,
    env: Mapping[str, str] | None = None,
    *,
    timeout_seconds: float = 300,
    torchrun_args: Sequence[str] = (),
    script: Path | str = REPOSITORY / "launch" / "train.py",
    launcher: Sequence[str] = TORCHRUN,
) -> subprocess.CompletedProcess[str]:
    """Run the training command to its end. The caller checks `returncode` and `stdout` (both streams)."""
    with training_process(
        args, nproc, cwd, env, torchrun_args=torchrun_args, script=script, launcher=launcher
    ) as running:
        returncode = running.wait(timeout_seconds)
        return subprocess.CompletedProcess(running.command, returncode, stdout=running.output(), stderr="")


def descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for child, parent in living_processes():
        children.setdefault(parent, []).append(child)
    found, queue = [], [pid]
    while queue:
        new = children.get(queue.pop(), [])
        found += new
        queue += new
    return found


def standbys(agent: int) -> list[int]:
    """Return the process IDs of the standbys of an agent that have imported torch or do so; see standby_rank.py."""
    return [pid for pid in descendants(agent) if _process_name(pid) == STANDBY_NAME]


def _process_name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def living_processes() -> list[tuple[int, int]]:
    """Return (process ID, parent's process ID) of all processes; from /proc, because small images have no ps."""
    if not Path("/proc/self/stat").exists():
        table = subprocess.run(
            ["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True, check=True
        ).stdout
        rows = [line.split() for line in table.splitlines()]
        return [(int(pid), int(parent)) for pid, parent, state in rows if "Z" not in state]
    pairs = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process ended while it was read
            # The name of the command is in brackets and may contain spaces, so count from the closing bracket.
            state, parent = stat.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if state != "Z":  # a zombie: it ended, and its parent has not waited for it yet
                pairs.append((int(stat.parent.name), int(parent)))
    return pairs


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
    except OSError:
        return subprocess.run(
            ["ps", "-o", "command=", "-p", str(pid)], capture_output=True, text=True, check=False
        ).stdout
