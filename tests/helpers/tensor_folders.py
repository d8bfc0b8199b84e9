"""Small folders of tensors of every type, written without a training run."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tinytrain_dist.checkpoint.manifest import Manifest, commit_folder, write_file, write_json_file
from tinytrain_dist.checkpoint.safetensors_io import (
    TensorSpec,
    write_index,
    write_tensors,
)


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(6, 5, generator=generator)
    return {
        "layers.0.weight": wide,
        "transposed": torch.randn(4, 3, generator=generator).T,
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 7),
        "bf16": wide.bfloat16(),
        "f16": wide.half(),
        "f64": wide.double(),
        "ids": torch.arange(9),
        "i32": torch.arange(3, dtype=torch.int32),
        "i16": torch.arange(3, dtype=torch.int16),
        "i8": torch.arange(3, dtype=torch.int8),
        "u8": torch.arange(3, dtype=torch.uint8),
        "flags": torch.tensor([True, False, True]),
        'a "name" with ünïcode': torch.ones(2),
    }


def specs_of(tensors: dict[str, Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]


def write_folder(parent: Path, tensors: dict[str, Tensor], max_bytes: int = 1 << 30, name: str = "done") -> Path:
    aside = parent / f"{name}.tmp"
    aside.mkdir()
    manifest = Manifest()
    chunks = (value.contiguous() for value in tensors.values())
    write_tensors(aside, "model", specs_of(tensors), chunks, max_bytes, manifest)
    write_index(aside, "model", specs_of(tensors), max_bytes, manifest)
    write_json_file(aside, "state.json", {"step": 3}, manifest)
    write_file(aside, "notes.bin", b"\x00\x01", manifest)
    commit_folder(aside, parent / name, manifest)
    return parent / name


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(found, expected)
