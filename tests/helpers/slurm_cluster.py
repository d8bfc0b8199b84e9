"""Run a real Slurm for tests: start the cluster of tests/helpers/slurm, submit jobs, and wait for their end.

Jobs run a copy of the checkout, with tests/helpers/slurm/train.py in place of tinytrain_dist/train.py.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.helpers.ranks import REPOSITORY

SCRIPTS = REPOSITORY / "tests" / "helpers" / "slurm"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "OUT_OF_MEMORY")
PATIENCE_SECONDS = 300.0


def why_not() -> str:
    """Return why no cluster can be started on this machine; "" if it can."""
    if os.geteuid() != 0:
        return "needs root, to give each node a network of its own"
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [
        name
        for name in ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter")
        if not shutil.which(name, path=path)
    ]
    if missing:
        return f"needs {', '.join(missing)}; .ci/run installs them"
    tried = subprocess.run(["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"], check=False)
    return "" if tried.returncode == 0 else "needs namespaces (CAP_SYS_ADMIN)"


def wait_until(condition: Callable[[], bool], what: Callable[[], str]) -> None:
    """Poll until the condition holds. Errors: AssertionError with what() if it takes too long."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE_SECONDS:g} s\n{what()}"
        time.sleep(0.1)


class Cluster:
    """A running cluster of four nodes, and a copy of the checkout for its jobs."""

    def __init__(self, folder: Path) -> None:
        """Start the cluster with its state in folder/state, and copy the code to folder/code."""
        self.state, self.code = folder / "state", folder / "code"
        for part in ("launch", "tinytrain_dist", "slurm", "configs"):
            shutil.copytree(REPOSITORY / part, self.code / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copyfile(SCRIPTS / "train.py", self.code / "tinytrain_dist" / "train.py")
        self.env: dict[str, str] = {}
        self.start()

    def start(self) -> None:
        """Start all parts that are not running, such as nodes that were powered off."""
        done = subprocess.run([SCRIPTS / "up.sh", self.state], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
            "SLURM_CONF": str(self.state / "slurm.conf"),
            "PATH": f"{self.state / 'bin'}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "PROCESSES_PER_NODE": "1",
        }

    def stop(self) -> None:
        """End the cluster."""
        subprocess.run([SCRIPTS / "down.sh", self.state], check=True)

    def power_off(self, node: str) -> None:
        """Power off a node, and tell Slurm, which would notice it only half a minute later."""
        subprocess.run([SCRIPTS / "down.sh", "-N", node, self.state], check=True)
        self("scontrol", "update", f"nodename={node}", "state=down", "reason=gone")

    def __call__(self, *command: str | Path, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node, in the copy of the checkout."""
        words = list(map(str, command))
        done = subprocess.run(
            words,
            cwd=self.code,
            env={**self.env, **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert not check or done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def sbatch(self, log: Path, *args: str | Path, **env: str) -> Job:
        """Submit a job whose output goes to `log`."""
        return Job(self, self("sbatch", "--parsable", f"--output={log}", *args, **env).stdout.strip(), log)

    def processes(self, node: str) -> list[str]:
        """Return the command lines of all processes on a node, without those of Slurm itself."""
        listing = "for p in /proc/[0-9]*; do tr '\\0' ' ' <$p/cmdline && echo; done 2>/dev/null"
        lines = self("on", node, "bash", "-c", listing, check=False).stdout.splitlines()
        return [line for line in lines if "python" in line or "train.sbatch" in line]

    def signal(self, node: str, name: str, pattern: str) -> None:
        """Send a signal to the processes of a node whose command line matches; [x]y does not match this command."""
        each = f"tr '\\0' ' ' <$p/cmdline | grep -q '{pattern}' && kill -{name} ${{p#/proc/}}"
        self("on", node, "bash", "-c", f"for p in /proc/[0-9]*; do {each}; done; true")


class Job:
    """A job of the cluster, by its ID."""

    def __init__(self, cluster: Cluster, number: str, log: Path) -> None:
        """`log`: the output file of the job."""
        self.cluster, self.id, self.log = cluster, number, log

    def shows(self, name: str) -> str:
        """Return a field of `scontrol show job`."""
        shown = self.cluster("scontrol", "show", "job", "-o", self.id).stdout
        found = re.search(rf"\b{name}=(\S*)", shown)
        assert found, shown
        return found.group(1)

    def output(self) -> str:
        """Return the output so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_for(self, text: str) -> None:
        """Wait until the output contains a text. Errors: AssertionError if the job ends before."""

        def seen() -> bool:
            ended = self.shows("JobState") in ENDED
            found = text in self.output()
            assert found or not ended, f"job {self.id} ended without {text!r}\n{self.output()}"
            return found

        wait_until(seen, lambda: f"for {text!r}\n{self.output()}")

    def ends(self) -> str:
        """Wait until the job has ended, and return its last state."""
        wait_until(lambda: self.shows("JobState") in ENDED, lambda: self.output())
        return self.shows("JobState")

    def stopped_and_resumed(self) -> list[tuple[int, int]]:
        """Return for each resume the step at which the attempt before stopped (-1: not logged), and where it began."""
        pairs, stopped = [], -1
        for line in self.output().splitlines():
            if found := re.match(r"step (\d+): preempted", line):
                stopped = int(found.group(1))
            if found := re.match(r"step (\d+): resumed", line):
                pairs.append((stopped, int(found.group(1))))
                stopped = -1
        return pairs
