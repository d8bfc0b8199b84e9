"""If a second run starts in a folder, it is refused, unless the lock is stale."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.checkpoint_runs import RUN
from tests.helpers.ranks import run_ranks
from tests.helpers.training import Run, fit, settings_for
from tests.training.test_trainer import fit_error

pytestmark = pytest.mark.multiprocess


def second_run(settings: dict[str, Any], path: str) -> str:
    """Another process holds the lock at `path`."""
    from tinytrain_dist.utils.processes import process_start_time

    parent = os.getppid()
    lock = {"host": os.uname().nodename, "pid": parent, "started": process_start_time(parent), "job": None}
    Path(path).parent.mkdir()
    Path(path).write_text(json.dumps(lock))
    return fit_error(settings)


@pytest.mark.parametrize("shared", ["run folder", "checkpoints"])
def test_second_run_in_a_folder_is_refused(folder: Path, shared: str) -> None:
    place, name = folder / shared, "lock.json" if shared == "run folder" else "checkpoint.lock.json"
    overrides = {"target_dir": str(place)} if shared == "run folder" else {"ckpt_dir": str(place)}
    message = run_ranks(1, second_run, settings_for(folder, "twice", **overrides), str(place / name))[0]
    expected = "is already training in this folder" if shared == "run folder" else "already saves checkpoints of this"
    assert expected in message
    assert str(json.loads((place / name).read_text())["pid"]) in message
    assert not (folder / "twice" / "lock.json").exists()
    assert not list(folder.glob("*/state.json")), "the run in the folder is another process's to judge"


@contextlib.contextmanager
def touched_by_its_holder(lock: Path) -> Iterator[None]:
    """Touch the lock repeatedly, as the process that holds it does."""
    end = threading.Event()

    def touch() -> None:
        while not end.wait(0.05):
            os.utime(lock)

    thread = threading.Thread(target=touch)
    thread.start()
    yield
    end.set()
    thread.join()


@pytest.mark.parametrize(
    ("lock", "accepted"),
    [
        ({"host": "HERE", "pid": 2**22 + 5, "started": "1", "job": None}, True),
        ({"host": "HERE", "pid": 1, "started": "another start", "job": None}, True),
        ({"host": "elsewhere", "pid": 1, "started": "1", "job": "77"}, True),
        ({"host": "elsewhere", "pid": 1, "started": "1", "job": "78"}, False),
        ("not json", True),
    ],
    ids=["process gone", "pid used again", "same Slurm job", "another host", "torn"],
)
def test_stale_locks_are_recognised(tmp_path: Path, lock: Any, accepted: bool) -> None:
    text = (
        lock
        if isinstance(lock, str)
        else json.dumps({**lock, "host": lock["host"].replace("HERE", os.uname().nodename)})
    )
    settings = settings_for(tmp_path, "run", stop_at_step=1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock.json").write_text(text)
    if text == "not json":
        os.utime(tmp_path / "run" / "lock.json", (1, 1))
    with touched_by_its_holder(tmp_path / "run" / "lock.json") if "78" in text else contextlib.nullcontext():
        message = run_ranks(1, fit_error, settings, env={"SLURM_JOB_ID": "77"})[0]
    assert (message == "no error") == accepted, message
    assert (tmp_path / "run" / "lock.json").exists() != accepted


def test_lock_of_another_host_is_stale_after_two_minutes(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "run", stop_at_step=1)
    (tmp_path / "run").mkdir()
    lock = tmp_path / "run" / "lock.json"
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "1", "job": None}))
    os.utime(lock, (1, 1))
    assert run_ranks(1, fit_error, settings)[0] == "no error"


def lose_the_lock(trainer: Any) -> None:
    """After the save of step 4, take over the folder as another process, like the next attempt of a Slurm job."""
    plain = trainer.run_step

    def train_step(*args: Any) -> Any:
        if trainer.step == 5 and trainer.context.is_main:
            if trainer.checkpoints.pending is not None:
                trainer.checkpoints.pending.join()  # the save of step 4; however slow the machine is, it is committed
            lock = Path(trainer.config.target_dir) / "lock.json"
            lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "1", "job": None}))
            (lock.parent / "state.json").write_text('{"state": "running", "step": 4, "attempt": "the next"}')
        return plain(*args)

    trainer.run_step = train_step


def fit_and_fail(settings: dict[str, Any]) -> tuple[str, bool]:
    from tinytrain_dist.reliability.run_state import owns_run

    try:
        fit(settings, lose_the_lock)
    except Exception as error:
        return f"{type(error).__name__}: {error}", owns_run(Path(settings["target_dir"]))
    return "no error", True


def test_no_process_commits_into_a_run_that_another_has_taken_over(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "run", **{**RUN, "ckpt_every": 2})
    for message, owned in run_ranks(2, fit_and_fail, settings):
        assert message.startswith("TrainingError")
        assert "another process has taken this run over" in message
        assert not owned, "and nobody may write how it ended"
    folder = tmp_path / "run"
    assert Run(folder).checkpoint.name == "checkpoint-00000004"
    assert json.loads((folder / "state.json").read_text())["attempt"] == "the next"
    assert json.loads((folder / "lock.json").read_text())["host"] == "elsewhere"
