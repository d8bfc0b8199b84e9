"""Owns what runs left on disk: finding a run's checkpoints and its record, `tinytrain ls` and `tinytrain verify`.

Must not know how a run is trained, and changes nothing: it only reads.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tinytrain_dist.commandline import read_toml
from tinytrain_dist.errors import CheckpointError, ConfigError, TinytrainError
from tinytrain_dist.files import MANIFEST, STATE

STEP_FOLDER = re.compile(r".+-(\d{8,})(\..+)?")  # PREFIX-00001000, and what is set aside: .tmp, .damaged
RUN_FILES = ("config.toml", "state.json", "environment.json", "logs", "checkpoints")

Place = tyro.conf.Positional[Path]
Record = dict[str, Any]


# ---------------------------------------------------------------- finding runs and checkpoints


@dataclass(frozen=True)
class Run:
    """A run folder: where its checkpoints and its plain record lie."""

    folder: Path
    checkpoints: Path
    records: Path

    @classmethod
    def at(cls, folder: Path) -> Run | None:
        """The run in `folder`, which may also be its folder of checkpoints; None if there is none."""
        if any((folder / name).exists() for name in RUN_FILES):
            settings = settings_of(folder)
            checkpoints = Path(settings.get("ckpt_dir") or folder / "checkpoints")
            logs = Path(settings.get("log_dir") or folder / "logs")
            return cls(folder, checkpoints, logs / f"{settings.get('log_save_prefix', 'metrics')}.jsonl")
        if folder.is_dir() and any(is_checkpoint(path) for path in folder.iterdir()):
            return cls(folder.parent, folder, folder.parent / "logs" / "metrics.jsonl")
        return None

    def step_folders(self) -> list[Path]:
        """Everything named like a checkpoint, by step, also what is damaged or half-written."""
        found = (
            [path for path in self.checkpoints.iterdir() if is_checkpoint(path)] if self.checkpoints.is_dir() else []
        )
        return sorted(found, key=lambda path: (step_of(path), path.name))

    def committed(self) -> list[Path]:
        """Checkpoints under their final name, by step."""
        return [path for path in self.step_folders() if not set_aside(path)]


def settings_of(folder: Path) -> dict[str, Any]:
    """What config.toml says, {} where there is none or it cannot be read: looking must not fail of it."""
    try:
        return read_toml(folder / "config.toml")[0] if (folder / "config.toml").is_file() else {}
    except ConfigError:
        return {}


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is, or was meant to be, a checkpoint."""
    if not path.is_dir() or (path / "config.toml").exists():
        return False
    return (path / MANIFEST).exists() or (path / STATE).exists() or bool(STEP_FOLDER.fullmatch(path.name))


def step_of(path: Path) -> int:
    """The step in a checkpoint's name, -1 where it has none."""
    match = STEP_FOLDER.fullmatch(path.name)
    return int(match[1]) if match else -1


def set_aside(path: Path) -> str:
    """What is left of the name after the step: "" for a committed checkpoint, else ".tmp", ".damaged" or the like."""
    match = STEP_FOLDER.fullmatch(path.name)
    return (match[2] or "") if match else ""


def open_run(place: Path) -> Run:
    """The run at `place`. Errors: CheckpointError saying what was looked for."""
    run = Run.at(place)
    if run is None:
        state = "holds neither a run nor a checkpoint" if place.is_dir() else "is not a folder"
        raise CheckpointError(f"{place}: {state}; give a run (its target_dir) or one of its checkpoints")
    return run


def quick_problems(folder: Path) -> list[str]:
    """What is wrong with a checkpoint as far as manifest and file sizes tell; empty if nothing."""
    from tinytrain_dist.tensorfiles import read_manifest  # torch takes seconds, and who lists runs need not wait

    try:
        files = read_manifest(folder).files
    except CheckpointError as error:
        return [str(error)]
    found = []
    for name, expected in files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != expected["bytes"]:
            has = "is missing" if size is None else f"has {size:,} bytes"
            found.append(f"{path}: {has}, but {expected['bytes']:,} were written")
    return found


