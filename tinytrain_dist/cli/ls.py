"""`tinytrain ls`: list the checkpoints of a run, or the runs in a folder.

Must not know how a run is trained. Changes nothing.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from rich.text import Text

from tinytrain_dist.checkpoint.discovery import own_checkpoints, present_rules, read_trainer_state
from tinytrain_dist.checkpoint.manifest import file_bytes, is_damaged, quick_problems
from tinytrain_dist.checkpoint.retention import read_committed_checkpoint, reasons_to_keep
from tinytrain_dist.cli.arguments import call_verb
from tinytrain_dist.cli.tables import PathArgument, new_table, print_table
from tinytrain_dist.config.run_folder import (
    DOWNLOAD_SUFFIX,
    ERROR_FILE,
    MANIFEST_FILE,
    STATE_FILE,
    TEMPORARY_SUFFIX,
    Record,
    RunFolder,
    checkpoint_step,
    is_checkpoint,
    name_suffix,
    open_run,
    read_copies_record,
    read_records,
    read_settings,
)
from tinytrain_dist.errors import CheckpointError
from tinytrain_dist.utils.atomic_files import read_json_object
from tinytrain_dist.utils.json_files import whole_number
from tinytrain_dist.utils.lost_output import print_line
from tinytrain_dist.utils.progress import progress_bar
from tinytrain_dist.utils.text import format_age, format_bytes, is_url


def ls(folder: PathArgument, full: bool = False) -> int:
    """List the checkpoints of a run, or the runs in a folder.

    Args:
        folder: A run (its target_dir), a checkpoint, a folder with several runs, or the URL of copies.
        full: Check every byte of every checkpoint, not only the manifest and the sizes.
    """
    if is_checkpoint(folder):
        no_records = Path()
        _list_checkpoints(RunFolder(folder.parent, folder.parent, no_records), [folder], full)
        return 0
    run = RunFolder.at(folder)
    if run is not None:
        _list_checkpoints(run, run.step_folders(), full)
        return 0
    subfolders = [path for path in sorted(folder.iterdir()) if path.is_dir()] if folder.is_dir() else []
    runs = [run for run in map(RunFolder.at, subfolders) if run is not None]
    if not runs:
        open_run(folder)  # raises an error that says what was expected
    _list_runs(runs)
    return 0


def _list_checkpoints(run: RunFolder, folders: list[Path], full: bool) -> None:
    if not folders:
        print(f"{run.checkpoints}: no checkpoint yet")
        return
    records = read_records(run.records) if run.records.is_file() else []
    evaluations = {record["step"]: record["loss"] for record in _with_loss(records, "eval")}
    reasons = _reasons_to_stay(run)
    copies = read_copies_record(run.folder)
    columns = ["copied<"] if copies else []
    table = new_table("step", "age", "size", "eval loss", "valid<", "folder<", *columns, "stays because of<")
    for path in folders:
        manifest = path / MANIFEST_FILE  # written last
        written = manifest if manifest.exists() else path
        age = format_age(time.time() - written.stat().st_mtime)
        size = format_bytes(sum(file.stat().st_size for file in path.rglob("*") if file.is_file()))
        step = checkpoint_step(path)
        shown_step = "" if step < 0 else str(step)
        validity, reason = _validity(path, full), reasons.get(path, "")
        cells: list[str | Text] = [shown_step, age, size, _eval_loss(path, evaluations), validity, path.name]
        table.add_row(*cells, *([_copied(path, copies)] if copies else []), reason)
    print_table(table)


def _copied(path: Path, copies: dict[str, Any]) -> str:
    """Return whether there is a copy of a checkpoint, by copies.json."""
    if path.name in copies["copied"]:
        return "yes"
    return "in progress" if copies.get("copying") == path.name and not copies["problem"] else ""


def _reasons_to_stay(run: RunFolder) -> dict[Path, str]:
    """Return what keeps each checkpoint of a run; "" where nothing does, so that the next save removes it."""
    settings = read_settings(run.folder)
    if not settings:  # a checkpoint without its run
        return {}
    paths = own_checkpoints(run, settings, print_line).committed()
    found = [read_committed_checkpoint(path) for path in paths]
    try:
        rules = present_rules(run, settings)
    except CheckpointError as error:
        print(f"WARNING: {error}", file=sys.stderr)
        return {}
    return dict(zip(paths, reasons_to_keep(found, rules, is_damaged), strict=True))


def _eval_loss(path: Path, evaluations: dict[int, float]) -> str:
    """Format the eval loss at the checkpoint's step, or an earlier one together with its step."""
    own_step = checkpoint_step(path)
    earlier = [step for step in evaluations if step <= own_step]
    if earlier:
        step = max(earlier)
        return f"{evaluations[step]:.4f}" + ("" if step == own_step else f" at {step}")
    try:
        loss = read_trainer_state(path).get("report", {}).get("eval_loss")
    except CheckpointError:
        loss = None
    return f"{loss:.4f}" if isinstance(loss, int | float) else ""


