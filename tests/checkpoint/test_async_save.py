"""Check host buffers and the thread of a save."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tinytrain_dist.checkpoint import async_save
from tinytrain_dist.checkpoint.async_save import CopyStream, HostBuffers, SaveThread
from tinytrain_dist.checkpoint.manifest import Manifest
from tinytrain_dist.checkpoint.state_collection import collect_shards
from tinytrain_dist.errors import CheckpointError


def test_buffers_keep_the_values_of_the_copy_and_are_reused() -> None:
    model = nn.Linear(3, 2)
    buffers = HostBuffers(collect_shards(model, None)[0])
    before = model.weight.detach().clone()
    shards, event = buffers.copy()
    assert event is None, "nothing to wait for where no GPU copies"
    copied = {shard.name: shard.rows_to_save for shard in shards["model"]}
    with torch.no_grad():
        model.weight.add_(1)
    assert torch.equal(copied["weight"], before)
    place = copied["weight"].data_ptr()
    again = {shard.name: shard.rows_to_save for shard in buffers.copy()[0]["model"]}
    assert torch.equal(again["weight"], before + 1)
    assert again["weight"].data_ptr() == place


class FakeCuda:
    """In place of torch.cuda: its streams write down what they are given. Everything runs at once, on the CPU."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.pinned: dict[int, int] = {}  # size of each pinned range, by address
        self.compute = FakeStream(self, "compute")
        self.current = self.compute

    def Stream(self, device: torch.device) -> FakeStream:
        return FakeStream(self, "side")

    def current_stream(self, device: torch.device) -> FakeStream:
        return self.current

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def cudart(self) -> SimpleNamespace:
        return SimpleNamespace(cudaHostRegister=self.register, cudaHostUnregister=self.pinned.pop)

    def register(self, address: int, size: int, flags: int) -> int:
        if size == 0:
            return 1  # cudaErrorInvalidValue
        assert address % 4096 == 0, "the driver locks whole pages"
        self.pinned[address] = size
        return 0


class FakeStream:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_stream(self, other: FakeStream) -> None:
        self.cuda.calls.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> str:
        self.cuda.calls.append(f"{self.name} records")
        return f"event of {self.name}"

    def wait_event(self, event: str) -> None:
        self.cuda.calls.append(f"{self.name} waits for {event}")


def test_on_a_gpu_the_copy_runs_beside_the_computation_and_the_next_update_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = FakeCuda()
    copy = torch._foreach_copy_

    def noted_copy(*args: Any, non_blocking: bool) -> None:
        cuda.calls.append(f"{cuda.current.name} copies, non_blocking={non_blocking}")
        copy(*args, non_blocking=non_blocking)

    monkeypatch.setattr(torch, "_foreach_copy_", noted_copy)
    model = nn.Linear(3, 2)
    buffers = HostBuffers(collect_shards(model, None)[0], CopyStream(torch.device("cuda"), cuda))
    buffers.before_update()
    assert cuda.calls == [], "no copy has been started"
    shards, event = buffers.copy()
    assert event == "event of side"
    assert cuda.calls == ["side waits for compute", "side copies, non_blocking=True", "side records"]
    assert all(torch.equal(shard.rows_to_save, shard.local_rows) for shard in shards["model"])
    buffers.before_update()
    buffers.before_update()
    assert cuda.calls[3:] == ["compute waits for event of side"], "one wait for each copy"
    buffers.copy()
    buffers.before_update()
    assert cuda.calls[4:] == [*cuda.calls[:3], "compute waits for event of side"]


