"""Run slurm/train.sbatch without Slurm; tests/slurm uses a real Slurm."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.launching import free_port
from tests.helpers.ranks import REPOSITORY
from tests.helpers.training import config_file

pytestmark = pytest.mark.multiprocess
PLAYED = {
    "scontrol": 'case "$*" in *requeue*) echo requeue >>$FAKE/asked ;; *) echo node ;; esac',
    "squeue": "echo ${LEFT:-UNLIMITED}",
    # what it is asked for, and then the command after its options
    "srun": 'echo "srun $*" >>$FAKE/asked; while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "apptainer": 'echo "apptainer $*" >>$FAKE/asked; while [ "${1%.sif}" = "$1" ]; do shift; done; shift; exec "$@"',
}


def batch(folder: Path, config: str, **env: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """Run slurm/train.sbatch as the batch host would; return its output and its calls of Slurm commands."""
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
            "SLURM_JOB_ID": str(free_port()),  # test sessions on one machine must not use the same port
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
    container = {"CONTAINER": "image.sif", "CONTAINER_MOUNTS": "/data", "CONTAINER_PYTHON": sys.executable}
    # as a login shell sets them: every bash would print a line, and it would be taken for the address of the head
    (tmp_path / "bashrc").write_text("echo a line of BASH_ENV; set -o noclobber\n")
    shell = {"BASH_ENV": str(tmp_path / "bashrc"), "CDPATH": "/tmp:."}
    done, asked = batch(tmp_path, config, **container, **shell)
    assert done.returncode == 0, done.stdout + done.stderr
    prefix = f"apptainer exec --bind {REPOSITORY},{REPOSITORY},/data --pwd {REPOSITORY} image.sif"
    first, step, second = asked.splitlines()
    assert first == f"{prefix} {sys.executable} -P -m tinytrain_dist.launch.slurm_job --peer  {config}"
    assert step.startswith(f"srun --kill-on-bad-exit=1 --cpus-per-task=2 {prefix} bash -c trap")
    assert f"{sys.executable} -P -m tinytrain_dist train --slurm --head 127.0.0.1:" in step
    assert step.endswith(config)
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
        f"srun --nodes=1 --ntasks=1 {options} {sys.executable} -P -m tinytrain_dist.launch.slurm_job --peer"
    )
    assert step.startswith(f"srun --kill-on-bad-exit=1 --cpus-per-task=2 {options} bash -c trap")
    assert requeue == "requeue"
    assert "15 s left" in done.stdout
    assert "preempted (time_limit)" in done.stdout
    assert time.monotonic() - started > 10
    assert (tmp_path / "run" / "requeues").read_text().split()[1] == "preempted"
