"""Check that every damage to a folder of tensors is noticed."""

from __future__ import annotations

import math

import torch

from tests.helpers.tensor_folders import some_tensors, write_folder
from tinytrain_dist.checkpoint import safetensors_io, verify
from tinytrain_dist.checkpoint.manifest import Manifest, commit_folder
from tinytrain_dist.checkpoint.safetensors_io import (
    TensorReader,
    TensorSpec,
    write_index,
    write_tensors,
)
from tinytrain_dist.checkpoint.verify import find_damage
from tinytrain_dist.config.run_folder import MANIFEST_FILE


def places(size: int) -> list[int]:
    """Return positions in a file: the first, the last and some between."""
    return sorted({0, size - 1, *(size * k // 7 for k in range(7))})


def test_one_flipped_bit_is_found_in_every_file(folder):
    names = sorted(path.name for path in folder.iterdir())
    assert MANIFEST_FILE in names
    assert len(names) >= 6
    for name in names:
        original = (folder / name).read_bytes()
        for place in places(len(original)):
            damaged = bytearray(original)
            damaged[place] ^= 1 << (place % 8)
            (folder / name).write_bytes(damaged)
            (problem,) = find_damage(folder)
            assert name in problem, (name, place)
        (folder / name).write_bytes(original)
    assert find_damage(folder) == []


def test_truncated_longer_and_missing_files_are_named_with_both_sizes(folder):
    name = next(folder.glob("model-00001-*")).name
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1])
    expected = f"has {len(data) - 1:,} bytes, but {len(data):,} bytes were written"
    assert find_damage(folder) == [f"{folder / name}: {expected}"]
    (folder / name).write_bytes(data + b"x")
    expected = f"has {len(data) + 1:,} bytes, but {len(data):,} bytes were written"
    assert find_damage(folder) == [f"{folder / name}: {expected}"]
    (folder / name).unlink()
    (folder / "state.json").write_text("")
    first, second = sorted(find_damage(folder))
    assert first == f"{folder / name}: cannot be read (No such file or directory)"
    assert second.startswith(f"{folder / 'state.json'}: has 0 bytes")


def test_only_the_files_asked_for_are_read(folder):
    (folder / "state.json").write_text("")
    assert find_damage(folder, ["notes.bin"]) == []
    assert len(find_damage(folder, ["notes.bin", "state.json"])) == 1


def test_special_values_survive_to_the_bit(tmp_path):
    values = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45, 3.4028235e38])
    aside, manifest, specs = tmp_path / "done.tmp", Manifest(), [TensorSpec("x", (6,), torch.float32, finite=False)]
    aside.mkdir()
    write_tensors(aside, "model", specs, iter([values]), 99, manifest)
    write_index(aside, "model", specs, 99, manifest)
    commit_folder(aside, tmp_path / "done", manifest)
    found = TensorReader(tmp_path / "done", "model").read("x")
    assert torch.equal(found.view(torch.int32), values.view(torch.int32))
    assert find_damage(tmp_path / "done") == []


def test_values_that_are_not_finite_are_damage_though_every_digest_fits(tmp_path, monkeypatch):
    tensors = some_tensors()
    tensors["layers.0.weight"][3, 2] = math.nan
    for module in (safetensors_io, verify):
        monkeypatch.setattr(module, "all_finite", lambda _: True)
    folder = write_folder(tmp_path, tensors, 200)
    assert find_damage(folder) == []
    monkeypatch.undo()
    (problem,) = find_damage(folder)
    assert "layers.0.weight is not finite" in problem


def test_shares_of_a_check_are_disjoint_and_together_everything(folder, monkeypatch):
    plain, seen = verify._ByteRange.problem, []
    monkeypatch.setattr(verify._ByteRange, "problem", lambda span, *args: seen.append(span) or plain(span, *args))
    amounts: list[float] = []
    find_damage(folder, advance=amounts.append)
    assert sum(amounts) == sum(span.nbytes for span in seen), "progress counts every byte that is read"
    everything = sorted((str(span.path), span.start, span.nbytes) for span in seen if span.nbytes)
    assert sum(nbytes for _, _, nbytes in everything) > 1000
    seen.clear()
    ranges_read = []
    for part in range(5):
        before = len(seen)
        assert find_damage(folder, part=part, parts=5) == []
        ranges_read.append(len(seen) - before)
    assert sum(count > 0 for count in ranges_read) >= 3, "a share is empty only where one tensor is larger than a share"
    assert sorted((str(span.path), span.start, span.nbytes) for span in seen if span.nbytes) == everything
