"""`tinytrain status`: show what a run is doing, from its files alone, so that it works on a dead run, too.

Must not know torch, and changes nothing. Goodput is the share of the time since the first record that went into steps
that count: step_seconds of every step in the record, over the time from the first record to the last sign of life (now,
for a run that is alive). The rest went into starts, evaluations, saves, waiting for nodes, and repeated steps.
"""

from __future__ import annotations

import dataclasses
import itertools
import socket
import sys
import time
from pathlib import Path

import tyro
from rich.console import Console

from tinytrain_dist.cli.tables import PathArgument, new_table, print_table
from tinytrain_dist.config.run_folder import (
    ERROR_FILE,
    STATE_FILE,
    Record,
    RunFolder,
    checkpoint_step,
    open_run,
    read_records,
    read_settings,
)
from tinytrain_dist.reliability.heartbeats import (
    HEARTBEAT_SECONDS,
    Heartbeat,
    describe_waiting,
    phase_index,
    read_heartbeats,
)
from tinytrain_dist.utils.atomic_files import read_json_object
from tinytrain_dist.utils.text import format_age

SILENT_SECONDS = 6 * HEARTBEAT_SECONDS  # as long as a file system of many nodes may hide a change
MANY_RANKS = 16  # a table of more shows those at its ends


@dataclasses.dataclass(frozen=True)
class Status:
    """What the files of a run say at one moment; times in seconds since 1970, None where nothing is known."""

    state: str
    why: str
    step: int
    last_step: int
    beats: list[Heartbeat]
    records: list[Record]
    checkpoint: Path | None
    now: float
    alive: bool
    seen: float

    def last(self, name: str) -> float | None:
        """Return a value of the newest record that has it."""
        return next((record[name] for record in reversed(self.records) if record.get(name) is not None), None)

    @property
    def goodput(self) -> float | None:
        """Time in steps that count over all time; the first record's own steps lie before the time that is counted."""
        trained = [record for record in self.records if record["kind"] == "train" and "step_seconds" in record]
        if len(trained) < 2 or self.seen <= trained[0]["time"]:
            return None
        pairs = itertools.pairwise(trained)
        useful = sum((after["step"] - before["step"]) * after["step_seconds"] for before, after in pairs)
        return float(min(1.0, useful / (self.seen - trained[0]["time"])))

    @property
    def seconds_left(self) -> float | None:
        """By the speed of the last record; None for a run that does not go on."""
        seconds = self.last("step_seconds")
        return (self.last_step - self.step) * seconds if self.alive and seconds is not None else None


def read_status(run: RunFolder, now: float | None = None) -> Status:
    """Look at a run. Missing and torn files are what a crash leaves, and no error."""
    now = time.time() if now is None else now
    settings, said = read_settings(run.folder), read_json_object(run.folder / STATE_FILE)
    records = read_records(run.records) if run.records.is_file() else []
    beats = read_heartbeats(run.folder)
    failed = read_json_object(run.folder / ERROR_FILE)
    seen = max([beat["seen"] for beat in beats] + [r["time"] for r in records if "time" in r], default=0.0)
    word = str(said.get("state", ""))
    here = [beat for beat in beats if beat["host"] == socket.gethostname()]
    gone = [beat for beat in here if not Path(f"/proc/{beat['pid']}").exists() and Path("/proc").is_dir()]
    why = str(said.get("reason", ""))
    if failed and word in ("failed", "running"):
        word, why = "failed", str(failed.get("message", ""))
    elif word in ("", "running") and (not beats or gone or now - seen > SILENT_SECONDS):
        word, why = "dead", _why_dead(gone, seen, now)
    elif beats and not gone and now - seen <= SILENT_SECONDS:
        word = "running"  # a new start that has not come to write its own state
    total = int(settings.get("total_steps", 0))
    step = max([beat["step"] for beat in beats] + [r["step"] for r in records] + [int(said.get("step") or 0)])
    saved = run.committed()
    return Status(
        state=word,
        why=why,
        step=step,
        last_step=min(total, int(settings.get("stop_at_step", total))),
        beats=beats,
        records=records,
        checkpoint=saved[-1] if saved else None,
        now=now,
        alive=word == "running",
        seen=now if word == "running" else seen,
    )


