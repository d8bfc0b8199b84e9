"""Check a run on the login node, keep a copy of code and settings, and submit it to Slurm: one job per call.

    launch/submit.py configs/llama_1b_hsdp.toml --nodes 2 --gpus-per-node 8 --cpus-per-task 64 --time 24:00:00

Must not import torch: a mistake is reported in half a second, and login nodes have few resources. The queued job runs
what was submitted, whatever becomes of the checkout meanwhile.
"""

from __future__ import annotations

import argparse
import glob
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from tinytrain_dist.config.loading import (
    parse_command_line,
    resolve_vocab_size,
)
from tinytrain_dist.config.run_folder import STOP_FILE, SUBMITTED_FOLDER
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed.batch_plan import BatchPlan
from tinytrain_dist.distributed.parallel_dims import choose_parallel_dims
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.utils.atomic_files import write_atomically

ROOT = Path(__file__).resolve().parents[2]  # the checkout
CODE = ("launch", "tinytrain_dist", "slurm", "configs", "pyproject.toml", "constraints.txt")
SITE = "slurm/env.sh"  # git ignores it, the job needs it
WARNING_SECONDS = 180  # before the time limit, in which the last save must fit
FOLLOW_SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """What is to be submitted: the checked runs, one or one for each task of an array, and how they are started."""

    options: argparse.Namespace
    configs: list[TrainingConfig]
    base: TrainingConfig  # without the lines of a sweep
    template: Path
    folder: Path  # RUN/submitted/N

    def flags(self) -> list[str]:
        """Return the options of sbatch, each once."""
        o = self.options
        tasks = o.gpus_per_node or o.processes_per_node if self.template.name == "srun.sbatch" else 1
        output = "job-%A_%a.out" if o.array else "job-%j.out"
        named = {
            "job-name": o.job_name or Path(self.base.target_dir).name,
            "nodes": o.nodes,
            "ntasks-per-node": tasks,
            "gpus-per-node": o.gpus_per_node,
            "cpus-per-task": o.cpus_per_task,
            "time": o.time,
            "signal": f"B:USR1@{min(WARNING_SECONDS, seconds_of(o.time) // 4)}",
            "partition": o.partition,
            "account": o.account,
            "qos": o.qos,
            "array": f"0-{len(self.configs) - 1}" if o.array else None,
            "output": str(self.folder / output),
        }
        return [*(f"--{name}={value}" for name, value in named.items() if value is not None), *o.sbatch]

    def script(self) -> str:
        """Return the template with the options, and what it runs, below its own options."""
        code = self.folder / "code"
        variables = {"TINYTRAIN_CODE": code, "PYTHON": os.environ.get("PYTHON", sys.executable)}
        if self.options.processes_per_node:
            variables["PROCESSES_PER_NODE"] = self.options.processes_per_node
        if self.options.max_requeues is not None:
            variables["MAX_REQUEUES"] = self.options.max_requeues
        task = "-$SLURM_ARRAY_TASK_ID" if self.options.array else ""
        lines = self.template.read_text(encoding="utf-8").splitlines()
        last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
        added = ["# ---- filled in by launch/submit.py"]
        added += [f"#SBATCH {shlex.quote(flag)}" for flag in self.flags()]
        added += [f"export {name}={shlex.quote(str(value))}" for name, value in variables.items()]
        added += [f"set -- {shlex.quote(str(self.folder))}/config{task}.toml", "# ----"]
        return "\n".join([*lines[: last + 1], *added, *lines[last + 1 :]]) + "\n"

    def write(self) -> None:
        """Make RUN/submitted/N: the code as it is now, the resolved settings of each run, the job script."""
        self.folder.mkdir(parents=True)
        copy_code(self.folder / "code")
        for number, config in enumerate(self.configs):
            name = f"config-{number}.toml" if self.options.array else "config.toml"
            write_atomically(self.folder / name, config.to_toml())
        write_atomically(self.folder / "job.sbatch", self.script())


