"""Check what `tinytrain submit` is asked for before Slurm is: the number of nodes, and the batch script.

Must not import torch.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from tinytrain_dist.utils.package_files import package_folder
from tinytrain_dist.utils.regular_files import read_text

if TYPE_CHECKING:
    from tinytrain_dist.launch.slurm_submit import SubmitOptions


def check_nodes(options: SubmitOptions) -> list[str]:
    """Return what is wrong with --nodes, as sentences."""
    if not re.fullmatch(r"\d+(:\d+)?", options.nodes):
        return [f"--nodes: {options.nodes!r} is not a number of nodes; give a whole number, or MIN:MAX"]
    if int(options.nodes.partition(":")[0]) < 1:
        return [f"--nodes: {options.nodes} must be at least 1"]
    fewest, most = options.node_range
    if fewest > most:
        return [f"--nodes: {options.nodes} has more nodes at least than at most; give MIN:MAX"]
    template = options.batch_script
    if options.is_elastic and template.is_file() and re.search(r"^(export )?DIRECT=.", _text(template), re.MULTILINE):
        return [f"--nodes: without torchrun ({template.name}) no node may be lost; give one number"]
    return []


def _text(path: Path) -> str:
    try:
        return read_text(path)
    except (OSError, UnicodeDecodeError):
        return ""  # check_template reports it


def check_template(options: SubmitOptions) -> list[str]:
    """Return why the batch script cannot run the job, as sentences."""
    template = options.batch_script
    if not template.is_file():
        return [f"--template: there is no file {template}; the templates are in {package_folder('slurm')}"]
    try:
        text = read_text(template)
    except (OSError, UnicodeDecodeError) as error:
        return [f"--template: {template} cannot be read ({error}); give a batch script"]
    if not text.startswith("#!"):
        return [f"--template: {template} does not begin with #!, so sbatch would refuse it; add #!/usr/bin/env bash"]
    if template.name == "array.sbatch":
        return [
            "--template: array.sbatch reads a sweep by itself, so it cannot run what is submitted here; give --array "
            "FILE without --template, or submit array.sbatch with sbatch"
        ]
    if not options.array and re.search(r"^#SBATCH +(--array|-a)", text, re.MULTILINE):
        return [
            f"--template: {template} asks for an array, whose tasks would all train the same run; give --array FILE, "
            "or remove that line"
        ]
    return []