def test_each_kind_has_one_pinned_buffer_of_the_size_of_its_rows() -> None:
    cuda = FakeCuda()
    model = nn.Sequential(nn.Linear(100, 7), nn.BatchNorm1d(7))  # the counter of batches is an int64 without axes
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 100)).sum().backward()
    optimizer.step()
    buffers = HostBuffers(collect_shards(model, optimizer)[0], CopyStream(torch.device("cuda"), cuda))
    shards, _ = buffers.copy()
    assert list(shards) == ["model", "optimizer"]
    assert len(cuda.pinned) == 2
    for of_kind in shards.values():
        rows = [shard.rows_to_save for shard in of_kind]
        start = rows[0].untyped_storage().data_ptr()
        assert {part.untyped_storage().data_ptr() for part in rows} == {start}, "views of one buffer"
        assert all(part.data_ptr() % 512 == 0 for part in rows)
        assert sum(part.nbytes for part in rows) <= cuda.pinned[start] < sum(part.nbytes + 512 for part in rows)
        for shard in of_kind:
            assert torch.equal(shard.rows_to_save, shard.local_rows), shard.name
    del buffers
    assert cuda.pinned == {}, "unlocked before the memory is freed"


def test_a_rank_with_nothing_to_copy_pins_nothing() -> None:
    """With DDP, only one rank saves; of the others each shard has no rows."""
    cuda = FakeCuda()
    shards = collect_shards(nn.Linear(3, 2), None)[0]
    empty = [replace(shard, rows_to_save=shard.rows_to_save[:0]) for shard in shards["model"]]
    buffers = HostBuffers({"model": empty}, CopyStream(torch.device("cuda"), cuda))
    copied, _ = buffers.copy()
    assert [shard.rows_to_save.numel() for shard in copied["model"]] == [0, 0]
    assert cuda.pinned == {}


def test_memory_that_the_driver_does_not_pin_is_an_error_that_says_what_to_do() -> None:
    cuda = FakeCuda()
    cuda.register = lambda *_: 2  # type: ignore[method-assign]
    buffers = HostBuffers(collect_shards(nn.Linear(3, 2), None)[0], CopyStream(torch.device("cuda"), cuda))
    with pytest.raises(CheckpointError, match=r"CUDA error 2\); set ckpt_async = false"):
        buffers.copy()


def test_a_save_runs_when_it_is_started_and_keeps_its_error() -> None:
    def fail(_: Manifest) -> None:
        raise OSError("the disk is full")

    save = SaveThread(3, fail)
    assert not save.is_alive()
    assert save.error is None
    save.start()
    save.join()
    assert str(save.error) == "the disk is full"
    assert save.seconds > 0


def test_a_slow_save_is_reported_with_its_file_whenever_its_duration_has_doubled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, end = [1000.0], threading.Event()
    monkeypatch.setattr(async_save, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def wait(_: Manifest) -> None:
        assert end.wait(60)

    save = SaveThread(4, wait)
    assert save.slow_save_warning() == ""
    save.start()
    warnings = []
    for seconds in (119, 120, 239, 240, 480):
        now[0] = 1000.0 + seconds
        if seconds > 120:
            save.manifest.files_in_progress = ["model-00001-of-00002.safetensors", "next"]
        warnings.append(save.slow_save_warning())
    end.set()
    save.join()
    assert warnings[0] == warnings[2] == ""
    assert warnings[1] == "the save of step 4 has taken 120 s and has not ended; waiting for other ranks"
    assert warnings[3].endswith("has taken 240 s and has not ended; model-00001-of-00002.safetensors is being written")
    assert "480 s" in warnings[4]
    now[0] = 9999.0
    assert save.slow_save_warning() == "", "it has ended"


def test_a_save_that_is_waited_for_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    now, end = [1000.0], threading.Event()
    monkeypatch.setattr(async_save, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def wait(manifest: Manifest) -> None:
        assert end.wait(60)

    save = SaveThread(4, wait)
    save.manifest.bytes_to_write = 4_000_000
    save.start()
    lines = []
    for seconds, written in ((11, 0), (20, 1_000_000), (25, 2_000_000), (30, 3_000_000), (40, 4_000_000)):
        now[0] = 1000.0 + seconds
        save.manifest.bytes_written = written
        lines.append(save.progress_line())
    end.set()
    save.join()
    assert lines == [
        "",
        "saving step 4: 1 of 4 MB, 0.1 MB/s, about 60 s left",
        "",
        "saving step 4: 3 of 4 MB, 0.1 MB/s, about 10 s left",
        "saving step 4: 4 MB written; waiting for the disk and the other ranks",
    ]
    now[0] = 9999.0
    assert save.progress_line() == "", "it has ended"
