"""Check launch/submit.py: what it refuses, the script it writes, what it copies, what it shows.

Needs no Slurm: sbatch and squeue are scripts that answer like the real ones, which test_slurm.py uses.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.ranks import REPOSITORY
from tests.helpers.training import settings_for
from tinytrain_dist.cli.arguments import parse_options
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.launch.slurm_submit import Job, SubmitOptions, check, seconds_of

SUBMIT = REPOSITORY / "launch" / "submit.py"
USUAL = ("--nodes", "2", "--processes-per-node", "2", "--time", "30")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    settings = settings_for(tmp_path, "run")
    path.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items()))
    return path


@pytest.fixture
def slurm(tmp_path: Path) -> Path:
    """A folder with commands that answer like those of Slurm, and record their arguments in the file `asked`."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    commands = {
        "sbatch": f'cp "${{!#}}" {folder}/script; echo 77',
        # running at the first look, ended at the second
        "squeue": f"[ -e {folder}/looked ] || echo RUNNING None; touch {folder}/looked; echo hello from the job >>"
        f"{tmp_path}/run/submitted/1/job-77.out",
        "scontrol": "echo JobId=77 JobState=COMPLETED Reason=None",
    }
    for name, body in commands.items():
        path = folder / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >>{folder}/asked\n{body}\n')
        path.chmod(0o755)
    return folder


def submit(*args: object, path: Path | None = None, script: Path = SUBMIT) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}" if path else "/usr/bin:/bin", "PYTHON": "/venv/python"}
    command = [sys.executable, str(script), *map(str, args)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=script.parent.parent)


def refusal(*args: object) -> str:
    done = submit(*args)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


GOLDEN = """\
# ---- filled in by tinytrain submit
#SBATCH --job-name=run
#SBATCH --nodes=2
#SBATCH --ntasks-per-node={tasks}
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=1-0
#SBATCH --signal=B:USR1@180
#SBATCH --partition=long
#SBATCH --account=me
#SBATCH --qos=high
#SBATCH --output={folder}/job-%j.out
#SBATCH --mem=0
#SBATCH --exclusive
export TINYTRAIN_CODE={folder}/code
export PYTHON=/venv/python
export MAX_REQUEUES=3
set -- {folder}/config.toml
# ----
"""


