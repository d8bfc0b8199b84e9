"""Check one token file: opening, the range of token IDs, the fingerprint, and reading windows."""

from __future__ import annotations

import inspect
import json
import os
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.threads import call_in_time
from tests.helpers.token_files import mapped_mib, needs_linux_memory_figures, save_tokens
from tinytrain_dist.data.token_file import dataset_fingerprint, load_token_dataset, num_windows, read_windows
from tinytrain_dist.errors import DataError

both_ways_to_open = pytest.mark.parametrize("mmap", [True, False], ids=["mapped", "in memory"])

# --- opening -------------------------------------------------------------------------------------------------------


def test_the_signature_stays_as_documented() -> None:
    path, mmap, *others = inspect.signature(load_token_dataset).parameters.values()
    assert [(parameter.name, parameter.kind) for parameter in (path, mmap)] == [
        ("path", inspect.Parameter.POSITIONAL_OR_KEYWORD),
        ("mmap", inspect.Parameter.POSITIONAL_OR_KEYWORD),
    ]
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in others)


@both_ways_to_open
@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64", "uint8"])
def test_files_of_any_integer_type_open_unchanged_and_without_meta_json(tmp_path: Path, mmap: bool, dtype: str) -> None:
    tokens = load_token_dataset(save_tokens(tmp_path / "t.npy", range(50), dtype), mmap, vocab_size=50)
    assert isinstance(tokens, np.memmap) is mmap
    assert tokens.dtype == dtype
    assert tokens.tolist() == list(range(50))


def test_a_file_is_memory_mapped_by_default_and_cannot_be_written(tmp_path: Path) -> None:
    tokens = load_token_dataset(str(save_tokens(tmp_path / "t.npy", range(5))))
    assert isinstance(tokens, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


def test_an_empty_file_opens_and_has_no_window(tmp_path: Path) -> None:
    tokens = load_token_dataset(save_tokens(tmp_path / "t.npy", []), vocab_size=5)
    with pytest.raises(DataError, match="has 0 tokens, but context_len 4 needs at least 5; 5 more are needed"):
        num_windows(tokens, 4)


def test_a_missing_file_is_an_error_that_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.npy: no such token file; make one with `tinytrain prepare`"):
        load_token_dataset(tmp_path / "none.npy")


def test_a_named_pipe_is_an_error_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "t.npy")
    with pytest.raises(DataError, match=r"t\.npy is a named pipe, not a regular file; give a token file made by"):
        call_in_time(load_token_dataset, tmp_path / "t.npy")


@both_ways_to_open
@pytest.mark.parametrize(
    "content",
    [b"", b"once upon a time", b"\x93NUMPY\x01\x00", b"\x93NUMPY\x01\x00v\x00{'descr'"],
    ids=["empty", "text", "no header", "header cut short"],
)
def test_a_file_that_is_not_npy_is_an_error(tmp_path: Path, mmap: bool, content: bytes) -> None:
    (tmp_path / "t.npy").write_bytes(content)
    with pytest.raises(DataError, match=r"t\.npy: not a readable \.npy file"):
        load_token_dataset(tmp_path / "t.npy", mmap)


@both_ways_to_open
def test_a_file_that_is_cut_short_is_an_error(tmp_path: Path, mmap: bool) -> None:
    path = save_tokens(tmp_path / "t.npy", range(1000))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="not a readable"):
        load_token_dataset(path, mmap)