def _why_dead(gone: list[Heartbeat], seen: float, now: float) -> str:
    if gone:
        return f"rank {gone[0]['rank']} (process {gone[0]['pid']}) is gone without an error message"
    return f"no sign of life for {format_age(now - seen)}" if seen else "no sign of life"


def show(status: Status, console: Console) -> None:
    """One line for each thing that a person would ask first, then the ranks."""
    for name, text in lines_of(status).items():
        if text:
            console.print(f"{name:<11}", end="", style="bold", highlight=False)
            colour = {"failed": "red", "dead": "red", "done": "green"}.get(status.state) if name == "state" else None
            console.print(text, style=colour, highlight=False, markup=False, soft_wrap=True)
    if status.beats:
        table = new_table("rank", "host<", "pid", "phase<", "step", "for", "seen")
        hidden = max(0, len(status.beats) - MANY_RANKS)
        for beat in sorted(status.beats, key=_place)[: MANY_RANKS if hidden else None]:  # those waited for first
            since, seen = format_age(beat["seconds"]), format_age(status.now - beat["seen"]) + " ago"
            row = (beat["rank"], beat["host"], beat["pid"], beat["phase"], beat["step"], since, seen)
            table.add_row(*map(str, row))
        print_table(table)
        if hidden:
            console.print(f"and {hidden} ranks that are as far or further", highlight=False)


def _place(beat: Heartbeat) -> tuple[float, int, int]:
    return beat["step"], phase_index(beat), beat["rank"]


def lines_of(s: Status) -> dict[str, str]:
    """Return what is shown, by its label; an empty text where nothing is known."""
    share = f" ({100 * s.step / s.last_step:.0f} %)" if s.last_step else ""
    left = "" if s.seconds_left is None else f", about {format_age(s.seconds_left)} left"
    losses = {r["kind"]: r for r in s.records if r["kind"] in ("train", "eval") and "loss" in r}
    loss = [f"{'' if kind == 'train' else 'eval '}{r['loss']:.4f} at step {r['step']}" for kind, r in losses.items()]
    speed, seconds, goodput = s.last("tokens_per_second"), s.last("step_seconds"), s.goodput
    restarts = [r for r in s.records if r["kind"] in ("restarted", "resumed")]
    said_twice = [b["kind"] == "restarted" and a["kind"] == "resumed" for a, b in itertools.pairwise(restarts)]
    saved = ""
    if s.checkpoint is not None:
        saved = f"{s.checkpoint.name}, {format_age(s.now - s.checkpoint.stat().st_mtime)} old"
        saved += (
            f", {s.step - checkpoint_step(s.checkpoint)} step(s) ago" if s.step > checkpoint_step(s.checkpoint) else ""
        )
    waits = ""
    if s.alive and s.beats:
        waits = describe_waiting(s.beats, s.beats[0]["world_size"], s.now - SILENT_SECONDS)
    return {
        "state": s.state + (f": {s.why}" if s.why else ""),
        "progress": f"step {s.step} of {s.last_step or '?'}{share}{left}",
        "checkpoint": saved or "none yet",
        "loss": ", ".join(loss),
        "speed": "" if speed is None else f"{speed:,.0f} tokens/s, {seconds:.3g} s per step",
        "goodput": "" if goodput is None else f"{100 * goodput:.0f} % of the time went into steps that count",
        "restarts": f"{len(restarts) - sum(said_twice)}" if restarts else "",
        **{f"  step {r['step']}": str(r.get("text", "")) for r in restarts[-5:]},
        "last sign": f"{format_age(s.now - s.seen)} ago" if s.seen and not s.alive else "",
        "waiting": waits,
    }


def status(run: PathArgument, watch: bool = False) -> int:
    """Show what a run is doing: state, progress, checkpoints, speed, restarts, and where each rank is.

    Args:
        run: A run (its target_dir).
        watch: Look again every two seconds until it has ended.
    """
    found = open_run(run)
    console = Console(width=None if sys.stdout.isatty() else 200)
    while True:
        now = read_status(found)
        if watch and sys.stdout.isatty():
            console.clear()
        show(now, console)
        if not watch or not now.alive:
            return 1 if now.state in ("failed", "dead") else 0
        time.sleep(2.0)


def main(args: list[str]) -> int:
    """`tinytrain status`."""
    return tyro.cli(status, prog="tinytrain status", args=args)
