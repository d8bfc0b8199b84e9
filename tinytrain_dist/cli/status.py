"""`tinytrain status`: show what a run is doing. It reads only files, so it also works after the run has died.

Must not know torch. Changes nothing.

Goodput is the share of the time that was spent in useful steps: the sum of step_seconds over all recorded steps,
divided by the time from the first record to the last heartbeat or record (for a running run: to now). The remaining
time was spent in starts, evaluations, saves, waiting for nodes, and steps that were repeated.
"""

from __future__ import annotations

import dataclasses
import itertools
import socket
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from tinytrain_dist.cli.arguments import call_verb
from tinytrain_dist.cli.tables import PathArgument, new_console, new_table, print_table
from tinytrain_dist.config.batch_phases import BatchSizes
from tinytrain_dist.config.run_folder import (
    ERROR_FILE,
    STATE_FILE,
    Record,
    RunFolder,
    checkpoint_step,
    open_run,
    read_copies_record,
    read_records,
    read_settings,
    read_snapshots_record,
)
from tinytrain_dist.reliability.heartbeats import (
    HEARTBEAT_SECONDS,
    Heartbeat,
    describe_progress,
    phase_index,
    read_heartbeats,
)
from tinytrain_dist.reliability.restart_history import Change, describe_changes, read_changes
from tinytrain_dist.utils.atomic_files import read_json_object
from tinytrain_dist.utils.json_files import whole_number
from tinytrain_dist.utils.processes import process_start_time
from tinytrain_dist.utils.stale_files import disk_bytes
from tinytrain_dist.utils.text import format_age, format_bytes

SILENT_SECONDS = 6 * HEARTBEAT_SECONDS  # a shared file system may show a change this late
MAX_SHOWN_RANKS = 16  # with more ranks, the table shows only those that are furthest behind
WATCH_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Status:
    """The status of a run at one moment, read from its files. Times are in seconds since 1970."""

    state: str  # as in state.json, or "dead"
    reason: str
    step: int
    last_step: int  # at which the run will stop; 0: unknown
    sizes: BatchSizes | None  # of all steps; None: unknown
    heartbeats: list[Heartbeat]
    records: list[Record]
    checkpoint: Path | None  # the newest one
    now: float
    alive: bool
    last_sign: float  # time of the last heartbeat or record (alive: now; 0: there is none)
    copies: dict[str, Any] = dataclasses.field(default_factory=dict)  # see read_copies_record
    snapshots: dict[str, Any] = dataclasses.field(default_factory=dict)  # see read_snapshots_record
    changes: list[Change] = dataclasses.field(default_factory=list)  # of the nodes of an elastic run

    def last(self, name: str) -> float | None:
        """Return a value from the newest record that has it; None if no record has it."""
        return next((record[name] for record in reversed(self.records) if record.get(name) is not None), None)

    @property
    def goodput(self) -> float | None:
        """The share of the time that was spent in useful steps; None with fewer than two records.

        The counted time begins with the first record, so the steps of that record do not count.
        """
        timed = [record for record in self.records if record.keys() >= {"step_seconds", "time"}]
        trained = [record for record in timed if record["kind"] == "train"]
        if len(trained) < 2 or self.last_sign <= trained[0]["time"]:
            return None
        useful_seconds = 0.0
        for before, after in itertools.pairwise(trained):
            # negative if a restart went back to an earlier step: the steps between were repeated
            useful_seconds += (after["step"] - before["step"]) * after["step_seconds"]
        return float(min(1.0, useful_seconds / (self.last_sign - trained[0]["time"])))

    @property
    def seconds_left(self) -> float | None:
        """The remaining time at the speed of the last record; None if the run has ended."""
        step_seconds = self.last("step_seconds")
        if not self.alive or step_seconds is None:
            return None
        if self.sizes is None or self.step < 1:
            return float((self.last_step - self.step) * step_seconds)
        sequences = self.sizes.before(self.last_step) - self.sizes.before(self.step)
        return float(sequences / self.sizes.at(self.step - 1) * step_seconds)


