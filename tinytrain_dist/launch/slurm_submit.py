"""Check a run on the login node, keep a copy of code and settings, and submit it to Slurm: one job per call.

    tinytrain submit config.toml --nodes 2 --gpus-per-node 8 --cpus-per-task 64 --time 24:00:00

Must not import torch: a mistake is reported in half a second, and login nodes have few resources. The queued job runs
the code and settings as they were submitted, even if the checkout has changed since.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

from tinytrain_dist.config.loading import parse_command_line, resolve_vocab_size
from tinytrain_dist.config.run_folder import STOP_FILE, SUBMITTED_FOLDER
from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed.batch_plan import BatchPlan
from tinytrain_dist.distributed.parallel_dims import choose_parallel_dims
from tinytrain_dist.distributed.spares import fewest_nodes_problems
from tinytrain_dist.errors import ConfigError, DataError
from tinytrain_dist.launch.submit_checks import check_nodes, check_template
from tinytrain_dist.launch.sweep import read_sweep, task_settings
from tinytrain_dist.training.run_length import resolve_epochs
from tinytrain_dist.utils.atomic_files import write_atomically
from tinytrain_dist.utils.git import git_output
from tinytrain_dist.utils.option_types import ConfigFile, Number, OptionalFile, Text
from tinytrain_dist.utils.package_files import PACKAGE, package_folder
from tinytrain_dist.utils.regular_files import read_text
from tinytrain_dist.utils.shard_paths import NoTokenFilesError, shard_paths
from tinytrain_dist.utils.text import is_url

PROGRAM = "tinytrain submit"
SITE_FILE = Path("slurm") / "env.sh"  # of the current folder or the checkout; git ignores it, but the job needs it
WARNING_SECONDS = 180  # from Slurm's signal to the time limit: enough for the last save
MIN_TIME_SECONDS = 120  # a run needs about this long to start and save
MOST_FILES_CHECKED = 50  # of each entry of train_data and val_data
FOLLOW_SECONDS = 0.5  # between two reads of the log


class SubmitError(Exception):
    """Slurm did not accept the job."""


@dataclass(frozen=True)
class SubmitOptions:
    """Check a run for the given processes, copy code and settings, and submit the run to Slurm.

    The copies are in TARGET_DIR/submitted. The job saves before its time limit, requeues itself and resumes.
    All other options are settings of the run; `tinytrain config --help` lists them. Everything after --sbatch is passed
    to sbatch unchanged.
    """

    config: ConfigFile
    """Configuration of the run."""
    time: str
    """Time limit of one job, as Slurm writes it: 30, 8:00:00, 2-0."""
    nodes: str = "1"
    """Number of nodes, or MIN:MAX: the job goes on while at least MIN nodes are left."""
    gpus_per_node: Number = None
    """GPUs of each node; each GPU gets one process."""
    processes_per_node: Number = None
    """Processes on each node, for a run without GPUs."""
    cpus_per_task: Number = None
    """Cores for all processes of a node (srun.sbatch: for each process)."""
    partition: Text = None
    """Slurm partition."""
    account: Text = None
    """Slurm account."""
    qos: Text = None
    """Slurm quality of service."""
    job_name: Text = None
    """Name of the job. Default: name of the run folder."""
    array: OptionalFile = None
    """File of a sweep: a line of settings for each task of a job array."""
    template: OptionalFile = None
    """Batch script; its only argument is the configuration. Default: train.sbatch, which comes with the package."""
    max_requeues: Number = None
    """How often the job may requeue itself. Default: 20."""
    dry_run: bool = False
    """Only print the script and the command."""
    follow: bool = False
    """Show the log until the job has ended; Ctrl-C only stops showing it."""
    sbatch: tyro.conf.Suppress[tuple[str, ...]] = ()

    @property
    def node_range(self) -> tuple[int, int]:
        """The smallest and the largest number of nodes; (1, 1) if `nodes` cannot be read, which `check` reports."""
        found = re.fullmatch(r"([1-9]\d*)(?::([1-9]\d*))?", self.nodes)
        return (int(found[1]), int(found[2] or found[1])) if found else (1, 1)

    @property
    def is_elastic(self) -> bool:
        """Whether nodes may be lost."""
        return ":" in self.nodes

    @property
    def batch_script(self) -> Path:
        """The template of the job."""
        return self.template or package_folder("slurm") / "train.sbatch"


@dataclass(frozen=True)
class Job:
    """A checked job: one run, or one run for each task of an array, and how to start it."""

    options: SubmitOptions
    configs: list[TrainingConfig]  # one for each task of an array; otherwise a single one
    base: TrainingConfig  # without the settings of single tasks
    template: Path
    folder: Path  # RUN/submitted/N

    def flags(self) -> list[str]:
        """Return the options of sbatch, each once."""
        options = self.options
        processes = options.gpus_per_node or options.processes_per_node
        # train.sbatch starts one torchrun on each node, srun.sbatch (DIRECT) every process
        template = read_text(self.template)
        own_tasks = re.search(r"^#SBATCH +--ntasks-per-node[= ](\d+)", template, re.MULTILINE)
        is_direct = re.search(r"^(export )?DIRECT=.", template, re.MULTILINE)
        tasks = own_tasks[1] if own_tasks else processes if is_direct else 1
        warning_seconds = min(WARNING_SECONDS, seconds_of(options.time) // 4)
        output = "job-%A_%a.out" if options.array else "job-%j.out"
        named = {
            "job-name": options.job_name or Path(self.base.target_dir).name,
            "nodes": options.nodes.replace(":", "-"),
            "ntasks-per-node": tasks,
            "gpus-per-node": options.gpus_per_node,
            "cpus-per-task": options.cpus_per_task,
            "time": options.time,
            "signal": f"B:USR1@{warning_seconds}",
            "partition": options.partition,
            "account": options.account,
            "qos": options.qos,
            "array": f"0-{len(self.configs) - 1}" if options.array else None,
            "output": str(self.folder / output),
        }
        flags = [f"--{name}={value}" for name, value in named.items() if value is not None]
        return [*flags, *(["--no-kill"] if options.is_elastic else []), *options.sbatch]

    def script(self) -> str:
        """Return the template, with the options, variables and arguments of this job added below its own options."""
        code = self.folder / "code"
        variables = {"TINYTRAIN_CODE": code, "PYTHON": os.environ.get("PYTHON", sys.executable)}
        if self.options.processes_per_node:
            variables["PROCESSES_PER_NODE"] = self.options.processes_per_node
        if self.options.is_elastic:
            variables["MIN_NODES"] = self.options.node_range[0]
        if self.options.max_requeues is not None:
            variables["MAX_REQUEUES"] = self.options.max_requeues
        task = "-$SLURM_ARRAY_TASK_ID" if self.options.array else ""
        lines = read_text(self.template).splitlines()
        # sbatch reads options up to the first command
        head = itertools.takewhile(lambda line: not line.strip() or line.startswith("#"), lines)
        last = max(number for number, line in enumerate(head) if line.startswith(("#SBATCH", "#!")))
        added = [f"# ---- filled in by {PROGRAM}"]
        added += [f"#SBATCH {shlex.quote(flag)}" for flag in self.flags()]
        added += [f"export {name}={shlex.quote(str(value))}" for name, value in variables.items()]
        added += [f"set -- {shlex.quote(str(self.folder))}/config{task}.toml", "# ----"]
        return "\n".join([*lines[: last + 1], *added, *lines[last + 1 :]]) + "\n"

    def command(self) -> list[str]:
        """Return the command that submits the job."""
        return ["sbatch", "--parsable", str(self.folder / "job.sbatch")]

    def write(self) -> None:
        """Write RUN/submitted/N: the code as it is now, the resolved settings of each run, the job script."""
        copy_code(self.folder / "code")
        for number, config in enumerate(self.configs):
            name = f"config-{number}.toml" if self.options.array else "config.toml"
            write_atomically(self.folder / name, config.to_toml())
        write_atomically(self.folder / "job.sbatch", self.script())


def seconds_of(limit: str) -> int:
    """Return the seconds of a limit in Slurm's spelling (M, M:S, H:M:S, D-H, D-H:M, D-H:M:S). Errors: ConfigError."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if not match:
        raise ConfigError(f"--time: {limit!r} is not a time limit; write minutes, H:MM:SS or D-HH:MM:SS")
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None or len(numbers) == 3:  # begins with hours
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    else:
        hours = 0
        minutes, seconds = [*numbers, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


# ---------------------------------------------------------------- checks on the login node


def check_run(config: TrainingConfig, nodes: int, per_node: int, fewest: int | None = None) -> list[str]:
    """Return the problems of a run on nodes x per_node processes, as far as a login node can find them.

    fewest: the smallest number of nodes with which it goes on; None: all.
    """
    problems = []
    try:
        config = resolve_vocab_size(config)
        config = resolve_epochs(config)
    except ConfigError as error:
        problems += error.problems
    if fewest is not None:
        problems += fewest_nodes_problems(config, fewest, per_node, "--nodes")
    else:
        try:
            BatchPlan.make(config, choose_parallel_dims(config, nodes * per_node, per_node))
        except ConfigError as error:
            problems += error.problems
    if (config.ckpt_writers or 1) > nodes * per_node:
        problems.append(f"ckpt_writers: {config.ckpt_writers} is more than the {nodes * per_node} processes; lower it")
    for name, files in (("train_data", config.train_files), ("val_data", config.val_files)):
        problems += [f"{name}: {problem}" for file in files for problem in check_tokens(file, config)]
    for name in ("ckpt_path_to_resume", "init_from"):
        path = getattr(config, name)
        if path is not None and not is_url(path) and not Path(path).is_dir():
            problems.append(f"{name}: there is no folder {path}; correct the path")
    return problems


def check_tokens(entry: str, config: TrainingConfig) -> list[str]:
    """Return what is wrong with an entry of train_data or val_data, from the headers of its files alone.

    Of many files only some are opened, spread evenly, so that the check takes about a second.
    """
    from tinytrain_dist.data.npy_files import missing_tokens
    from tinytrain_dist.data.token_formats import check_stated_type, find_layout

    try:
        paths = shard_paths(entry)
        checked = paths[:: -(-len(paths) // MOST_FILES_CHECKED)]
        layouts = [find_layout(Path(path), config.token_dtype, config.vocab_size) for path in checked]
        if checked == paths:
            check_stated_type(list(zip(paths, layouts, strict=True)), config.token_dtype)
    except NoTokenFilesError:
        return []  # resolve_vocab_size has reported it
    except DataError as error:
        return [str(error)]
    longest = max(layout.tokens for layout in layouts)
    problem = missing_tokens(longest, config.context_len) if checked == paths else ""
    return [f"{entry}: {problem}"] if problem else []


def check_options(options: SubmitOptions) -> list[str]:
    """Return what is wrong with the options of this command, as sentences."""
    problems = []
    if not (options.gpus_per_node or options.processes_per_node):
        problems.append(
            "--gpus-per-node: not set; give the number of GPUs of a node, or set --processes-per-node without GPUs"
        )
    if options.gpus_per_node and options.processes_per_node:
        problems.append(
            "--processes-per-node: with --gpus-per-node there is one process for each GPU; leave one of them out"
        )
    problems += check_nodes(options)
    for name in ("gpus_per_node", "processes_per_node", "cpus_per_task"):
        if (value := getattr(options, name)) is not None and value < 1:
            problems.append(f"--{name.replace('_', '-')}: {value} must be at least 1")
    if options.max_requeues is not None and options.max_requeues < 0:
        problems.append(f"--max-requeues: {options.max_requeues} must not be negative; give 0 for no requeue")
    problems += check_template(options)
    try:
        if seconds_of(options.time) < MIN_TIME_SECONDS:
            problems.append(f"--time: {options.time} is less than two minutes, too short to start and save; raise it")
    except ConfigError as error:
        problems += error.problems
    return problems


def check_array_option(options: SubmitOptions, num_tasks: int) -> list[str]:
    """Return what is wrong with an --array among the options for sbatch, which replaces that of the sweep."""
    given = re.findall(r"(?:^| )(?:--array[= ]|-a ?)([\w,:%-]+)", " ".join(options.sbatch))
    if not given:
        return []
    if not options.array:
        return ["--sbatch: its --array would make all tasks train the same run; give --array FILE before --sbatch"]
    wanted = given[-1].partition("%")[0]
    largest = max(map(int, re.findall(r"(?<!:)\b\d+", wanted)), default=0)
    if largest >= num_tasks:
        return [f"--sbatch: --array={given[-1]} has task {largest}, but the sweep has tasks 0 .. {num_tasks - 1}"]
    return []


def check(options: SubmitOptions, settings: list[str]) -> tuple[TrainingConfig, list[TrainingConfig]]:
    """Return the run without the settings of single tasks, and the run of each task (without --array: one).

    Errors: ConfigError with all problems at once.
    """
    problems = check_options(options)
    per_node = max(1, options.gpus_per_node or options.processes_per_node or 1)
    fewest = options.node_range[0] if options.is_elastic else None
    lines: list[str | None] = [None]  # of a sweep; None: a single run
    if options.array:
        lines = list(read_sweep(options.array))
        if not lines:
            problems.append(f"--array: {options.array} has no line with settings; write a line for each task")
    configs: list[TrainingConfig] = []
    for task, line in enumerate(lines):
        prefix = "" if line is None else f"task {task}: "
        try:
            words = [str(options.config), *settings]
            more = [] if line is None else task_settings(words, line, task)
            config = parse_command_line([*words, *more], prog=PROGRAM)
            configs.append(config)
            problems += [prefix + problem for problem in check_run(config, options.node_range[1], per_node, fewest)]
        except ConfigError as error:
            problems += [prefix + problem for problem in error.problems]
    problems += shared_places(configs)
    if lines:
        problems += check_array_option(options, len(lines))
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)), str(options.config))  # tasks share most problems
    return parse_command_line([str(options.config), *settings]), configs


