"""Snapshots in shared memory: ranks that are killed and started again continue from the newest complete one.

A call of `run_ranks` is one launch. Ranks of one "node" share a folder, as they do under an agent.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.checkpoint_runs import RUN
from tests.helpers.ranks import AGENT, REPOSITORY, run_ranks, training_process
from tests.helpers.training import Run, config_file, fit, settings_for
from tinytrain_dist.training import run_snapshots
from tinytrain_dist.utils.stale_files import owner

pytestmark = pytest.mark.multiprocess
SNAPSHOTS: dict[str, Any] = RUN | {"ckpt_every": 100, "snapshot_every": 2}
VARIABLE = "TINYTRAIN_SNAPSHOTS"


def wait_for_saves(trainer: Any) -> None:
    for thread in (trainer.snapshots._keeper._writer._thread, trainer.checkpoints.pending):
        if thread is not None:
            thread.join()


def die_after(trainer: Any, step: int, action: str) -> None:
    """Let rank 0 kill itself after a step, when the snapshots up to it are complete; see `launch`."""
    from tinytrain_dist.checkpoint.snapshots import writer

    run_step = trainer.run_step

    def deadly() -> Any:
        wait_for_saves(trainer)
        if trainer.step == step and trainer.context.is_main:
            if action == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif action == "kill in the next snapshot":
                writer.with_digests = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        return run_step()

    trainer.run_step = deadly


def launch(shared: list[str], settings: dict[str, Any], death_step: int = 0, action: str = "kill") -> dict[str, Any]:
    """On a rank: train as one of the ranks of the node shared[rank]; after `death_step`, do `action` on rank 0.

    death_step: 0: train to the end.
    """
    rank = int(os.environ["RANK"])
    os.environ[VARIABLE] = shared[rank]
    Path(shared[rank]).mkdir(parents=True, exist_ok=True)
    if settings.get("snapshot_every") is None:  # by time: it is always time
        run_snapshots.INTERVAL_SECONDS, run_snapshots.WORK_SHARE = 0.0, math.inf
    return fit(settings, (lambda trainer: die_after(trainer, death_step, action)) if death_step else None)


def killed(shared: list[str], settings: dict[str, Any], death_step: int, action: str = "kill") -> None:
    with pytest.raises(AssertionError, match="SIGKILL"):
        run_ranks(len(shared), launch, shared, settings, death_step, action)


def nodes(folder: Path, name: str, numbers: list[int]) -> list[str]:
    """Return for each rank the folder of its node. numbers: of the node of each rank."""
    return [str(folder / f"{name}-node{number}") for number in numbers]


def resumed(run: Run) -> list[str]:
    return [record["text"] for record in run.records if record["kind"] == "resumed"]


def check_equal(run: Run, undisturbed: Run) -> None:
    assert run.digests() == undisturbed.digests()
    losses = [(record["step"], record["loss"]) for record in run.records if record["kind"] == "train"]
    assert losses == [(record["step"], record["loss"]) for record in undisturbed.records if record["kind"] == "train"]


# mode, the node of each rank before, the same after, the mode after
LAYOUTS = {
    "same layout": ("fsdp", [0, 0], [0, 0], "fsdp"),
    "fewer ranks": ("ddp", [0, 0], [0], "none"),
    "more ranks": ("fsdp", [0, 0], [0, 0, 0, 0], "hsdp"),
    "a node is lost": ("fsdp", [0, 1, 2], [2, 1], "fsdp"),
    "a node joins": ("ddp", [0], [1, 0], "fsdp"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_restarted_ranks_continue_from_the_snapshot_to_the_same_bits(folder: Path, undisturbed: Run, name: str) -> None:
    mode, before, after, mode_after = LAYOUTS[name]
    label = name.replace(" ", "-")
    settings = settings_for(folder, label, **SNAPSHOTS | {"parallel": mode})
    if name == "fewer ranks":
        del settings["snapshot_every"]
    killed(nodes(folder, label, before), settings, 5)
    settings |= {"parallel": mode_after}
    if mode_after == "hsdp":
        settings |= {"dp_replicate": 2, "dp_shard": 2}
    run_ranks(len(after), launch, nodes(folder, label, after), settings)
    run = Run(folder / label)
    assert resumed(run) == ["resumed from the snapshot of step 4 in memory"]
    check_equal(run, undisturbed)
    assert not any(list(Path(node).iterdir()) for node in nodes(folder, label, after))


def flip_a_byte(node: Path, step: int) -> None:
    for record in node.glob("*/snapshot.json"):
        if f'\\"step\\": {step},' in record.read_text():
            data = bytearray((record.parent / "data").read_bytes())
            data[700] ^= 1
            (record.parent / "data").write_bytes(data)
            return
    raise AssertionError(f"no snapshot of step {step} in {node}")


def test_torn_and_damaged_snapshots_are_not_used(
    folder: Path, undisturbed: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = settings_for(folder, "torn", **SNAPSHOTS)
    shared = nodes(folder, "torn", [0, 0])
    killed(shared, settings, 5, "kill in the next snapshot")  # of step 6, in the slot of step 2
    assert len(list(Path(shared[0]).glob("*/data"))) == 4
    killed(shared, settings, 6)
    assert resumed(Run(folder / "torn")) == ["resumed from the snapshot of step 4 in memory"]
    flip_a_byte(Path(shared[0]), 6)
    run_ranks(2, launch, shared, settings)
    run = Run(folder / "torn")
    assert "snapshot of step 6" in (output := capfd.readouterr().out), output
    # the second launch has deleted the snapshot of step 4 when that of step 6 was complete, so nothing is left of it
    assert resumed(run) == []
    check_equal(run, undisturbed)


def test_stale_snapshots_are_not_used(folder: Path, undisturbed: Run) -> None:
    """Snapshots of another run, of a launch that the run has left behind, or older than the newest checkpoint."""
    shared = nodes(folder, "stale", [0, 0])
    killed(shared, settings_for(folder, "other", **SNAPSHOTS), 5)
    settings = settings_for(folder, "stale", **SNAPSHOTS | {"ckpt_every": 3})
    killed(shared, settings, 3)  # not from the snapshot of the other run
    kept = folder / "kept"
    shutil.copytree(shared[0], kept)  # a node that is cut off now
    killed(shared, settings, 5)
    run = Run(folder / "stale")
    assert resumed(run) == [f"resumed from {run.folder}/checkpoints/checkpoint-00000003"]
    shutil.rmtree(shared[0])
    kept.rename(shared[0])  # and returns
    (run.folder / "checkpoints" / "checkpoint-00000003").rename(folder / "moved-away")
    run_ranks(2, launch, shared, settings)
    run = Run(folder / "stale")
    assert resumed(run) == []
    check_equal(run, undisturbed)


def test_shared_memory_that_is_too_small_is_an_error_before_the_first_step(folder: Path) -> None:
    settings = settings_for(folder, "small", **SNAPSHOTS)
    with pytest.raises(AssertionError, match=r"snapshot_every: snapshots need \d.* (?s:.)*free; make it larger"):
        run_ranks(2, in_small_memory, nodes(folder, "small", [0, 0]), settings)
    assert not (folder / "small" / "logs" / "metrics.jsonl").exists()
    del settings["snapshot_every"]
    run_ranks(2, in_small_memory, nodes(folder, "small", [0, 0]), settings)
    assert "snapshot" not in {record["kind"] for record in Run(folder / "small").records}


def in_small_memory(shared: list[str], settings: dict[str, Any]) -> None:
    real = shutil.disk_usage
    small = real(".")._replace(free=10_000)
    shutil.disk_usage = lambda path: small if "node" in str(path) else real(path)
    launch(shared, settings)


def test_a_killed_rank_is_started_again_by_its_agent_and_loses_few_steps(tmp_path: Path) -> None:
    endless = {"total_steps": 100_000, "ckpt_every": 100_000, "eval_every": 100_000, "log_every": 5}
    config = config_file(tmp_path, **endless, snapshot_every=5)
    shared = tmp_path / "shared"
    ended = subprocess.Popen(["true"])
    ended.wait()
    left = shared / f"tinytrain-{owner().split('.')[0]}.{ended.pid}.1-x"  # of an agent that was killed
    left.mkdir(parents=True)
    (left / "data").write_bytes(bytes(100_000))
    env = {"TINYTRAIN_SHARED_MEMORY": str(shared)}
    with training_process([config], 2, tmp_path, env, launcher=AGENT, torchrun_args=["--max-restarts=2"]) as running:
        output = running.wait_for_output("first snapshot in memory")
        assert f"removed what killed processes had left: {left} (" in output
        assert "snapshot   step" in status_of(tmp_path / "run")
        os.kill(running.worker_pids()[1], signal.SIGKILL)
        running.wait_for_output("resumed from the snapshot of step")
        os.kill(running.process.pid, signal.SIGTERM)
        assert running.wait(60) == 0, running.output()
    assert not list(shared.iterdir())
    records = [json.loads(line) for line in (tmp_path / "run" / "logs" / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if record["kind"] == "train"]
    assert steps == sorted(set(steps))


def status_of(run: Path) -> str:
    command = [sys.executable, "-m", "tinytrain_dist.cli.main", "status", str(run)]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY).stdout
