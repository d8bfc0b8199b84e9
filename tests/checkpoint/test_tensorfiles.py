"""Owns the checks of tensor folders: safetensors' own loader reads them, and no damage goes unseen."""

import hashlib
import json
import math
import shutil
import time
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.helpers.training import in_older_format
from tinytrain_dist.checkpoint import safetensors_io, verify
from tinytrain_dist.checkpoint.hashing import all_finite
from tinytrain_dist.checkpoint.manifest import Manifest, commit_folder, read_manifest, write_file, write_json_file
from tinytrain_dist.checkpoint.safetensors_io import (
    CHUNKS_IN_FLIGHT,
    TensorReader,
    TensorSpec,
    split_into_files,
    write_index,
    write_tensors,
)
from tinytrain_dist.checkpoint.verify import find_damage
from tinytrain_dist.config.run_folder import MANIFEST_FILE
from tinytrain_dist.errors import CheckpointError


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


# --- cutting -------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 20), max_size=12), st.integers(1, 60))
def test_files_are_consecutive_full_and_not_too_large(sizes, limit):
    specs = [TensorSpec(str(i), (size,), torch.float32) for i, size in enumerate(sizes)]
    files = split_into_files(specs, limit)
    assert [spec for group in files for spec in group] == specs
    assert all(files)
    totals = [sum(spec.nbytes for spec in group) for group in files]
    assert all(total <= limit or len([s for s in group if s.nbytes]) == 1 for total, group in zip(totals, files))  # noqa: B905
    for total, after in zip(totals, files[1:], strict=False):
        assert total + after[0].nbytes > limit  # the first of the next file would not have fitted


def test_a_tensor_larger_than_a_file_gets_its_own():
    sizes = {"a": 2, "big": 100, "b": 2, "c": 1}
    specs = [TensorSpec(name, (size,), torch.float32) for name, size in sizes.items()]
    assert [[s.name for s in group] for group in split_into_files(specs, 16)] == [["a"], ["big"], ["b", "c"]]


def test_bytes_of_a_tensor():
    assert TensorSpec("x", (3, 5), torch.bfloat16).nbytes == 30
    assert TensorSpec("x", (), torch.float64).nbytes == 8
    assert TensorSpec("x", (0, 5), torch.float64).nbytes == 0


# --- writing and reading -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_bytes", [1, 200, 1 << 30])
def test_safetensors_own_loader_reads_what_is_written(tmp_path, max_bytes):
    tensors = some_tensors()
    folder = write_folder(tmp_path, tensors, max_bytes)
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    assert set(found) == set(tensors)
    for name, expected in tensors.items():
        assert_same(found[name], expected)


def test_the_index_says_where_each_tensor_lies(tmp_path):
    tensors = some_tensors()
    folder = write_folder(tmp_path, tensors, 200)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 1
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert index["weight_map"] == {name: file for file in files for name in load_file(folder / file)}


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


def test_nothing_is_fetched_before_there_is_room_for_it(tmp_path, monkeypatch):
    """A tensor may be as large as memory allows: what is not written yet must not pile up."""
    fetched, written, plain = [], [], safetensors_io._write_out

    def write_out(file, data):
        plain(file, data)
        written.append(len(data))

    def chunks():
        for number in range(40):
            fetched.append(number)
            assert len(fetched) - len(written) <= CHUNKS_IN_FLIGHT
            yield torch.full((5,), number, dtype=torch.uint8)

    monkeypatch.setattr(safetensors_io, "_write_out", write_out)
    specs = [TensorSpec(str(number), (5 * count,), torch.uint8) for number, count in enumerate([1, 30, 0, 9])]
    write_tensors(tmp_path, "model", specs, chunks(), 10**9, Manifest())
    found = load_file(tmp_path / "model-00001-of-00001.safetensors")
    assert_same(
        torch.cat([found[spec.name] for spec in specs]), torch.arange(40, dtype=torch.uint8).repeat_interleave(5)
    )


def test_the_same_values_give_the_same_bytes(tmp_path):
    one, two = (write_folder(tmp_path, some_tensors(), 200, name) for name in ("one", "two"))
    assert [p.name for p in sorted(one.iterdir())] == [p.name for p in sorted(two.iterdir())]
    assert all((two / path.name).read_bytes() == path.read_bytes() for path in one.iterdir())


def test_a_tensor_that_is_not_as_announced_is_not_written(tmp_path):
    with pytest.raises(AssertionError, match="x"):
        write_tensors(tmp_path, "m", [TensorSpec("x", (2,), torch.float32)], iter([torch.zeros(3)]), 100, Manifest())


def test_the_reader_gives_specs_rows_and_whole_tensors(tmp_path):
    tensors = some_tensors()
    reader = TensorReader(write_folder(tmp_path, tensors, 200), "model")
    assert set(reader.files) == set(tensors)
    assert reader.spec("bf16") == ((6, 5), "BF16")
    assert reader.spec("scalar") == ((), "F32")
    for name, expected in tensors.items():
        assert_same(reader.read(name), expected)
    assert_same(reader.read("layers.0.weight", 2, 5), tensors["layers.0.weight"][2:5])
    assert_same(reader.read("layers.0.weight", 4), tensors["layers.0.weight"][4:])
    assert_same(reader.read("layers.0.weight", 3, 3), tensors["layers.0.weight"][3:3])


