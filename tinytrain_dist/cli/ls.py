"""`tinytrain ls`: list the checkpoints of a run, or the runs in a folder.

Must not know how a run is trained, and changes nothing.
"""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import tyro
from rich.text import Text

from tinytrain_dist.checkpoint.discovery import quick_problems, read_trainer_state
from tinytrain_dist.cli.tables import PathArgument, new_table, print_table
from tinytrain_dist.config.run_folder import (
    ERROR_FILE,
    MANIFEST_FILE,
    STATE_FILE,
    TEMPORARY_SUFFIX,
    RunFolder,
    checkpoint_step,
    is_checkpoint,
    name_suffix,
    open_run,
    read_records,
    read_settings,
)
from tinytrain_dist.errors import CheckpointError
from tinytrain_dist.utils.text import format_age, format_bytes


def ls(folder: PathArgument, full: bool = False) -> int:
    """List the checkpoints of a run, or the runs in a folder.

    Args:
        folder: A run (its target_dir), a checkpoint, or a folder with several runs.
        full: Read every byte of every checkpoint; without it the manifest and the sizes are checked.
    """
    if is_checkpoint(folder):
        _list_checkpoints(RunFolder(folder.parent, folder.parent, Path()), [folder], full)
    elif run := RunFolder.at(folder):
        _list_checkpoints(run, run.step_folders(), full)
    else:
        runs = [RunFolder.at(path) for path in sorted(folder.iterdir()) if path.is_dir()] if folder.is_dir() else []
        if not any(runs):
            open_run(folder)  # says what is wrong
        _list_runs([run for run in runs if run])
    return 0


def _list_checkpoints(run: RunFolder, folders: list[Path], full: bool) -> None:
    if not folders:
        print(f"{run.checkpoints}: no checkpoint yet")
        return
    evaluations = {r["step"]: r["loss"] for r in read_records(run.records) if r["kind"] == "eval"} if (
        run.records.is_file()
    ) else {}  # fmt: skip
    table = new_table("step", "age", "size", "eval loss", "valid<", "folder<")
    for path in folders:
        seen = path / MANIFEST_FILE if (path / MANIFEST_FILE).exists() else path
        age = format_age(time.time() - seen.stat().st_mtime)
        size = format_bytes(sum(file.stat().st_size for file in path.rglob("*") if file.is_file()))
        step = "" if checkpoint_step(path) < 0 else str(checkpoint_step(path))
        table.add_row(step, age, size, _eval_loss(path, evaluations), _validity(path, full), path.name)
    print_table(table)


def _eval_loss(path: Path, evaluations: dict[int, float]) -> str:
    """Return the evaluation at the checkpoint's step, or an older one together with its step."""
    earlier = [step for step in evaluations if step <= checkpoint_step(path)]
    if earlier:
        step = max(earlier)
        return f"{evaluations[step]:.4f}" + ("" if step == checkpoint_step(path) else f" at {step}")
    try:
        loss = read_trainer_state(path).get("report", {}).get("eval_loss")
    except CheckpointError:
        loss = None
    return "" if loss is None else f"{loss:.4f}"


def _validity(path: Path, full: bool) -> Text:
    from tinytrain_dist.checkpoint.verify import find_damage

    if name_suffix(path) == TEMPORARY_SUFFIX:
        return Text("unfinished: being written, or left by a crash", "yellow")
    if name_suffix(path):
        return Text(f"set aside as {name_suffix(path)}", "yellow")
    found = find_damage(path) if full else quick_problems(path)
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        return Text("DAMAGED: " + found[0].replace(f"{path}/", "") + more, "bold red")
    return Text("yes, every byte" if full else "yes, by size", "green")


def _list_runs(runs: list[RunFolder]) -> None:
    table = new_table("run<", "state<", "step", "of", "loss", "eval loss", "checkpoints", "last sign")
    for run in runs:
        records = read_records(run.records) if run.records.is_file() else []
        last = {kind: [r for r in records if r["kind"] == kind][-1:] for kind in ("train", "eval")}
        losses = [f"{found[0]['loss']:.4f}" if found else "" for found in last.values()]
        step = max((record["step"] for record in records), default=None)
        age = format_age(time.time() - run.records.stat().st_mtime) + " ago" if records else ""
        total = str(read_settings(run.folder).get("total_steps", ""))
        shown = "" if step is None else str(step)
        table.add_row(run.folder.name, _run_state(run, step), shown, total, *losses, str(len(run.committed())), age)
    print_table(table)


def _run_state(run: RunFolder, last_step: int | None) -> Text:
    """state.json's word, unless the record or error.json is newer than it."""
    state: dict[str, Any] = {}
    path, failure = run.folder / STATE_FILE, run.folder / ERROR_FILE
    with contextlib.suppress(OSError, ValueError):  # none yet: the run has just started, or died
        state = json.loads(path.read_text(encoding="utf-8"))
    written = path.stat().st_mtime if state else 0.0
    if failure.exists() and failure.stat().st_mtime > written:
        return Text("failed", "bold red")
    if not state or (last_step is not None and last_step > state.get("step", 0)):
        return Text("running or killed", "yellow")
    word = str(state.get("state", ""))
    return Text(word, {"done": "green", "failed": "bold red"}.get(word, "yellow"))


def main(args: list[str]) -> int:
    """`tinytrain ls`."""
    return tyro.cli(ls, prog="tinytrain ls", args=args)
