"""Check host buffers and the thread of a save."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tinytrain_dist.checkpoint import async_save
from tinytrain_dist.checkpoint.async_save import HostBuffers, SaveThread
from tinytrain_dist.checkpoint.manifest import Manifest
from tinytrain_dist.checkpoint.state import collect_shards


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