def test_the_reader_takes_a_lone_file(tmp_path):
    save_file({"x": torch.arange(6).view(3, 2)}, tmp_path / "model.safetensors")
    assert_same(TensorReader(tmp_path, "model").read("x", 1, 3), torch.tensor([[2, 3], [4, 5]]))


def test_a_folder_without_readable_weights_is_a_sentence(tmp_path):
    with pytest.raises(CheckpointError, match="has no readable model weights"):
        TensorReader(tmp_path, "model")
    (tmp_path / "model.safetensors").write_bytes(b"not tensors at all, but long enough to have a header")
    with pytest.raises(CheckpointError, match="has no readable model weights"):
        TensorReader(tmp_path, "model")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '"x"'])
def test_a_broken_index_is_a_sentence(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="has no readable model weights"):
        TensorReader(tmp_path, "model")


def test_a_file_that_the_index_names_and_that_is_gone_is_a_sentence(tmp_path):
    folder = write_folder(tmp_path, some_tensors())
    (folder / "model-00001-of-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00001-of-00001\.safetensors: cannot be read"):
        TensorReader(folder, "model").read("ids")


@pytest.mark.parametrize("chunk", [8, 24, 1 << 20])
@pytest.mark.parametrize("into", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_are_read_into_a_tensor_of_any_type_and_order(tmp_path, monkeypatch, into, chunk):
    monkeypatch.setattr(safetensors_io, "CHUNK_BYTES", chunk)
    wide = torch.randn(6, 5)
    save_file({"before": torch.ones(3), "wide": wide, "scalar": torch.tensor(2.5)}, tmp_path / "model.safetensors")
    reader = TensorReader(tmp_path, "model")
    for rows in (torch.zeros(3, 5, dtype=into), torch.zeros(5, 3, dtype=into).T, nn.Parameter(torch.zeros(3, 5))):
        place = rows.data_ptr()
        reader.fill([(rows, "wide", 2)])
        assert_same(rows.detach(), wide[2:5].to(rows.dtype))
        assert rows.data_ptr() == place
    scalar = torch.zeros((), dtype=into)
    reader.fill([(scalar, "scalar", 0)])
    assert scalar == 2.5


def test_the_place_of_a_tensor_is_read_from_any_header(tmp_path):
    """Hugging Face's files name tensors in any order, with metadata; and what is read is exactly what lies there."""
    tensors = {name: value.contiguous() for name, value in some_tensors().items()}
    save_file(dict(reversed(tensors.items())), tmp_path / "model.safetensors", {"format": "pt", "by": "others"})
    reader = TensorReader(tmp_path, "model")
    assert set(reader.files) == set(tensors)
    for name, expected in tensors.items():
        assert_same(reader.read(name), expected)


@pytest.mark.parametrize("shape", [(6, 5), (5, 6), (2, 3, 5), (30,), ()])
def test_rows_that_do_not_fit_are_a_sentence(tmp_path, shape):
    save_file({"wide": torch.randn(6, 5), "after": torch.randn(6, 5)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"wide is \[6, 5\], but \[.*\] from row 1 is wanted here"):
        TensorReader(tmp_path, "model").fill([(torch.zeros(shape), "wide", 1)])


def test_a_file_cut_short_meanwhile_is_a_sentence(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.randn(6, 5)}, path)
    reader, data = TensorReader(tmp_path, "model"), path.read_bytes()
    reader.spec("x")
    path.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read \(it ends too early\)"):
        reader.read("x")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read \(No such file"):
        reader.read("x")


def header_of(**entry):
    text = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **entry}}).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\xff" * 8, b"\xff" * 7, (99).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"{x",
        header_of() + bytes(7), header_of() + bytes(9), header_of(data_offsets=[0, 4]) + bytes(8),
        header_of(data_offsets=[-8, 0]) + bytes(8), header_of(data_offsets=[2**63, 2**63 + 8]) + bytes(8),
        header_of(shape=[3]) + bytes(8), header_of(dtype="F33") + bytes(8), header_of(shape="2") + bytes(8),
    ],
)  # fmt: skip
@pytest.mark.parametrize("index", [True, False])
def test_a_broken_header_is_a_sentence(tmp_path, data, index):
    (tmp_path / "model.safetensors").write_bytes(data)
    if index:
        (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"cannot be read|no readable model weights"):
        TensorReader(tmp_path, "model").read("x")


def test_what_the_index_names_and_the_file_has_not_is_a_sentence(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "f", "y": "f", "z": 3}}')
    (tmp_path / "f").write_bytes(header_of(dtype="F8_E4M3", shape=[8]) + bytes(8))
    reader = TensorReader(tmp_path, "model")
    with pytest.raises(CheckpointError, match="f: y is missing"):
        reader.read("y")
    with pytest.raises(CheckpointError, match=r"f: x is F8_E4M3, not one of F64, .*; use another one"):
        reader.spec("x")
    with pytest.raises(CheckpointError, match="3: cannot be read"):
        reader.spec("z")


