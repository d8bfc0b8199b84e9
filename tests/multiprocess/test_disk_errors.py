"""If a disk is full, stuck or broken, a save fails and the run continues."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.checkpoint_runs import RUN
from tests.helpers.ranks import run_ranks
from tests.helpers.training import Run, fit, settings_for
from tests.training.test_trainer import fit_error

pytestmark = pytest.mark.multiprocess


def fail_saves(trainer: Any, steps: tuple[int, ...], errno: int) -> None:
    from tinytrain_dist.checkpoint import sharded_io

    plain = sharded_io.write_tensors

    def write(folder: Path, *args: Any) -> None:
        if int(folder.name.removesuffix(".tmp")[-8:]) in steps:
            raise OSError(errno, os.strerror(errno))
        plain(folder, *args)

    sharded_io.write_tensors = write  # type: ignore[assignment]


@pytest.mark.parametrize("errno", [28, 5, 30], ids=["ENOSPC", "EIO", "EROFS"])
def test_failed_save_costs_the_save_and_not_the_run(folder: Path, undisturbed: Run, errno: int) -> None:
    settings = settings_for(folder, f"failing{errno}", **RUN)
    ends = run_ranks(2, fit, settings, functools.partial(fail_saves, steps=(4, 6), errno=errno))
    assert [end["state"] for end in ends] == ["done", "done"]
    run = Run(folder / f"failing{errno}")
    texts = run.values("save_failed", "text")
    assert [text.count("failed saves so far: 2") for text in texts] == [0, 1]
    assert os.strerror(errno) in texts[0]
    assert sorted(path.name for path in (run.folder / "checkpoints").iterdir()) == [
        "checkpoint-00000002",
        "checkpoint-00000008",
    ]
    assert run.digests() == undisturbed.digests()


def test_last_save_that_fails_is_an_error(folder: Path) -> None:
    settings = settings_for(folder, "last", **RUN)
    messages = run_ranks(2, last_save_error, settings)
    assert "could not be saved" in messages[0]
    assert "resume" in messages[1]


def last_save_error(settings: dict[str, Any]) -> str:
    return fit_error(settings, functools.partial(fail_saves, steps=(8,), errno=28))


def fail_beside_the_tensors(trainer: Any, where: str) -> None:
    """Fail on rank 0 between two collectives, like a stale file handle; the ranks must stay in step."""
    from tinytrain_dist.checkpoint import manager
    from tinytrain_dist.checkpoint.checkpoint_folder import CheckpointFolder

    owner: Any = manager if where == "huggingface_files" else CheckpointFolder
    plain = getattr(owner, where)

    def fail(*args: Any) -> Any:
        if trainer.step in (4, 5):
            raise OSError(116, "Stale file handle")
        return plain(*args)

    setattr(owner, where, fail)


@pytest.mark.parametrize("where", ["huggingface_files", "delete_old"])
def test_error_of_rank_0_beside_the_tensors_does_not_separate_ranks(folder: Path, undisturbed: Run, where: str) -> None:
    settings = settings_for(folder, f"beside{where}", **RUN)
    ends = run_ranks(2, fit, settings, functools.partial(fail_beside_the_tensors, where=where))
    assert [end["state"] for end in ends] == ["done", "done"]
    assert Run(folder / f"beside{where}").digests() == undisturbed.digests()


def records_fail(trainer: Any) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    if trainer.context.is_main:
        (sink,) = trainer.log._sinks
        sink._tracker._writer.add_scalar = full


def test_records_that_cannot_be_written_do_not_end_the_training(folder: Path, undisturbed: Run) -> None:
    settings = settings_for(folder, "unrecorded", **RUN)
    assert {end["state"] for end in run_ranks(2, fit, settings, records_fail)} == {"done"}
    assert Run(folder / "unrecorded").digests() == undisturbed.digests()


def disturb(trainer: Any) -> None:
    """At step 3, delete the folder of checkpoints and set the clock back by a year."""
    import time

    real = time.time

    def hook(*_: Any) -> None:
        if trainer.step == 3 and time.time is real:
            time.time = lambda: real() - 3e7
            if trainer.context.is_main:
                trainer.checkpoints.collect(wait=True)
                shutil.rmtree(trainer.config.checkpoints_dir)

    trainer.train_step.model.register_forward_pre_hook(hook)


def test_vanished_folder_and_a_clock_that_jumps_back(folder: Path, undisturbed: Run) -> None:
    run_ranks(2, fit, settings_for(folder, "disturbed", **RUN), disturb)
    run = Run(folder / "disturbed")
    assert run.digests() == undisturbed.digests()
    assert sorted(path.name[-1] for path in (run.folder / "checkpoints").iterdir()) == ["6", "8"]


def disk_is_stuck(trainer: Any) -> None:
    """Block the writes of the save of step 4 until the next save waits, and those of step 8 until the end waits."""
    import threading

    from tinytrain_dist.checkpoint import async_save, manager, safetensors_io

    async_save.SLOW_SAVE_SECONDS, manager.POLL_SECONDS = 0.0, 0.02
    plain, say, free, end = safetensors_io._write_out, trainer.log.say, threading.Event(), threading.Event()
    said = (trainer.checkpoints.folder(0).parent.parent / "said.txt").open("a") if trainer.context.is_main else None

    def stuck(file: Any, data: Any) -> None:
        if "checkpoint-00000004" in str(file.name):
            assert free.wait(60)
        if "checkpoint-00000008" in str(file.name):
            assert end.wait(60)
        plain(file, data)

    def note(*words: Any, **_: Any) -> None:
        if said:
            print(*words, file=said, flush=True)
        if "step 4 has taken" in words[0] and trainer.step == 6:
            free.set()  # rank 0 reported how long it waits, and for which file
        if "waiting for the save of step 8" in words[0]:
            end.set()

    def note_say(text: str) -> None:
        note(text)
        say(text)

    safetensors_io._write_out, trainer.log.say = stuck, note_say
    trainer.checkpoints.report = note


def test_stuck_disk_does_not_stop_training_and_is_named(folder: Path, undisturbed: Run) -> None:
    run_ranks(2, fit, settings_for(folder, "stuck", **RUN), disk_is_stuck)
    said = (folder / "stuck" / "said.txt").read_text()
    assert "step 6: waiting for the save of step 4 to end" in said
    assert "has not ended; model-00001-of-00001.safetensors is being written" in said
    assert "step 8: waiting for the save of step 8 to end" in said, "the exit says what it waits for"
    steps = [r["step"] for r in Run(folder / "stuck").records if r["kind"] == "train"]
    assert steps == list(range(1, 9)), "steps went on beside it"
    assert Run(folder / "stuck").digests() == undisturbed.digests()


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"a file system of 2 MB cannot be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill_the_disk(trainer: Any) -> None:
    """Fill the disk up to 20 kB before the save of step 4; free it before the save of step 6."""
    ballast = trainer.config.checkpoints_dir.parent / "ballast"

    def hook(*_: Any) -> None:
        if trainer.context.is_main and trainer.step == 3 and not ballast.exists():
            trainer.checkpoints.collect(wait=True)
            free = shutil.disk_usage(ballast.parent).free
            ballast.write_bytes(bytes(free - 20_000))
        if trainer.context.is_main and trainer.step == 5 and ballast.exists():
            trainer.checkpoints.collect(wait=True)
            found = [path.name for path in trainer.config.checkpoints_dir.iterdir() if path.is_dir()]
            assert found == ["checkpoint-00000002"]
            ballast.unlink()

    trainer.train_step.model.register_forward_pre_hook(hook)


def test_disk_that_fills_in_the_middle_of_a_save(folder: Path, undisturbed: Run, small_disk: Path) -> None:
    settings = settings_for(folder, "filled", **RUN, ckpt_dir=str(small_disk / "checkpoints"), max_shard_bytes=9000)
    assert {end["state"] for end in run_ranks(2, fit, settings, fill_the_disk)} == {"done"}
    run = Run(folder / "filled")
    (text,) = run.values("save_failed", "text")
    assert "No space left on device" in text
    assert "failed saves so far: 1" in text
    kept = sorted(path.name for path in (small_disk / "checkpoints").iterdir())
    assert kept == ["checkpoint-00000006", "checkpoint-00000008"]
    manifest = json.loads((small_disk / "checkpoints" / kept[-1] / "manifest.json").read_text())
    found = {name: t["blake3"] for kind in manifest["tensors"].values() for name, t in kind.items()}
    assert found == undisturbed.digests()
