"""Read the file of a sweep: a line of settings for each task of a job array. Must not import torch."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from tinytrain_dist.config.loading import parse_command_line
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.utils.regular_files import read_text


def task_settings(words: Sequence[str], line: str, task: int) -> list[str]:
    """Return the settings of a task: those of its line, and a target_dir of its own if the line has none.

    words: the configuration file and the settings of all tasks. Errors: ConfigError.
    """
    settings = split_settings(line)
    if any(re.match(r"--target[-_]dir(=|$)", word) for word in settings):
        return settings
    return [*settings, "--target-dir", f"{parse_command_line([*words, *settings]).target_dir}/{task}"]


def split_settings(line: str) -> list[str]:
    """Return the words of a line of a sweep, as a shell would. Errors: ConfigError."""
    try:
        return shlex.split(line)
    except ValueError as error:
        raise ConfigError(f"--array: the line {line!r} has a quote without its end ({error}); close it") from None


def read_sweep(path: Path) -> list[str]:
    """Return the lines of a sweep, without empty lines and comments. Errors: ConfigError."""
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--array: {path} cannot be read ({error}); give a text file") from None
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def line_of_task(path: Path, task: int) -> str:
    """Return the line of a task. Errors: ConfigError."""
    lines = read_sweep(path)
    if not 0 <= task < len(lines):
        raise ConfigError(f"SWEEP: {path} has no line for task {task}, only for tasks 0 .. {len(lines) - 1}; add one")
    return lines[task]
