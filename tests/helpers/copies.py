"""Small checkpoints, and a worker in this process that copies them to a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.helpers.tensor_folders import some_tensors, specs_of
from tinytrain_dist.checkpoint.copies.worker import CopyWorker
from tinytrain_dist.checkpoint.manifest import Manifest, commit_folder, write_json_file
from tinytrain_dist.checkpoint.safetensors_io import write_tensors

TARGET = "runs/a"


def write_checkpoint_folder(folder: Path, step: int, note: str = "") -> Path:
    """Write a small checkpoint. note: makes its content differ from that of another one of this step."""
    aside = folder / f"checkpoint-{step:08d}.tmp"
    aside.mkdir(parents=True)
    manifest, tensors = Manifest(), some_tensors()
    chunks = (value.contiguous() for value in tensors.values())
    write_tensors(aside, "model", specs_of(tensors), chunks, 200, manifest)
    write_json_file(aside, "trainer_state.json", {"step": step, "note": note}, manifest)
    final = folder / f"checkpoint-{step:08d}"
    commit_folder(aside, final, manifest)
    return final


class Copies:
    """A worker of one start of a run, and what it has replied."""

    def __init__(self, place: Path | str, *, keep_last: int = 1, keep_every: int | None = None) -> None:
        self.replies: list[dict[str, Any]] = []
        self.worker = CopyWorker(lambda kind, **values: self.replies.append({"kind": kind, **values}))
        self.worker.open({"url": str(place), "prefix": "checkpoint", "keep_last": keep_last, "keep_every": keep_every})

    def claim(
        self, claim: str = "first", run: str | None = None, adopt: str | None = TARGET, **more: Any
    ) -> dict[str, Any]:
        request = {"run": run, "new_run": f"run-of-{claim}", "target_dir": TARGET, "adopt": adopt, "claim": claim}
        return self.worker.claim({**request, **more, "by": f"start {claim}"})

    def copy(self, checkpoint: Path, newest_step: int | None = None) -> list[str]:
        """Copy a checkpoint, and return the names of the complete copies."""
        step = int(checkpoint.name[-8:])
        copies = self.worker.copy({"folder": str(checkpoint), "newest_step": newest_step or step})["copies"]
        return sorted(copies)

    def fetch(self, into: Path, name: str | None = None) -> Path | None:
        path = self.worker.fetch({"into": str(into), "save_prefix": "checkpoint", "name": name})["path"]
        return Path(path) if path else None

    @property
    def notes(self) -> list[str]:
        return [reply["text"] for reply in self.replies if reply["kind"] == "note"]


def flip_byte(path: Path) -> None:
    """Change the last byte of a file, and not its size."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def status_of(run: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((run / "copies.json").read_text())
    return record