def find_checkpoint(place: Path, kind: str | None = None) -> Path:
    """`place` itself if it is a checkpoint, or the newest valid one of the run there; sizes checked.

    kind: also read every byte of its "model" or "optimizer" files. Those that are passed over are named on stderr.
    Errors: CheckpointError if the one that was asked for is damaged, or if the run has no valid one.
    """

    from tinytrain_dist.tensorfiles import problems_in, read_manifest

    def problems(path: Path) -> list[str]:
        found = quick_problems(path)
        names = [] if found or kind is None else [n for n in read_manifest(path).files if n.startswith(kind)]
        return found + (problems_in(path, names) if names else [])

    if is_checkpoint(place):
        if found := problems(place):
            raise CheckpointError("\n".join(found))
        return place
    run = open_run(place)
    candidates = run.committed()
    for path in reversed(candidates):
        found = problems(path)
        if not found:
            return path
        print(f"passed over, damaged: {'; '.join(found)}", file=sys.stderr)
    raise CheckpointError(
        f"{run.checkpoints}: none of {len(candidates)} checkpoint(s) is valid; train on, or give another run"
        if candidates
        else f"{run.checkpoints}: has no checkpoint yet; wait for the first (ckpt_every), or give another run"
    )


def read_state(checkpoint: Path) -> dict[str, Any]:
    """trainer_state.json of a checkpoint. Errors: CheckpointError if it is missing or broken."""
    try:
        state: dict[str, Any] = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        return state
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint}: {STATE} cannot be read ({error}); give a checkpoint of a training run"
        ) from None


def read_records(path: Path) -> list[Record]:
    """The records of a metrics.jsonl; a torn line, which a crash leaves, is passed over.

    Errors: TinytrainError if there is no such file.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise TinytrainError(
            f"{path}: no record of a run ({error.strerror}); give a folder that a run has written to (its target_dir)"
        ) from None
    found = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record and "kind" in record:
            found.append(record)
    return found


# ---------------------------------------------------------------- ls


def human_bytes(count: float) -> str:
    """Bytes in the unit that a person would choose."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_age(seconds: float) -> str:
    """Seconds in the unit that a person would choose."""
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{max(0, seconds) / size:.0f} {unit}"
    return f"{seconds / 86_400:.0f} days"


