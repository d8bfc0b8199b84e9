"""Trackers that misbehave, and a reader of the files that wandb keeps offline."""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinytrain_dist.metrics.trackers.base import Tracker

BLOCK_BYTES = 32768


def wandb_records(file: Path) -> Iterator[Any]:
    """Read a .wandb file: records of protobuf in the log format of LevelDB, after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = file.read_bytes(), 7, []
    while at + 7 <= len(data):
        left = BLOCK_BYTES - at % BLOCK_BYTES
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        if left < 7 or kind == 0:  # the rest of the block is empty
            at += left
            continue
        parts.append(data[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


class OfflineRun:
    """What a folder with offline runs of wandb holds, over all processes of the run."""

    def __init__(self, folder: Path) -> None:
        self.ids: list[str] = []
        self.projects: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.exit_codes: list[int] = []
        for file in sorted(folder.glob("offline-run-*/*.wandb")):
            for record in wandb_records(file):
                self._add(record)

    def _add(self, record: Any) -> None:
        kind = record.WhichOneof("record_type")
        if kind == "run":
            if record.run.run_id not in self.ids[-1:]:
                self.ids.append(record.run.run_id)
            self.projects.append(record.run.project)
            self.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "config":
            self.config |= {item.key: json.loads(item.value_json) for item in record.config.update}
        elif kind == "history":
            self.rows.append({_key(item): json.loads(item.value_json) for item in record.history.item})
        elif kind == "summary":
            self.summary |= {_key(item): json.loads(item.value_json) for item in record.summary.update}
        elif kind == "exit":
            self.exit_codes.append(record.exit.exit_code)

    def points(self, tag: str) -> list[tuple[int, Any]]:
        return [(row["step"], row[tag]) for row in self.rows if tag in row]


def _key(item: Any) -> str:
    return item.key or "/".join(item.nested_key)


class Recorder(Tracker):
    """Keep the calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.threads: set[str] = set()

    def start(self, run):
        self.calls.append(("start", run.name, run.resumed_step))
        return "a line"

    def log_numbers(self, step, numbers, time):
        self.threads.add(threading.current_thread().name)
        self.calls.append(("numbers", step, numbers["train/loss"]))

    def log_event(self, step, kind, text, time):
        self.calls.append(("event", step, kind))

    def flush(self):
        self.calls.append(("flush",))

    def finish(self, status):
        self.calls.append(("finish", status))


class Raising(Recorder):
    """Raise at each point, in different ways."""

    def log_numbers(self, step, numbers, time):
        raise SystemExit(3) if step % 2 else ValueError("no such column\nand more")


class Unstartable(Recorder):
    """Fail at the start."""

    def start(self, run):
        raise ConnectionError("refused")


class Blocking(Recorder):
    """Block at the first point until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.released = threading.Event(), threading.Event()

    def log_numbers(self, step, numbers, time):
        self.entered.set()
        self.released.wait()
        super().log_numbers(step, numbers, time)


class NeedsArguments(Tracker):
    """Cannot be created."""

    def __init__(self, address) -> None:
        pass


class NoTracker:
    """Not derived from Tracker."""
