"""`tinytrain report`: write one HTML file about runs, to share: curves, events, samples, settings and environment.

Must not know training or torch: it reads the files of the runs.
"""

from __future__ import annotations

from pathlib import Path

import tyro

from tinytrain_dist.cli.arguments import UsageError, call_verb
from tinytrain_dist.cli.report_page.page import MARK, fill_page
from tinytrain_dist.cli.report_page.run_data import read_run
from tinytrain_dist.config.run_folder import distinct_names
from tinytrain_dist.errors import TinytrainError
from tinytrain_dist.utils.atomic_files import write_atomically
from tinytrain_dist.utils.regular_files import NotAFileError, open_regular
from tinytrain_dist.utils.text import format_bytes

MAX_POINTS = 800  # of a curve
MAX_POINTS_OF_ALL = 6000  # of the same curve of all runs, so that the page stays small with many runs
MARK_BYTES = 1000  # the mark of a report is in its first bytes


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
    _check_replaceable(out)
    max_points = max(60, min(MAX_POINTS, MAX_POINTS_OF_ALL // len(runs)) // 2 * 2)
    found = [read_run(run, name, max_points) for run, name in zip(runs, distinct_names(runs), strict=True)]
    page = fill_page(found, title)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, page)
    except OSError as error:
        raise TinytrainError(f"out: {out} cannot be written ({error.strerror}); give another path with --out") from None
    print(f"{out}: {len(runs)} run{'s' * (len(runs) > 1)}, {format_bytes(len(page.encode()))}; open it in a browser")
    return 0


def _check_replaceable(out: Path) -> None:
    """Check that there is no file at `out` but an earlier report. Errors: TinytrainError."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out: {out} is not the name of a page; it must end in .html", "report")
    try:
        with open_regular(out) as file:
            start = file.read(MARK_BYTES)
    except FileNotFoundError:
        return
    except NotAFileError as error:
        raise TinytrainError(f"out: {error}; give another path with --out") from None
    except OSError as error:
        raise TinytrainError(f"out: {out} cannot be written ({error.strerror}); give another path with --out") from None
    if MARK.encode() not in start:
        raise TinytrainError(
            f"out: {out} exists and is not a report (it has no {MARK}), so it is not replaced; give another path with "
            "--out, or delete it"
        )


def main(args: list[str]) -> int:
    """Run `tinytrain report`."""
    return call_verb(report, "report", args)