# --- commit --------------------------------------------------------------------------------------------------------


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
        assert not data.startswith((b"\x80", b"PK"))  # a pickle's, and torch.save's, first bytes
        if path.suffix == ".json":
            json.loads(data)


# --- damage --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("whole"), some_tensors(), 200)


@pytest.fixture
def folder(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def places(size: int) -> list[int]:
    """First, last and some bytes between."""
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


def test_no_bit_of_the_manifest_can_flip_unseen(folder):
    original = (folder / MANIFEST_FILE).read_bytes()
    end = len(original) - 1  # after the last brace there is a line end, which says nothing
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


def test_truncated_longer_and_missing_files_are_named_with_both_sizes(folder):
    name = next(folder.glob("model-00001-*")).name
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1])
    assert find_damage(folder) == [f"{folder / name}: has {len(data) - 1:,} bytes, but {len(data):,} were written"]
    (folder / name).write_bytes(data + b"x")
    assert find_damage(folder) == [f"{folder / name}: has {len(data) + 1:,} bytes, but {len(data):,} were written"]
    (folder / name).unlink()
    (folder / "state.json").write_text("")
    first, second = sorted(find_damage(folder))
    assert first == f"{folder / name}: cannot be read (No such file or directory)"
    assert second.startswith(f"{folder / 'state.json'}: has 0 bytes")


def test_only_the_files_asked_for_are_read(folder):
    (folder / "state.json").write_text("")
    assert find_damage(folder, ["notes.bin"]) == []
    assert len(find_damage(folder, ["notes.bin", "state.json"])) == 1


def test_a_manifest_changed_by_hand_is_refused(folder):
    found = json.loads((folder / MANIFEST_FILE).read_text())
    found["files"]["state.json"]["bytes"] += 1
    (folder / MANIFEST_FILE).write_text(json.dumps(found))
    with pytest.raises(CheckpointError, match="was changed after it was written"):
        read_manifest(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3", '{"format": 1}'])
def test_a_manifest_that_is_none_is_refused(folder, text):
    (folder / MANIFEST_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json: cannot be read"):
        read_manifest(folder)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_must_be_finite_is_not_written_otherwise(tmp_path, bad, dtype):
    values = torch.ones(5000, dtype=dtype)
    values[4321] = bad
    with pytest.raises(CheckpointError, match=r"x: is not finite, so nothing is saved"):
        write_tensors(tmp_path, "m", [TensorSpec("x", (5000,), dtype)], iter(values.split(1000)), 9, Manifest())


def test_finite_values_with_an_infinite_sum_are_finite():
    assert all_finite(torch.full((9,), 3e38))
    assert all_finite(torch.full((9,), 6e4, dtype=torch.float16))
    assert all_finite(torch.full((9,), 2**62))
    assert all_finite(torch.zeros(0))
    assert not all_finite(torch.tensor([math.inf, -math.inf]))


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


def test_blocks_change_no_digest_and_are_all_looked_at(tmp_path, monkeypatch):
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


def test_a_chunk_is_not_read_any_more_when_ring_others_were_given(tmp_path, monkeypatch):
    """The buffers are used again: a slow disk must hold the gathering up, not lose bytes."""
    plain, buffers = safetensors_io._write_out, [torch.empty(1000, dtype=torch.uint8) for _ in range(CHUNKS_IN_FLIGHT)]

    def slow(file, data):
        time.sleep(0.002)
        plain(file, data)

    def chunks():
        for number in range(60):
            yield buffers[number % CHUNKS_IN_FLIGHT].fill_(number)

    monkeypatch.setattr(safetensors_io, "_write_out", slow)
    write_tensors(tmp_path, "m", [TensorSpec("x", (60, 1000), torch.uint8)], chunks(), 10**9, Manifest())
    found = load_file(tmp_path / "m-00001-of-00001.safetensors")["x"]
    assert torch.equal(found, torch.arange(60, dtype=torch.uint8)[:, None].expand(60, 1000))


def test_shares_of_a_check_are_disjoint_and_together_everything(folder, monkeypatch):
    plain, seen = verify._ByteRange.problem, []
    monkeypatch.setattr(verify._ByteRange, "problem", lambda span, buffer: seen.append(span) or plain(span, buffer))
    find_damage(folder)
    everything = sorted((str(span.path), span.start, span.nbytes) for span in seen if span.nbytes)
    assert sum(nbytes for _, _, nbytes in everything) > 1000
    seen.clear()
    for part in range(5):
        assert find_damage(folder, part=part, parts=5) == []
        assert seen, "each has a share"
    assert sorted((str(span.path), span.start, span.nbytes) for span in seen if span.nbytes) == everything


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


def test_a_newer_format_is_said_and_not_read(folder):
    body = json.loads((folder / MANIFEST_FILE).read_text()) | {"format": 4}
    del body["sha256"]
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST_FILE).write_text(json.dumps({**body, "sha256": digest}))
    assert "has format 4, but this version reads 1 to 3" in find_damage(folder)[0]
