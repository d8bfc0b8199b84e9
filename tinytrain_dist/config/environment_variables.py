"""List every environment variable of this project: its name, its meaning, who sets it, and who reads it.

Must not read or set any of them; a test compares the table with their use in the repository. Variables that torchrun,
Slurm, NCCL or gloo define are not listed: `distributed/` reads the ones that identify a rank.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EnvironmentVariable:
    """One variable. set_by, read_by: files of the repository, or "user"."""

    name: str
    meaning: str
    set_by: tuple[str, ...]
    read_by: tuple[str, ...]


VARIABLES = (
    # ---- between the processes of a run
    EnvironmentVariable(
        "TINYTRAIN_AGENT",
        "Path of a note in which a rank writes its run folder. The agent that started the ranks reads it when a rank "
        "has died and cannot report. Its presence says that an agent watches over this process.",
        ("tinytrain_dist/launch/elastic_agent.py",),
        (
            "tinytrain_dist/reliability/run_state.py",
            "tinytrain_dist/reliability/error_report.py",
            "tinytrain_dist/reliability/watchdog.py",
            "tinytrain_dist/reliability/start_marks.py",
        ),
    ),
    EnvironmentVariable(
        "TINYTRAIN_STOP",
        "Name of the signal that asked for a stop before a rank was started; a rank with it saves and ends.",
        ("tinytrain_dist/launch/elastic_agent.py",),
        ("tinytrain_dist/reliability/stop_requests.py",),
    ),
    # ---- between a batch script and the run
    EnvironmentVariable(
        "TINYTRAIN_ATTEMPT",
        "Name of this attempt of a job, JOB.RESTARTS. With it the batch script tells the state.json of this attempt "
        "from the one that an earlier attempt left.",
        ("slurm/train.sbatch",),
        (
            "tinytrain_dist/reliability/run_state.py",
            "tinytrain_dist/reliability/watchdog.py",
            "launch/node.sh",
            "slurm/train.sbatch",
        ),
    ),
    EnvironmentVariable(
        "TINYTRAIN_DEADLINE",
        "End of the allocation in seconds since 1970; the run saves and stops before it.",
        ("slurm/train.sbatch",),
        ("tinytrain_dist/reliability/stop_requests.py",),
    ),
    EnvironmentVariable(
        "TINYTRAIN_CODE",
        "Folder with the code that a job runs: the copy that was made when it was submitted (default: the folder in "
        "which sbatch was called).",
        ("tinytrain_dist/launch/slurm_submit.py",),
        ("slurm/train.sbatch", "slurm/srun.sbatch", "slurm/array.sbatch"),
    ),
    EnvironmentVariable(
        "TINYTRAIN_RUN",
        "Run folder of a job, where state.json is read (default: what launch/submit.py --print-run prints).",
        ("user",),
        ("slurm/train.sbatch",),
    ),
    # ---- in tests
    EnvironmentVariable(
        "TINYTRAIN_REQUIRE_MULTIPROCESS",
        "1: a test session fails if no test with several processes ran, or one was skipped.",
        (".ci/run",),
        ("tests/conftest.py",),
    ),
    EnvironmentVariable(
        "TINYTRAIN_DAMAGE_CASES",
        "Number of cases of each file that tests/checkpoint/test_damaged_files.py damages.",
        ("user",),
        ("tests/checkpoint/test_damaged_files.py",),
    ),
    EnvironmentVariable(
        "TINYTRAIN_REQUIRE_SLURM",
        "1: a test session fails if no test with a real Slurm ran, or one was skipped.",
        (".ci/run",),
        ("tests/conftest.py",),
    ),
    # ---- of the scripts
    EnvironmentVariable(
        "PYTHON",
        "The Python to use (default: .venv of the checkout; for launch/setup.sh the first one from 3.11 on).",
        ("user", "tinytrain_dist/launch/slurm_submit.py", "slurm/train.sbatch"),
        ("launch/setup.sh", "launch/node.sh", "tinytrain_dist/launch/slurm_submit.py", "slurm/train.sbatch"),
    ),
    EnvironmentVariable(
        "TORCH_BUILD",
        "Build of torch to install: cpu, gpu or auto (default: auto, gpu where nvidia-smi works).",
        ("user",),
        ("launch/setup.sh",),
    ),
    EnvironmentVariable(
        "PROCESSES_PER_NODE",
        "Without GPUs: processes on each node (default: 1).",
        ("user", "tinytrain_dist/launch/slurm_submit.py"),
        ("launch/node.sh", "slurm/doctor.sbatch"),
    ),
    EnvironmentVariable(
        "MAX_REQUEUES",
        "How often the script may requeue a job (default: 20); Slurm's own requeues do not count.",
        ("user", "tinytrain_dist/launch/slurm_submit.py"),
        ("slurm/train.sbatch",),
    ),
    EnvironmentVariable(
        "MAX_RESTARTS",
        "How often torchrun starts the processes of a node again, in place, after one has died (default: 3).",
        ("user",),
        ("launch/node.sh",),
    ),
    EnvironmentVariable(
        "CONTAINER",
        "Image for apptainer, in which every command of a job runs (default: no container).",
        ("user",),
        ("slurm/train.sbatch",),
    ),
    EnvironmentVariable(
        "CONTAINER_IMAGE",
        "Image for pyxis (srun --container-image), in which every command of a job runs (default: no container).",
        ("user",),
        ("slurm/train.sbatch",),
    ),
    EnvironmentVariable(
        "CONTAINER_MOUNTS",
        "Folders to mount in the container besides the working folder and the code, with commas (default: none).",
        ("user",),
        ("slurm/train.sbatch",),
    ),
    EnvironmentVariable(
        "CONTAINER_PYTHON",
        "The Python in the container (default: python3).",
        ("user",),
        ("slurm/train.sbatch",),
    ),
)
