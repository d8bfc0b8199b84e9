"""Owns that nothing is lost: kills at every stage of a save, full disks, damage, two runs in a folder, retention."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import threading
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3

from tests.helpers.ranks import run_ranks
from tests.helpers.training import Run, fit, settings_for, train
from tests.training.test_trainer import fit_error

pytestmark = pytest.mark.multiprocess

RUN = {"reproducible": True, "parallel": "fsdp", "total_steps": 8, "ckpt_every": 2, "eval_every": 100}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saver")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Run:
    return train(folder, "undisturbed", 2, **RUN)


def die_at(trainer: Any, stage: str, ranks: tuple[int, ...]) -> None:
    """SIGKILL the given ranks when the save of step 4 reaches a stage."""
    import torch.distributed

    from tinytrain_dist.checkpoint import async_save, manifest, sharded_io
    from tinytrain_dist.parallel import replica_check

    if trainer.context.rank not in ranks:
        return
    owner, name = {
        "copy": (async_save.HostBuffers, "copy"),
        "compare": (replica_check.ReplicaComparison, "finish"),
        "gather": (torch.distributed, "isend" if trainer.context.rank else "irecv"),
        "between files": (sharded_io, "write_index"),
        "before the manifest": (sharded_io, "commit_folder"),
        "before the rename": (manifest, "fsync_folder"),
        "retention": (shutil, "rmtree"),
    }[stage]
    plain, calls = getattr(owner, name), [0]
    copies = [0]
    copy = async_save.HostBuffers.copy

    def counted_copy(self: Any) -> Any:
        copies[0] += 1
        if stage == "copy" and copies[0] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return copy(self)

    def deadly(*args: Any, **kwargs: Any) -> Any:
        if copies[0] == 2:
            calls[0] += 1
            if calls[0] == WHICH_CALL.get(stage, 1):
                os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args, **kwargs)

    if stage != "copy":
        setattr(owner, name, deadly)
    async_save.HostBuffers.copy = counted_copy  # type: ignore[method-assign]


WHICH_CALL = {"gather": 5, "retention": 2}  # the first rmtree clears the way for the new folder
STAGES = [
    ("copy", (0,)), ("copy", (0, 1)), ("compare", (0,)), ("compare", (1,)), ("gather", (1,)), ("gather", (0,)),
    ("gather", (0, 1)), ("between files", (0,)), ("before the manifest", (0,)), ("before the rename", (0,)),
    ("retention", (0,)),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "ranks"), STAGES, ids=[f"{stage} {ranks}" for stage, ranks in STAGES])
def test_killed_in_a_save_the_next_start_goes_on_to_the_same_bits(
    folder: Path, undisturbed: Run, stage: str, ranks: tuple[int, ...]
) -> None:
    name = f"killed-{stage}-{len(ranks)}-{ranks[0]}".replace(" ", "-")
    # one checkpoint is kept, so that the save of step 4 has something to delete; replicas compare what they hold
    settings = settings_for(folder, name, **RUN | {"parallel": "ddp" if stage == "compare" else "fsdp"}, keep_last=1)
    with pytest.raises(AssertionError, match="SIGKILL"):
        run_ranks(2, fit, settings, functools.partial(die_at, stage=stage, ranks=ranks))
    run_ranks(2, fit, settings)
    run = Run(folder / name)
    (text,) = run.values("resumed", "text")
    assert f"checkpoint-0000000{4 if stage == 'retention' else 2}" in text, "at most one interval is lost"
    assert run.digests() == undisturbed.digests()
    assert not list((folder / name / "checkpoints").glob("*.tmp")), "what was half-written is cleared away"


def send_in_many_parts(_: Any) -> None:
    """A tensor comes in up to 53 parts from each rank, more than are asked for ahead: they must not change places."""
    from tinytrain_dist.checkpoint import safetensors_io

    safetensors_io.CHUNK_BYTES = 16


@pytest.mark.parametrize("mode", [{"parallel": "ddp"}, {"parallel": "fsdp"}, {"parallel": "hsdp", "dp_shard": 2}])
def test_several_writers_write_the_same_tensors(folder: Path, undisturbed: Run, mode: dict[str, Any]) -> None:
    name = f"writers-{mode['parallel']}"
    writers = {"ckpt_writers": 3, "max_shard_bytes": 3000}
    run_ranks(4, fit, settings_for(folder, name, **{**RUN, **mode}, **writers), send_in_many_parts)
    run = Run(folder / name)
    assert len(list(run.checkpoint.glob("*.safetensors"))) > 6
    assert run.digests() == undisturbed.digests()
    manifest, expected = (json.loads((r.checkpoint / "manifest.json").read_text()) for r in (run, undisturbed))
    assert list(manifest["tensors"]["model"]) == list(expected["tensors"]["model"])
    again = train(folder, name, 2, **RUN)
    assert again.values("resumed", "text")


def test_more_writers_than_ranks_are_refused(folder: Path) -> None:
    message = run_ranks(2, fit_error, settings_for(folder, "many", **RUN, ckpt_writers=3))[0]
    assert "ckpt_writers: 3 is more than the 2 ranks" in message


def test_background_and_foreground_saves_are_the_same(folder: Path, undisturbed: Run) -> None:
    assert train(folder, "foreground", 2, **RUN, ckpt_async=False).digests() == undisturbed.digests()


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
    assert [text.count("2 so far") for text in texts] == [0, 1]
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


def no_room(settings: dict[str, Any]) -> str:

    usage = namedtuple("usage", "total used free")
    shutil.disk_usage = lambda _: usage(10**6, 10**6, 9999)  # type: ignore[assignment]
    return fit_error(settings)


def test_too_little_disk_is_said_before_step_one(folder: Path) -> None:
    messages = run_ranks(2, no_room, settings_for(folder, "small", **RUN))
    assert messages[0] == messages[1]
    assert "0.010 MB are free" in messages[0]
    assert "keep_last + 1 = 3 checkpoints" in messages[0]
    assert not (folder / "small" / "logs").exists()


def no_memory(settings: dict[str, Any]) -> str:
    from tinytrain_dist.reliability import storage_checks

    class Meminfo:
        def __init__(self, *_: Any) -> None: ...

        def read_text(self) -> str:
            return "MemTotal: 9 kB\nMemAvailable:  1 kB\n"

    storage_checks.Path = Meminfo  # type: ignore[misc, assignment]
    try:
        storage_checks.check_host_memory(2**20, start_context())
    except ValueError as error:
        return str(error)
    return "no error"


def start_context() -> Any:
    from tinytrain_dist.distributed.context import init_distributed

    return init_distributed("cpu")


def test_too_little_host_memory_is_said(folder: Path) -> None:
    message = run_ranks(2, no_memory, settings_for(folder, "memory", **RUN))[0]
    assert "ckpt_async: saving in the background needs 2.097 MB" in message
    assert "ckpt_async = false" in message


def blind_rank(settings: dict[str, Any]) -> str:
    """Rank 1 stands for a node whose path leads to another disk."""
    import dataclasses

    from tinytrain_dist.reliability.storage_checks import check_shared_storage

    context = start_context()
    place = Path(settings["target_dir"])
    context = dataclasses.replace(context, host=f"node{context.rank}")
    if context.rank == 1:
        os.chdir("/")
        os.environ["HOME"] = "/"
        real = Path.read_text
        Path.read_text = lambda self, **k: "other" if ".probe" in self.name else real(self, **k)  # type: ignore
    try:
        check_shared_storage(place, context)
    except ValueError as error:
        return str(error)
    return "no error"


def test_node_that_does_not_see_the_folder_is_named(folder: Path) -> None:
    messages = run_ranks(2, blind_rank, settings_for(folder, "blind"))
    assert messages[0] == messages[1]
    assert "is not seen on node1" in messages[0]
    assert not list((folder / "blind").iterdir())


def second_run(settings: dict[str, Any]) -> str:
    """Another process holds the lock."""
    from tinytrain_dist.reliability.run_lock import process_start_time

    parent = os.getppid()
    lock = {"host": os.uname().nodename, "pid": parent, "started": process_start_time(parent), "job": None}
    Path(settings["target_dir"]).mkdir()
    (Path(settings["target_dir"]) / "lock.json").write_text(json.dumps(lock))
    return fit_error(settings)


def test_second_run_in_a_folder_is_refused(folder: Path) -> None:
    message = run_ranks(1, second_run, settings_for(folder, "twice"))[0]
    assert "trains into this folder" in message
    lock = json.loads((folder / "twice" / "lock.json").read_text())
    assert str(lock["pid"]) in message
    assert not (folder / "twice" / "state.json").exists(), "the run in the folder is another process's to judge"


@contextlib.contextmanager
def lives(lock: Path) -> Iterator[None]:
    """Somebody touches the lock, as who holds it does."""
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
    with lives(tmp_path / "run" / "lock.json") if "78" in text else contextlib.nullcontext():
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


def best_at_step_2(trainer: Any) -> None:
    tokens = trainer.config.eval_steps * trainer.train_step.plan.tokens_per_step
    losses = iter([3.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    trainer.evaluator.summed_loss = lambda _: (tokens * next(losses), 0)


def fit_best_at_step_2(settings: dict[str, Any]) -> None:
    fit(settings, best_at_step_2)


def test_best_by_eval_loss_is_kept(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "run", total_steps=6, ckpt_every=1, eval_every=1, keep_last=1)
    run_ranks(1, fit_best_at_step_2, settings)
    assert Run(tmp_path / "run").values("eval", "loss") == [3.0, 1.0, 2.0, 2.0, 2.0, 2.0]
    kept = sorted(int(path.name[-8:]) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == [2, 6]


def test_allow_names_what_may_change(tmp_path: Path) -> None:
    train(tmp_path, "run", 1, stop_at_step=3)
    refused = settings_for(tmp_path, "run", seed=3, context_len=11)
    assert "context_len: 12 in the checkpoint, 11 now" in run_ranks(1, fit_error, {**refused, "allow": "seed"})[0]
    assert run_ranks(1, fit_error, {**refused, "allow": "seed, context_len"})[0] == "no error"


def test_damage_is_shared_out_and_found_by_whoever_reads_it(tmp_path: Path) -> None:
    """Each file is read by one rank: damage in any one of them must reach all."""
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


def test_branch_inside_the_folder_is_refused_and_a_requeued_start_goes_on(tmp_path: Path) -> None:
    first = train(tmp_path, "first", 1, keep_last=9)
    earlier = first.folder / "checkpoints" / "checkpoint-00000003"
    message = run_ranks(1, fit_error, settings_for(tmp_path, "first", resume=str(earlier)))[0]
    assert "1 later checkpoint(s) lie beside it" in message
    branch = settings_for(tmp_path, "branch", resume=str(earlier), ckpt_every=1)
    run_ranks(1, fit, {**branch, "stop_at_step": 5})
    run_ranks(1, fit, branch)
    texts = Run(tmp_path / "branch").values("resumed", "text")
    assert "first/checkpoints/checkpoint-00000003" in texts[0]
    assert "branch/checkpoints/checkpoint-00000005" in texts[1]


def test_finished_run_started_again_records_nothing_twice(tmp_path: Path) -> None:
    run = train(tmp_path, "run", 1)
    before = [(r["kind"], r["step"]) for r in run.records if r["kind"] in ("train", "eval", "saved")]
    again = train(tmp_path, "run", 1)
    assert [(r["kind"], r["step"]) for r in again.records if r["kind"] in ("train", "eval", "saved")] == before


def fail_beside_the_tensors(trainer: Any, where: str) -> None:
    """On rank 0 only, as a stale file handle would: what surrounds the collectives must not part ranks."""
    from tinytrain_dist.checkpoint.manager import CheckpointManager

    plain = getattr(CheckpointManager, where)

    def fail(self: Any, *args: Any) -> Any:
        if trainer.step in (4, 5):
            raise OSError(116, "Stale file handle")
        return plain(self, *args)

    setattr(CheckpointManager, where, fail)


@pytest.mark.parametrize("where", ["_extra_files", "_retain"])
def test_error_of_rank_0_beside_the_tensors_parts_no_ranks(folder: Path, undisturbed: Run, where: str) -> None:
    settings = settings_for(folder, f"beside{where}", **RUN)
    ends = run_ranks(2, fit, settings, functools.partial(fail_beside_the_tensors, where=where))
    assert [end["state"] for end in ends] == ["done", "done"]
    assert Run(folder / f"beside{where}").digests() == undisturbed.digests()


def records_fail(trainer: Any) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    if trainer.context.is_main:
        trainer.log._tensorboard._writer.add_scalar = full


def test_records_that_cannot_be_written_do_not_end_the_training(folder: Path, undisturbed: Run) -> None:
    settings = settings_for(folder, "unrecorded", **RUN)
    assert {end["state"] for end in run_ranks(2, fit, settings, records_fail)} == {"done"}
    assert Run(folder / "unrecorded").digests() == undisturbed.digests()


def data_of_rank_1_is_gone(settings: dict[str, Any]) -> str:
    from tinytrain_dist.data import token_dataset

    if os.environ["RANK"] == "1":  # its node has not mounted the folder
        plain = token_dataset.load_token_dataset
        token_dataset.load_token_dataset = lambda path, **rest: plain(f"{path}.gone", **rest)  # type: ignore[assignment]
    return fit_error(settings)


def test_error_of_one_rank_is_raised_on_all(folder: Path) -> None:
    messages = run_ranks(2, data_of_rank_1_is_gone, settings_for(folder, "gone", **RUN))
    assert messages[0] == messages[1]
    assert "train.npy.gone: no such token file" in messages[0]


class Trap:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_no_pickle_is_ever_loaded(tmp_path: Path) -> None:
    """Planted in place of each file of a checkpoint, and of the token files; digests made to fit."""
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


def disturb(trainer: Any) -> None:
    """At step 3 the folder of checkpoints is deleted, and the clock jumps a year back."""
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


def poison(checkpoint: Path, name: str) -> None:
    """Put a NaN into a tensor, and make every digest fit, as a program that did not look would have written it."""
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
    """Memory of rank 1 goes bad between a step and its save."""
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
    assert [path.name for path in (folder / "bad-state" / "checkpoints").iterdir()] == ["checkpoint-00000002"]


def fit_error_after(settings: dict[str, Any]) -> str:
    return fit_error(settings, state_turns_bad)


def disk_is_stuck(trainer: Any) -> None:
    """Writes of the save of step 4 block until training waits for it at the next one; those of 8 until its end does."""
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
            free.set()  # rank 0 said how long and where, while it waits
        if "waiting for the save of step 8" in words[0]:
            end.set()

    def note_say(text: str) -> None:
        note(text)
        say(text)

    safetensors_io._write_out, trainer.log.say = stuck, note_say
    manager.print = note  # type: ignore[attr-defined]


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
    """What is free is taken before the save of step 4, but for 20 kB; before that of step 6 it is given back."""
    ballast = trainer.config.checkpoints_dir.parent / "ballast"

    def hook(*_: Any) -> None:
        if trainer.context.is_main and trainer.step == 3 and not ballast.exists():
            trainer.checkpoints.collect(wait=True)
            free = shutil.disk_usage(ballast.parent).free
            ballast.write_bytes(bytes(free - 20_000))
        if trainer.context.is_main and trainer.step == 5 and ballast.exists():
            trainer.checkpoints.collect(wait=True)
            assert [path.name for path in trainer.config.checkpoints_dir.iterdir()] == ["checkpoint-00000002"]
            ballast.unlink()

    trainer.train_step.model.register_forward_pre_hook(hook)


def test_disk_that_fills_in_the_middle_of_a_save(folder: Path, undisturbed: Run, small_disk: Path) -> None:
    settings = settings_for(folder, "filled", **RUN, ckpt_dir=str(small_disk / "checkpoints"), max_shard_bytes=9000)
    assert {end["state"] for end in run_ranks(2, fit, settings, fill_the_disk)} == {"done"}
    run = Run(folder / "filled")
    (text,) = run.values("save_failed", "text")
    assert "No space left on device" in text
    assert "1 so far" in text
    kept = sorted(path.name for path in (small_disk / "checkpoints").iterdir())
    assert kept == ["checkpoint-00000006", "checkpoint-00000008"]
    manifest = json.loads((small_disk / "checkpoints" / kept[-1] / "manifest.json").read_text())
    found = {name: t["blake3"] for kind in manifest["tensors"].values() for name, t in kind.items()}
    assert found == undisturbed.digests()


def lose_the_lock(trainer: Any) -> None:
    """After the save of step 4 another process takes the folder, as Slurm's next attempt does on another node."""
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


