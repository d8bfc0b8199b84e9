"""Start the store and the nodes of an elastic run, and do to a node what can happen to a machine.

Must not know which events there are, or what a run records.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chaos_nodes.network import BRIDGE_ADDRESS, Network, in_namespace, write_names
from tests.helpers.ranks import REPOSITORY, descendants, standbys
from tests.helpers.training import settings_for

STORE_PORT = 29400
BRAKE_SECONDS = 0.05  # longer steps: the same time of training has fewer of them for the undisturbed run to compute
SLOW_PERIOD_SECONDS = 0.4  # a slow node is stopped during the first three quarters of each


class ChaosError(Exception):
    """The run did not do what it has to; the text says what."""


@dataclass(frozen=True)
class Setup:
    """What all nodes of a run share: its folder, its configuration and the commands to start it."""

    folder: Path
    config: Path
    fewest: int
    most: int

    @classmethod
    def make(cls, folder: Path, fewest: int, most: int, **overrides: Any) -> Setup:
        """Write the configuration, and copy the code with a program for ranks that has a brake."""
        code = folder / "code"
        shutil.copytree(REPOSITORY / "tinytrain_dist", code / "tinytrain_dist", ignore=_no_caches)
        braked = REPOSITORY / "tests" / "helpers" / "slurm" / "train.py"
        shutil.copyfile(braked, code / "tinytrain_dist" / "train.py")
        write_names(folder)
        config = folder / "run.toml"
        settings = settings_for(folder, "run", **overrides)
        config.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items()))
        return cls(folder, config, fewest, most)

    @property
    def run(self) -> Path:
        """The run folder, which all nodes share."""
        return self.folder / "run"

    def tinytrain(self, *arguments: str) -> list[str]:
        """Return the command line of a verb."""
        return [sys.executable, "-P", "-m", "tinytrain_dist", *arguments]

    def environment(self, **variables: str) -> dict[str, str]:
        """Return the environment of a process that runs the copied code."""
        shared = {"PYTHONPATH": str(self.folder / "code"), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        # as on a user's machine: otherwise each process would compile the copied code again
        own = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        return {**own, **shared, **variables}

    def train_alone(self, name: str, step: int) -> Path:
        """Train the same run in one undisturbed process until a step; return its folder. Errors: ChaosError."""
        folder = self.folder / name
        command = self.tinytrain("train", str(self.config), "--nproc", "1", "--target-dir", str(folder))
        command += ["--stop-at-step", str(step), "--log-every", "1000", "--ckpt-every", "1000000"]
        done = subprocess.run(command, env=self.environment(), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ChaosError(f"the undisturbed run failed:\n{done.stdout}{done.stderr}")
        return folder


class Store:
    """The process that keeps the list of nodes. It runs at the address of the bridge."""

    def __init__(self, setup: Setup, network: Network) -> None:
        """Start it; nodes wait until it answers."""
        self.log = setup.folder / "store.log"
        command = in_namespace(
            network.bridge, "store", setup.folder, *setup.tinytrain("store", "--port", str(STORE_PORT))
        )
        with self.log.open("wb") as sink:
            self._process = subprocess.Popen(
                command, env=setup.environment(), stdin=subprocess.DEVNULL, stdout=sink, stderr=sink
            )

    def wait(self, seconds: float) -> None:
        """Wait until it serves. Errors: ChaosError."""
        end = time.monotonic() + seconds
        while "--store" not in self.log.read_text():
            if time.monotonic() > end or self._process.poll() is not None:
                raise ChaosError(f"the store did not start:\n{self.log.read_text()}")
            time.sleep(0.1)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


class Node:
    """One machine: a network, a host name, shared memory, and the processes that `tinytrain train` starts on it."""

    def __init__(self, setup: Setup, network: Network, number: int, shared: Path) -> None:
        """Connect the machine and start its agent. shared: folder in memory in which it has a part of its own."""
        self.number = number
        self._setup, self._network = setup, network
        self._shared = shared / f"node{number}"
        self.log = setup.folder / f"node{number}.log"
        self._namespace, self.address = network.add_node(number)
        self._slow: threading.Event | None = None
        self.start()

    def start(self) -> None:
        """Start the agent."""
        self._shared.mkdir(parents=True, exist_ok=True)
        setup = self._setup
        command = setup.tinytrain("train", str(setup.config), "--nproc", "1", "--address", self.address)
        command += ["--nnodes", f"{setup.fewest}:{setup.most}", "--store", f"{BRIDGE_ADDRESS}:{STORE_PORT}"]
        env = setup.environment(BRAKE=f"0:{BRAKE_SECONDS}", TINYTRAIN_SHARED_MEMORY=str(self._shared))
        self.started = time.time()
        with self.log.open("ab") as sink:
            self._process = subprocess.Popen(
                in_namespace(self._namespace, f"node{self.number}", setup.folder, *command),
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )

    @property
    def exit_code(self) -> int | None:
        """How the agent has ended; None while it runs."""
        return self._process.poll()

    def wait(self, seconds: float) -> int:
        """Wait until the agent has ended; return its exit code. Errors: ChaosError."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise ChaosError(f"node {self.address} did not end within {seconds:.0f} s:\n{self.output()}") from None

    def output(self) -> str:
        """Return the end of what the node has printed."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])

    def shared_memory(self) -> list[Path]:
        """Return the files that the node has in shared memory."""
        return [path for path in self._shared.rglob("*") if path.is_file()]

    # ------------------------------------------------------------ what can happen to it

    def lose_power(self) -> None:
        """Kill the agent and all ranks at once, and forget what is in memory."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        shutil.rmtree(self._shared, ignore_errors=True)

    def kill_rank(self) -> None:
        """Kill a rank, but not the agent."""
        if ranks := self._ranks():
            with contextlib.suppress(ProcessLookupError):
                os.kill(ranks[0], signal.SIGKILL)

    def freeze(self) -> None:
        """Stop all processes."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let all processes run again."""
        self._signal(signal.SIGCONT)

    def unplug(self) -> None:
        """Cut off the network."""
        self._network.set_cable(self.number, plugged=False)

    def plug_in(self) -> None:
        """Connect the network again."""
        self._network.set_cable(self.number, plugged=True)

    def slow_down(self) -> None:
        """Let all processes run only a part of the time, until `speed_up`."""
        self._slow = threading.Event()
        threading.Thread(target=self._stutter, args=[self._slow], daemon=True).start()

    def speed_up(self) -> None:
        """Let all processes run all the time again."""
        if self._slow is not None:
            self._slow.set()
        self._slow = None
        self.thaw()

    def _stutter(self, end: threading.Event) -> None:
        while not end.is_set():
            self.freeze()
            end.wait(SLOW_PERIOD_SECONDS * 3 / 4)
            self.thaw()
            end.wait(SLOW_PERIOD_SECONDS / 4)

    def close(self) -> None:
        """End all processes and remove the machine."""
        if self._slow is not None:
            self._slow.set()
        self.lose_power()
        self._network.remove_node(self.number)

    def _ranks(self) -> list[int]:
        own = self._process.pid
        return [pid for pid in descendants(own) if _leads_session(pid) and pid not in standbys(own)]

    def _signal(self, number: int) -> None:
        for pid in [self._process.pid, *descendants(self._process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def _leads_session(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        return os.getsid(pid) == pid
    return False


def _no_caches(folder: str, names: list[str]) -> set[str]:
    return {name for name in names if name == "__pycache__"}
