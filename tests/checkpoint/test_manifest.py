"""Check the manifest of a folder and its commit: a checkpoint is complete or absent, and every change is noticed."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file

from tests.helpers.tensor_folders import some_tensors, write_folder
from tests.helpers.training import in_older_format
from tinytrain_dist.checkpoint.manifest import Manifest, read_manifest, write_file
from tinytrain_dist.checkpoint.safetensors_io import (
    TensorSpec,
    write_tensors,
)
from tinytrain_dist.checkpoint.verify import find_damage
from tinytrain_dist.config.run_folder import MANIFEST_FILE
from tinytrain_dist.errors import CheckpointError


def test_the_manifest_lists_every_file_and_every_tensor(tmp_path):
    tensors = some_tensors()
    folder = write_folder(tmp_path, tensors, 200)
    manifest = read_manifest(folder)
    assert set(manifest.files) == {path.name for path in folder.iterdir()} - {MANIFEST_FILE}
    for name, entry in manifest.files.items():
        data = (folder / name).read_bytes()
        assert entry["bytes"] == len(data)
        if not name.endswith(".safetensors"):
            assert entry == {"bytes": len(data), "blake3": blake3(data).hexdigest()}
            continue
        header = data[: 8 + int.from_bytes(data[:8], "little")]
        assert entry["tensors"] == list(load_file(folder / name))
        digests = [bytes.fromhex(manifest.tensors["model"][tensor]["blake3"]) for tensor in entry["tensors"]]
        assert entry["blake3_of_digests"] == blake3(header + b"".join(digests)).hexdigest()
    assert set(manifest.tensors) == {"model"}
    assert list(manifest.tensors["model"]) == list(tensors)
    entry = manifest.tensors["model"]["bf16"]
    values = tensors["bf16"].view(torch.uint8).numpy().tobytes()
    assert entry == {"shape": [6, 5], "dtype": "BF16", "blake3": blake3(values).hexdigest()}


def test_commit_is_one_rename_and_the_folder_is_whole(tmp_path):
    folder = write_folder(tmp_path, some_tensors())
    assert find_damage(folder) == []
    assert [path.name for path in tmp_path.iterdir()] == ["done"]


def test_before_the_commit_the_folder_is_not_a_checkpoint(tmp_path):
    write_tensors(tmp_path, "model", [TensorSpec("x", (1,), torch.float32)], iter([torch.zeros(1)]), 99, Manifest())
    (problem,) = find_damage(tmp_path)
    assert "is not a complete checkpoint (no manifest.json)" in problem


@pytest.mark.parametrize("kind", ["folder", "full folder", "file"])
def test_commit_never_replaces(tmp_path, kind):
    final = tmp_path / "done"
    if kind == "file":
        final.write_text("mine")
    else:
        final.mkdir()
        if kind == "full folder":
            (final / "mine").write_text("mine")
    before = sorted(p.name for p in final.iterdir()) if final.is_dir() else final.read_text()
    with pytest.raises(CheckpointError, match="exists already and is not replaced"):
        write_folder(tmp_path, some_tensors())
    assert before == (sorted(p.name for p in final.iterdir()) if final.is_dir() else final.read_text())


def test_a_file_is_never_written_twice(tmp_path):
    write_file(tmp_path, "a", b"1", Manifest())
    with pytest.raises(FileExistsError):
        write_file(tmp_path, "a", b"2", Manifest())
    assert (tmp_path / "a").read_bytes() == b"1"


def test_nothing_is_pickled(tmp_path):
    folder = write_folder(tmp_path, some_tensors(), 200)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors", ".bin"}
    for path in folder.iterdir():
        data = path.read_bytes()
        assert not data.startswith((b"\x80", b"PK"))  # the first bytes of a pickle, and of a file of torch.save
        if path.suffix == ".json":
            json.loads(data)


def test_no_bit_of_the_manifest_can_flip_unseen(folder):
    original = (folder / MANIFEST_FILE).read_bytes()
    end = len(original) - 1  # the line end after the last brace has no meaning
    unseen = []
    for place in range(0, end, 5):
        damaged = bytearray(original)
        damaged[place] ^= 1 << (place % 8)
        (folder / MANIFEST_FILE).write_bytes(damaged)
        try:
            found = read_manifest(folder)
        except CheckpointError:
            continue
        unseen.append((place, found))
    assert unseen == []


def test_a_manifest_changed_by_hand_is_refused(folder):
    found = json.loads((folder / MANIFEST_FILE).read_text())
    found["files"]["state.json"]["bytes"] += 1
    (folder / MANIFEST_FILE).write_text(json.dumps(found))
    with pytest.raises(CheckpointError, match="was changed after it was written"):
        read_manifest(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3", '{"format": 1}'])
def test_a_file_that_is_not_a_manifest_is_refused(folder, text):
    (folder / MANIFEST_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json: cannot be read"):
        read_manifest(folder)


@pytest.mark.parametrize("number", [1, 2])
def test_folders_of_older_formats_are_still_read(folder, number):
    in_older_format(folder, number)
    assert read_manifest(folder).hashed == "sha256"
    assert find_damage(folder) == []
    name = next(folder.glob("model-00001-*")).name
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    (problem,) = find_damage(folder)
    assert name in problem
    assert "has sha256" in problem


def test_a_newer_format_is_named_and_not_read(folder):
    body = json.loads((folder / MANIFEST_FILE).read_text()) | {"format": 4}
    del body["sha256"]
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST_FILE).write_text(json.dumps({**body, "sha256": digest}))
    assert "has format 4, but this version reads 1 to 3" in find_damage(folder)[0]