def read_status(run: RunFolder, now: float | None = None, records: list[Record] | None = None) -> Status:
    """Read the status of a run. Missing or incomplete files are no error, because a crash may leave them.

    records: the records, or the last of them, if the caller has read them already.
    """
    now = time.time() if now is None else now
    settings = read_settings(run.folder)
    if records is None:
        records = read_records(run.records) if run.records.is_file() else []
    heartbeats = read_heartbeats(run.folder)
    signs = [heartbeat["seen"] for heartbeat in heartbeats] + [record["time"] for record in records if "time" in record]
    last_sign = max(signs, default=0.0)
    state_record = read_json_object(run.folder / STATE_FILE)
    state, reason = _state(run, state_record, heartbeats, last_sign, now)
    steps = [heartbeat["step"] for heartbeat in heartbeats] + [record["step"] for record in records]
    total_steps = whole_number(settings.get("total_steps"))
    checkpoints = run.committed()
    return Status(
        state=state,
        reason=reason,
        step=max([*steps, whole_number(state_record.get("step"))]),
        last_step=min(total_steps, whole_number(settings.get("stop_at_step")) or total_steps),
        sizes=BatchSizes.read(settings),
        heartbeats=heartbeats,
        records=records,
        checkpoint=checkpoints[-1] if checkpoints else None,
        now=now,
        alive=state == "running",
        last_sign=now if state == "running" else last_sign,
        copies=read_copies_record(run.folder),
        snapshots=read_snapshots_record(run.folder),
        changes=read_changes(run.folder),
    )


def _state(
    run: RunFolder, state_record: dict[str, Any], heartbeats: list[Heartbeat], last_sign: float, now: float
) -> tuple[str, str]:
    """Return the state of a run and its reason. After a crash or a restart, state.json may be out of date."""
    state = str(state_record.get("state", ""))
    reason = str(state_record.get("reason", ""))
    error_record = read_json_object(run.folder / ERROR_FILE)
    lost = [heartbeat for heartbeat in heartbeats if _process_is_gone(heartbeat)]
    silent = now - last_sign > SILENT_SECONDS
    if error_record and state in ("failed", "running"):
        return "failed", str(error_record.get("message", ""))
    if state in ("", "running") and (not heartbeats or lost or silent):
        return "dead", _reason_of_death(lost, last_sign, now)
    if heartbeats and not lost and not silent:
        return "running", reason  # it was started again, and has not written its state yet
    return state, reason


def _process_is_gone(heartbeat: Heartbeat) -> bool:
    """Return whether a process of this machine has ended. Returns False for processes of other machines."""
    if heartbeat["host"] != socket.gethostname() or not Path("/proc").is_dir():
        return False
    return process_start_time(heartbeat["pid"]) is None


def _reason_of_death(lost: list[Heartbeat], last_sign: float, now: float) -> str:
    if lost:
        return f"rank {lost[0]['rank']} (process {lost[0]['pid']}) ended without reporting an error"
    return f"no heartbeat or record for {format_age(now - last_sign)}" if last_sign else "no heartbeat or record found"


def show(status: Status, console: Console) -> None:
    """Print a summary with one topic per line, then a table of the ranks."""
    state_colours = {"failed": "red", "dead": "red", "done": "green"}
    for label, text in lines_of(status).items():
        if text:
            console.print(f"{label:<11}", end="", style="bold", highlight=False)
            colour = state_colours.get(status.state) if label == "state" else None
            console.print(text, style=colour, highlight=False, markup=False, soft_wrap=True)
    if status.heartbeats:
        _show_ranks(status, console)


def _show_ranks(status: Status, console: Console) -> None:
    table = new_table("rank", "host<", "pid", "phase<", "step", "unchanged", "seen")
    by_progress = sorted(status.heartbeats, key=_progress)  # first those that the others wait for
    for heartbeat in by_progress[:MAX_SHOWN_RANKS]:
        duration = format_age(heartbeat["seconds"])
        seen = format_age(status.now - heartbeat["seen"]) + " ago"
        identity = (heartbeat["rank"], heartbeat["host"], heartbeat["pid"])
        table.add_row(*map(str, (*identity, heartbeat["phase"], heartbeat["step"], duration, seen)))
    print_table(table)
    num_hidden = len(by_progress) - MAX_SHOWN_RANKS
    if num_hidden > 0:
        console.print(f"and {num_hidden} more ranks that are at least as far", highlight=False)


def _progress(heartbeat: Heartbeat) -> tuple[float, int, int]:
    return heartbeat["step"], phase_index(heartbeat), heartbeat["rank"]


