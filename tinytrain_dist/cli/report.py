"""`tinytrain report`: write one HTML file about runs, to share: curves, events, samples, settings and environment.

Must not know training or torch: it reads the files of the runs.
"""

from __future__ import annotations

from pathlib import Path

import tyro

from tinytrain_dist.cli.arguments import UsageError, call_verb
from tinytrain_dist.cli.page_file import check_page_path, write_page
from tinytrain_dist.cli.report_page.page import MARK, fill_page
from tinytrain_dist.cli.report_page.run_data import read_run
from tinytrain_dist.config.run_folder import distinct_names
from tinytrain_dist.utils.text import format_bytes

MAX_POINTS = 800  # of a curve
MAX_POINTS_OF_ALL = 6000  # of the same curve of all runs, so that the page stays small with many runs


def report(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    out: Path = Path("report.html"),
    title: str = "Training report",
) -> int:
    """Write one HTML file about one or several runs: curves, events, samples, settings, environment and endings.

    The file needs no network and no other file, so it can be sent to others. It names the paths and hosts of the runs.

    Args:
        runs: Runs (their target_dir), or files such as metrics.jsonl.
        out: The file to write. An existing file is replaced only if it is such a report.
        title: The heading of the page.
    """
    if not runs:
        raise UsageError("runs: no run is given; give at least one (its target_dir)", "report")
    check_page_path(out, "out", "report", MARK, "a report")
    max_points = max(60, min(MAX_POINTS, MAX_POINTS_OF_ALL // len(runs)) // 2 * 2)
    found = [read_run(run, name, max_points) for run, name in zip(runs, distinct_names(runs), strict=True)]
    page = fill_page(found, title)
    write_page(out, "out", page)
    print(f"{out}: {len(runs)} run{'s' * (len(runs) > 1)}, {format_bytes(len(page.encode()))}; open it in a browser")
    return 0


def main(args: list[str]) -> int:
    """Run `tinytrain report`."""
    return call_verb(report, "report", args)
