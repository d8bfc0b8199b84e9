"""The check for finite values, and digests that do not depend on the block size."""

from __future__ import annotations

import math

import pytest
import torch

from tests.helpers.tensor_folders import some_tensors, write_folder
from tinytrain_dist.checkpoint import safetensors_io, verify
from tinytrain_dist.checkpoint.file_digests import all_finite
from tinytrain_dist.checkpoint.manifest import Manifest
from tinytrain_dist.checkpoint.safetensors_io import (
    TensorSpec,
    write_tensors,
)
from tinytrain_dist.checkpoint.verify import find_damage
from tinytrain_dist.config.run_folder import MANIFEST_FILE
from tinytrain_dist.errors import CheckpointError


def test_finite_values_with_an_infinite_sum_are_finite():
    assert all_finite(torch.full((9,), 3e38))
    assert all_finite(torch.full((9,), 6e4, dtype=torch.float16))
    assert all_finite(torch.full((9,), 2**62))
    assert all_finite(torch.zeros(0))
    assert not all_finite(torch.tensor([math.inf, -math.inf]))


def test_blocks_change_no_digest_and_all_are_checked(tmp_path, monkeypatch):
    whole = write_folder(tmp_path, some_tensors(), name="whole")
    for module in (safetensors_io, verify):
        monkeypatch.setattr(module, "HASH_BLOCK_BYTES", 16)
    blocks = write_folder(tmp_path, some_tensors(), name="blocks")
    assert (blocks / MANIFEST_FILE).read_bytes() == (whole / MANIFEST_FILE).read_bytes()
    assert find_damage(whole) == []
    values = torch.ones(50)
    values[25] = math.nan  # neither in the first block nor in the last
    with pytest.raises(CheckpointError, match="x: is not finite"):
        write_tensors(tmp_path, "m", [TensorSpec("x", (50,), torch.float32)], [values], 999, Manifest())
    for module in (safetensors_io, verify):
        monkeypatch.setattr(module, "all_finite", lambda _: True)
    bad = write_folder(tmp_path, {"x": values}, name="bad")
    monkeypatch.undo()
    for module in (safetensors_io, verify):
        monkeypatch.setattr(module, "HASH_BLOCK_BYTES", 16)
    assert "x is not finite" in find_damage(bad)[0]
