"""Run the scripts of slurm/ without Slurm; tests/slurm uses a real Slurm."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.launching import free_port
from tests.helpers.ranks import REPOSITORY
from tests.helpers.training import config_file
from tinytrain_dist.launch import slurm_job

pytestmark = pytest.mark.multiprocess
PLAYED = {
    "scontrol": 'case "$*" in *requeue*) echo requeue >>$FAKE/asked ;; *) echo node ;; esac',
    "squeue": "echo ${LEFT:-UNLIMITED}",
    # what it is asked for, and then the command after its options
    "srun": 'echo "srun $*" >>$FAKE/asked; while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    # a Python that only answers as launch/slurm_job.py does
    "answers": r'echo "python $*" >>$FAKE/asked; printf "node:1\n/nowhere\n--prompt\ntwo words\n"',
    "apptainer": 'echo "apptainer $*" >>$FAKE/asked; while [ "${1%.sif}" = "$1" ]; do shift; done; shift; exec "$@"',
}


def batch(
    folder: Path, *words: str, script: str = "train.sbatch", **env: str
) -> tuple[subprocess.CompletedProcess[str], str]:
    """Run a batch script as the batch host would; return its output and its calls of Slurm commands."""
    (folder / "fake").mkdir()
    for name, body in PLAYED.items():
        (folder / "fake" / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / "fake" / name).chmod(0o755)
    done = subprocess.run(
        ["bash", REPOSITORY / "slurm" / script, *words],
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


def test_a_job_that_outlives_its_nodes_serves_the_list_of_nodes_itself(tmp_path: Path) -> None:
    config = config_file(tmp_path, total_steps=2, compile=False)
    done, asked = batch(tmp_path, config, MIN_NODES="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert asked.startswith("srun --no-kill --kill-on-bad-exit=0 --cpus-per-task=2 bash -c trap")
    assert re.search(r"tinytrain_dist train --slurm --store 127\.0\.0\.1:\d+ --nnodes 1:1 ", asked)
    assert "tinytrain store: nodes join with --store " in done.stdout
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


def test_the_doctor_runs_in_the_container_of_the_run(tmp_path: Path) -> None:
    python = str(tmp_path / "fake" / "answers")
    container = {"CONTAINER": "image.sif", "CONTAINER_PYTHON": python}
    done, asked = batch(tmp_path, "c.toml", script="doctor.sbatch", **container)
    assert done.returncode == 0, done.stderr
    prefix = f"apptainer exec --bind {REPOSITORY},{REPOSITORY} --pwd {REPOSITORY} image.sif {python} -P -m"
    calls = [line for line in asked.splitlines() if line.startswith(("apptainer", "srun"))]
    assert calls[0] == f"{prefix} tinytrain_dist.launch.slurm_job --peer "
    assert calls[1].startswith("srun --ntasks-per-node=1 ")
    assert calls[1].endswith(f" {prefix} tinytrain_dist.cli.doctor c.toml")


def test_a_task_of_an_array_is_started_with_its_settings(tmp_path: Path) -> None:
    env = {"PYTHON": str(tmp_path / "fake" / "answers"), "SLURM_ARRAY_TASK_ID": "1"}
    _, asked = batch(tmp_path, "c.toml", "sweep.txt", script="array.sbatch", **env)
    question, *_, step = [line for line in asked.splitlines() if line.startswith("python ")]
    assert question == "python -P -m tinytrain_dist.launch.slurm_job --peer  --sweep sweep.txt --task 1 c.toml"
    assert step == "python -P -m tinytrain_dist train --slurm --head node:1 c.toml --prompt two words"


def test_a_task_of_an_array_has_the_settings_of_its_line_and_a_run_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slurm_job, "head_endpoint", lambda peer: "node:1")
    config = tmp_path / "c.toml"
    config.write_text("target_dir = 'runs/my sweep'  # in single quotes\n")
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("# the rate\n\n--lr-max 1e-3\n--init-from 'a model' --target_dir=runs/mine\n")
    arguments = ["--peer", "", "--sweep", str(sweep), "--task"]
    assert slurm_job.main([*arguments, "0", str(config)]) == 0
    expected = ["node:1", "runs/my sweep/0", "--lr-max", "1e-3", "--target-dir", "runs/my sweep/0"]
    assert capsys.readouterr().out.splitlines() == expected
    assert slurm_job.main([*arguments, "1", str(config)]) == 0
    expected = ["node:1", "runs/mine", "--init-from", "a model", "--target_dir=runs/mine"]
    assert capsys.readouterr().out.splitlines() == expected
    assert slurm_job.main([*arguments, "2", str(config)]) == 2
    assert "has no line for task 2, only for tasks 0 .. 1; add one" in capsys.readouterr().err
