"""Checkpoints of a run with damage, values that are not finite, or pickles that a test put there."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3

from tests.helpers.checkpoint_runs import RUN
from tests.helpers.ranks import run_ranks
from tests.helpers.training import Run, fit, settings_for, train
from tests.training.test_trainer import fit_error

pytestmark = pytest.mark.multiprocess


def test_damage_found_by_one_rank_reaches_all(tmp_path: Path) -> None:
    """Each file is read by one rank. All ranks must learn of damage in any file."""
    run = train(tmp_path, "run", 2, parallel="fsdp", max_shard_bytes=2000, stop_at_step=3)
    for file in sorted(run.checkpoint.iterdir()):
        shutil.copytree(run.folder, tmp_path / "copy")
        target = tmp_path / "copy" / "checkpoints" / run.checkpoint.name / file.name
        data = bytearray(target.read_bytes())
        data[len(data) // 2] ^= 1
        target.write_bytes(data)
        messages = run_ranks(2, fit_error, settings_for(tmp_path, "copy", parallel="fsdp"))
        assert all("none of 1 checkpoint(s) is valid" in message for message in messages), file.name
        shutil.rmtree(tmp_path / "copy")


class Trap:
    """An object that creates a file if it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_no_pickle_is_ever_loaded(tmp_path: Path) -> None:
    """A pickle replaces each file of a checkpoint, with a fitting digest, and the token files."""
    run = train(tmp_path, "run", 1, stop_at_step=3)
    mark = tmp_path / "executed"
    planted = pickle.dumps(Trap(mark))
    for file in sorted(run.checkpoint.iterdir()):
        shutil.copytree(run.folder, tmp_path / "copy")
        checkpoint = tmp_path / "copy" / "checkpoints" / run.checkpoint.name
        (checkpoint / file.name).write_bytes(planted)
        if file.name != "manifest.json":
            body = json.loads((checkpoint / "manifest.json").read_text())
            del body["sha256"]
            body["files"][file.name] = {"bytes": len(planted), "sha256": hashlib.sha256(planted).hexdigest()}
            digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
            (checkpoint / "manifest.json").write_text(json.dumps({**body, "sha256": digest}))
        run_ranks(1, any_end, settings_for(tmp_path, "copy"))
        assert not mark.exists(), file.name
        shutil.rmtree(tmp_path / "copy")
    for name in ("train", "val"):
        np.save(tmp_path / "objects.npy", np.array([Trap(mark)], dtype=object), allow_pickle=True)
        data = {f"{name}_data": str(tmp_path / "objects.npy"), "vocab_size": 53}
        assert "objects.npy" in run_ranks(1, any_end, settings_for(tmp_path, f"new-{name}", **data))[0]
        assert not mark.exists()


def any_end(settings: dict[str, Any]) -> str:
    try:
        fit(settings)
    except Exception as error:
        return str(error)
    return "no error"


def poison(checkpoint: Path, name: str) -> None:
    """Put a NaN into a tensor and correct all digests, as if a program without checks had written it."""
    path = checkpoint / "manifest.json"
    body = json.loads(path.read_text())
    del body["sha256"]
    file, entry = next((f, e) for f, e in body["files"].items() if name in e.get("tensors", []))
    data, tensors, start = (
        bytearray((checkpoint / file).read_bytes()),
        body["tensors"][entry["kind"]],
        entry["header_bytes"],
    )
    for other in entry["tensors"]:
        size = 4 * int(np.prod(tensors[other]["shape"]))
        if other == name:
            data[start : start + 4] = np.float32("nan").tobytes()
            tensors[name]["blake3"] = blake3(data[start : start + size]).hexdigest()
        start += size
    (checkpoint / file).write_bytes(data)
    digests = b"".join(bytes.fromhex(tensors[other]["blake3"]) for other in entry["tensors"])
    entry["blake3_of_digests"] = blake3(data[: entry["header_bytes"]] + digests).hexdigest()
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**body, "sha256": digest}))


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight.exp_avg_sq"])
def test_checkpoint_that_is_not_finite_is_damaged(folder: Path, undisturbed: Run, tmp_path: Path, name: str) -> None:
    run = train(folder, "poisoned", 2, **RUN) if not (folder / "poisoned").exists() else Run(folder / "poisoned")
    shutil.copytree(run.folder, tmp_path / "run")
    poison(tmp_path / "run" / "checkpoints" / "checkpoint-00000008", name)
    settings = {**settings_for(folder, "poisoned", **RUN), "target_dir": str(tmp_path / "run")}
    run_ranks(2, fit, settings)
    again = Run(tmp_path / "run")
    assert "checkpoint-00000006" in again.values("resumed", "text")[-1]
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-00000008.damaged").is_dir()
    assert again.digests() == undisturbed.digests()


def state_turns_bad(trainer: Any) -> None:
    """Change the state of rank 1 to NaN between a step and its save."""
    plain = trainer.save

    def save() -> None:
        if trainer.step == 4 and trainer.context.rank == 1:
            (buffer,) = [
                trainer.train_step.optimizer.state[p]["exp_avg"]
                for n, p in trainer.train_step.model.named_parameters()
                if "up_proj" in n
            ][:1]
            buffer.to_local()[0, 0] = float("inf")
        plain()

    trainer.save = save


def test_state_that_is_not_finite_is_never_written(folder: Path) -> None:
    settings = settings_for(folder, "bad-state", **RUN)
    messages = run_ranks(2, fit_error_after, settings)
    assert messages[0] == messages[1]
    assert "exp_avg: is not finite, so nothing is saved" in messages[0]
    assert [path.name for path in (folder / "bad-state" / "checkpoints").glob("checkpoint-*")] == [
        "checkpoint-00000002"
    ]


def fit_error_after(settings: dict[str, Any]) -> str:
    return fit_error(settings, state_turns_bad)