def test_nobody_commits_into_a_run_that_another_has_taken(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "run", **{**RUN, "ckpt_every": 2})
    for message, owned in run_ranks(2, fit_and_fail, settings):
        assert message.startswith("TrainingError")
        assert "another process has taken this run over" in message
        assert not owned, "and nobody may write how it ended"
    folder = tmp_path / "run"
    assert Run(folder).checkpoint.name == "checkpoint-00000004"
    assert json.loads((folder / "state.json").read_text())["attempt"] == "the next"
    assert json.loads((folder / "lock.json").read_text())["host"] == "elsewhere"


def copies(trainer: Any) -> None:
    """Note at which steps state is copied for a save."""
    buffers, note = trainer.checkpoints.buffers, (trainer.checkpoints.folder(0).parent.parent / "copies.txt").open("a")
    plain = buffers.copy

    def copy() -> Any:
        print(trainer.step, file=note, flush=True)
        return plain()

    buffers.copy = copy


def fit_with_copies(settings: dict[str, Any]) -> None:
    fit(settings, copies)


@pytest.mark.parametrize(("ckpt_every", "stop_at_step", "steps"), [(2, 6, [2, 4]), (100, 3, []), (2, 3, [2])])
def test_the_last_save_copies_nothing(
    folder: Path, undisturbed: Run, ckpt_every: int, stop_at_step: int, steps: list[int]
) -> None:
    name = f"copies-{ckpt_every}-{stop_at_step}"
    settings = settings_for(folder, name, **{**RUN, "ckpt_every": ckpt_every, "stop_at_step": stop_at_step})
    run_ranks(2, fit_with_copies, settings)
    found = [int(line) for line in (folder / name / "copies.txt").read_text().split()]
    assert sorted(found) == sorted(2 * steps)  # each of two ranks
    run = Run(folder / name)
    assert run.checkpoint.name == f"checkpoint-{stop_at_step:08d}"
    manifest = json.loads((run.checkpoint / "manifest.json").read_text())
    assert manifest["tensors"]["model"]


def test_buffers_are_taken_at_the_start_only_if_training_will_go_on_beside_a_save(folder: Path) -> None:
    for ckpt_every, taken in ((2, True), (100, False)):
        settings = settings_for(folder, f"b{ckpt_every}", **{**RUN, "ckpt_every": ckpt_every})
        assert run_ranks(1, buffers_at_start, settings) == [taken]


def buffers_at_start(settings: dict[str, Any]) -> bool:
    from tinytrain_dist.config.schema import TrainingConfig
    from tinytrain_dist.distributed.context import init_distributed
    from tinytrain_dist.training.trainer import Trainer

    trainer = Trainer.build(TrainingConfig(**{**settings, "parallel": "none"}), init_distributed("cpu"))
    return bool(trainer.checkpoints.buffers._copied)
