"""Find the examples and run them as users do. Must not know what a test asserts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from tests.helpers.programs import load_program

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def load_example(name: str) -> ModuleType:
    """Import an example that is a Python program; its `main` does not run."""
    return load_program(EXAMPLES / f"{name}.py")


def run_script(name: str, arguments: list[object], cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a shell example with a `tinytrain` command that starts this checkout."""
    commands = cwd / "commands"
    commands.mkdir(exist_ok=True)
    tinytrain = commands / "tinytrain"
    tinytrain.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tinytrain_dist "$@"\n', encoding="utf-8")
    tinytrain.chmod(0o755)
    env = {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), **variables}
    command = ["bash", str(EXAMPLES / name), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=300)