class CreatesFileWhenUnpickled:
    """An object that creates a file if it is ever unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@both_ways_to_open
def test_nothing_is_unpickled(tmp_path: Path, mmap: bool) -> None:
    created = tmp_path / "created"
    harmful = CreatesFileWhenUnpickled(created)
    np.save(tmp_path / "t.npy", np.array([harmful], dtype=object), allow_pickle=True)
    (tmp_path / "p.npy").write_bytes(pickle.dumps(harmful))
    for name in ("t.npy", "p.npy"):
        with pytest.raises(DataError, match="not a readable"):
            load_token_dataset(tmp_path / name, mmap)
    assert not created.exists()
    pickle.loads((tmp_path / "p.npy").read_bytes())
    assert created.exists(), "the object must create the file, or this test proves nothing"


@pytest.mark.parametrize(
    ("array", "content"),
    [
        (np.zeros((2, 3), np.uint16), "2-D uint16"),
        (np.asfortranarray(np.zeros((2, 3), np.uint16)), "2-D uint16"),
        (np.zeros((), np.uint16), "0-D uint16"),
        (np.zeros(3, np.float32), "1-D float32"),
        (np.zeros(3, bool), "1-D bool"),
    ],
    ids=["two axes", "two axes in Fortran order", "no axis", "float", "bool"],
)
def test_another_array_is_an_error_that_says_what_the_file_holds(
    tmp_path: Path, array: np.ndarray, content: str
) -> None:
    np.save(tmp_path / "t.npy", array)
    with pytest.raises(DataError, match=rf"t\.npy: holds {content}, but a token file is a 1-D array of integers"):
        load_token_dataset(tmp_path / "t.npy")


def test_an_archive_of_arrays_is_an_error(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", a=np.zeros(3), b=np.zeros(3))
    with pytest.raises(DataError, match="holds several arrays"):
        load_token_dataset(tmp_path / "t.npz")


def test_an_array_that_is_not_in_c_order_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # numpy writes every 1-D array in C order, so no file can hold another one.
    path = save_tokens(tmp_path / "t.npy", range(10))
    monkeypatch.setattr(np, "load", lambda *_, **__: np.arange(10, dtype=np.uint16)[::2])
    with pytest.raises(DataError, match="is not in C order"):
        load_token_dataset(path)


# --- range of token IDs --------------------------------------------------------------------------------------------


def test_a_token_id_that_is_too_large_is_an_error_with_file_id_and_limit(tmp_path: Path) -> None:
    path = save_tokens(tmp_path / "t.npy", [1, 2, 99, 3])
    assert len(load_token_dataset(path, vocab_size=100)) == 4
    with pytest.raises(DataError, match=r"t\.npy: holds token id 99, but vocab_size 99 allows 0 \.\. 98"):
        load_token_dataset(path, vocab_size=99)
    assert len(load_token_dataset(path)) == 4


def test_a_negative_token_id_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds token id -7"):
        load_token_dataset(save_tokens(tmp_path / "t.npy", [1, -7, 3], "int32"), vocab_size=10)


def test_a_token_id_in_a_later_block_of_the_scan_is_found(tmp_path: Path) -> None:
    ids = np.zeros((1 << 24) + 5000, np.uint8)  # the scan reads blocks of 2^24 token IDs
    ids[1 << 24] = 9
    with pytest.raises(DataError, match="token id 9"):
        load_token_dataset(save_tokens(tmp_path / "t.npy", ids, "uint8"), vocab_size=9)


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """A list that gets an entry for each block of token IDs that is scanned."""
    scanned: list[None] = []
    plain_load, plain_min = np.load, np.ndarray.min

    class CountingArray(np.memmap):
        def min(self, *args: Any, **kwargs: Any) -> Any:
            scanned.append(None)
            return plain_min(self, *args, **kwargs)

    monkeypatch.setattr(np, "load", lambda *args, **kwargs: plain_load(*args, **kwargs).view(CountingArray))
    return scanned


def test_the_result_of_a_scan_is_cached_beside_the_file(tmp_path: Path, scans: list[None]) -> None:
    path = save_tokens(tmp_path / "t.npy", range(100))
    for _ in range(3):
        load_token_dataset(path, vocab_size=100)
    assert len(scans) == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["t.npy", "t.npy.range.json"]
    with pytest.raises(DataError, match="token id 99"):
        load_token_dataset(path, vocab_size=50)
    assert len(scans) == 1


def test_a_changed_file_is_scanned_again_even_with_the_old_modification_time(tmp_path: Path, scans: list[None]) -> None:
    path = save_tokens(tmp_path / "t.npy", range(100))
    load_token_dataset(path, vocab_size=100)
    times = path.stat()
    save_tokens(path, [*range(99), 500])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(DataError, match="token id 500"):
        load_token_dataset(path, vocab_size=100)
    assert len(scans) == 2


def test_a_file_with_another_modification_time_is_scanned_again(tmp_path: Path, scans: list[None]) -> None:
    # A change between the 64 blocks of the fingerprint of a large file shows only in the modification time.
    path = save_tokens(tmp_path / "t.npy", range(100))
    load_token_dataset(path, vocab_size=100)
    os.utime(path, (1, 1))
    load_token_dataset(path, vocab_size=100)
    assert len(scans) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3", '{"key": 1}'])
def test_an_unreadable_cache_is_ignored_and_written_again(tmp_path: Path, text: str) -> None:
    path = save_tokens(tmp_path / "t.npy", range(100))
    load_token_dataset(path, vocab_size=100)
    cache = tmp_path / "t.npy.range.json"
    good = cache.read_text()
    cache.write_text(text)
    with pytest.raises(DataError, match="token id 99"):
        load_token_dataset(path, vocab_size=99)
    assert cache.read_text() == good


def test_a_cache_with_half_a_range_is_ignored(tmp_path: Path) -> None:
    path = save_tokens(tmp_path / "t.npy", range(100))
    load_token_dataset(path, vocab_size=100)
    cache = tmp_path / "t.npy.range.json"
    cache.write_text(json.dumps({**json.loads(cache.read_text()), "range": [0]}))
    assert len(load_token_dataset(path, vocab_size=100)) == 100


def test_a_named_pipe_in_place_of_the_cache_is_replaced(tmp_path: Path) -> None:
    path = save_tokens(tmp_path / "t.npy", range(100))
    cache = tmp_path / "t.npy.range.json"
    os.mkfifo(cache)
    assert len(call_in_time(partial(load_token_dataset, vocab_size=100), path)) == 100
    assert json.loads(cache.read_text())["range"] == [0, 99]


def test_a_folder_that_cannot_be_written_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_tokens(tmp_path / "t.npy", range(100))

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refuse)  # root, as whom tests may run, may write in a read-only folder
    assert len(load_token_dataset(path, vocab_size=100)) == 100
    with pytest.raises(DataError, match="token id 99"):
        load_token_dataset(path, vocab_size=99)
    assert [file.name for file in tmp_path.iterdir()] == ["t.npy"]


@needs_linux_memory_figures
def test_pages_that_a_scan_mapped_are_given_back(tmp_path: Path) -> None:
    path = save_tokens(tmp_path / "t.npy", np.zeros(20_000_000, np.uint16))
    before = mapped_mib()
    tokens = load_token_dataset(path, vocab_size=5)
    assert (tmp_path / "t.npy.range.json").exists()
    assert mapped_mib() - before < 10  # of 38 MiB
    assert not tokens[:5].any()


# --- fingerprint ---------------------------------------------------------------------------------------------------


def test_a_fingerprint_has_name_length_type_and_digest(tmp_path: Path) -> None:
    tokens = load_token_dataset(save_tokens(tmp_path / "t.npy", range(100)))
    fingerprint = dataset_fingerprint(tmp_path / "t.npy", tokens)
    assert {name: fingerprint[name] for name in ("file", "tokens", "dtype")} == {
        "file": "t.npy",
        "tokens": 100,
        "dtype": "uint16",
    }
    assert dataset_fingerprint(tmp_path / "t.npy", tokens) == fingerprint
    assert json.loads(json.dumps(fingerprint)) == fingerprint


@pytest.mark.parametrize("length", [1, 100, 4096, 5000])
def test_any_change_of_a_small_file_changes_its_fingerprint(length: int) -> None:
    ids = np.arange(length, dtype=np.uint16)
    positions = {0, length // 2, length - 1}
    digests = {dataset_fingerprint("t", ids)["sha256"]}
    for position in positions:
        changed = ids.copy()
        changed[position] += 1
        digests.add(dataset_fingerprint("t", changed)["sha256"])
    assert len(digests) == 1 + len(positions)


def test_a_change_at_either_end_of_a_large_file_changes_its_fingerprint() -> None:
    ids = np.zeros(1_000_000, dtype=np.uint16)
    unchanged = dataset_fingerprint("t", ids)["sha256"]
    for position in (0, 4095, 1_000_000 - 4096, 999_999):
        ids[position] = 1
        assert dataset_fingerprint("t", ids)["sha256"] != unchanged
        ids[position] = 0


# --- windows -------------------------------------------------------------------------------------------------------


def test_too_few_tokens_for_a_window_are_an_error_that_counts_the_missing() -> None:
    ids = np.arange(10, dtype=np.uint16)
    assert num_windows(ids, 4) == 6
    assert num_windows(ids, 9) == 1
    with pytest.raises(
        DataError, match="my file: has 10 tokens, but context_len 12 needs at least 13; 3 more are needed"
    ):
        num_windows(ids, 12, "my file")


@pytest.mark.parametrize(
    ("dtype", "largest", "dtype_of_rows"),
    [
        ("uint16", 65_535, torch.int32),
        ("uint32", 2**32 - 1, torch.int64),
        ("uint64", 2**40, torch.int64),
        ("int32", 2**31 - 1, torch.int32),
        ("int64", 2**40, torch.int64),
        (">u2", 65_535, torch.int32),
        (">i4", 2**31 - 1, torch.int32),
        ("uint8", 255, torch.uint8),
    ],
)
def test_windows_keep_the_values_of_every_type(dtype: str, largest: int, dtype_of_rows: torch.dtype) -> None:
    rows = read_windows(np.array([0, 1, largest, 3, 4], dtype=dtype), np.array([0, 2]), 2)
    assert rows.dtype == dtype_of_rows
    assert rows.tolist() == [[0, 1, largest], [largest, 3, 4]]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"Once upon a time", r"it begins with b'Once upo', which is not how such a file begins"),
        (b"", "it is empty"),
        (b"\x93NUMPY\1\0\xff\xff" + b"x" * 70_000, "its header has 65,535 bytes by its own account"),
        (b"\x93NUMPY\1\0\x88\x13" + b"[" * 5000, "its header is damaged"),
        (b"\x93NUMPY\7\7\1\0{", r"it has version 7\.7 of the format"),
    ],
)
def test_a_file_that_is_no_array_is_described_in_our_words(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "t.npy").write_bytes(content)
    with pytest.raises(DataError, match=rf"t\.npy: not a readable \.npy file \({expected}") as caught:
        load_token_dataset(tmp_path / "t.npy")
    assert "allow_pickle" not in str(caught.value)


def test_values_that_the_header_does_not_count_are_refused(tmp_path: Path) -> None:
    path = save_tokens(tmp_path / "t.npy", range(1000))
    path.write_bytes(path.read_bytes().replace(b"(1000,)", b"(100,) "))
    with pytest.raises(DataError, match="it has 2,000 bytes of values, but 200 by its header"):
        load_token_dataset(path)