def _validity(path: Path, full: bool) -> Text:
    """Describe whether a checkpoint is intact, by its sizes or, with `full`, by its bytes."""
    suffix = name_suffix(path)
    if suffix == DOWNLOAD_SUFFIX:
        return Text("unfinished: being downloaded, or left by a crash", "yellow")
    if suffix == TEMPORARY_SUFFIX:
        return Text("unfinished: being written, or left by a crash", "yellow")
    if suffix:
        return Text(f"set aside as {suffix}", "yellow")
    if full:
        from tinytrain_dist.checkpoint.verify import find_damage  # needs torch, which takes seconds to import

        with progress_bar(f"verifying {path.name}", file_bytes(path), unit="bytes") as advance:
            damage = find_damage(path, advance=advance)
    else:
        damage = quick_problems(path)
    if damage:
        more = f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
        return Text("DAMAGED: " + damage[0].replace(f"{path}/", "") + more, "bold red")
    return Text("yes, every byte" if full else "yes, by size", "green")


def _list_runs(runs: list[RunFolder]) -> None:
    table = new_table("run<", "state<", "step", "of", "loss", "eval loss", "checkpoints", "last record")
    for run in runs:
        records = read_records(run.records) if run.records.is_file() else []
        step = max((record["step"] for record in records), default=None)
        age = format_age(time.time() - run.records.stat().st_mtime) + " ago" if records else ""
        table.add_row(
            run.folder.name,
            _run_state(run, step),
            "" if step is None else str(step),
            str(read_settings(run.folder).get("total_steps", "")),
            _last_loss(records, "train"),
            _last_loss(records, "eval"),
            str(len(run.committed())),
            age,
        )
    print_table(table)


def _with_loss(records: list[Record], kind: str) -> list[Record]:
    return [record for record in records if record["kind"] == kind and "loss" in record]


def _last_loss(records: list[Record], kind: str) -> str:
    losses = [record["loss"] for record in _with_loss(records, kind)]
    return f"{losses[-1]:.4f}" if losses else ""


def _run_state(run: RunFolder, last_step: int | None) -> Text:
    """Return the state in state.json, unless the records or error.json are newer than it."""
    state_path = run.folder / STATE_FILE
    error_path = run.folder / ERROR_FILE
    state_record = read_json_object(state_path)  # {}: the run has just started, or was killed
    written = state_path.stat().st_mtime if state_record else 0.0
    if error_path.exists() and error_path.stat().st_mtime > written:
        return Text("failed", "bold red")
    if not state_record or (last_step is not None and last_step > whole_number(state_record.get("step"))):
        return Text("running or killed", "yellow")
    state = str(state_record.get("state", ""))
    return Text(state, {"done": "green", "failed": "bold red"}.get(state, "yellow"))


def main(args: list[str]) -> int:
    """Run `tinytrain ls`."""
    if any(map(is_url, args)):
        from tinytrain_dist.cli.remote_copies import list_copies  # its libraries take a while to import

        return call_verb(list_copies, "ls", args)
    return call_verb(ls, "ls", args)
