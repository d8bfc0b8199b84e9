"""Check the manager of a run's checkpoints, without a training loop."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.helpers.training import VOCABULARY, settings_for
from tinytrain_dist.utils import progress

pytestmark = pytest.mark.multiprocess


def new_manager(settings: dict[str, Any], warnings: list[str]) -> Any:
    """Return the manager of a model whose weights are all 0."""
    from tinytrain_dist import AdamW, TrainingConfig, TransformerLM
    from tinytrain_dist.checkpoint.manager import CheckpointManager
    from tinytrain_dist.distributed.context import init_distributed

    config = TrainingConfig(**settings)
    model = TransformerLM(config)
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    optimizer = AdamW(model.parameters(), 0.1)
    optimizer.materialize()
    return CheckpointManager(config, init_distributed("cpu"), model, optimizer, {}, {}, report=warnings.append)


def save(manager: Any, step: int) -> None:
    """Save weights that are all `step`."""
    with torch.no_grad():
        for param in manager.model.parameters():
            param.fill_(step)
    manager.save(step, {})
    assert manager.collect(wait=True).error is None


def damage_and_resume(settings: dict[str, Any]) -> dict[str, Any]:
    warnings: list[str] = []
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        manager = new_manager(settings, warnings)
        for step in (1, 2, 3):
            save(manager, step)
        kept = [path.name for path in manager.committed()]
        newest = manager.folder(3) / "model-00001-of-00001.safetensors"
        newest.write_bytes(newest.read_bytes()[:-1])
        path, state, changes = manager.resume()
        num_warnings = len(warnings)
        progress.LINE_SECONDS = 0.0  # in this process of the test alone
        manager.resume()
    return {
        "progress": warnings[num_warnings:],
        "kept": kept,
        "path": path.name,
        "step": state["step"],
        "changes": changes,
        "weights": {value for param in manager.model.parameters() for value in param.unique().tolist()},
        "warnings": warnings[:num_warnings],
        "printed": printed.getvalue(),
    }


def test_warnings_go_to_the_report_and_the_checkpoint_before_a_damaged_one_is_loaded(tmp_path: Path) -> None:
    (end,) = run_ranks(1, damage_and_resume, settings_for(tmp_path, "run", vocab_size=VOCABULARY, keep_last=2))
    assert end["kept"] == ["checkpoint-00000002", "checkpoint-00000003"]
    assert (end["path"], end["step"], end["changes"]) == ("checkpoint-00000002", 2, [])
    assert end["weights"] == {2.0}
    (warning,) = end["warnings"]
    assert warning.startswith("WARNING: damaged checkpoint, renamed to checkpoint-00000003.damaged: ")
    assert "bytes, but" in warning
    assert end["printed"] == "", "the report is the only way to print"
    assert len(end["progress"]) > 2
    assert all(line.startswith("verifying and loading checkpoint-00000002: ") for line in end["progress"])


def fail_and_collect(settings: dict[str, Any]) -> list[Any]:
    """Return the state of a failed save before and after it is collected; its error will end the run."""
    manager = new_manager(settings, [])
    next(manager.model.parameters()).data[0, 0] = float("nan")
    manager.save(1, {}).join()
    before = [manager.failure, manager.collect() is None]
    error = manager.collect(wait=True).error
    return [*before, str(error), manager.failure, manager.pending is None]


def test_an_error_that_will_end_the_run_is_collected_only_when_all_ranks_wait_for_it(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "run", vocab_size=VOCABULARY)
    ((failure, stays_pending, error, failure_after, collected),) = run_ranks(1, fail_and_collect, settings)
    assert "is not finite, so nothing is saved" in failure
    assert stays_pending
    assert error == failure
    assert failure_after == ""
    assert collected


def update_and_save(settings: dict[str, Any]) -> list[str]:
    """What happens to the host buffers when the optimizer updates the weights, before and after a save."""
    manager = new_manager(settings, [])
    calls: list[str] = []
    manager.buffers.before_update = lambda: calls.append(f"update of {next(manager.model.parameters()).max():.0f}")
    save(manager, 5)
    for param in manager.model.parameters():
        param.grad = torch.ones_like(param)
    manager.optimizer.step()
    return calls


def test_every_update_first_waits_for_the_copy_of_a_save(tmp_path: Path) -> None:
    (calls,) = run_ranks(1, update_and_save, settings_for(tmp_path, "run", vocab_size=VOCABULARY))
    assert calls == ["update of 5"], "called once, while the weights are still those that are being saved"


def writers_on(settings: dict[str, Any], local_world_size: int) -> set[int]:
    """The ranks that write a checkpoint of several files if each node has `local_world_size` of the ranks."""
    import dataclasses

    from tinytrain_dist.checkpoint.manager import CheckpointManager

    manager = new_manager(settings, [])
    context = dataclasses.replace(manager.context, local_world_size=local_world_size)
    of_nodes = CheckpointManager(manager.config, context, manager.model, manager.optimizer, {}, {})
    return {shard.writer for shard in of_nodes.all_shards}


@pytest.mark.parametrize(("settings", "expected"), [({}, [{0, 1}, {0}]), ({"ckpt_writers": 1}, [{0}, {0}])])
def test_one_rank_of_each_node_writes(tmp_path: Path, settings: dict[str, Any], expected: list[set[int]]) -> None:
    config = settings_for(tmp_path, "run", vocab_size=VOCABULARY, max_shard_bytes=3000, **settings)
    assert run_ranks(2, writers_on, config, 1)[0] == expected[0]
    assert run_ranks(2, writers_on, config, 2)[0] == expected[1]
