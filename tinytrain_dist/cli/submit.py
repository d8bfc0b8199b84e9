"""`tinytrain submit`: check a run on the login node and submit it to Slurm; see launch/slurm_submit.py."""

from __future__ import annotations

import dataclasses

from tinytrain_dist.cli.arguments import parse_options
from tinytrain_dist.launch.slurm_submit import SubmitOptions as SubmitOptions
from tinytrain_dist.launch.slurm_submit import submit_run
from tinytrain_dist.utils.lost_output import keep_output_from_failing


def main(args: list[str]) -> int:
    """Submit a run; return 0 if submitted (with --follow: completed), 1 if Slurm refuses."""
    keep_output_from_failing()  # the job is submitted, even if its number cannot be printed
    end = args.index("--sbatch") if "--sbatch" in args else len(args)
    options, settings = parse_options(SubmitOptions, "submit", args[:end])
    return submit_run(dataclasses.replace(options, sbatch=tuple(args[end + 1 :])), settings)