def shared_places(configs: list[TrainingConfig]) -> list[str]:
    """Return what tasks of one sweep would write to the same place, as sentences."""
    folders = Counter(os.path.abspath(config.target_dir) for config in configs)
    if shared := sorted(folder for folder, tasks in folders.items() if tasks > 1):
        return [f"--array: several tasks have the target_dir {', '.join(shared)}; give each task its own"]
    places = Counter((os.path.abspath(config.checkpoints_dir), config.ckpt_save_prefix) for config in configs)
    return [
        f"--array: several tasks have the ckpt_dir {folder} and the ckpt_save_prefix {prefix}; give each task its own"
        for (folder, prefix), tasks in sorted(places.items())
        if tasks > 1
    ]


# ---------------------------------------------------------------- submission


def copy_code(target: Path) -> None:
    """Copy what a job runs: the package as it is now, the batch scripts, and the site's settings."""
    shutil.copytree(PACKAGE, target / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__", "configs", "slurm"))
    shutil.copytree(package_folder("slurm"), target / "slurm", ignore=shutil.ignore_patterns(SITE_FILE.name))
    for folder in (Path.cwd(), PACKAGE.parent):
        if (folder / SITE_FILE).is_file():
            shutil.copy2(folder / SITE_FILE, target / SITE_FILE)
            break
    commit = git_output("rev-parse", "HEAD")
    if commit is not None:
        changes = git_output("status", "--porcelain", "--", PACKAGE.name)
        write_atomically(target / "COMMIT", commit.strip() + (" with changes" if changes else "") + "\n")


def follow(slurm_id: str, folder: Path) -> int:
    """Print what the job writes to its logs until it has left the queue; return 0 if it completed, else 1."""
    positions: dict[str, int] = {}  # by log file: how far it was printed
    state = ""
    ended = False
    while not ended:
        command = ["squeue", "-h", "-j", slurm_id, "-o", "%T %r"]
        queue = subprocess.run(command, capture_output=True, text=True, check=False)
        states = queue.stdout.strip().splitlines()
        # an empty answer means that the job has ended only if the controller has answered
        ended = not states and (queue.returncode == 0 or "Invalid job id" in queue.stderr)
        if states and states[0] != state and not states[0].startswith("RUNNING"):
            print(f"job {slurm_id}: {states[0]}")
        state = states[0] if states else state
        _print_logs(folder, positions)
        time.sleep(FOLLOW_SECONDS)
    command = ["scontrol", "show", "job", slurm_id]
    job_record = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    final_states = sorted(set(re.findall(r"JobState=(\w+)", job_record)))
    how = ", ".join(final_states) or "Slurm no longer knows in which state; see the log"
    print(f"job {slurm_id} has ended: {how}")
    return 0 if final_states == ["COMPLETED"] else 1


def _print_logs(folder: Path, positions: dict[str, int]) -> None:
    """Print what was added to the logs since `positions`. The lines of an array begin with the number of the task."""
    for name in sorted(glob.glob(glob.escape(str(folder)) + "/job-*.out")):
        task = re.search(r"_(\d+)\.out$", name)
        prefix = f"[{task[1]}] " if task else ""
        with open(name, encoding="utf-8", errors="replace") as file:
            file.seek(positions.get(name, 0))
            for line in iter(file.readline, ""):
                print(prefix + line, end="")
            positions[name] = file.tell()
    sys.stdout.flush()


@contextlib.contextmanager
def _folder_unless_it_fails(folder: Path) -> Iterator[None]:
    """Make a folder with its parents, and remove what was made if the block raises."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True)
    try:
        yield
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        for path in missing[1:]:  # from the inside out
            with contextlib.suppress(OSError):  # another process has put something there
                path.rmdir()
        raise


def submit(job: Job) -> str:
    """Write the job's folder and submit the job; return its ID in Slurm. Errors: SubmitError if Slurm refuses."""
    with _folder_unless_it_fails(job.folder):
        job.write()
        done = subprocess.run(job.command(), capture_output=True, text=True, check=False)
        if done.returncode:
            raise SubmitError(f"sbatch refused: {done.stderr.strip()}")
    slurm_id = done.stdout.strip().partition(";")[0]  # "ID", or "ID;CLUSTER"
    write_atomically(job.folder / "job_id", slurm_id + "\n")
    return slurm_id


def _print_next_steps(job: Job, slurm_id: str) -> None:
    base = job.base
    log = job.folder / (f"job-{slurm_id}_0.out" if job.options.array else f"job-{slurm_id}.out")
    stop_file = (
        "TARGET_DIR/stop of a task" if job.options.array else shlex.quote(str(Path(base.target_dir) / STOP_FILE))
    )
    print(f"job {slurm_id}: {len(job.configs)} run(s) into {base.target_dir}; code, settings and log in {job.folder}")
    print(f"  watch   tail -F {shlex.quote(str(log))}")
    print(f"  stop    scancel {slurm_id}, or touch {stop_file}; both save first")
    print("  resume  run the same command again; it resumes from the newest checkpoint", flush=True)


def submit_run(options: SubmitOptions, settings: list[str]) -> int:
    """Check and submit a run; return 0 if submitted (with `follow`: completed), 1 if Slurm refuses.

    Errors: ConfigError with everything that is wrong.
    """
    base, configs = check(options, settings)
    submissions = Path(base.target_dir).absolute() / SUBMITTED_FOLDER
    number = 1 + max((int(path.name) for path in submissions.glob("*") if path.name.isdigit()), default=0)
    job = Job(options, configs, base, options.batch_script, submissions / str(number))
    if options.dry_run:
        for number, config in enumerate(configs):
            if config.epochs is not None:
                task = f"task {number}: " if options.array else ""
                print(f"# {task}{config.epochs} epochs give total_steps = {resolve_epochs(config).total_steps}")
        print(f"{job.script()}\n# would be submitted from {os.getcwd()} with:\n{shlex.join(job.command())}")
        return 0
    if shutil.which("sbatch") is None:
        print("error: sbatch: not found here; run this on a login node of the cluster", file=sys.stderr)
        return 1
    try:
        slurm_id = submit(job)
    except SubmitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    _print_next_steps(job, slurm_id)
    if not options.follow:
        return 0
    try:
        return follow(slurm_id, job.folder)
    except KeyboardInterrupt:
        print(f"\nthe job continues; scancel {slurm_id} ends it")
        return 0