def parse(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split the arguments into options of this command and settings of the run."""
    end = args.index("--sbatch") if "--sbatch" in args else len(args)
    parser = argparse.ArgumentParser(
        prog="launch/submit.py",
        description="Check a run for that many processes, keep a copy of code and settings, and submit it to Slurm.",
        epilog="All other --name value are settings of the run; launch/train.py --help lists them. "
        "What stands after --sbatch goes to sbatch as it is.",
        allow_abbrev=False,
    )
    parser.add_argument("config", help="the configuration (.toml)")
    parser.add_argument("--nodes", type=int, default=1, help="number of nodes (1)")
    parser.add_argument("--gpus-per-node", type=int, help="GPUs on each node; a process for each")
    parser.add_argument("--processes-per-node", type=int, help="without GPUs: processes on each node")
    parser.add_argument("--cpus-per-task", type=int, help="cores for all processes of a node (srun.sbatch: of each)")
    parser.add_argument("--time", required=True, help="time limit of one slot, as Slurm writes it: 30, 8:00:00, 2-0")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--qos")
    parser.add_argument("--job-name", help="default: the name of the run folder")
    parser.add_argument("--array", type=Path, metavar="FILE", help="a sweep: one line of settings for each task")
    parser.add_argument(
        "--template", type=Path, default=ROOT / "slurm" / "train.sbatch", help="default: slurm/train.sbatch"
    )
    parser.add_argument("--max-requeues", type=int, help="how often the run may come back by itself (20)")
    parser.add_argument("--dry-run", action="store_true", help="print script and command, change nothing")
    parser.add_argument("--follow", action="store_true", help="show the log until the job has ended; Ctrl-C leaves it")
    options, settings = parser.parse_known_args(args[:end])
    options.sbatch = args[end + 1 :]
    return options, settings


def seconds_of(limit: str) -> int:
    """Return the seconds of a limit in Slurm's spelling (M, M:S, H:M:S, D-H, D-H:M, D-H:M:S). Errors: ConfigError."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if not found:
        raise ConfigError(f"--time: {limit!r} is no time limit; write minutes, H:MM:SS or D-HH:MM:SS")
    days, *parts = found.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None or len(numbers) == 3:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    else:
        hours, (minutes, seconds) = 0, [*numbers, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def check_run(config: TrainingConfig, nodes: int, per_node: int) -> list[str]:
    """Return everything that a login node can know to be wrong with a run on nodes x per_node processes."""
    problems = []
    try:
        config = resolve_vocab_size(config)
    except ConfigError as error:
        problems += error.problems
    try:
        BatchPlan.make(config, choose_parallel_dims(config, nodes * per_node, per_node))
    except ConfigError as error:
        problems += error.problems
    if config.ckpt_writers > nodes * per_node:
        problems.append(f"ckpt_writers: {config.ckpt_writers} is more than the {nodes * per_node} processes; lower it")
    for name, files in (("train_data", config.train_files), ("val_data", config.val_files)):
        for file in files:
            problems += [f"{name}: {problem}" for problem in check_tokens(Path(file), config.context_len)]
    for name in ("ckpt_path_to_resume", "init_from"):
        path = getattr(config, name)
        if path is not None and not Path(path).is_dir():
            problems.append(f"{name}: there is no folder {path}; correct it")
    return problems


def check_tokens(path: Path, context_len: int) -> list[str]:
    """Return what is wrong with a token file, from its header alone."""
    import numpy as np

    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        reason = "no such token file" if isinstance(error, FileNotFoundError) else f"is no token file ({error})"
        return [f"{path}: {reason}; make one with `tinytrain prepare`"]
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        return [
            f"{path}: holds {tokens.dtype} of shape {tokens.shape}, not a row of ids; make one with `tinytrain prepare`"
        ]
    if len(tokens) <= context_len:
        return [f"{path}: has {len(tokens)} tokens, but context_len {context_len} needs {context_len + 1}; lower it"]
    return []


def check_options(options: argparse.Namespace) -> list[str]:
    """Return what is wrong with the options of this command, as sentences."""
    problems = []
    if not (options.gpus_per_node or options.processes_per_node):
        problems.append("--gpus-per-node: not set; give the GPUs of a node, or --processes-per-node without GPUs")
    if options.gpus_per_node and options.processes_per_node:
        problems.append("--processes-per-node: there is one process for each GPU; leave it out with --gpus-per-node")
    for name in ("nodes", "gpus_per_node", "processes_per_node", "cpus_per_task"):
        if (value := getattr(options, name)) is not None and value < 1:
            problems.append(f"--{name.replace('_', '-')}: {value} must be at least 1")
    if not options.template.is_file():
        problems.append(f"--template: there is no file {options.template}; the ones that come along are in slurm/")
    try:
        if seconds_of(options.time) < 120:
            problems.append(f"--time: {options.time} is less than two minutes, in which no run starts and saves")
    except ConfigError as error:
        problems += error.problems
    return problems


def check(options: argparse.Namespace, settings: list[str]) -> tuple[TrainingConfig, list[TrainingConfig]]:
    """Return the run of a call, and those of a sweep. Errors: ConfigError with all problems at once."""
    problems = check_options(options)
    per_node = max(1, options.gpus_per_node or options.processes_per_node or 1)
    lines: list[str | None] = [None]
    if options.array:
        lines = [line for line in read_lines(options.array) if line.strip() and not line.lstrip().startswith("#")]
        if not lines:
            problems.append(f"--array: {options.array} has no line with settings; write one for each task")
    configs: list[TrainingConfig] = []
    for number, line in enumerate(lines):
        more, where = ([], "") if line is None else (shlex.split(line), f"task {number}: ")
        try:
            config = parse_command_line([options.config, *settings, *more], prog="launch/submit.py")
            if line is not None and not re.search(r"--target[-_]dir\b", line):
                config = replace(config, target_dir=f"{config.target_dir}/{number}")
            configs.append(config)
            problems += [where + problem for problem in check_run(config, max(1, options.nodes), per_node)]
        except ConfigError as error:
            problems += [where + problem for problem in error.problems]
    folders = [config.target_dir for config in configs]
    if twice := sorted({folder for folder in folders if folders.count(folder) > 1}):
        problems.append(f"--array: several tasks have the target_dir {', '.join(twice)}; give each its own")
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)), options.config)
    return parse_command_line([options.config, *settings]), configs


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text file. Errors: ConfigError."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--array: {path} cannot be read ({error}); give a text file") from None