@pytest.mark.parametrize(("template", "tasks"), [("train", 1), ("srun", 8)])
def test_the_script_that_is_submitted(config: Path, tmp_path: Path, template: str, tasks: int) -> None:
    done = submit(
        config, "--nodes", 2, "--gpus-per-node", 8, "--cpus-per-task", 64, "--time", "1-0", "--partition", "long",
        "--account", "me", "--qos", "high", "--max-requeues", 3, "--template", f"slurm/{template}.sbatch", "--dry-run",
        "--batch-size", 16, "--sbatch", "--mem=0", "--exclusive",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run" / "submitted" / "1"
    original = (REPOSITORY / "slurm" / f"{template}.sbatch").read_text()
    script, _, command = done.stdout.partition("\n# would be submitted from ")
    rendered = GOLDEN.format(tasks=tasks, folder=folder)
    assert rendered in script
    assert script.replace(rendered, "").rstrip("\n") == original.rstrip("\n"), "nothing else of the template may change"
    assert command == f"{REPOSITORY} with:\nsbatch --parsable {folder}/job.sbatch\n"
    assert not (tmp_path / "run").exists(), "a dry run changes nothing"


def test_a_sweep_has_a_configuration_for_each_task(config: Path, slurm: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.txt"
    sweep.write_text(f"# two\n--lr-max 0.02\n\n--d-model 32 --target-dir {tmp_path}/wide\n")
    done = submit(config, *USUAL, "--array", sweep, path=slurm)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run" / "submitted" / "1"
    script = (slurm / "script").read_text()
    assert "#SBATCH --array=0-1\n" in script
    assert f"#SBATCH --output={folder}/job-%A_%a.out\n" in script
    assert f"set -- {folder}/config-$SLURM_ARRAY_TASK_ID.toml\n" in script
    first, second = ((folder / f"config-{task}.toml").read_text() for task in (0, 1))
    assert "lr_max = 0.02\n" in first
    assert f'target_dir = "{tmp_path}/run/0"\n' in first
    assert "d_model = 32\n" in second
    assert f'target_dir = "{tmp_path}/wide"\n' in second
    sweep.write_text("--target-dir same\n--target-dir same\n--batch-size 3\n")
    text = refusal(config, *USUAL, "--array", sweep)
    assert f"several tasks have the target_dir {REPOSITORY}/same; give each" in text
    assert "task 2: batch_size: 3 / micro_batch_size 1 = 3 micro-batches are fewer than 4 ranks" in text


def parse(args: list[str]) -> tuple[SubmitOptions, list[str]]:
    """Parse a command line as tinytrain submit does."""
    end = args.index("--sbatch") if "--sbatch" in args else len(args)
    options, settings = parse_options(SubmitOptions, "submit", args[:end])
    return replace(options, sbatch=tuple(args[end + 1 :])), settings


def problems_of(*args: object) -> str:
    """What is wrong with a command line, as text; "" if nothing is."""
    try:
        check(*parse([*map(str, args)]))
    except ConfigError as error:
        return "\n".join(error.problems)
    return ""


def without_steps(config: Path) -> Path:
    lines = config.read_text().splitlines(keepends=True)
    config.write_text("".join(line for line in lines if not line.startswith("total_steps")))
    return config


def test_a_dry_run_says_how_many_steps_the_epochs_are(config: Path, tmp_path: Path) -> None:
    shuffled = (without_steps(config), *USUAL, "--vocab-size", 53, "--sampling", "shuffle", "--dry-run")
    # (4,000 tokens / 12, rounded up) = 334 windows in batches of 8
    done = submit(*shuffled, "--epochs", 3)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("# 3.0 epochs give total_steps = 126\n")
    (tmp_path / "sweep").write_text("--epochs 1\n--epochs 3\n")
    done = submit(*shuffled, "--array", tmp_path / "sweep")
    assert done.stdout.startswith(
        "# task 0: 1.0 epochs give total_steps = 42\n# task 1: 3.0 epochs give total_steps = 126\n"
    ), done.stderr
    assert not (tmp_path / "run").exists()
    said = refusal(*shuffled, "--epochs", 3, "--train-data", tmp_path / "none.npy")
    assert "epochs: total_steps follows from the token files of train_data, which cannot be read here (" in said


def test_an_own_template_gets_the_configuration_of_its_task_and_keeps_its_number_of_tasks(
    config: Path, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("--seed 1\n--seed 2\n")
    template = tmp_path / "mine.sbatch"
    lines = ["#!/bin/bash", "# ours", 'srun train "$@"', "#SBATCH --comment=too-late"]
    for own, tasks in ([], 1), (["#SBATCH --ntasks-per-node=4"], 4), (["#SBATCH --mem=0", "DIRECT=yes"], 2):
        template.write_text("\n".join([lines[0], *own, *lines[1:]]))
        options, settings = parse([str(config), *USUAL, "--array", str(sweep), "--template", str(template)])
        base, configs = check(options, settings)
        script = Job(options, configs, base, template, tmp_path / "job").script().splitlines()
        ours = script.index("# ---- filled in by tinytrain submit")
        assert f"#SBATCH --ntasks-per-node={tasks}" in script[ours:]
        assert "#SBATCH --array=0-1" in script[ours : script.index('srun train "$@"')], "sbatch must read it"
        assert f"set -- {tmp_path}/job/config-$SLURM_ARRAY_TASK_ID.toml" in script[ours:]
        del script[ours : script.index("# ----") + 1]
        assert script == template.read_text().splitlines(), "nothing else of the template may change"


def test_what_an_array_or_a_template_cannot_do_is_refused(config: Path, tmp_path: Path) -> None:
    sweep, template = tmp_path / "sweep.txt", tmp_path / "mine.sbatch"
    sweep.write_text("--seed 1\n--seed 2\n")
    array, own = ("--array", sweep), ("--template", template)
    both = "array.sbatch reads a sweep by itself"
    assert both in problems_of(config, *USUAL, *array, "--template", REPOSITORY / "slurm" / "array.sbatch")
    for text, expected in (
        (b"srun x\n", "does not begin with #!"),
        (b"#!/bin/sh\n\xff", "cannot be read"),
        (b"#!/bin/sh\n#SBATCH --array=0-3\n", "whose tasks would all train the same run"),
    ):
        template.write_bytes(text)
        assert expected in problems_of(config, *USUAL, *own)
    assert problems_of(config, *USUAL, *array, *own) == "", "the lines of the sweep replace that array"
    same_run = "would make all tasks train the same run"
    assert same_run in problems_of(config, *USUAL, "--sbatch", "--array=0-3")
    assert same_run in problems_of(config, *USUAL, "--sbatch", "-a", "0")
    assert problems_of(config, *USUAL, *array, "--sbatch", "--array=0-1%1") == ""
    assert "has task 2, but the sweep has tasks 0 .. 1" in problems_of(config, *USUAL, *array, "--sbatch", "--array=2")
    kept = ("--ckpt-dir", tmp_path / "kept")
    text = problems_of(config, *USUAL, *array, *kept)
    assert f"several tasks have the ckpt_dir {tmp_path}/kept and the ckpt_save_prefix checkpoint" in text
    sweep.write_text("--ckpt-save-prefix a\n--ckpt-save-prefix b\n")
    assert problems_of(config, *USUAL, *array, *kept) == ""
    sweep.write_text('--seed "1\n')
    assert "has a quote without its end" in problems_of(config, *USUAL, *array)


def test_a_job_that_may_lose_nodes(config: Path) -> None:
    done = submit(config, *USUAL, "--nodes", "1:3", "--dry-run")
    assert done.returncode == 0, done.stderr + "three nodes cannot be used at once, but two can"
    assert "#SBATCH --nodes=1-3\n" in done.stdout
    assert "#SBATCH --no-kill\n" in done.stdout
    assert "export MIN_NODES=1\n" in done.stdout


def test_all_mistakes_are_reported_together(config: Path, tmp_path: Path) -> None:
    (tmp_path / "text.npy").write_text("no tokens")
    text = refusal(
        config, "--nodes", 3, "--processes-per-node", 3, "--time", "1", "--context-len", 5000, "--val-data",
        tmp_path / "text.npy", "--init-from", "/nowhere", "--ckpt-writers", 9,
    )  # fmt: skip
    assert text.startswith(f"error: 6 problems in {config}\n")
    assert "--time: 1 is less than two minutes" in text
    assert (
        "batch_size: 8 / micro_batch_size 1 = 8 micro-batches are fewer than 9 ranks, and each rank needs one; "
        "possible: ranks 5, 6, 7, 8; or batch_size 9" in text
    )
    assert "train_data: " in text
    assert (
        "has 4000 tokens, but context_len 5000 needs at least 5001; 1001 more are needed, or set context_len to at most"
        in text
    )
    assert "val_data: " in text
    assert "not a readable .npy file (it begins with b'no token', which is not how such a file begins)" in text
    assert "init_from: there is no folder /nowhere" in text
    assert "ckpt_writers: 9 is more than the 6 processes" in text


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--time", "30"], "--gpus-per-node: not set"),
        ([*USUAL, "--gpus-per-node", "2"], "there is one process for each GPU"),
        ([*USUAL[:-1], "soon"], "--time: 'soon' is not a time limit"),
        ([*USUAL, "--total-step", "5"], "did you mean total_steps?"),
        ([*USUAL, "--train-data", "/nope/train.npy", "--vocab-size", "9"], "/nope/train.npy: no such token file"),
        ([*USUAL, "--train-data", "/nope/train.npy"], "train_data: /nope/train.npy: no such token file"),
        ([*USUAL, "--train-data", "/nope/*.npy"], "train_data: /nope/*.npy: no file fits the glob"),
        ([*USUAL, "--vocab-size", "9"], "vocab_size: 9 is less than the 53 in"),
        ([*USUAL, "--parallel", "none"], "parallel: none runs on 1 process, but there are 4"),
        ([*USUAL, "--template", "mine.sbatch"], "--template: there is no file mine.sbatch"),
        ([*USUAL, "--max-requeues", "-1"], "--max-requeues: -1 must not be negative; give 0 for no requeue"),
        ([*USUAL, "--max-requeus", "1"], "--max-requeus: unknown option; did you mean --max-requeues?"),
        ([*USUAL, "--array", "mine.txt"], "--array: mine.txt cannot be read"),
        ([*USUAL, "--nodes", "x"], "--nodes: 'x' is not a number of nodes; give a whole number, or MIN:MAX"),
        ([*USUAL, "--nodes", "3:2"], "--nodes: 3:2 has more nodes at least than at most; give MIN:MAX"),
        ([*USUAL, "--nodes", "1:2", "--template", "slurm/srun.sbatch"], "--nodes: without torchrun (srun.sbatch) no"),
        (
            [*USUAL, "--nodes", "1:2", "--parallel", "hsdp", "--dp-shard", "8"],
            "--nodes: 1 node(s) with 2 process(es) each, the fewest, cannot train this run: ",
        ),
    ],
)
def test_a_mistake_is_reported_on_the_login_node(config: Path, args: list[str], sentence: str) -> None:
    assert sentence in refusal(config, *args)


def test_a_check_needs_no_torch(config: Path) -> None:
    code = (
        "import runpy, sys\nsys.argv[0] = 'submit.py'\n"
        f"try: runpy.run_path({str(SUBMIT)!r}, run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, str(config), *USUAL, "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stderr.strip() == "False", "a login node must not wait for torch"


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [("30", 1800), ("1:30", 90), ("2:00:00", 7200), ("1-0", 86400), ("1-2:30", 95400), ("1-2:30:05", 95405)],
)
def test_time_limits_in_slurms_spelling(limit: str, seconds: int) -> None:
    assert seconds_of(limit) == seconds


def test_the_job_runs_what_was_submitted(config: Path, slurm: Path, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for part in ("launch", "tinytrain_dist", "slurm", "configs"):
        shutil.copytree(REPOSITORY / part, checkout / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", checkout)
    git = ["git", "-C", str(checkout), "-c", "user.name=a", "-c", "user.email=b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    (checkout / "slurm" / "env.sh").write_text("export NCCL_DEBUG=INFO\n")
    (checkout / "tinytrain_dist" / "train.py").write_text("changed and not committed\n")
    (checkout / "tinytrain_dist" / "new.py").write_text("not added yet\n")
    (checkout / "data").mkdir()
    (checkout / "data" / "huge.npy").write_text("not code")
    done = submit(config, *USUAL, "--seed", 5, path=slurm, script=checkout / "launch" / "submit.py")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run" / "submitted" / "1"
    assert "job 77: 1 run(s)" in done.stdout
    assert (folder / "job_id").read_text() == "77\n"
    (checkout / "tinytrain_dist" / "train.py").write_text("changed again\n")
    assert (folder / "code" / "tinytrain_dist" / "train.py").read_text() == "changed and not committed\n"
    assert (folder / "code" / "tinytrain_dist" / "new.py").exists()
    assert (folder / "code" / "slurm" / "env.sh").exists()
    assert not (folder / "code" / "data").exists()
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert (folder / "code" / "COMMIT").read_text() == f"{head} with changes\n"
    assert "seed = 5\n" in (folder / "config.toml").read_text()
    assert (slurm / "script").read_text() == (folder / "job.sbatch").read_text()
    again = submit(config, *USUAL, path=slurm, script=checkout / "launch" / "submit.py")
    assert str(tmp_path / "run" / "submitted" / "2") in again.stdout


def test_follow_shows_the_log_to_the_end(config: Path, slurm: Path) -> None:
    done = submit(config, *USUAL, "--follow", path=slurm)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("hello from the job\n") == 2
    assert done.stdout.endswith("job 77 has ended: COMPLETED\n")


def test_what_slurm_refuses_leaves_nothing_behind(config: Path, slurm: Path, tmp_path: Path) -> None:
    (slurm / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: x' >&2\nexit 1\n")
    done = submit(config, *USUAL, "--partition", "x", path=slurm)
    assert done.returncode == 1
    assert done.stderr == "error: sbatch refused: sbatch: error: invalid partition specified: x\n"
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    submit(config, *USUAL, "--partition", "x", path=slurm)
    assert list((tmp_path / "run").iterdir()) == []


def test_missing_slurm_is_reported(config: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SUBMIT), str(config), *USUAL],
        env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "sbatch: not found here" in done.stderr