def lines_of(status: Status) -> dict[str, str]:
    """Return the lines of the summary by their label; "" if nothing is known."""
    share = f" ({100 * status.step / status.last_step:.0f} %)" if status.last_step else ""
    left = "" if status.seconds_left is None else f", about {format_age(status.seconds_left)} left"
    goodput = status.goodput
    restarts = [record for record in status.records if record["kind"] in ("restarted", "resumed")]
    waiting = ""
    if status.alive and status.heartbeats:
        world_size = status.heartbeats[0]["world_size"]
        waiting = describe_progress(status.heartbeats, world_size, status.now - SILENT_SECONDS)
    return {
        "state": status.state + (f": {status.reason}" if status.reason else ""),
        "progress": f"step {status.step} of {status.last_step or '?'}{share}{left}",
        "checkpoint": _describe_checkpoint(status),
        "snapshot": _describe_snapshot(status),
        "copies": _describe_copies(status),
        "loss": _describe_losses(status),
        "speed": _describe_speed(status),
        "goodput": "" if goodput is None else f"{100 * goodput:.0f} % of the time was spent in useful steps",
        **describe_changes(status.changes),
        "restarts": str(_count_restarts(restarts)) if restarts else "",
        **{f"  step {record['step']}": str(record.get("text", "")) for record in restarts[-5:]},
        "last seen": (
            f"{format_age(status.now - status.last_sign)} ago" if status.last_sign and not status.alive else ""
        ),
        "waiting": waiting,
    }


def _describe_checkpoint(status: Status) -> str:
    if status.checkpoint is None:
        return "none yet"
    age = format_age(status.now - status.checkpoint.stat().st_mtime)
    steps_ago = status.step - checkpoint_step(status.checkpoint)
    return f"{status.checkpoint.name}, {age} old" + (f", {steps_ago} step(s) ago" if steps_ago > 0 else "")


def _describe_snapshot(status: Status) -> str:
    """Return the newest snapshot in memory; after the run has died, what it has left in the memory of this machine."""
    nodes = status.snapshots.get("nodes", [])
    if not nodes:
        return ""
    if not status.alive:
        left = [node["folder"] for node in nodes if node["host"] == socket.gethostname()]
        left = [folder for folder in left if Path(folder).is_dir()]
        size = format_bytes(sum(disk_bytes(Path(folder)) for folder in left))
        return f"{size} of memory left in {', '.join(left)}; the next start on this machine frees it" if left else ""
    size = format_bytes(max(node["bytes"] for node in nodes))
    record = status.snapshots
    if "step" not in record:
        return f"none yet, {size} per node"
    steps_ago = status.step - record["step"]
    return (
        f"step {record['step']}, {format_age(status.now - record['time'])} old, {steps_ago} step(s) ago; training "
        f"waited {record['stall_seconds']:.2g} s for it; {size} per node"
    )


def _describe_copies(status: Status) -> str:
    """Return the newest copy, the one that is being made, and why none is made; "" for a run without copies."""
    record = status.copies
    if not record:
        return ""
    names = [name for name in record["copied"] if isinstance(name, str)]
    parts = [f"{max(names, key=lambda name: (len(name), name))} at {record['url']}" if names else "none yet"]
    if status.alive and record.get("copying"):
        done, total = format_bytes(record["bytes_copied"]), format_bytes(record["bytes"])
        parts.append(f"copying {record['copying']}, {done} of {total}")
    if record["problem"]:
        parts.append(f"FAILING: {record['problem']}")
    return "; ".join(parts)


def _describe_losses(status: Status) -> str:
    """Return the newest training loss and the newest evaluation."""
    labels = {"train": "", "eval": "eval "}
    newest = {record["kind"]: record for record in status.records if record["kind"] in labels and "loss" in record}
    losses = (f"{labels[kind]}{record['loss']:.4f} at step {record['step']}" for kind, record in newest.items())
    return ", ".join(losses)


def _describe_speed(status: Status) -> str:
    speed, step_seconds = status.last("tokens_per_second"), status.last("step_seconds")
    if speed is None or step_seconds is None:
        return ""
    return f"{speed:,.0f} tokens/s, {step_seconds:.3g} s per step"


def _count_restarts(restarts: list[Record]) -> int:
    """Count the starts after the first one. A restart in place writes two records, "restarted" and "resumed"."""
    kinds = [record["kind"] for record in restarts]
    return len(kinds) - sum(pair == ("restarted", "resumed") for pair in itertools.pairwise(kinds))


def status(run: PathArgument, watch: bool = False) -> int:
    """Show what a run is doing: state, progress, checkpoints, speed, restarts, and where each rank is.

    Exit code 1 if the run has failed or died.

    Args:
        run: A run (its target_dir).
        watch: Refresh every two seconds until the run has ended.
    """
    run_folder = open_run(run)
    console = new_console()
    while True:
        now = read_status(run_folder)
        if watch and sys.stdout.isatty():
            console.clear()
        show(now, console)
        if not watch or not now.alive:
            return 1 if now.state in ("failed", "dead") else 0
        time.sleep(WATCH_SECONDS)


def main(args: list[str]) -> int:
    """Run `tinytrain status`."""
    return call_verb(status, "status", args)