def copy_code(target: Path) -> None:
    """Copy what a job runs, as it is in the checkout now, changes that are not committed included."""
    git = ["git", "-C", str(ROOT)]
    listed = subprocess.run(
        [*git, "ls-files", "-co", "--exclude-standard", "-z", "--", *CODE], capture_output=True, text=True, check=False
    )
    names = [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    if not names:  # no git, or no checkout of it
        found = [path for part in CODE for path in (ROOT / part, *(ROOT / part).rglob("*"))]
        names = [str(path.relative_to(ROOT)) for path in found if path.is_file() and path.suffix != ".pyc"]
    for name in [*names, *([SITE] if (ROOT / SITE).is_file() else [])]:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)
    if listed.returncode == 0:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        changed = subprocess.run([*git, "status", "--porcelain", "--", *CODE], capture_output=True, check=False).stdout
        write_atomically(target / "COMMIT", commit.stdout.strip() + (" with changes" if changed else "") + "\n")


def follow(job: str, folder: Path) -> int:
    """Print what the job's output files get until it has left the queue; 0 if Slurm says it completed."""
    positions: dict[str, int] = {}
    state, ended = "", False
    while not ended:
        queue = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T %r"], capture_output=True, text=True, check=False)
        now = queue.stdout.strip().splitlines()
        # a controller that does not answer is no end
        ended = not now and (queue.returncode == 0 or "Invalid job id" in queue.stderr)
        if now and now[0] != state and not now[0].startswith("RUNNING"):
            print(f"submit.py: job {job}: {now[0]}")
        state = now[0] if now else state
        for name in sorted(glob.glob(glob.escape(str(folder)) + "/job-*.out")):
            task = re.search(r"_\d+(?=\.out$)", name)  # of an array
            with open(name, encoding="utf-8", errors="replace") as file:
                file.seek(positions.get(name, 0))
                for line in iter(file.readline, ""):
                    print((f"[{task.group()[1:]}] " if task else "") + line, end="")
                positions[name] = file.tell()
        sys.stdout.flush()
        time.sleep(FOLLOW_SECONDS)
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=False).stdout
    states = sorted(set(re.findall(r"JobState=(\w+)", shown)))
    print(f"submit.py: job {job} has ended: {', '.join(states) or 'Slurm has forgotten it, see the log'}")
    return 0 if states == ["COMPLETED"] else 1


def main(args: list[str]) -> int:
    """Run the command; return 0 when submitted (with --follow: completed), 2 for a mistake, 1 when Slurm refuses."""
    try:
        if args[:1] == ["--print-run"]:  # a batch script that was not filled in here asks where its state.json will be
            print(parse_command_line(args[1:]).target_dir)
            return 0
        options, settings = parse(args)
        base, configs = check(options, settings)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    submitted = Path(base.target_dir).absolute() / SUBMITTED_FOLDER
    number = 1 + max((int(path.name) for path in submitted.glob("*") if path.name.isdigit()), default=0)
    job = Job(options, configs, base, options.template, submitted / str(number))
    command = ["sbatch", "--parsable", str(job.folder / "job.sbatch")]
    if options.dry_run:
        print(f"{job.script()}\n# would be submitted from {os.getcwd()} with:\n{shlex.join(command)}")
        return 0
    if shutil.which("sbatch") is None:
        print("error: there is no sbatch here; run this on a login node of the cluster", file=sys.stderr)
        return 1
    job.write()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(job.folder)
        print(f"error: sbatch refused: {done.stderr.strip()}", file=sys.stderr)
        return 1
    slurm_id = done.stdout.strip().partition(";")[0]
    write_atomically(job.folder / "job_id", slurm_id + "\n")
    log = job.folder / (f"job-{slurm_id}_0.out" if options.array else f"job-{slurm_id}.out")
    print(f"job {slurm_id}: {len(configs)} run(s) into {base.target_dir}; code, settings and log in {job.folder}")
    print(f"  watch   tail -F {log}")
    stop_file = "TARGET_DIR/stop of a task" if options.array else Path(base.target_dir) / STOP_FILE
    print(f"  stop    scancel {slurm_id}, or touch {stop_file}; both save first")
    print("  resume  the same command again: it resumes from the newest checkpoint", flush=True)
    if not options.follow:
        return 0
    try:
        return follow(slurm_id, job.folder)
    except KeyboardInterrupt:
        print(f"\nthe job continues; scancel {slurm_id} ends it")
        return 0
