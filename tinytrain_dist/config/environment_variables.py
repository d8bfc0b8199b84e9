"""List every environment variable of this project: its name, its meaning, who sets it, and who reads it.

Must not read or set any of them; a test compares the table with their use in the repository. Variables that torchrun,
Slurm, NCCL or gloo define are not listed: `distributed/` reads the ones that identify a rank.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EnvironmentVariable:
    """One variable. set_by, read_by: paths in the repository, or "user"."""

    name: str
    meaning: str
    set_by: tuple[str, ...]
    read_by: tuple[str, ...]


VARIABLES = (
    # ---- set and read by the processes of a run
    EnvironmentVariable(
        "TINYTRAIN_AGENT",
        "Path of a file to which a rank writes the path of its run folder. The agent that started the ranks reads it "
        "when a rank was killed and could not report. If the variable is set, an agent supervises this process.",
        ("tinytrain_dist/launch/elastic_agent.py",),
        (
            "tinytrain_dist/reliability/run_state.py",
            "tinytrain_dist/reliability/error_report.py",
            "tinytrain_dist/reliability/watchdog.py",
            "tinytrain_dist/reliability/start_marks.py",
            "tinytrain_dist/reliability/start_times.py",
            "tinytrain_dist/reliability/world.py",
        ),
    ),
    EnvironmentVariable(
        "TINYTRAIN_STOP",
        "Name of a stop signal that arrived before this rank was started. The rank then saves and ends.",
        ("tinytrain_dist/launch/agent_signals.py",),
        (
            "tinytrain_dist/reliability/stop_requests.py",
            "tinytrain_dist/reliability/world.py",
            "tinytrain_dist/launch/elastic_nodes.py",
            "tinytrain_dist/launch/leaving_nodes.py",
            "tinytrain_dist/launch/rank_deaths.py",
        ),
    ),
    EnvironmentVariable(
        "TINYTRAIN_ELASTIC",
        "Tells the agent that nodes of the run may come and go (`tinytrain train --store`).",
        ("tinytrain_dist/launch/start.py",),
        ("tinytrain_dist/launch/elastic_agent.py",),
    ),
    EnvironmentVariable(
        "TINYTRAIN_LEAVE_ON_SIGTERM",
        "Tells the agent that SIGTERM takes its node out of the run (`tinytrain train --leave-on-sigterm`).",
        ("tinytrain_dist/launch/start.py",),
        ("tinytrain_dist/launch/leaving_nodes.py",),
    ),
    EnvironmentVariable(
        "TINYTRAIN_WORLD",
        "The world of a rank in an elastic run, as JSON: session, round, and the time at which its nodes had found "
        "each other.",
        ("tinytrain_dist/launch/elastic_nodes.py",),
        ("tinytrain_dist/reliability/world.py",),
    ),
    EnvironmentVariable(
        "TINYTRAIN_SNAPSHOTS",
        "Folder in the shared memory of a node in which the ranks keep snapshots. The agent makes it if it may restart "
        "the ranks, and deletes it when it ends.",
        ("tinytrain_dist/launch/snapshot_folder.py",),
        ("tinytrain_dist/checkpoint/snapshots/keeper.py",),
    ),
    EnvironmentVariable(
        "TINYTRAIN_SHARED_MEMORY",
        "Folder in memory in which the agent makes the folder for snapshots (default: /dev/shm).",
        ("user",),
        ("tinytrain_dist/launch/snapshot_folder.py",),
    ),
    EnvironmentVariable(
        "TINYTRAIN_STANDBY",
        "File descriptor of the connection through which a process of an elastic run, which has imported torch, waits "
        "for its agent to make it a rank.",
        ("tinytrain_dist/launch/standby_pool.py",),
        ("tinytrain_dist/launch/standby_rank.py",),
    ),
    EnvironmentVariable(
        "TINYTRAIN_LISTENER",
        "File descriptor of a socket that listens on the port of the rendezvous. The program that starts the ranks has "
        "bound the port and then becomes the agent, or the rank, that serves there.",
        ("tinytrain_dist/distributed/network.py",),
        ("tinytrain_dist/distributed/network.py",),
    ),
    EnvironmentVariable(
        "PYTORCH_ALLOC_CONF",
        "Settings of torch's allocator of GPU memory. A run on GPUs sets expandable_segments:True, unless this "
        "variable or PYTORCH_CUDA_ALLOC_CONF, its older name, is set.",
        ("user", "tinytrain_dist/distributed/torch_internals.py"),
        ("tinytrain_dist/distributed/torch_internals.py",),
    ),
    # ---- set for a job or read by its batch script
    EnvironmentVariable(
        "TINYTRAIN_ATTEMPT",
        "Job ID and number of restarts, as JOB.RESTARTS. The batch script uses it to recognize a state.json that an "
        "earlier attempt of the job wrote.",
        ("slurm/train.sbatch",),
        (
            "tinytrain_dist/reliability/run_state.py",
            "tinytrain_dist/reliability/watchdog.py",
            "tinytrain_dist/launch/start.py",
            "tinytrain_dist/distributed/context.py",
            "slurm/train.sbatch",
        ),
    ),
    EnvironmentVariable(
        "TINYTRAIN_DEADLINE",
        "End of the allocation, in seconds since 1970. The run saves and stops before it.",
        ("slurm/train.sbatch",),
        ("tinytrain_dist/reliability/stop_requests.py",),
    ),
    EnvironmentVariable(
        "TINYTRAIN_CODE",
        "Folder with the code of a job: the copy that was made at submission (default: the folder from which sbatch "
        "was called).",
        ("tinytrain_dist/launch/slurm_submit.py",),
        ("slurm/train.sbatch", "slurm/srun.sbatch", "slurm/array.sbatch"),
    ),
    EnvironmentVariable(
        "TINYTRAIN_RUN",
        "Run folder of a job, which contains state.json (default: target_dir of the configuration and settings).",
        ("user",),
        ("slurm/train.sbatch",),
    ),
    # ---- read by tests
    EnvironmentVariable(
        "TINYTRAIN_REQUIRE_MULTIPROCESS",
        "1: the test session fails if no test used several processes, or if such a test was skipped.",
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
        "TINYTRAIN_TEST_DEVICE",
        "cpu: the tests marked cuda run on the CPU, which tries the tests themselves.",
        ("user",),
        ("tests/cuda/runs.py",),
    ),
    EnvironmentVariable(
        "TINYTRAIN_REQUIRE_SLURM",
        "1: the test session fails if no test used a real Slurm, or if such a test was skipped.",
        (".ci/run",),
        ("tests/conftest.py",),
    ),
    # ---- read by scripts
    EnvironmentVariable(
        "PYTHON",
        "The Python interpreter to use (default: the one in .venv; for launch/setup.sh: the first from 3.11 on).",
        ("user", "tinytrain_dist/launch/slurm_submit.py", "slurm/train.sbatch"),
        (
            "launch/setup.sh",
            "tinytrain_dist/launch/preamble.sh",
            "tinytrain_dist/launch/slurm_submit.py",
            "slurm/train.sbatch",
        ),
    ),
    EnvironmentVariable(
        "TORCH_BUILD",
        "Build of torch to install: cpu, gpu or auto (default: auto, that is gpu if nvidia-smi works, else cpu).",
        ("user",),
        ("launch/setup.sh",),
    ),
    EnvironmentVariable(
        "PROCESSES_PER_NODE",
        "Number of processes on each node without GPUs (default: 1).",
        ("user", "tinytrain_dist/launch/slurm_submit.py"),
        ("tinytrain_dist/launch/start.py", "slurm/doctor.sbatch"),
    ),
    EnvironmentVariable(
        "MAX_REQUEUES",
        "How many times the script may requeue a job (default: 20). Requeues by Slurm itself do not count.",
        ("user", "tinytrain_dist/launch/slurm_submit.py"),
        ("slurm/train.sbatch",),
    ),
    EnvironmentVariable(
        "MAX_RESTARTS",
        "How many times torchrun restarts the processes of a node after one of them has died (default: 3).",
        ("user",),
        ("tinytrain_dist/launch/start.py",),
    ),
    EnvironmentVariable(
        "CONTAINER",
        "Apptainer image in which every command of a job runs (default: no container).",
        ("user",),
        ("tinytrain_dist/launch/preamble.sh",),
    ),
    EnvironmentVariable(
        "CONTAINER_IMAGE",
        "Pyxis image (srun --container-image) in which every command of a job runs (default: no container).",
        ("user",),
        ("tinytrain_dist/launch/preamble.sh",),
    ),
    EnvironmentVariable(
        "CONTAINER_MOUNTS",
        "Comma-separated folders to mount in the container, besides the working folder and the code (default: none).",
        ("user",),
        ("tinytrain_dist/launch/preamble.sh",),
    ),
    EnvironmentVariable(
        "CONTAINER_PYTHON",
        "The Python interpreter in the container (default: python3).",
        ("user",),
        ("tinytrain_dist/launch/preamble.sh",),
    ),
)