def table_of(*columns: str) -> Table:
    """An empty table; `<` behind a name aligns its column to the left."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        left = column.endswith("<")
        table.add_column(column.rstrip("<"), justify="left" if left else "right", overflow="fold")
    return table


def show_table(table: Table) -> None:
    """Print it, in a width that fits."""
    # a pipe has no width; rich would take 80 and fold what another program wants to read
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)


def ls(folder: Place, full: bool = False) -> int:
    """List the checkpoints of a run, or the runs in a folder.

    Args:
        folder: A run (its target_dir), a checkpoint, or a folder with several runs.
        full: Read every byte of every checkpoint; without it the manifest and the sizes are checked.
    """
    if is_checkpoint(folder):
        _list_checkpoints(Run(folder.parent, folder.parent, Path()), [folder], full)
    elif run := Run.at(folder):
        _list_checkpoints(run, run.step_folders(), full)
    else:
        runs = [Run.at(path) for path in sorted(folder.iterdir()) if path.is_dir()] if folder.is_dir() else []
        if not any(runs):
            open_run(folder)  # says what is wrong
        _list_runs([run for run in runs if run])
    return 0


def _list_checkpoints(run: Run, folders: list[Path], full: bool) -> None:
    if not folders:
        print(f"{run.checkpoints}: no checkpoint yet")
        return
    evaluations = {r["step"]: r["loss"] for r in read_records(run.records) if r["kind"] == "eval"} if (
        run.records.is_file()
    ) else {}  # fmt: skip
    table = table_of("step", "age", "size", "eval loss", "valid<", "folder<")
    for path in folders:
        seen = path / MANIFEST if (path / MANIFEST).exists() else path
        age = human_age(time.time() - seen.stat().st_mtime)
        size = human_bytes(sum(file.stat().st_size for file in path.rglob("*") if file.is_file()))
        step = "" if step_of(path) < 0 else str(step_of(path))
        table.add_row(step, age, size, _eval_loss(path, evaluations), _validity(path, full), path.name)
    show_table(table)


def _eval_loss(path: Path, evaluations: dict[int, float]) -> str:
    """The evaluation at the checkpoint's step; an older one is shown with its step, never as if it were this one's."""
    earlier = [step for step in evaluations if step <= step_of(path)]
    if earlier:
        step = max(earlier)
        return f"{evaluations[step]:.4f}" + ("" if step == step_of(path) else f" at {step}")
    try:
        loss = read_state(path).get("report", {}).get("eval_loss")
    except CheckpointError:
        loss = None
    return "" if loss is None else f"{loss:.4f}"


def _validity(path: Path, full: bool) -> Text:
    from tinytrain_dist.tensorfiles import problems_in

    if set_aside(path) == ".tmp":
        return Text("unfinished: being written, or left by a crash", "yellow")
    if set_aside(path):
        return Text(f"set aside as {set_aside(path)}", "yellow")
    found = problems_in(path) if full else quick_problems(path)
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        return Text("DAMAGED: " + found[0].replace(f"{path}/", "") + more, "bold red")
    return Text("yes, every byte" if full else "yes, by size", "green")


def _list_runs(runs: list[Run]) -> None:
    table = table_of("run<", "state<", "step", "of", "loss", "eval loss", "checkpoints", "last sign")
    for run in runs:
        records = read_records(run.records) if run.records.is_file() else []
        last = {kind: [r for r in records if r["kind"] == kind][-1:] for kind in ("train", "eval")}
        losses = [f"{found[0]['loss']:.4f}" if found else "" for found in last.values()]
        step = max((record["step"] for record in records), default=None)
        age = human_age(time.time() - run.records.stat().st_mtime) + " ago" if records else ""
        total = str(settings_of(run.folder).get("total_steps", ""))
        shown = "" if step is None else str(step)
        table.add_row(run.folder.name, _run_state(run, step), shown, total, *losses, str(len(run.committed())), age)
    show_table(table)


def _run_state(run: Run, last_step: int | None) -> Text:
    """state.json's word, unless the record or error.json is newer than it."""
    state: dict[str, Any] = {}
    path, failure = run.folder / "state.json", run.folder / "error.json"
    with contextlib.suppress(OSError, ValueError):  # none yet: the run goes on, or died without a word
        state = json.loads(path.read_text(encoding="utf-8"))
    written = path.stat().st_mtime if state else 0.0
    if failure.exists() and failure.stat().st_mtime > written:
        return Text("failed", "bold red")
    if not state or (last_step is not None and last_step > state.get("step", 0)):
        return Text("running or killed", "yellow")
    word = str(state.get("state", ""))
    return Text(word, {"done": "green", "failed": "bold red"}.get(word, "yellow"))


# ---------------------------------------------------------------- verify


def verify(place: Place) -> int:
    """Read every byte of a checkpoint, or of all of a run; exit code 1 if anything is damaged.

    Args:
        place: A run (its target_dir) or a checkpoint.
    """
    from tinytrain_dist.tensorfiles import problems_in, read_manifest

    run = None if is_checkpoint(place) else open_run(place)
    folders = run.committed() if run else [place]
    if not folders:
        assert run is not None
        raise CheckpointError(f"{run.checkpoints}: has no checkpoint to verify; wait for the first (ckpt_every)")
    damaged = 0
    for path in folders:
        started = time.perf_counter()
        found = problems_in(path)
        seconds = max(time.perf_counter() - started, 1e-9)
        if found:
            damaged += 1
            print(f"DAMAGED  {path}\n  " + "\n  ".join(found))
            continue
        count = sum(file["bytes"] for file in read_manifest(path).files.values())
        print(f"ok       {path}  {human_bytes(count)}, {count / seconds / 1e9:.2f} GB/s", flush=True)
    for path in run.step_folders() if run else []:
        if set_aside(path):
            print(f"skipped  {path}  not a finished checkpoint; a resume does not look at it")
    return 1 if damaged else 0


def ls_main(args: list[str]) -> int:
    """`tinytrain ls`."""
    return tyro.cli(ls, prog="tinytrain ls", args=args)


def verify_main(args: list[str]) -> int:
    """`tinytrain verify`."""
    return tyro.cli(verify, prog="tinytrain verify", args=args)
