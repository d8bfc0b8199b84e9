"""Writing and reading of safetensors files: the safetensors library reads what we write, and the reverse."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.helpers.tensor_folders import assert_same, some_tensors, write_folder
from tinytrain_dist.checkpoint import safetensors_io
from tinytrain_dist.checkpoint.manifest import Manifest
from tinytrain_dist.checkpoint.safetensors_io import (
    CHUNKS_IN_FLIGHT,
    TensorReader,
    TensorSpec,
    split_into_files,
    write_tensors,
)
from tinytrain_dist.errors import CheckpointError


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


def test_the_index_has_the_file_of_each_tensor(tmp_path):
    tensors = some_tensors()
    folder = write_folder(tmp_path, tensors, 200)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 1
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert index["weight_map"] == {name: file for file in files for name in load_file(folder / file)}


def test_nothing_is_fetched_before_there_is_room_for_it(tmp_path, monkeypatch):
    """Memory stays small: at most a few chunks are fetched but not yet written."""
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


def test_the_reader_reads_a_single_file(tmp_path):
    save_file({"x": torch.arange(6).view(3, 2)}, tmp_path / "model.safetensors")
    assert_same(TensorReader(tmp_path, "model").read("x", 1, 3), torch.tensor([[2, 3], [4, 5]]))


def test_a_folder_without_readable_weights_is_reported(tmp_path):
    with pytest.raises(CheckpointError, match="has no readable model weights"):
        TensorReader(tmp_path, "model")
    (tmp_path / "model.safetensors").write_bytes(b"not tensors at all, but long enough to have a header")
    with pytest.raises(CheckpointError, match="has no readable model weights"):
        TensorReader(tmp_path, "model")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '"x"'])
def test_a_broken_index_is_reported(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="has no readable model weights"):
        TensorReader(tmp_path, "model")


def test_a_missing_file_of_the_index_is_reported(tmp_path):
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
    """Files of Hugging Face have metadata, and list tensors in any order."""
    tensors = {name: value.contiguous() for name, value in some_tensors().items()}
    save_file(dict(reversed(tensors.items())), tmp_path / "model.safetensors", {"format": "pt", "by": "others"})
    reader = TensorReader(tmp_path, "model")
    assert set(reader.files) == set(tensors)
    for name, expected in tensors.items():
        assert_same(reader.read(name), expected)


@pytest.mark.parametrize("shape", [(6, 5), (5, 6), (2, 3, 5), (30,), ()])
def test_rows_that_do_not_fit_are_reported(tmp_path, shape):
    save_file({"wide": torch.randn(6, 5), "after": torch.randn(6, 5)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"wide is \[6, 5\], but \[.*\] from row 1 is needed"):
        TensorReader(tmp_path, "model").fill([(torch.zeros(shape), "wide", 1)])


def test_a_file_cut_short_meanwhile_is_reported(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.randn(6, 5)}, path)
    reader, data = TensorReader(tmp_path, "model"), path.read_bytes()
    reader.spec("x")
    path.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read \(the file ends too early\)"):
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
def test_a_broken_header_is_reported(tmp_path, data, index):
    (tmp_path / "model.safetensors").write_bytes(data)
    if index:
        (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"cannot be read|no readable model weights"):
        TensorReader(tmp_path, "model").read("x")


def test_a_tensor_that_is_in_the_index_but_not_in_the_file_is_reported(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "f", "y": "f"}}')
    (tmp_path / "f").write_bytes(header_of(dtype="F8_E4M3", shape=[8]) + bytes(8))
    reader = TensorReader(tmp_path, "model")
    with pytest.raises(CheckpointError, match="f: y is missing"):
        reader.read("y")
    with pytest.raises(CheckpointError, match=r"f: x is F8_E4M3, not one of F64, .*; use another folder"):
        reader.spec("x")
    with pytest.raises(CheckpointError, match="has no model tensor z"):
        reader.spec("z")
    for file in ("3", '"../f"', '"a\\u0000b"', "null"):
        (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"x": {file}}}}}')
        with pytest.raises(CheckpointError, match=r"x is in .*, which is not the name of a file"):
            TensorReader(tmp_path, "model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_not_written(tmp_path, bad, dtype):
    values = torch.ones(5000, dtype=dtype)
    values[4321] = bad
    with pytest.raises(CheckpointError, match=r"x: is not finite, so nothing is saved"):
        write_tensors(tmp_path, "m", [TensorSpec("x", (5000,), dtype)], iter(values.split(1000)), 9, Manifest())


def test_a_chunk_is_no_longer_read_when_chunks_in_flight_others_were_fetched(tmp_path, monkeypatch):
    """Buffers are reused, so a slow disk must delay gathering instead of losing bytes."""
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
