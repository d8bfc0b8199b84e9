"""Run all checks of a checkout one after another: lint, format, types, shell scripts, tests.

    .venv/bin/python tinytrain_dist/launch/checks.py [--fast] [--torch VERSION] [PYTEST ARGUMENTS]

launch/test.sh makes the environment and then runs this file by its path with the Python of the environment. A failing
stage does not end the others.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # the checkout
TEST_PROCESSES = min(4, os.cpu_count() or 1)  # most tests wait for processes that they start, so these share the cores
FOLDERS_WITH_SCRIPTS = (".ci", "launch", "slurm", "tinytrain_dist", "tests", "benchmarks", "examples")


@dataclass(frozen=True)
class Stage:
    """One command: its name, what it does and how long it takes, and its words."""

    name: str
    description: str
    command: Sequence[str]


def shell_scripts(root: Path) -> list[str]:
    """Return the paths of all shell and batch scripts, relative to `root`."""
    found = [path for folder in FOLDERS_WITH_SCRIPTS for path in sorted((root / folder).rglob("*")) if path.is_file()]
    is_script = {path: path.suffix in (".sh", ".sbatch") or path == root / ".ci" / "run" for path in found}
    return [str(path.relative_to(root)) for path in found if is_script[path]]


def stages(arguments: Sequence[str], root: Path = ROOT) -> list[Stage]:
    """Return the stages for the arguments of launch/test.sh, after the stage that makes the environment."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--torch")
    options, of_pytest = parser.parse_known_args(arguments)
    markers = "not slow and not slurm" if options.torch else "not slow" if options.fast else ""
    # The last -m or -n counts, so the user's own has precedence. The tests of a file share what they prepare.
    # tests/conftest.py sorts the files by length; pytest-xdist would sort them by the number of tests.
    parallel = ["-n", str(TEST_PROCESSES), "--dist", "loadfile", "--no-loadscope-reorder"]
    pytest = [sys.executable, "-m", "pytest", *parallel, *(["-m", markers] if markers else []), *of_pytest]
    tests = Stage("pytest", "tests on one and many processes, a few minutes", pytest)
    if options.torch:
        return [tests]
    tools = Path(sys.executable).parent
    return [
        Stage("ruff check", "lint, a second", [f"{tools}/ruff", "check", "."]),
        Stage("ruff format", "layout of the code, a second", [f"{tools}/ruff", "format", "--check", "."]),
        Stage("mypy", "types, up to a minute the first time", [f"{tools}/mypy"]),
        Stage("shellcheck", "shell and batch scripts, seconds", [f"{tools}/shellcheck", *shell_scripts(root)]),
        tests,
    ]


def run_all(planned: Sequence[Stage], root: Path = ROOT) -> int:
    """Run all stages; return 0 if all passed, else 1. The last line names the stages that failed."""
    # The ranks of a test share the cores. With more than one thread each, they would wait for each other.
    # Scripts that the tests start use the Python of this environment, also if PYTHON is the one that made it.
    variables = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHON": sys.executable}
    failed = []
    total = len(planned) + 1  # making the environment was the first
    for number, stage in enumerate(planned, 2):
        print(f"\n[{number}/{total}] {stage.name}: {stage.description}", flush=True)
        if subprocess.run(stage.command, cwd=root, env=variables, check=False).returncode != 0:
            failed.append(f"[{stage.name}]")
    if failed:
        print(f"\nlaunch/test.sh: FAILED in {len(failed)} of {total} stages: {' '.join(failed)}", flush=True)
        return 1
    print(f"\nlaunch/test.sh: all {total} stages passed", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_all(stages(sys.argv[1:])))
